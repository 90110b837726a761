"""Find all pairs of stored rows that are near each other.

The rows that qualify are read once, as the invoker. The vectors of all others are left out of the
search, so no answer has to be checked against the table again. What is read in the beginning serves
until the end, whatever the session searches for in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server import interrupts, vectors
from pg_siamese_server.catalog import Collection, group_column, prepare
from pg_siamese_server.errors import SiameseError
from pg_siamese_server.index.threads import MAX_THREADS, allowed_threads, threads
from pg_siamese_server.search import exact, filters
from pg_siamese_server.search.cells import ROUNDING, Cells, squared_lengths
from pg_siamese_server.search.request import Request
from pg_siamese_server.search.search import (
    current_state,
    decline,
    notice_queued_rows,
    open_faiss,
)

if TYPE_CHECKING:
    from pg_siamese_server.search.faiss_search import FaissSearch
    from pg_siamese_server.search.filters import Conditions

# Rows that others are compared with at once, and most pairs that one call may find.
BLOCK, MAX_HITS = 4096, 500_000
# Most bytes of pending vectors. With more, pgvector compares all rows.
MAX_PENDING_BYTES = 64 * 1024 * 1024
# Pairs that pgvector hands over at once.
SCANNED = 5_000


@dataclass(slots=True, eq=False, repr=False)
class Pairs:
    """Pairs of rows, each once.

    Attributes:
        first, second: int64 (pairs,), numbers of rows, for ``keys`` of the search.
        distances: float64 (pairs,), in the collection's metric.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    distances: NDArray[np.float64]

    def part(self, start: int, end: int) -> Pairs:
        """Return some of the pairs."""
        some = slice(start, end)
        return Pairs(self.first[some], self.second[some], self.distances[some])


def open_search(
    plpy: Any, request: Request, thread_count: int, *, differ_in: str = ""
) -> IndexedPairs | ScannedPairs:
    """Prepare a search for all pairs within the request's distance.

    Args:
        plpy: PL/Python's module.
        request: of no key and no image. If not ``own_group``, pairs of one group are left out.
        thread_count: most threads of FAISS, if the server's setting allows them.
        differ_in: column whose values must differ in a pair, or none.
    """
    if not request.own_group and not request.group_by:
        request.group_by = group_column(plpy, request.collection_name) or ""
    request.check()
    if request.own_group and request.group_by:
        raise SiameseError("group_by of pairs needs own_group => false")
    if not 1 <= thread_count <= MAX_THREADS:
        raise SiameseError(f"threads must be between 1 and {MAX_THREADS}")
    collection, state = current_state(plpy, request)
    conditions = filters.parse(plpy, collection, request.filter, request.exclude)
    if collection.has_frames:
        conditions.clauses.append(collection.one_per_image)
    column = differ_in or request.group_by
    quoted = None
    if column:
        quoted = str(filters.columns(plpy, collection, [column])[column]["quoted"])
    finder = None
    if request.engine != "pgvector":
        finder = open_faiss(plpy, request, collection, state)
    if finder is not None and finder.changes.addition_bytes() > MAX_PENDING_BYTES:
        decline(request, "Too many vectors are pending.")
        finder = None
    if collection.embed == "deferred":
        notice_queued_rows(plpy, collection, is_short=False)
    if finder is not None:
        allowed = allowed_threads(plpy, "max_parallel_workers_per_gather")
        count = min(thread_count, allowed)
        return IndexedPairs(plpy, request, conditions, quoted, finder, count)
    return ScannedPairs(plpy, request, collection, conditions, quoted)


