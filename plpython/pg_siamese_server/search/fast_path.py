"""Searches of a collection with nothing pending: FAISS first, then one statement that confirms.

What a search must know of its snapshot, and which of the rows that FAISS found are there for the
caller, are two questions to the database. While a session knows of no change since the index was
built, it asks both at once, and takes the answer only where it is what was expected. With a filter
it does so in the way that answered searches with such a filter before.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server import interrupts, vectors
from pg_siamese_server.catalog import MAX_XACT_ID, Collection
from pg_siamese_server.errors import SiameseError
from pg_siamese_server.search import exact, filters
from pg_siamese_server.vectors import in_order, to_distances

if TYPE_CHECKING:
    from pg_siamese_server.index.generations import Generation
    from pg_siamese_server.search.filters import Conditions
    from pg_siamese_server.search.pending import Changes
    from pg_siamese_server.search.search import Request

# Beyond these a search takes so long that an estimate costs little.
MAX_READ, MAX_NEAREST = 20_000, 1_000
MIN_READ = 1_000
# Shapes of filters that are remembered.
MAX_WAYS = 200
# By what a success and a failure change the number of rows asked about: one in twenty fails.
SHRINK, GROW = 0.99, 1.25
# The next size of a look, how often it is thought to be enough at first, how quickly that follows
# what is seen, and after how many searches another is tried; twice as many each time.
LONGER, HOPE, LEARN, AGAIN = 3, 0.8, 0.05, 100

Found = tuple[list[int], list[float], NDArray[np.float32]]


@dataclass
class Way:
    """How searches with a filter of some shape, whatever its values, were answered lately.

    Attributes:
        is_exact: by reading all rows that qualify, rather than by asking which of the nearest do.
        count: how many rows were read, or asked about.
        is_sure: whether the last two searches went this way.
        look: of exact ones, how many of the nearest to ask about before; 0 for none.
        rate: which share of these looks was enough.
        idle, again: how many searches went without one, and how many do before the next try.
    """

    is_exact: bool
    count: int
    is_sure: bool = False
    look: int = 0
    rate: float = HOPE
    idle: int = 0
    again: int = 1

    @property
    def limit(self) -> int:
        """How many rows to read at most: a power of two, so that few plans are made."""
        return max(MIN_READ, 2 << self.count.bit_length())

    def plan_look(self, index: Generation, k: int) -> None:
        """Choose the look that, as far as is known, saves most; none where none saves anything."""
        whole = self.count * (exact.READ_ROW + exact.COMPARE_ROW) + exact.CALL
        if not self.look:
            self.idle += 1
            if self.idle < self.again:
                return
            self.look, self.rate = exact.LOOK * (k + 1), HOPE
            self.idle, self.again = 0, max(AGAIN, 2 * self.again)
        while self.look:
            cost = index.microseconds(self.look) + self.look * exact.CHECK_ROW + exact.CALL
            if cost < self.rate * whole:
                return
            is_cheap = cost < HOPE * whole
            self.look, self.rate = (LONGER * self.look if is_cheap else 0), HOPE


def may_serve(request: Request, changes: Changes) -> bool:
    """Whether it is worth a try: a plain search, integer keys, nothing pending when last seen."""
    return (
        changes.is_empty
        and not changes.is_restricted
        and changes.index.keys is not None
        and changes.index.index.ntotal > 0
        and request.candidates is None
        and (request.filter is not None or request.max_distance is None)
        and request.engine != "pgvector"
    )


def search(
    plpy: Any,
    collection: Collection,
    request: Request,
    changes: Changes,
    embedding: NDArray[np.float32] | None,
) -> Found | None:
    """Find the k nearest rows.

    Args:
        plpy: of PL/Python.
        collection: as it was when last looked up.
        request: for which :func:`may_serve`.
        changes: what this session knows of the collection's pending table: nothing.
        embedding: of the image to search for, float32 (1, dimension), or None to search by key.

    Returns:
        Keys, distances and the prepared query, or None where anything is not as expected: then the
        ordinary way.
    """
    index = changes.index
    entry = None
    if embedding is not None:
        query = vectors.prepare(embedding, collection.metric)
    else:
        assert isinstance(request.key, int)
        row = index.row_of_key(request.key)
        if row is None:
            return None
        entry = index.slot_of(row)
        query = index.vectors[entry : entry + 1]
    find = _all if request.filter is None else _filtered
    try:
        found = find(plpy, collection, request, changes, query, entry)
    except (
        plpy.spiexceptions.UndefinedTable,
        plpy.spiexceptions.UndefinedColumn,
        plpy.spiexceptions.UndefinedFunction,
        plpy.spiexceptions.UndefinedObject,
        plpy.spiexceptions.InvalidSchemaName,
    ):
        return None
    if found is None:
        return None
    keys, squared = found
    return keys, to_distances(squared, collection.metric), query


def _all(
    plpy: Any,
    collection: Collection,
    request: Request,
    changes: Changes,
    query: NDArray[np.float32],
    entry: int | None,
) -> tuple[list[int], list[float]] | None:
    assert request.k is not None
    index = changes.index
    keys, squared = _nearest(index, query, request.k + (entry is not None), entry)
    if entry is not None:
        if request.key not in keys:
            return None
        own = keys.index(request.key)
        del keys[own], squared[own]
    keys, squared = keys[: request.k], squared[: request.k]
    if len(keys) < request.k:
        return None
    asked = keys if entry is None else [*keys, request.key]
    plan = collection.plans.get("steady")
    if plan is None:
        plan = collection.plans["steady"] = plpy.prepare(
            # The table comes before the others, so that it is locked first.
            "SELECT c.generation, (SELECT pg_catalog.count(*)"
            f" FROM {collection.relation} AS b"
            f" WHERE b.{collection.key_column} = ANY($3)) AS there, {_changed(collection, '$2')}"
            f" FROM siamese.collections AS c WHERE {collection.as_it_was(plpy)}",
            ["text", "xid8", "bigint[]"],
        )
    state = plan.execute([collection.name, str(changes.horizon), asked])
    if not _is_steady(state, changes) or state[0]["there"] < len(asked):
        return None
    return keys, squared


def _filtered(
    plpy: Any,
    collection: Collection,
    request: Request,
    changes: Changes,
    query: NDArray[np.float32],
    entry: int | None,
) -> tuple[list[int], list[float]] | None:
    assert request.k is not None and request.filter is not None
    try:
        conditions = filters.parse_remembered(collection, request.filter)
    except SiameseError:  # which error it is to be, the ordinary way knows
        return None
    way = None if conditions is None else collection.ways.get(_shape(conditions, request.k))
    if conditions is None or way is None or not way.is_sure:
        return None
    way.is_sure = False  # until it has answered this search, too
    limit = math.inf
    if request.max_distance is not None:
        limit = vectors.squared_limit(request.max_distance, collection.metric)
    asking = _Asking(plpy, collection, request, changes, query, entry, conditions, limit)
    found: tuple[list[int], list[float]] | None = None
    if way.is_exact:
        way.plan_look(changes.index, request.k)
        if way.look:
            found = asking.among_nearest(way.look)
            if not asking.is_steady:
                return None
            way.rate += LEARN * ((found is not None) - way.rate)
        if found is None:
            found = asking.exactly(way)
    else:
        found = asking.among_nearest(way.count)
        way.count = max(request.k + 1, int(way.count * (GROW if found is None else SHRINK)))
    way.is_sure = found is not None
    return found


class _Asking:
    """One filtered search, which confirms that all is as expected with each of its statements."""

    def __init__(
        self,
        plpy: Any,
        collection: Collection,
        request: Request,
        changes: Changes,
        query: NDArray[np.float32],
        entry: int | None,
        conditions: Conditions,
        limit: float,
    ) -> None:
        assert request.k is not None
        self.plpy, self.collection, self.changes = plpy, collection, changes
        self.index = changes.index
        self.k, self.own = request.k, request.key
        self.query, self.entry = query, entry
        self.conditions = conditions
        self.limit = limit
        self.is_steady = True

    def among_nearest(self, count: int) -> tuple[list[int], list[float]] | None:
        """Ask which of the nearest rows qualify; None where these are not enough."""
        keys, squared = _nearest(self.index, self.query, count, self.entry)
        found = self._ask(0, keys)
        complete = squared[-1] if squared else 0.0
        wanted = set(found or ())
        taken = [place for place, key in enumerate(keys) if key in wanted]
        near = [keys[place] for place in taken], [squared[place] for place in taken]
        return self._cut(*near, complete)

    def exactly(self, way: Way) -> tuple[list[int], list[float]] | None:
        """Compare all rows that qualify; None where more do than were read."""
        found = exact.from_send(self._ask(way.limit, None))
        if len(found) > way.limit:
            return None
        way.count = max(1, len(found))
        index = self.index
        rows = index.rows_of_keys(found)
        squared = index.squared_distances(
            self.query, index.slots_of(rows), partial(interrupts.check, self.plpy)
        )
        places, _ = exact.nearest_places(squared, self.k + 1)
        assert index.rows.keys is not None
        near = in_order(index.rows.keys[rows[places]].tolist(), squared[places].tolist())
        return self._cut(*near, math.inf)

    def _cut(
        self, keys: list[int], squared: list[float], complete: float
    ) -> tuple[list[int], list[float]] | None:
        if not self.is_steady:
            return None
        if self.own in keys:
            own = keys.index(self.own)
            del keys[own], squared[own]
        if len(keys) < self.k and complete < self.limit:
            return None
        end = min(self.k, bisect.bisect_right(squared, self.limit))
        return keys[:end], squared[:end]

    def _ask(self, limit: int, keys: list[int] | None) -> Any:
        """Ask which of some keys qualify, or for all that do, up to a limit."""
        values = [
            *self.conditions.values,
            str(self.changes.horizon),
            self.collection.name,
            *([] if self.own is None else [self.own]),
            *([] if keys is None else [keys]),
        ]
        plans = self.collection.plans
        purpose = limit, self.own is None, *self.conditions.clauses
        plan = plans.get(purpose)
        if plan is None:
            if len(plans) > MAX_WAYS:
                plans.clear()
            plan = plans[purpose] = self._plan(limit)
        state = plan.execute(values)
        self.is_steady = _is_steady(state, self.changes) and state[0]["is_there"]
        return state[0]["found"] if self.is_steady else None

    def _plan(self, limit: int) -> Any:
        collection = self.collection
        where = self.conditions.copy()
        changed = _changed(collection, where.parameter("xid8", None))
        same = collection.as_it_was(self.plpy, where.parameter("text", None))
        key = f"b.{collection.key_column}"
        there = "true"
        if self.own is not None:
            place = where.parameter("bigint", None)
            there = f"EXISTS (SELECT FROM {collection.relation} AS b WHERE {key} = {place})"
        if limit:
            found = (
                f"SELECT {exact.ALL_WANTED} FROM (SELECT {key}::pg_catalog.int8 AS wanted"
                f" FROM {collection.relation} AS b WHERE {' AND '.join(where.clauses)}"
                f" LIMIT {limit + 1}) AS x"
            )
        else:
            place = where.parameter("bigint[]", None)
            found = (
                f"SELECT pg_catalog.array_agg({key}) FROM {collection.relation} AS b"
                f" WHERE {' AND '.join([f'{key} = ANY({place})', *where.clauses])}"
            )
        # Of the types that they had when the filter's values were written out for them.
        columns = ", ".join(
            f"({self.plpy.quote_literal(name)}, {oid})" for name, oid in where.columns.items()
        )
        return self.plpy.prepare(
            # The table before the others, again.
            f"SELECT c.generation, {there} AS is_there, ({found}) AS found, {changed}"
            f" FROM siamese.collections AS c WHERE {same} AND (SELECT pg_catalog.count(*)"
            f" FROM pg_catalog.pg_attribute AS a WHERE a.attrelid = {collection.relation_oid}"
            f" AND NOT a.attisdropped AND (a.attname, a.atttypid) IN ({columns}))"
            f" = {len(where.columns)}",
            where.types,
        )


def note_way(
    collection: Collection, conditions: Conditions, k: int, is_exact: bool, count: int
) -> None:
    """Remember how a filtered search was answered, for the next one like it."""
    shape = _shape(conditions, k)
    before = collection.ways.pop(shape, None)
    if count > (MAX_READ if is_exact else MAX_NEAREST):
        return
    if before is not None and before.is_exact == is_exact:
        before.is_sure = True
        if is_exact:
            before.count = count
        collection.ways[shape] = before
        return
    if len(collection.ways) >= MAX_WAYS:
        collection.ways.clear()
    collection.ways[shape] = Way(is_exact, count)


def _shape(conditions: Conditions, k: int) -> tuple[Any, ...]:
    return (k, *conditions.clauses)


def _nearest(
    index: Generation, query: NDArray[np.float32], count: int, entry: int | None
) -> tuple[list[int], list[float]]:
    assert index.keys is not None
    positions, squared = index.search(query, count, entry)
    if index.rows.slot_starts is not None:
        rows, squared = index.expand(positions, squared)
        return in_order([index.keys[row] for row in rows.tolist()], squared.tolist())
    places = positions.tolist()
    if index.by_slot is not None:
        places = [index.by_slot[place] for place in places]
    return in_order([index.keys[place] for place in places], squared.tolist())


def _changed(collection: Collection, horizon: str) -> str:
    return (
        f"EXISTS (SELECT FROM {collection.pending} AS y WHERE y.xact_id >= {horizon}"
        # The upper bound excludes nothing: see the ordinary statement.
        f" AND y.xact_id <= '{MAX_XACT_ID}'::pg_catalog.xid8) AS changed"
    )


def _is_steady(state: Any, changes: Changes) -> bool:
    return bool(state) and state[0]["generation"] == changes.generation and not state[0]["changed"]
