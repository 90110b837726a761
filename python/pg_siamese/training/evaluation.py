"""Evaluation of embeddings: the retrieval protocol, and pairs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Retrieval:
    """Retrieval figures in per cent: mAP@5, mMV@5, ACC@1, ACC@3, ACC@5.

    Protocol of Mahbod et al., Engineering Applications of Artificial Intelligence 150 (2025)
    110571: gallery = train split, queries = another split, cosine similarity; a neighbour is
    relevant when its class equals the query's.
    """

    map5: float
    mmv5: float
    acc1: float
    acc3: float
    acc5: float

    def as_dict(self) -> dict[str, float]:
        """Return the figures, rounded to two decimals."""
        return {key: round(value, 2) for key, value in asdict(self).items()}


def nearest(queries: Vectors, gallery: Vectors, k: int) -> Integers:
    """Return the indices (Q, k) of the nearest gallery vectors by cosine, nearest first.

    Both are unit vectors: (Q, d) and (G, d). Ties go to the lower index.
    """
    found = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), 512):
        similarity = queries[start : start + 512] @ gallery.T
        # The k best, then in order: similarity first, index second.
        best = np.argpartition(-similarity, k - 1, axis=1)[:, :k] if k < len(gallery) else None
        if best is None:
            best = np.tile(np.arange(len(gallery)), (len(similarity), 1))[:, :k]
        values = np.take_along_axis(similarity, best, axis=1)
        order = np.lexsort((best, -values), axis=1)
        found[start : start + 512] = np.take_along_axis(best, order, axis=1)
    return found


def retrieval(neighbour_labels: Integers, query_labels: Integers) -> Retrieval:
    """Score the labels (Q, 5) of each query's five nearest against the queries' labels (Q,).

    AP@5 = sum over relevant positions i of precision at i, divided by the number of relevant
    positions among the five; 0 where there is none. mMV@5 counts a query whose label is among
    the most frequent of the five.
    """
    relevant = neighbour_labels == query_labels[:, None]
    precision = np.cumsum(relevant, axis=1) / np.arange(1, 6)
    hits = relevant.sum(axis=1)
    average = (precision * relevant).sum(axis=1) / np.maximum(hits, 1)
    counts = (neighbour_labels[:, :, None] == neighbour_labels[:, None, :]).sum(axis=2)
    votes = hits >= counts.max(axis=1)
    return Retrieval(
        map5=100 * float(average.mean()),
        mmv5=100 * float(votes.mean()),
        acc1=100 * float(relevant[:, 0].mean()),
        acc3=100 * float(relevant[:, :3].any(axis=1).mean()),
        acc5=100 * float(relevant.any(axis=1).mean()),
    )


@dataclass(frozen=True)
class Embedded:
    """Embeddings (N, d) with joined labels (N,) and set numbers (N,)."""

    vectors: Vectors
    labels: Integers
    sets: Integers


def retrieval_by_set(
    gallery: Embedded, queries: Embedded, names: tuple[str, ...]
) -> dict[str, Retrieval]:
    """Score retrieval within each data set: its queries against its own gallery."""
    figures = {}
    for number, name in enumerate(names):
        here, there = queries.sets == number, gallery.sets == number
        found = nearest(queries.vectors[here], gallery.vectors[there], 5)
        figures[name] = retrieval(gallery.labels[there][found], queries.labels[here])
    return figures


def right_set(gallery: Embedded, queries: Embedded) -> float:
    """Return the share of queries, in per cent, whose nearest of the whole joined gallery is of
    their own data set.
    """
    found = nearest(queries.vectors, gallery.vectors, 1)[:, 0]
    return 100 * float((gallery.sets[found] == queries.sets).mean())