class IndexedPairs:
    """Pairs by an index file and the pending vectors.

    Rows have numbers: first those of the index file in its order, then the pending ones.
    """

    def __init__(
        self,
        plpy: Any,
        request: Request,
        conditions: Conditions,
        label: str | None,
        finder: FaissSearch,
        thread_count: int,
    ) -> None:
        self.plpy, self.thread_count = plpy, thread_count
        self.collection, self.index = finder.collection, finder.index
        self.limit = math.inf
        if request.max_distance is not None:
            self.limit = vectors.squared_limit(request.max_distance, self.collection.metric)
        self.poll = partial(interrupts.check, plpy)
        found, labels = _read(plpy, self.collection, conditions, label)
        held = finder.index.rows
        by_key = self.collection.is_by_integer
        rows = self.index.rows_of_keys(found) if by_key else self.index.rows_of(found)
        dead = finder.changes.is_dead(rows)
        self.rows = np.sort(rows if dead is None else rows[~dead])
        ids, items, matrix = finder.changes.read_added(plpy, self.collection)
        names = np.array(items if by_key else ids, dtype=np.int64)
        kept = vectors.are_in(names, found)
        self.pending = matrix[kept]
        self.pending_keys = [
            key
            for key, is_kept in zip(self.collection.bases(items), kept.tolist(), strict=True)
            if is_kept
        ]
        self.total = len(self.rows) + len(self.pending)
        # A number for each label, 0 if it is unknown, int64 (rows,), or None if none matter.
        self.labels: NDArray[np.int64] | None = None
        if labels is not None:
            by_row = held.keys if held.keys is not None and by_key else held.embedding_ids
            own = by_row[self.rows]
            self.labels = labels[found.searchsorted(np.concatenate([own, names[kept]]))]

    def keys(self, numbers: NDArray[np.int64]) -> list[Any]:
        """Return the keys of rows."""
        held, count = self.index.rows, len(self.rows)
        if held.keys is not None and not len(self.pending):
            keys: list[Any] = held.keys[self.rows[numbers]].tolist()
            return keys
        return [
            self.pending_keys[number - count]
            if number >= count
            else self.collection.bases(self.collection.items([held.key(int(self.rows[number]))]))[0]
            for number in numbers.tolist()
        ]

    def find(self) -> Iterator[Pairs]:
        """Find all pairs, some at a time and in no order."""
        if self.limit < 0 or self.total < 2:
            return
        reach = math.sqrt(self.limit)
        for cell in Cells(self._vectors, self.total, reach, self.thread_count, self.poll):
            yield from self._compare(*cell)

    def _compare(self, members: NDArray[np.int64], others: NDArray[np.int64]) -> Iterator[Pairs]:
        """Compare rows with each other, and with others."""
        import faiss

        rows = np.concatenate([members, others])
        for begin in range(0, len(members), BLOCK):
            found_among = members[begin : begin + BLOCK]
            block = self._vectors(found_among)
            flat = faiss.IndexFlatL2(block.shape[1])
            flat.add(block)
            longest = squared_lengths(block).max()
            size = max(1, MAX_HITS // len(block))
            for low in range(begin, len(rows), size):
                asking = rows[low : low + size]
                matrix = self._vectors(asking)
                length = squared_lengths(matrix).max()
                radius = self.limit + ROUNDING * float(longest + length)
                with threads(self.thread_count):
                    starts, _, found = flat.range_search(matrix, min(radius, 3e38))
                owners = np.repeat(np.arange(len(asking)), np.diff(starts.astype(np.int64)))
                is_later = owners + low > found + begin
                owners, found = owners[is_later], found[is_later]
                squared = indexed_distances(matrix, owners, block, found)
                near = squared <= self.limit
                owners, found = owners[near], found[near]
                yield from self._pairs(found_among[found], asking[owners], squared[near])
                self.poll()

    def _vectors(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the prepared vectors of rows."""
        is_held = numbers < len(self.rows)
        held = self.index.vectors[self.index.slots_of(self.rows[numbers[is_held]])]
        if len(held) == len(numbers):
            return held
        matrix = np.empty((len(numbers), held.shape[1]), dtype=np.float32)
        matrix[is_held] = held
        matrix[~is_held] = self.pending[numbers[~is_held] - len(self.rows)]
        return matrix

    def _pairs(
        self,
        first: NDArray[np.int64],
        second: NDArray[np.int64],
        squared: NDArray[np.float32],
    ) -> Iterator[Pairs]:
        if self.labels is not None:
            own, other = self.labels[first], self.labels[second]
            differ = (own != other) | (own == 0)
            first, second, squared = first[differ], second[differ], squared[differ]
        if len(first):
            yield Pairs(
                first, second, _distances(squared.astype(np.float64), self.collection.metric)
            )


class ScannedPairs:
    """Pairs by pgvector, which compares all rows with each other.

    Rows have numbers in the order in which they are met.
    """

    def __init__(
        self,
        plpy: Any,
        request: Request,
        collection: Collection,
        conditions: Conditions,
        label: str | None,
    ) -> None:
        self.plpy, self.collection = plpy, collection
        self._keys: list[Any] = []
        self._numbers: dict[Any, int] = {}
        where = conditions.copy()
        limit = where.parameter(
            "real", math.inf if request.max_distance is None else request.max_distance
        )
        key = f"b.{collection.key_column}"
        shown, tie = key, key
        if not collection.has_integer_keys:
            shown, tie = f"{key}::text", f'{key}::text COLLATE "C"'
        clauses = f" WHERE {' AND '.join(where.clauses)}" if where.clauses else ""
        group = "NULL" if label is None else f'b.{label}::text COLLATE "C"'
        distance = f"(x.embedding {collection.distance_operator} y.embedding)"
        plan = prepare(
            plpy,
            f"WITH q AS MATERIALIZED (SELECT {shown} AS key, {tie} AS tie, {group} AS label,"
            f" e.embedding FROM {collection.relation} AS b"
            f" INNER JOIN {collection.embeddings} AS e ON e.key = {key}{clauses})"
            f" SELECT x.key AS a, y.key AS b, {distance} AS distance"
            f" FROM q AS x INNER JOIN q AS y ON x.tie < y.tie"
            f" WHERE {distance}::real <= {limit}"
            " AND (x.label OPERATOR(pg_catalog.=) y.label) IS NOT TRUE",
            tuple(where.types),
        )
        self._cursor = plan.cursor(where.values)

    def keys(self, numbers: NDArray[np.int64]) -> list[Any]:
        """Return the keys of rows."""
        return [self._keys[number] for number in numbers.tolist()]

    def find(self) -> Iterator[Pairs]:
        """Find all pairs, some at a time and in no order."""
        while rows := list(self._cursor.fetch(SCANNED)):
            yield Pairs(
                np.fromiter((self._number(row["a"]) for row in rows), np.int64, len(rows)),
                np.fromiter((self._number(row["b"]) for row in rows), np.int64, len(rows)),
                np.fromiter((row["distance"] for row in rows), np.float64, len(rows)),
            )

    def _number(self, key: Any) -> int:
        number = self._numbers.setdefault(key, len(self._keys))
        if number == len(self._keys):
            self._keys.append(key)
        return number


def in_order(search: IndexedPairs | ScannedPairs, pairs: Pairs) -> tuple[list[Any], list[Any]]:
    """Return the keys of pairs, in each pair the smaller one first."""
    keys = zip(search.keys(pairs.first), search.keys(pairs.second), strict=True)
    ordered = [(a, b) if a < b else (b, a) for a, b in keys]
    return [a for a, _ in ordered], [b for _, b in ordered]


def indexed_distances(
    matrix: NDArray[np.float32],
    rows: NDArray[np.int64],
    others: NDArray[np.float32],
    other_rows: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Return the squared distance of each pair of rows of two matrices, float32 (pairs,)."""
    import faiss

    squared = np.empty(len(rows), dtype=np.float32)
    arrays = matrix, np.ascontiguousarray(rows), others, np.ascontiguousarray(other_rows), squared
    faiss.pairwise_indexed_L2sqr(matrix.shape[1], len(rows), *map(faiss.swig_ptr, arrays))
    return squared


def _read(
    plpy: Any, collection: Collection, conditions: Conditions, label: str | None
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Read, as the invoker, what identifies the rows that qualify, ascending, and their labels.

    Returns:
        int64 (rows,), as ``exact.read_keys``, and int64 (rows,): a number for each label, 0 for
        null.
    """
    source, wanted = exact.rows_source(collection)
    clauses = f" WHERE {' AND '.join(conditions.clauses)}" if conditions.clauses else ""
    code = "0::pg_catalog.int8"
    if label is not None:
        code = (
            f"CASE WHEN b.{label} IS NULL THEN 0 ELSE pg_catalog.dense_rank()"
            f' OVER (ORDER BY b.{label}::text COLLATE "C") END'
        )
    plan = prepare(
        plpy,
        f"SELECT {exact.ALL_WANTED} AS found,"
        " pg_catalog.string_agg(pg_catalog.int8send(x.code), '') AS labels"
        f" FROM (SELECT {wanted} AS wanted, {code} AS code FROM {source}{clauses}) AS x",
        tuple(conditions.types),
    )
    row = plan.execute(conditions.values)[0]
    found = exact.from_send(row["found"])
    order = np.argsort(found)
    return found[order], None if label is None else exact.from_send(row["labels"])[order]


def _distances(squared: NDArray[np.float64], metric: str) -> NDArray[np.float64]:
    return 0.5 * squared if metric == "cosine" else np.sqrt(squared)
