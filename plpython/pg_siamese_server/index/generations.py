"""Keep index files in a node's data directory, and open generations in this session."""

from __future__ import annotations

import bisect
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pg_siamese_server import interrupts
from pg_siamese_server.catalog import Collection, prepare, session_cache
from pg_siamese_server.errors import IndexFileError
from pg_siamese_server.index import index_file
from pg_siamese_server.index.index_file import Identity, Rows
from pg_siamese_server.index.threads import threads

MAX_OPEN = 4
# FAISS's bounded queue is quicker up to this breadth.
MAX_BOUNDED = 200
FEW = 50
# Microseconds, measured with 64 dimensions. Only their proportions matter.
WALK_STEP = 1.2  # of a walk through the graph
MAX_WALK = 100_000  # longest walk, since it can't be interrupted
SCAN_ROW = 0.03  # a vector, if all are compared
# Dimensions that one call of FAISS compares, in some 30 ms.
VALUES_AT_ONCE = 64_000_000
FIRST = 10  # queries, of which the time of a call is learned
# Numbers of neighbours that a build measures breadths for, besides ten.
MANY = (30, 100, 300, 1000)
# With fewer queries in a call, FAISS subtracts vectors. With more it multiplies them, which is
# quicker but less exact (``distance_compute_blas_threshold``).
SUBTRACTED = 19
# Breadth per neighbour, if nothing was measured.
FACTOR_UNKNOWN = 4

# A backend's working directory is the data directory. The path is kept from its first use. Only
# some roles may read the setting data_directory.
_directory_of_database: str | None = None
_open: OrderedDict[tuple[int, int], Generation] = session_cache(OrderedDict())


def directory(plpy: Any, collection_id: int | None = None) -> str:
    """Return the directory of this database's index files, or that of one collection."""
    global _directory_of_database
    if _directory_of_database is None:
        oid = plpy.execute(
            "SELECT oid::int8 AS oid FROM pg_catalog.pg_database"
            " WHERE datname = pg_catalog.current_database()"
        )[0]["oid"]
        _directory_of_database = os.path.join(os.getcwd(), "pg_siamese", str(oid))
    if collection_id is None:
        return _directory_of_database
    return os.path.join(_directory_of_database, str(collection_id))


@dataclass(frozen=True)
class Breadths:
    """Breadths of a graph's searches (``efSearch``), as its build measured them.

    Attributes:
        stored, new: for ten neighbours, of a query that the index holds and of a new one.
        many: for MANY neighbours of a new query, or None if the build did not measure them.
    """

    stored: int = 10
    new: int = 10
    many: tuple[int, ...] | None = None

    def for_count(self, count: int) -> int:
        """Return the breadth for ``count`` neighbours of a new query."""
        if count <= 10:
            return self.new
        many = self.many or tuple(FACTOR_UNKNOWN * point for point in MANY)
        place = bisect.bisect_left(MANY, count)
        if place == len(MANY):
            return math.ceil(count * many[-1] / MANY[-1])
        low, low_breadth = (MANY[place - 1], many[place - 1]) if place else (10, self.new)
        high, high_breadth = MANY[place], many[place]
        part = math.log(count / low) / math.log(high / low)
        factor = (1 - part) * low_breadth / low + part * high_breadth / high
        return max(count, low_breadth, math.ceil(count * factor))


