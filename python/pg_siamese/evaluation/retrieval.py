"""Neighbours of embeddings, and how good they are: the retrieval protocol, precision, votes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Gallery x queries of one step: about 100 MB of similarities.
BLOCK_NUMBERS = 12_000_000


@dataclass(frozen=True)
class Embedded:
    """Embeddings (N, d) with joined labels (N,), set numbers (N,) and, if known, groups (N,)."""

    vectors: Vectors
    labels: Integers
    sets: Integers
    groups: Integers | None = None

    def of_set(self, number: int) -> Embedded:
        """Return the part that belongs to one data set."""
        return self.of_sets([number])

    def of_sets(self, numbers: Sequence[int]) -> Embedded:
        """Return the part that belongs to some of the data sets."""
        return self.select(np.isin(self.sets, numbers))

    def select(self, chosen: npt.NDArray[Any]) -> Embedded:
        """Return the embeddings at some places (numbers or a mask), in that order."""
        groups = None if self.groups is None else self.groups[chosen]
        return Embedded(self.vectors[chosen], self.labels[chosen], self.sets[chosen], groups)

    def by_set(self) -> Embedded:
        """Return the same embeddings with "which set" as their label."""
        return replace(self, labels=self.sets)

    def as_one_set(self) -> Embedded:
        """Return the same embeddings as those of one data set."""
        return replace(self, sets=np.zeros_like(self.sets))

    def shares_groups(self, other: Embedded) -> bool:
        """Return whether images of one group are in both."""
        if self.groups is None or other.groups is None:
            return False
        return bool(np.isin(self.groups, other.groups).any())


@dataclass(frozen=True)
class Retrieval:
    """Retrieval figures in per cent: mAP@5, mMV@5, ACC@1, ACC@3, ACC@5.

    Protocol of Mahbod et al., Engineering Applications of Artificial Intelligence 150 (2025)
    110571: gallery = train split, queries = another split, cosine similarity. A neighbour is
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


