"""Find exact neighbours, and the recall of an answer."""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

K = 10
# Distances this close count as equal, since rounding orders two such neighbours.
TIE = 1e-6


@dataclass(frozen=True)
class Vectors:
    """A collection's vectors: ascending ids int64 (n,), matrix float32 (n, d) of length one."""

    ids: NDArray[np.int64]
    matrix: NDArray[np.float32]

    def of(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the vectors of ids."""
        return self.matrix[np.searchsorted(self.ids, ids)]


@dataclass(frozen=True)
class Truth:
    """The exact answers to some queries.

    Attributes:
        vectors: what is searched.
        queries: float32 (queries, d), of length one.
        own: int64 (queries,), ids that the answers leave out, or None.
        farthest: float64 (queries,), cosine distance of the K-th neighbour.
    """

    vectors: Vectors
    queries: NDArray[np.float32]
    own: NDArray[np.int64] | None
    farthest: NDArray[np.float64]

    @classmethod
    def of(
        cls, vectors: Vectors, queries: NDArray[np.float32], own: NDArray[np.int64] | None = None
    ) -> Truth:
        """Search exactly, in the whole matrix."""
        places = faiss.knn(queries, vectors.matrix, K + 2, metric=faiss.METRIC_INNER_PRODUCT)[1]
        near = vectors.matrix[places].astype(np.float64)
        distances = 1 - np.einsum("qkd,qd->qk", near, queries.astype(np.float64))
        if own is not None:
            distances[vectors.ids[places] == own[:, None]] = np.inf
        return cls(vectors, queries, own, np.sort(distances, axis=1)[:, K - 1])

    def recall(self, answers: list[list[int]]) -> float:
        """Return the share of the K nearest that the answers hold, on average.

        Raises:
            AssertionError: an answer holds a row twice, or the query itself.
        """
        hits = 0
        for query, answer in enumerate(answers):
            assert len(set(answer)) == len(answer), "an answer holds a row twice"
            if self.own is not None:
                assert int(self.own[query]) not in answer, "an answer holds the query itself"
            found = self.vectors.of(np.asarray(answer[:K], dtype=np.int64))
            distance = 1 - found.astype(np.float64) @ self.queries[query].astype(np.float64)
            hits += int((distance <= self.farthest[query] + TIE).sum())
        return hits / (K * len(answers))