@dataclass(eq=False, repr=False)
class Generation:
    """A generation opened for searching.

    Attributes:
        index: the FAISS index.
        rows: which row each vector belongs to.
        vectors: float32 (index.ntotal, dimension), mapped. Row i is the vector at position i.
        breadths: of searches.
        is_flat: whether the index is a list and not a graph.
        made_for: snapshot that the file was made in (see ``index_file.IndexFile``).
        keys, by_slot, slot_starts: views of the same arrays of ``rows``, for quick access to a few
            elements.
    """

    index: Any
    rows: Rows
    vectors: NDArray[np.float32]
    breadths: Breadths
    is_flat: bool
    made_for: str | None = None

    def __post_init__(self) -> None:
        keys, by_slot = self.rows.keys, self.rows.by_slot
        self.keys = None if keys is None else keys.data
        self.by_slot = None if by_slot is None else by_slot.data
        starts = self.rows.slot_starts
        self.slot_starts = None if starts is None else starts.data
        self._total = int(self.index.ntotal)
        ids = self.rows.embedding_ids
        self._first = int(ids[0]) if len(ids) else 0
        self._dense = len(ids) > 0 and int(ids[-1]) - self._first == len(ids) - 1
        self._dense_keys: bool | None = None
        self._repeated_keys = False
        self._parameters = None if self.is_flat else faiss.SearchParametersHNSW()
        self._buffers: dict[int, tuple[Any, ...]] = {}
        self._entry = np.empty((1, 1), dtype=np.int32)
        self._entry_distance = np.zeros((1, 1), dtype=np.float32)
        self._entry_pointers = faiss.swig_ptr(self._entry), faiss.swig_ptr(self._entry_distance)

    @property
    def breadth(self) -> int | None:
        """``efSearch`` of the last walk through the graph, or None if there is no graph."""
        return None if self._parameters is None else int(self._parameters.efSearch)

    def row_of(self, embedding_id: int) -> int | None:
        """Return the row of an embedding_id, or None if the file does not hold it."""
        ids = self.rows.embedding_ids
        if self._dense:
            row = embedding_id - self._first
            return row if 0 <= row < len(ids) else None
        row = int(ids.searchsorted(embedding_id))
        return row if row < len(ids) and ids[row] == embedding_id else None

    def rows_of(self, embedding_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of those embedding_ids that the file holds."""
        ids = self.rows.embedding_ids
        if not len(ids):
            return np.empty(0, dtype=np.int64)
        places = np.minimum(ids.searchsorted(embedding_ids), len(ids) - 1)
        found: NDArray[np.int64] = places[ids[places] == embedding_ids]
        return found

    def row_of_key(self, key: int) -> int | None:
        """Return the row of an integer key, or None if the file does not hold it."""
        assert self.keys is not None
        if self.rows.by_key is None and len(self.keys):
            place = key - self.keys[0]  # right if keys are dense, as most are
            if 0 <= place < len(self.keys) and self.keys[place] == key:
                return int(place)
        return self.rows.row_of_key(key)

    def rows_of_keys(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of those integer keys that the file holds.

        A key has several rows if its image was replaced during the build. All but one are dead.
        """
        own = self.rows.keys
        assert own is not None and self.keys is not None
        if not len(own):
            return np.empty(0, dtype=np.int64)
        first = self.keys[0]
        if self._dense_keys is None:
            self._dense_keys = self.rows.by_key is None and self.keys[-1] - first == len(own) - 1
            ordered = own if self.rows.by_key is None else own[self.rows.by_key]
            self._repeated_keys = bool((ordered[1:] == ordered[:-1]).any())
            self._dense_keys &= not self._repeated_keys
        if self._dense_keys:
            dense: NDArray[np.int64] = keys - first
            # Unsigned, those below the first are far above the last.
            return dense[dense.view(np.uint64) < len(own)]
        starts = own.searchsorted(keys, sorter=self.rows.by_key)
        if self._repeated_keys:
            ends = own.searchsorted(keys, side="right", sorter=self.rows.by_key)
            counts = ends - starts
            offsets = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
            places = np.repeat(starts, counts) + offsets
            repeated: NDArray[np.int64] = (
                places if self.rows.by_key is None else self.rows.by_key[places]
            )
            return repeated
        places = np.minimum(starts, len(own) - 1)
        rows = places if self.rows.by_key is None else self.rows.by_key[places]
        found: NDArray[np.int64] = rows[own[rows] == keys]
        return found

    def slots_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the FAISS positions of rows' vectors."""
        return rows if self.rows.slots is None else self.rows.slots[rows].astype(np.int64)

    def slot_of(self, row: int) -> int:
        """Return the FAISS position of a row's vector."""
        return row if self.rows.slots is None else int(self.rows.slots[row])

    def search(
        self, query: NDArray[np.float32], count: int, entry: int | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Find the nearest vectors.

        Args:
            query: float32 (1, dimension), prepared.
            count: how many.
            entry: FAISS position to start from, if the query is itself in the index.

        Returns:
            FAISS positions, ascending by squared distance, and these distances. There are fewer
            than ``count`` only if the graph ends.
        """
        count = min(count, self._total)
        distances, positions, distance_pointer, position_pointer = self._buffer(count)
        pointer = faiss.swig_ptr(query)
        if self._parameters is None:
            self.index.search_c(1, pointer, count, distance_pointer, position_pointer)
        elif entry is None or count > MAX_BOUNDED:
            breadth = self.breadths.for_count(count)
            self._parameters.efSearch = breadth
            # FAISS scans a bounded queue whole at each step, so time would grow with the square.
            self._parameters.bounded_queue = breadth <= MAX_BOUNDED
            self.index.search_c(
                1, pointer, count, distance_pointer, position_pointer, self._parameters
            )
        else:
            breadth = self.breadths.stored
            if count > 11:
                breadth = max(breadth, self.breadths.for_count(count))
            self._parameters.efSearch = breadth
            self._entry[0, 0] = entry
            self.index.search_level_0(
                1,
                pointer,
                count,
                *self._entry_pointers,
                distance_pointer,
                position_pointer,
                1,
                1,
                self._parameters,
            )
        found, squared = positions[0], distances[0]
        if found[-1] < 0:
            valid = found >= 0
            return found[valid], squared[valid]
        return found, squared

    def search_each(
        self,
        slots: NDArray[np.int64],
        count: int,
        thread_count: int,
        poll: Callable[[], None],
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Find the nearest vectors of each of many stored ones, as ``search`` does for one.

        Args:
            slots: FAISS positions of the queries, int64 (queries,).
            count: how many.
            thread_count: of FAISS.
            poll: called between pieces of work, may raise to stop.

        Returns:
            FAISS positions, ascending by squared distance, and these distances, (queries, count).
            Positions are -1 if the graph ends.
        """
        count = min(count, self._total)
        shape = len(slots), count
        positions, squared = np.empty(shape, np.int64), np.empty(shape, np.float32)
        is_stored = count <= MAX_BOUNDED
        breadth = self.breadths.for_count(count)
        if is_stored:
            breadth = max(self.breadths.stored, breadth if count > 11 else 0)
        if self._parameters is not None:
            self._parameters.efSearch = breadth
            self._parameters.bounded_queue = breadth <= MAX_BOUNDED
        # Vectors that are near each other have near positions, and so are read once.
        order = np.argsort(slots)
        slots = slots[order]
        entries, no_distances = slots.astype(np.int32), np.zeros(len(slots), np.float32)
        most = SUBTRACTED if self.is_flat else len(slots)
        for start, end in interrupts.portions(0, len(slots), size=FIRST, least=1, most=most):
            part = slice(start, end)
            queries = self.vectors[slots[part]]
            sizes = len(queries), faiss.swig_ptr(queries), count
            results = faiss.swig_ptr(squared[part]), faiss.swig_ptr(positions[part])
            with threads(thread_count):
                if self._parameters is None:
                    self.index.search_c(*sizes, *results)
                elif is_stored:
                    pointers = [faiss.swig_ptr(each[part]) for each in (entries, no_distances)]
                    self.index.search_level_0(*sizes, *pointers, *results, 1, 1, self._parameters)
                else:
                    self.index.search_c(*sizes, *results, self._parameters)
            poll()
        given = np.argsort(order)
        return positions[given], squared[given]

    def squared_distances(
        self, query: NDArray[np.float32], slots: NDArray[np.int64], poll: Callable[[], None]
    ) -> NDArray[np.float32]:
        """Return squared distances of a query to some positions, float32 (slots,)."""
        result = np.empty(len(slots), dtype=np.float32)
        slots = np.ascontiguousarray(slots, dtype=np.int64)
        pointers = faiss.swig_ptr(query), faiss.swig_ptr(self.vectors)
        dimension = self.vectors.shape[1]
        block = max(1, VALUES_AT_ONCE // dimension)
        for start in range(0, len(slots), block):
            part = slice(start, start + block)
            faiss.fvec_L2sqr_by_idx(
                faiss.swig_ptr(result[part]),
                *pointers,
                faiss.swig_ptr(slots[part]),
                dimension,
                1,
                len(slots[part]),
            )
            poll()
        return result

    def scan(
        self, query: NDArray[np.float32], count: int, poll: Callable[[], None]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Compare all vectors.

        Returns:
            FAISS positions, ascending by squared distance, and these distances: ``count``, or all.
        """
        total, dimension = self.vectors.shape
        squared = np.empty(total, dtype=np.float32)
        block = max(1, VALUES_AT_ONCE // dimension)
        for start in range(0, total, block):
            part = slice(start, min(total, start + block))
            faiss.fvec_L2sqr_ny(
                faiss.swig_ptr(squared[part]),
                faiss.swig_ptr(query),
                faiss.swig_ptr(self.vectors[part]),
                dimension,
                len(squared[part]),
            )
            poll()
        positions: NDArray[np.int64] = np.arange(total, dtype=np.int64)
        if count < total:
            positions = np.argpartition(squared, count - 1)[:count]
            poll()
        positions = positions[np.argsort(squared[positions], kind="stable")]
        return positions, squared[positions]

    def is_scanned(self, count: int) -> bool:
        """Return whether to scan all vectors for ``count`` neighbours, and not walk the graph."""
        if self.is_flat:
            return True
        walk = self.breadths.for_count(count) * WALK_STEP
        is_long = walk * self.vectors.shape[1] / 64 > MAX_WALK
        return count > MAX_BOUNDED and (is_long or walk > self._total * SCAN_ROW)

    def microseconds(self, count: int) -> float:
        """Estimate the microseconds of a search for ``count`` neighbours."""
        steps = self.breadths.for_count(count) * WALK_STEP
        if self.is_scanned(count):
            steps = self._total * SCAN_ROW
        return steps * int(self.vectors.shape[1]) / 64

    def _buffer(self, count: int) -> tuple[Any, ...]:
        """Return arrays for results, and FAISS's pointers to them. Small ones are kept."""
        buffers = self._buffers.get(count)
        if buffers is None:
            if len(self._buffers) > 32:
                self._buffers.clear()
            distances = np.empty((1, count), dtype=np.float32)
            positions = np.empty((1, count), dtype=np.int64)
            buffers = distances, positions, faiss.swig_ptr(distances), faiss.swig_ptr(positions)
            if count <= MAX_BOUNDED:
                self._buffers[count] = buffers
        return buffers

    def expand(
        self, positions: NDArray[np.int64], squared: NDArray[Any]
    ) -> tuple[NDArray[np.integer[Any]], NDArray[Any]]:
        """Convert positions to rows, since one vector may belong to several."""
        by_slot, starts = self.rows.by_slot, self.rows.slot_starts
        if by_slot is None:
            return positions, squared
        if starts is None:
            return by_slot[positions], squared
        counts = starts[positions + 1] - starts[positions]
        if len(positions) == counts.sum():
            return by_slot[starts[positions]], squared
        offsets = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        return by_slot[np.repeat(starts[positions], counts) + offsets], np.repeat(squared, counts)

    def integer_keys(
        self, positions: NDArray[np.int64], squared: NDArray[np.float32]
    ) -> tuple[list[int], list[float]]:
        """Convert positions to the integer keys of their rows, with a distance for each.

        For a few, Python's own loops take half the time of NumPy's calls.
        """
        assert self.keys is not None
        keys, by_slot, starts = self.keys, self.by_slot, self.slot_starts
        if starts is None or len(positions) > FEW:
            rows, squared = self.expand(positions, squared)
            return [keys[row] for row in rows.tolist()], squared.tolist()
        assert by_slot is not None
        found: list[int] = []
        distances: list[float] = []
        for place, distance in zip(positions.tolist(), squared.tolist(), strict=True):
            first, end = starts[place], starts[place + 1]
            found.append(keys[by_slot[first]])
            distances.append(distance)
            for other in range(first + 1, end):
                found.append(keys[by_slot[other]])
                distances.append(distance)
        return found, distances


def get(plpy: Any, collection: Collection, generation: int) -> Generation:
    """Return an opened generation, from this session or from the file.

    Raises:
        IndexFileError: its file can't be used.
    """
    key = (collection.collection_id, generation)
    found = _open.get(key)
    if found is None:
        found = _load(plpy, collection, generation)
        while len(_open) >= MAX_OPEN:
            _open.popitem(last=False)
        for other in [item for item in _open if item[0] == key[0] and item[1] < generation]:
            del _open[other]
        _open[key] = found
    return found


def identity(collection: Collection, generation: int, build_id: str) -> Identity:
    """Return what the file of a generation must state."""
    return Identity(
        collection_id=collection.collection_id,
        generation=generation,
        build_id=build_id,
        model_sha256=collection.sha256,
        dimension=collection.dimension,
        metric=collection.metric,
    )


def _load(plpy: Any, collection: Collection, generation: int) -> Generation:
    plan = prepare(
        plpy,
        "SELECT build_id::text AS build_id, ef_search_stored, ef_search, ef_search_many"
        " FROM siamese.generations"
        " WHERE generation = $1 AND collection_id = $2",
        ("bigint", "integer"),
    )
    rows = plan.execute([generation, collection.collection_id])
    if not rows:
        raise IndexFileError(f"generation {generation} is not in siamese.generations")
    row = rows[0]
    with interrupts.signals_blocked():  # FAISS may start threads
        faiss.omp_set_num_threads(1)
    file = index_file.read(
        directory(plpy, collection.collection_id),
        identity(collection, generation, row["build_id"]),
        partial(interrupts.check, plpy),
    )
    return opened(
        file.index,
        file.rows,
        # A standby that makes its own file may find too few vectors for a graph.
        not isinstance(file.index, faiss.IndexHNSW),
        Breadths(
            row["ef_search_stored"] or 10,
            row["ef_search"] or 10,
            None if row["ef_search_many"] is None else tuple(row["ef_search_many"]),
        ),
        file.made_for,
    )


def opened(
    index: Any,
    rows: Rows,
    is_flat: bool,
    breadths: Breadths | None = None,
    made_for: str | None = None,
) -> Generation:
    """Make a ``Generation`` of an index. A graph needs the breadths of its searches."""
    storage = index if is_flat else faiss.downcast_index(index.storage)
    shape = (index.ntotal, index.d)
    vectors = np.empty(shape, dtype=np.float32)
    if index.ntotal:
        vectors = faiss.rev_swig_ptr(storage.get_xb(), index.ntotal * index.d).reshape(shape)
    return Generation(index, rows, vectors, breadths or Breadths(), is_flat, made_for)
