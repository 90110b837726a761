"""Find the neighbours of many stored rows, a portion of these at a time.

FAISS searches for a whole portion, and one statement checks all rows that it found. Queries that
need more rows are asked again, and at last searched for one by one. Each portion asks for the state
of its snapshot again: between two of them, the session may have searched with a later one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server import interrupts, vectors
from pg_siamese_server.catalog import Collection, prepare
from pg_siamese_server.errors import SiameseError
from pg_siamese_server.index.threads import MAX_THREADS, allowed_threads
from pg_siamese_server.search import exact, filters, groups
from pg_siamese_server.search.request import Request
from pg_siamese_server.search.search import (
    current_state,
    notice_queued_rows,
    open_faiss,
    search_part,
)

# Queries of a portion, and rows that it looks at for all of them.
PORTION, MAX_CANDIDATES = 10_000, 120_000
# Factor on the number of rows that is expected to be enough, also if rows are lost to groups.
ENOUGH, ENOUGH_GROUPED = 1.25, 1.5
# Rounds of a portion, and the factor to the rows of the next one. If more queries than this share
# come to a second round, the next portion begins with more rows, up to MAX_COUNT.
ROUNDS, WIDER, MANY_SHORT = 3, 4, 0.05
MAX_COUNT = 1_000
# Rows that qualify to read at most. If checks take longer than so many calls, that is considered.
MAX_READ, MANY_CALLS = 2_000_000, 20


@dataclass(slots=True)
class Part:
    """Neighbours of some rows: those of one row stand together, nearest first.

    ``frames`` are numbers, from 1, or None if each image has one vector.
    """

    collection: Collection
    keys: list[Any] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    neighbours: list[Any] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    frames: list[int] | None = None


def nearest(plpy: Any, request: Request, keys: str | None, thread_count: int) -> Iterator[Part]:
    """Find the k nearest rows of many stored ones.

    Rows that do not exist, or that the caller may not see, have no neighbours.

    Args:
        plpy: PL/Python's module.
        request: what is asked of each of them. Its key stands for any.
        keys: an array as text, or None for all rows.
        thread_count: most threads of FAISS, if the server's setting allows them.
    """
    if not (request.own_group or request.group_by):
        groups.leave_out_own(plpy, request)
    request.check()
    if not 1 <= thread_count <= MAX_THREADS:
        raise SiameseError(f"threads must be between 1 and {MAX_THREADS}")
    allowed = allowed_threads(plpy, "max_parallel_workers_per_gather")
    queries = math.inf if keys is None else 1 + keys.count(",")
    search = _Search(plpy, request, queries, min(thread_count, allowed))
    collection = search.collection
    stored = _stored_plan(plpy, collection, is_all=keys is None)
    cursor = stored.cursor([] if keys is None else [keys])
    size = max(1, min(PORTION, MAX_CANDIDATES // (search.wanted + 1)))
    while rows := list(cursor.fetch(size)):
        yield search.answer(rows)
    if collection.embed == "deferred":
        notice_queued_rows(plpy, collection, is_short=False)


def _stored_plan(plpy: Any, collection: Collection, *, is_all: bool) -> Any:
    """Return a plan of the rows to search for, as the invoker sees them, each once."""
    key = f"b.{collection.key_column}"
    columns = f"{key} AS key" if collection.has_integer_keys else f"{key}::text AS key"
    source = f"{collection.relation} AS b"
    if not collection.is_by_integer:
        columns += ", e.embedding_id AS id"
        source += (
            f" LEFT JOIN {collection.embeddings} AS e"
            f" ON e.key = {key} AND {collection.one_per_image}"
        )
    statement = f"SELECT {columns} FROM {source}"
    if is_all:
        return prepare(plpy, statement)
    kind = collection.candidate_array
    # A subquery is evaluated once, and a cast of text by itself for each row.
    return prepare(
        plpy, f"{statement} WHERE {key} = ANY((SELECT CAST($1 AS {kind}))::{kind})", ("text",)
    )


@dataclass(slots=True, eq=False, repr=False)
class _Found:
    """Rows found for several queries.

    Attributes:
        owners: int64 (rows,), the number of each row's query.
        items: what identifies the rows (``Collection.items``): int64 (rows,) if by integer keys.
        squared: float32 (rows,), squared distances.
        complete: float64 (queries,), squared distance within which no row of a query is missing.
    """

    owners: NDArray[np.int64]
    items: Any
    squared: NDArray[np.float32]
    complete: NDArray[np.float64]

    def keep(self, which: NDArray[Any]) -> None:
        """Keep some of the rows, by a mask or in an order."""
        self.owners, self.squared = self.owners[which], self.squared[which]
        if isinstance(self.items, list):
            places = np.flatnonzero(which) if which.dtype == bool else which
            self.items = [self.items[place] for place in places.tolist()]
        else:
            self.items = self.items[which]

    def is_sorted(self) -> bool:
        """Return whether the rows of each query stand together, nearest first, without ties."""
        owner, farther = np.diff(self.owners), np.diff(self.squared) > 0
        return bool(((owner > 0) | (owner == 0) & farther).all())


class _Search:
    """The searches of one statement.

    ``queries`` is how many these are, at most.
    """

    def __init__(self, plpy: Any, request: Request, queries: float, thread_count: int) -> None:
        assert request.k is not None
        self.plpy, self.request, self.thread_count = plpy, request, thread_count
        self.queries = queries
        self.any_row = copy.copy(request)
        self.any_row.key = None
        self.collection, _ = current_state(plpy, self.any_row)
        self.conditions = filters.parse(plpy, self.collection, request.filter, request.exclude)
        self.wanted = request.k
        if request.group_by:
            self.wanted = math.ceil(ENOUGH_GROUPED * request.k) + 1
        self.limit = math.inf
        if request.max_distance is not None:
            self.limit = vectors.squared_limit(request.max_distance, self.collection.metric)
        self.poll = partial(interrupts.check, plpy)
        # Rows to ask FAISS about for each query, or 0 before the first portion.
        self.count = 0
        # What identifies all rows that qualify, if they have been read: int64, ascending. One
        # statement has one snapshot.
        self.qualifying: NDArray[np.int64] | None = None

    def answer(self, stored: list[Any]) -> Part:
        """Return the neighbours of stored rows."""
        self.collection, state = current_state(self.plpy, self.any_row)
        part = Part(self.collection, frames=[] if self.collection.has_frames else None)
        done: set[Any] = set()
        finder = None
        if self.request.engine != "pgvector":
            finder = open_faiss(self.plpy, self.request, self.collection, state)
        if finder is not None and (finder.keeps_pending or not finder.changes.has_additions):
            done = self._answer_at_once(finder, stored, part)
        for row in stored:
            if row["key"] not in done:
                self.poll()
                self._answer_alone(row["key"], part)
        return part

    def _answer_alone(self, key: Any, part: Part) -> None:
        """Search for one row by itself."""
        request = copy.copy(self.request)
        request.key = key
        answer = search_part(self.plpy, request)
        part.keys += [key] * len(answer.keys)
        part.ranks += range(1, len(answer.keys) + 1)
        part.neighbours += answer.keys
        part.distances += answer.distances
        if part.frames is not None:
            part.frames += answer.frames or []

    def _answer_at_once(self, finder: Any, stored: list[Any], part: Part) -> set[Any]:
        """Search for all rows that the index file holds. Return the keys that were answered."""
        rows, own = self._indexed(finder, stored)
        done: set[Any] = set()
        if not len(rows):
            return done
        if not self.count:
            self._plan(finder)
        among = self._few_qualifying(finder)
        count = self.count if among is None else self.wanted + 1
        size = max(1, MAX_CANDIDATES // count)
        for start in range(0, len(rows), size):
            some = slice(start, start + size)
            self._answer_some(finder, rows[some], own[some], count, among, part, done)
        return done

    def _answer_some(
        self,
        finder: Any,
        rows: NDArray[np.int64],
        own: NDArray[Any],
        count: int,
        among: NDArray[np.int64] | None,
        part: Part,
        done: set[Any],
    ) -> None:
        for number in range(ROUNDS):
            if self._is_long(finder, len(rows) * count, count):
                break
            found = self._candidates(finder, rows, count, among)
            is_full = self._cut(found, own)
            done.update(self._take(found, is_full, own, part))
            if is_full.all():
                break
            if number == 0 and among is None and np.mean(~is_full) > MANY_SHORT:
                self.count = max(self.count, min(2 * self.count, MAX_COUNT))
            rows, own = rows[~is_full], own[~is_full]
            count *= WIDER

    @staticmethod
    def _is_long(finder: Any, candidates: int, count: int) -> bool:
        """Return whether queries are better searched for one by one."""
        index = finder.index
        return candidates > WIDER * MAX_CANDIDATES or (
            index.is_scanned(count) and not index.is_flat
        )

    def _indexed(self, finder: Any, stored: list[Any]) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Return the rows of the index file that are rows of the table, and their keys."""
        index = finder.index
        if self.collection.is_by_integer:
            keys = np.fromiter((row["key"] for row in stored), np.int64, len(stored))
            rows = index.rows_of_keys(keys)
            dead = finder.changes.is_dead(rows)
            if dead is not None:
                rows = rows[~dead]
            return rows, index.rows.keys[rows]
        by_id = {row["id"]: row["key"] for row in stored if row["id"] is not None}
        rows = index.rows_of(np.fromiter(by_id, np.int64, len(by_id)))
        own = [by_id[number] for number in index.rows.embedding_ids[rows].tolist()]
        return rows, np.array(own, dtype=object)

    def _plan(self, finder: Any) -> None:
        """Choose how many rows to ask about, and read those that qualify if that saves time."""
        index = finder.index
        total = max(1, len(index.rows.embedding_ids) + finder.changes.addition_count())
        alive = max(0.1, 1 - finder.changes.dead_count() / total)
        self.count = least = math.ceil((self.wanted + 1) / alive) + 2 * (alive < 1)
        queries = min(self.queries, total)
        ask = queries * least * exact.CHECK_ROW
        is_filtered = self.conditions.clauses or finder.is_restricted
        if not is_filtered and ask < MANY_CALLS * exact.CALL:
            return
        expected = exact.estimate(self.plpy, self.collection, self.conditions)
        if is_filtered:
            self.count = math.ceil(ENOUGH * least * total / min(total, max(0.5, expected.rows)))
            ask = queries * self.count * exact.CHECK_ROW
        walk = queries * index.microseconds(self.count)
        compare = queries * expected.rows * exact.COMPARE_ROW
        is_read = expected.microseconds + compare < ask + walk
        if self.collection.is_by_integer:
            is_read |= expected.microseconds < ask
        if not is_read or expected.rows > MAX_READ:
            return
        found = exact.read_keys(
            self.plpy, self.collection, self.conditions, min(expected.most, MAX_READ)
        )
        if found is not None:
            # Most tables are read in the order of their keys, which this sort is quick at.
            self.qualifying = np.sort(found, kind="stable")
            if is_filtered:
                self.count = math.ceil(ENOUGH * least * total / min(total, max(1, len(found))))

    def _few_qualifying(self, finder: Any) -> NDArray[np.int64] | None:
        """Return the rows of the index file that qualify, if to compare all of them costs less."""
        index, found = finder.index, self.qualifying
        if found is None or len(found) * exact.COMPARE_ROW > index.microseconds(self.count):
            return None
        by_key = self.collection.is_by_integer
        rows: NDArray[np.int64] = index.rows_of_keys(found) if by_key else index.rows_of(found)
        dead = finder.changes.is_dead(rows)
        return rows if dead is None else rows[~dead]

    def _candidates(
        self, finder: Any, rows: NDArray[np.int64], count: int, among: NDArray[np.int64] | None
    ) -> _Found:
        """Return the nearest rows of the index file, or of ``among``, and of the pending ones."""
        slots = finder.index.slots_of(rows)
        if among is None:
            found = self._by_graph(finder, slots, count)
        else:
            found = self._by_comparison(finder, slots, count, among)
        if finder.changes.has_additions:
            queries = finder.index.vectors[slots]
            owners, keys, squared, complete = finder.changes.nearest_each(queries, count, self.poll)
            found.owners = np.concatenate([found.owners, owners])
            if isinstance(found.items, list):
                found.items += keys
            else:
                found.items = np.concatenate([found.items, np.array(keys, dtype=np.int64)])
            found.squared = np.concatenate([found.squared, squared])
            found.complete = np.minimum(found.complete, complete)
        return found

    def _by_graph(self, finder: Any, slots: NDArray[np.int64], count: int) -> _Found:
        index = finder.index
        positions, squared = index.search_each(slots, count, self.thread_count, self.poll)
        is_found = positions >= 0
        complete = np.where(is_found, squared, 0).max(axis=1).astype(np.float64)
        complete[is_found.sum(axis=1) == index.index.ntotal] = math.inf
        owners = np.nonzero(is_found)[0]
        positions, squared = positions[is_found], squared[is_found]
        rows, places = index.expand(positions, np.arange(len(positions)))
        dead = finder.changes.is_dead(rows)
        if dead is not None:
            rows, places = rows[~dead], places[~dead]
        return _Found(owners[places], finder.items(rows), squared[places], complete)

    def _by_comparison(
        self, finder: Any, slots: NDArray[np.int64], count: int, among: NDArray[np.int64]
    ) -> _Found:
        index, compared = finder.index, finder.index.slots_of(among)
        owners, rows, distances = [], [], []
        complete = np.full(len(slots), math.inf)
        for owner, slot in enumerate(slots.tolist()):
            squared = index.squared_distances(index.vectors[slot : slot + 1], compared, self.poll)
            places, complete[owner] = exact.nearest_places(squared, count)
            owners.append(np.full(len(places), owner))
            rows.append(among[places])
            distances.append(squared[places])
        items = finder.items(np.concatenate(rows))
        return _Found(np.concatenate(owners), items, np.concatenate(distances), complete)

    def _cut(self, found: _Found, own: NDArray[Any]) -> NDArray[np.bool_]:
        """Keep the nearest rows that qualify. Return which queries have all that they want."""
        limits = np.minimum(found.complete, self.limit)
        is_near = found.squared.astype(np.float64) <= limits[found.owners]
        items = found.items
        if isinstance(items, list):
            items = np.array(self._bases(items), dtype=object)
        is_near &= own[found.owners] != items
        found.keep(is_near)
        is_good, order = self._checked(found.items)
        found.keep(is_good)
        if not found.is_sorted():
            found.keep(np.lexsort((order[is_good], found.squared, found.owners)))
        ranks = self._ranks(found.owners)
        found.keep(ranks < self.wanted)
        numbers = np.bincount(found.owners, minlength=len(own))
        is_full: NDArray[np.bool_] = (numbers == self.wanted) | (found.complete >= self.limit)
        return is_full

    def _bases(self, items: list[Any]) -> list[Any]:
        """Return the keys of items."""
        return self.collection.bases(items)

    def _checked(self, items: Any) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Ask the table which items qualify. Return this, and the items' order."""
        if not len(items):
            return np.empty(0, dtype=bool), np.empty(0, dtype=np.int64)
        if not isinstance(items, list):
            if self.qualifying is not None:
                return vectors.are_in(items, self.qualifying), items
            unique, places = np.unique(items, return_inverse=True)
            found = self._qualifying(unique.tolist())
            return np.isin(unique, np.array(found, dtype=np.int64))[places], places
        ordered = sorted(set(items))
        bases = self._bases(ordered)
        good = set(self._qualifying(list(set(bases))))
        by_item = {item: place for place, item in enumerate(ordered)}
        places = np.fromiter((by_item[item] for item in items), np.int64, len(items))
        return np.fromiter((base in good for base in bases), bool, len(bases))[places], places

    def _qualifying(self, keys: list[Any]) -> list[Any]:
        return filters.qualifying(self.plpy, self.collection, self.conditions, keys) or []

    @staticmethod
    def _ranks(owners: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rank of each row among those of its query, from 0."""
        starts = np.flatnonzero(np.diff(owners, prepend=-1))
        sizes = np.diff(starts, append=len(owners))
        ranks: NDArray[np.int64] = np.arange(len(owners)) - np.repeat(starts, sizes)
        return ranks

    def _take(
        self, found: _Found, is_full: NDArray[np.bool_], own: NDArray[Any], part: Part
    ) -> list[Any]:
        """Add the rows of full queries to the answer. Return the keys of these queries."""
        found.keep(is_full[found.owners])
        done: list[Any] = own[is_full].tolist()
        items = found.items if isinstance(found.items, list) else found.items.tolist()
        if self.request.group_by:
            done = self._take_groups(found, items, own.tolist(), done)
            items = found.items if isinstance(found.items, list) else found.items.tolist()
        part.keys += own[found.owners].tolist()
        part.ranks += (self._ranks(found.owners) + 1).tolist()
        part.neighbours += self._bases(items)
        part.distances += vectors.to_distances(found.squared.tolist(), self.collection.metric)
        if part.frames is not None:
            part.frames += [frame for _, frame in items]
        return done

    def _take_groups(
        self, found: _Found, items: list[Any], own: list[Any], full: list[Any]
    ) -> list[Any]:
        """Keep the best of each group. Return the keys of queries with enough groups."""
        request = copy.copy(self.request)
        keys = self._bases(items)
        column = request.group_by
        labels = groups.labels(self.plpy, self.collection, column, list({*keys, *full}))
        starts = np.searchsorted(found.owners, np.arange(len(own) + 1)).tolist()
        wanted = set(full)
        taken: list[int] = []
        done = []
        for owner, key in enumerate(own):
            if key not in wanted:
                continue
            start, end = starts[owner], starts[owner + 1]
            request.key = key
            places = groups.chosen(keys[start:end], labels, request)
            if len(places) == request.k or end - start < self.wanted:
                taken += [start + place for place in places]
                done.append(key)
        found.keep(np.array(taken, dtype=np.int64))
        return done
