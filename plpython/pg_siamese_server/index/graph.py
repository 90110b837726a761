"""Make the index in memory, a graph (HNSW) with the breadth of its searches or a flat index."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pg_siamese_server.errors import SiameseError
from pg_siamese_server.index import cells
from pg_siamese_server.index.generations import MANY, MAX_BOUNDED, Breadths
from pg_siamese_server.index.index_file import Poll
from pg_siamese_server.index.threads import MAX_THREADS, threads
from pg_siamese_server.interrupts import portions
from pg_siamese_server.progress import ADDING, Progress

FLAT_BELOW = 10_000  # a scan of fewer takes no longer than a walk through a graph
CELL_ROWS = 2_000  # with their neighbour lists, they fit into a processor's cache
MAX_CELLS = 1_000
ROUNDS = 4
MAX_PORTION = 4_000  # vectors of one call of FAISS hardly see each other
CALIBRATION_QUERIES = 500  # stored ones, and as many that the graph lacks
SEARCH_AT_ONCE = 50
TIMED_QUERIES = 30
TIMED_BELOW = 200_000  # from this number on, a scan takes many times as long
NEIGHBOURS = 10
GATHERED = 20_000  # vectors that are moved in one go
MANY_QUERIES = 50
# Factors on a number of neighbours.
MANY_BREADTHS = (1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8)
BREADTHS = (10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class Options:
    """Parameters of HNSW and of the build."""

    m: int
    ef_construction: int
    target_recall: float
    threads: int

    def check(self) -> None:
        """Refuse values out of range."""
        for name, value, low, high in (
            ("m", self.m, 4, 64),
            ("ef_construction", self.ef_construction, 8, 1000),
            ("target_recall", self.target_recall, 0.5, 1.0),
            ("threads", self.threads, 1, MAX_THREADS),
        ):
            if value is None or not low <= value <= high:
                raise SiameseError(f"{name} must be between {low} and {high}")


@dataclass(frozen=True)
class Measured:
    """How to search a graph, and its recall at 10, as a build measured them."""

    breadths: Breadths
    recall: float


@dataclass(frozen=True, eq=False)
class Built:
    """An index in memory.

    Attributes:
        index: the FAISS index.
        measured: how to search it, or None for a flat index, which is exact.
        places: the position of each vector in the index, int32 (vectors,), or None if it is that in
            the matrix.
    """

    index: Any
    measured: Measured | None = None
    places: NDArray[np.int32] | None = None


def in_order(
    matrix: NDArray[np.float32], slots: NDArray[np.int32] | None, options: Options, poll: Poll
) -> tuple[NDArray[np.float32], NDArray[np.int32] | None, NDArray[np.int32] | None]:
    """Draw each vector's level in the graph, and sort the vectors in the order of insertion.

    The highest level comes first. FAISS does so within a call, but we insert in many calls, to be
    interruptible between them. The lowest level, most of the vectors, comes in rounds. Each round
    goes cell by cell, so that an insertion reads what was read just before. That saves a third of
    the time at a million vectors. There are several rounds, since vectors of one call hardly see
    each other.

    The last vectors, which calibration takes as unknown, are drawn by chance.

    Args:
        matrix: float32 (vectors, dimension).
        slots: the vector of each row, int32 (rows,), or None if row i has vector i.
        options: of the build.
        poll: called between pieces of work, may raise to stop.

    Returns:
        The vectors, the vector of each row, and the levels, int32 (vectors,). These count from 1 as
        in FAISS, or are None if there are too few vectors for a graph.
    """
    count = len(matrix)
    if count < FLAT_BELOW:
        return matrix, slots, None
    # Geometric with ratio 1/m: Malkov and Yashunin, arXiv 1603.09320, section 4.1.
    generator = np.random.default_rng(0)
    uniform = 1 - generator.random(count)
    levels = np.floor(-np.log(uniform) / np.log(options.m)).astype(np.int32) + 1
    by_level = np.argsort(uniform)  # in random order within a level
    low, last = int((levels > 1).sum()), _known_count(count)
    centres = matrix[generator.choice(count, min(MAX_CELLS, count // CELL_ROWS), replace=False)]
    parts = [by_level[:low]]
    for places in np.array_split(by_level[low:last], ROUNDS):
        own = cells.nearest(matrix[places], centres, options.threads, poll)[1]
        parts.append(places[np.argsort(own, kind="stable")])
    order = np.concatenate([*parts, by_level[last:]])
    place = np.empty(count, dtype=np.int32)
    place[order] = np.arange(count, dtype=np.int32)
    return matrix[order], place if slots is None else place[slots], levels[order]


def _known_count(count: int) -> int:
    """Return how many vectors the graph holds while its breadths are measured."""
    return count - min(CALIBRATION_QUERIES, count // 20)


def build(
    matrix: NDArray[np.float32],
    levels: NDArray[np.int32] | None,
    options: Options,
    progress: Progress,
    poll: Poll,
) -> Built:
    """Return an index and how to search it.

    Args:
        matrix: float32 (vectors, dimension), as ``in_order`` returns them.
        levels: of the vectors, or None for a flat index.
        options: of the build.
        progress: told of phases, and of each portion.
        poll: called between pieces of work, may raise to stop.
    """
    if levels is None:
        return Built(_flat(matrix))
    index = _empty(matrix, options)
    add = partial(_add, index, matrix, levels, options, progress, poll)
    # The last ones are of the lowest level, drawn by chance. While the graph does not know them,
    # they find what new images will find.
    known = _known_count(len(matrix))
    add(0, known)
    progress.enter("measuring recall")
    measured = _calibrate(index, matrix[:known], matrix[known:], options, poll)
    add(known, len(matrix))
    if measured.recall >= options.target_recall:
        if not _is_quicker(index, matrix, measured.breadths.new):
            return Built(_flat(matrix))
        progress.enter("gathering vectors")
        return Built(index, measured, _gather(index, matrix, options, poll))
    progress.plpy.notice(
        f'graph index of collection "{progress.name}" reached a recall of only'
        f" {measured.recall:.3f}",
        detail="Built an exact flat index instead. Search time grows with the number of vectors.",
        hint="Build with a larger m and ef_construction, or a lower target_recall.",
    )
    return Built(_flat(matrix))


def build_again(
    matrix: NDArray[np.float32],
    levels: NDArray[np.int32] | None,
    options: Options,
    progress: Progress,
    poll: Poll,
) -> Built:
    """Return an index like one that ``build`` made, without measuring again.

    The arguments are those of ``build``.
    """
    if levels is None:
        return Built(_flat(matrix))
    index = _empty(matrix, options)
    _add(index, matrix, levels, options, progress, poll, 0, len(matrix))
    progress.enter("gathering vectors")
    return Built(index, None, _gather(index, matrix, options, poll))


def _gather(
    index: Any, matrix: NDArray[np.float32], options: Options, poll: Poll
) -> NDArray[np.int32]:
    """Put near vectors of a graph next to each other, and return the new position of each.

    A search then reads fewer pages and less memory. At a million vectors that saves a third of its
    time. In the order of insertion, the vectors of a cell are in several places.
    """
    count = len(matrix)
    generator = np.random.default_rng(1)
    cell_count = max(1, min(MAX_CELLS, count // CELL_ROWS))
    chosen = generator.choice(count, min(count, cells.SAMPLE * cell_count), replace=False)
    centres = cells.moved_centres(matrix[chosen], cell_count, options.threads, poll)
    own = cells.nearest(matrix, cells.along_a_path(centres), options.threads, poll)[1]
    order = np.argsort(own, kind="stable")
    places = np.empty(count, dtype=np.int32)
    places[order] = np.arange(count, dtype=np.int32)

    hnsw = index.hnsw
    starts = faiss.vector_to_array(hnsw.offsets).astype(np.int64)
    levels = faiss.vector_to_array(hnsw.levels)
    sizes = np.diff(starts)[order]
    ends = np.concatenate([[0], sizes.cumsum()])
    links = faiss.rev_swig_ptr(hnsw.neighbors.data(), hnsw.neighbors.size())
    moved = np.empty_like(links)
    stored = faiss.rev_swig_ptr(faiss.downcast_index(index.storage).get_xb(), matrix.size)
    stored = stored.reshape(matrix.shape)
    for start in range(0, count, GATHERED):
        end = min(count, start + GATHERED)
        rows = order[start:end]
        sources = np.repeat(starts[rows] - ends[start:end], sizes[start:end])
        own_links = links[sources + np.arange(ends[start], ends[end])]
        # Where a vector has fewer links than it may, they are -1.
        moved[ends[start] : ends[end]] = np.where(own_links < 0, own_links, places[own_links])
        stored[start:end] = matrix[rows]
        poll()
    links[:] = moved
    faiss.copy_array_to_vector(levels[order], hnsw.levels)
    faiss.copy_array_to_vector(ends.astype(np.uint64), hnsw.offsets)
    hnsw.entry_point = int(places[hnsw.entry_point])
    return places


def _empty(matrix: NDArray[np.float32], options: Options) -> Any:
    index = faiss.IndexHNSWFlat(matrix.shape[1], options.m)
    index.hnsw.efConstruction = options.ef_construction
    return index


def _add(
    index: Any,
    matrix: NDArray[np.float32],
    levels: NDArray[np.int32],
    options: Options,
    progress: Progress,
    poll: Poll,
    first: int,
    last: int,
) -> None:
    progress.enter(ADDING, len(matrix), first)
    levels = np.minimum(levels, index.hnsw.assign_probas.size())
    for start, end in portions(first, last, size=200, least=50, most=MAX_PORTION):
        faiss.copy_array_to_vector(levels[:end], index.hnsw.levels)
        with threads(options.threads):
            index.add(matrix[start:end])
        poll()
        progress.report(end)


def _is_quicker(index: Any, matrix: NDArray[np.float32], ef_search: int) -> bool:
    if len(matrix) > TIMED_BELOW:
        return True
    parameters = faiss.SearchParametersHNSW()
    parameters.efSearch = ef_search
    rivals = {True: partial(index.search, params=parameters), False: _flat(matrix).search}
    seconds: dict[bool, list[float]] = {is_graph: [] for is_graph in rivals}
    for place in np.random.default_rng(0).choice(len(matrix), TIMED_QUERIES).tolist():
        for is_graph, search in rivals.items():
            started = time.perf_counter()
            search(matrix[place : place + 1], NEIGHBOURS)
            seconds[is_graph].append(time.perf_counter() - started)
    return float(np.median(seconds[True])) < float(np.median(seconds[False]))


def _flat(matrix: NDArray[np.float32]) -> Any:
    index = faiss.IndexFlatL2(matrix.shape[1])
    index.add(matrix)
    return index


def _calibrate(
    index: Any,
    stored: NDArray[np.float32],
    unknown: NDArray[np.float32],
    options: Options,
    poll: Poll,
) -> Measured:
    """Choose the narrowest searches that reach the recall, by queries from the same data.

    The neighbours of a stored vector are easier to find than those of one that the graph lacks.

    Args:
        index: the graph of ``stored``.
        stored: float32 (vectors, dimension).
        unknown: further vectors, which the graph does not hold.
        options: of the build.
        poll: called between pieces of work, may raise to stop.
    """
    places = np.random.default_rng(0).choice(len(stored), len(unknown), replace=False)
    truth = _exact(stored, np.concatenate([stored[places], unknown]), NEIGHBOURS, options, poll)
    narrowest = partial(_narrowest_breadth, index, options, poll)
    entries = places.astype(np.int32)
    for_stored, recall_stored = narrowest(stored[places], entries, truth[: len(places)], BREADTHS)
    for_new, recall_new = narrowest(unknown, None, truth[len(places) :], BREADTHS)
    queries = unknown[:MANY_QUERIES]
    truth = _exact(stored, queries, MANY[-1], options, poll)
    many = []
    for count in MANY:
        choices = [max(for_new, int(count * factor)) for factor in MANY_BREADTHS]
        many.append(narrowest(queries, None, truth[:, :count], choices)[0])
    return Measured(Breadths(for_stored, for_new, tuple(many)), min(recall_stored, recall_new))


def _narrowest_breadth(
    index: Any,
    options: Options,
    poll: Poll,
    queries: NDArray[np.float32],
    entries: NDArray[np.int32] | None,
    truth: NDArray[np.int64],
    choices: Sequence[int],
) -> tuple[int, float]:
    """Return the first breadth that reaches the recall, or the best one, with its recall.

    ``truth`` is int64 (queries, neighbours). The other arguments are those of ``_search``.
    """
    best = (choices[-1], 0.0)
    for breadth in choices:
        found = _search(index, queries, entries, truth.shape[1], breadth, options, poll)
        hits = [np.isin(true, near).sum() for true, near in zip(truth, found, strict=True)]
        recall = float(sum(hits)) / truth.size
        if recall > best[1]:
            best = (breadth, recall)
        if recall >= options.target_recall:
            break
    return best


def _search(
    index: Any,
    queries: NDArray[np.float32],
    entries: NDArray[np.int32] | None,
    count: int,
    breadth: int,
    options: Options,
    poll: Poll,
) -> NDArray[np.int64]:
    """Return the neighbours that the graph finds, int64 (queries, count).

    Searches start from the top of the graph. With ``entries``, int32 (queries,), they start on its
    lowest level from the queries themselves.
    """
    parameters = faiss.SearchParametersHNSW()
    parameters.efSearch = breadth
    parameters.bounded_queue = breadth <= MAX_BOUNDED
    positions = np.empty((len(queries), count), dtype=np.int64)
    distances = np.empty((len(queries), count), dtype=np.float32)
    at_once = max(1, SEARCH_AT_ONCE * NEIGHBOURS // count)
    for start in range(0, len(queries), at_once):
        part = slice(start, start + at_once)
        sizes = len(queries[part]), faiss.swig_ptr(queries[part]), count
        results = faiss.swig_ptr(distances[part]), faiss.swig_ptr(positions[part])
        with threads(options.threads):
            if entries is None:
                index.search_c(*sizes, *results, parameters)
            else:
                starts = entries[part], np.zeros(len(entries[part]), dtype=np.float32)
                pointers = [faiss.swig_ptr(array) for array in starts]
                index.search_level_0(*sizes, *pointers, *results, 1, 1, parameters)
        poll()
    return positions


def _exact(
    matrix: NDArray[np.float32],
    queries: NDArray[np.float32],
    count: int,
    options: Options,
    poll: Poll,
) -> NDArray[np.int64]:
    """Return the true nearest neighbours of queries, int64 (queries, count) or fewer."""
    block = max(count, 1_000, 1_000_000 // matrix.shape[1])
    distances, places = [], []
    for start in range(0, len(matrix), block):
        part = matrix[start : start + block]
        with threads(options.threads):
            near, where = faiss.knn(queries, part, min(count, len(part)))
        distances.append(near)
        places.append(where + start)
        poll()
    order = np.argsort(np.concatenate(distances, axis=1), axis=1)[:, :count]
    return np.take_along_axis(np.concatenate(places, axis=1), order, axis=1)