def nearest(
    queries: Vectors,
    gallery: Vectors,
    k: int,
    metric: str = "cosine",
    groups: tuple[Integers, Integers] | None = None,
) -> Integers:
    """Return the indices (Q, k) of the nearest gallery vectors, nearest first.

    With k > G there are only G columns. Ties go to the lower index.

    Args:
        queries: vectors (Q, d) of any length.
        gallery: vectors (G, d) of any length.
        k: number of neighbours.
        metric: ``cosine`` or ``l2``.
        groups: groups of the queries (Q,) and of the gallery (G,). A query's own group is left out.

    Raises:
        ValueError: fewer than k gallery vectors are outside a query's own group.
    """
    # Doubles: cosines of a few dimensions are so close to one that float32 makes ties of them.
    asked, known = queries.astype(np.float64), gallery.astype(np.float64)
    if metric == "cosine":
        asked, known = unit(asked), unit(known)
        penalty = 0.0
    else:
        penalty = (known**2).sum(axis=1) / 2  # order by q.g - |g|²/2 is order by |q - g|
    k = min(k, len(known))
    step = max(1, BLOCK_NUMBERS // max(1, len(known)))
    parts = []
    for start in range(0, len(asked), step):
        similarity = asked[start : start + step] @ known.T - penalty
        if groups is not None:
            own = groups[0][start : start + step, None] == groups[1]
            if len(known) - own.sum(axis=1).max(initial=0) < k:
                raise ValueError(f"fewer than {k} images are outside a query's own group")
            similarity[own] = -np.inf
        parts.append(_best(similarity, k))
    return np.concatenate(parts) if parts else np.empty((0, k), np.int64)


def neighbours(
    gallery: Embedded, queries: Embedded, k: int, metric: str = "cosine", own_group: bool = False
) -> Integers:
    """Return the places (Q, k) of the nearest gallery images, nearest first.

    A query's own group is left out, unless ``own_group``.

    Raises:
        ValueError: fewer than k gallery images are outside a query's own group.
    """
    groups = None
    if not own_group and queries.groups is not None and gallery.groups is not None:
        groups = queries.groups, gallery.groups
    return nearest(queries.vectors, gallery.vectors, k, metric, groups)


def _best(similarity: Floats, k: int) -> Integers:
    if k == similarity.shape[1]:
        return np.argsort(-similarity, axis=1, kind="stable")
    chosen = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    values = np.take_along_axis(similarity, chosen, axis=1)
    order = np.lexsort((chosen, -values), axis=1)
    chosen = np.take_along_axis(chosen, order, axis=1)
    # If the last place is a tie, the partition may have picked a higher index.
    least = values.min(axis=1, keepdims=True)
    crowded = (similarity >= least).sum(axis=1) > k
    for row in np.flatnonzero(crowded):
        chosen[row] = np.argsort(-similarity[row], kind="stable")[:k]
    return chosen


def unit(vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return vectors (N, d) of length one. A vector of length zero stays as it is."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: npt.NDArray[Any] = vectors / np.where(lengths > 0, lengths, 1)
    return scaled


def distances(first: Vectors, second: Vectors, metric: str = "cosine") -> Floats:
    """Return the distances (N,) of rows: 1 - cosine (0 to 2), or the Euclidean distance."""
    left, right = first.astype(np.float64), second.astype(np.float64)
    if metric == "cosine":
        apart: Floats = 1.0 - np.einsum("nd,nd->n", unit(left), unit(right))
        return apart
    lengths: Floats = np.linalg.norm(left - right, axis=1)
    return lengths


def retrieval(neighbour_labels: Integers, query_labels: Integers) -> Retrieval:
    """Score the labels (Q, 5) of each query's five nearest against the queries' labels (Q,).

    AP@5 = sum over relevant positions i of precision at i, divided by the number of relevant
    positions among the five. It is 0 if there is none. mMV@5 counts a query whose label is among
    the most frequent of the five.
    """
    scores = retrieval_scores(neighbour_labels, query_labels)
    return Retrieval(**{name: float(each.mean()) for name, each in scores.items()})


def retrieval_scores(neighbour_labels: Integers, query_labels: Integers) -> dict[str, Floats]:
    """Return each query's part (Q,) in the figures of ``retrieval``, which are their means."""
    relevant = neighbour_labels == query_labels[:, None]
    precision = np.cumsum(relevant, axis=1) / np.arange(1, 6)
    hits = relevant.sum(axis=1)
    average = (precision * relevant).sum(axis=1) / np.maximum(hits, 1)
    counts = (neighbour_labels[:, :, None] == neighbour_labels[:, None, :]).sum(axis=2)
    return {
        "map5": 100.0 * average,
        "mmv5": 100.0 * (hits >= counts.max(axis=1)),
        "acc1": 100.0 * relevant[:, 0],
        "acc3": 100.0 * relevant[:, :3].any(axis=1),
        "acc5": 100.0 * relevant.any(axis=1),
    }


def precision_at(neighbour_labels: Integers, query_labels: Integers, k: int) -> Floats:
    """Return the share (Q,), 0 to 1, of the k nearest (Q, >= k) that have the query's label."""
    share: Floats = (neighbour_labels[:, :k] == query_labels[:, None]).mean(axis=1)
    return share


def votes(neighbour_labels: Integers, k: int) -> Integers:
    """Return the most frequent label (Q,) among the k nearest (Q, >= k).

    Of labels that are equally frequent, the one with the nearest neighbour wins.
    """
    first = neighbour_labels[:, :k]
    counts = (first[:, :, None] == first[:, None, :]).sum(axis=2)
    return np.take_along_axis(first, counts.argmax(axis=1)[:, None], axis=1)[:, 0]


def retrieval_by_set(
    gallery: Embedded,
    queries: Embedded,
    names: Sequence[str],
    metric: str = "cosine",
    labels: str = "class",
    own_group: bool = False,
) -> dict[str, Retrieval]:
    """Score retrieval within each data set, as ``each_set`` divides it.

    A query's own group is no neighbour, unless ``own_group``.
    """
    figures = {}
    for name, own_gallery, own_queries in each_set(gallery, queries, names, labels):
        found = neighbours(own_gallery, own_queries, 5, metric, own_group)
        figures[name] = retrieval(own_gallery.labels[found], own_queries.labels)
    return figures


def each_set(
    gallery: Embedded, queries: Embedded, names: Sequence[str], labels: str = "class"
) -> Iterator[tuple[str, Embedded, Embedded]]:
    """Yield the name, the gallery and the queries of each data set.

    If ``labels`` is ``set``, there is one part: all images, labelled with their set, under the name
    ``all``.
    """
    if labels == "set":
        gallery, queries = gallery.by_set().as_one_set(), queries.by_set().as_one_set()
        names = ("all",)
    for number, name in enumerate(names):
        yield name, gallery.of_set(number), queries.of_set(number)


def right_set(gallery: Embedded, queries: Embedded, metric: str = "cosine") -> float:
    """Return the share of queries, in per cent, whose nearest image is of their own data set.

    The nearest image is that of all galleries together.
    """
    return 100 * float((nearest_sets(gallery, queries, metric) == queries.sets).mean())


def nearest_sets(gallery: Embedded, queries: Embedded, metric: str = "cosine") -> Integers:
    """Return the data set (Q,) of each query's nearest image of all galleries together.

    A query's own group is left out.
    """
    return gallery.sets[neighbours(gallery, queries, 1, metric)[:, 0]]
