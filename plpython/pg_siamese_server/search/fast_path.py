"""Search with nothing pending: FAISS first, then one statement that confirms.

A search has two questions for the database. What does its snapshot hold, and which rows that FAISS
found can the caller see? While a session knows of no change since the build, one statement asks
both. The session takes the answer only if nothing has changed. A search with a filter is
answered as earlier searches with such a filter were.
"""

from __future__ import annotations

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
from pg_siamese_server.search.request import Answer, Neighbours, Request
from pg_siamese_server.search.trace import NEAREST, QUALIFYING, phase

if TYPE_CHECKING:
    from pg_siamese_server.index.generations import Generation
    from pg_siamese_server.search.filters import Conditions
    from pg_siamese_server.search.pending import Changes

# Beyond these, a search takes so long that an estimate costs little.
MAX_READ, MAX_NEAREST = 20_000, 1_000
MIN_READ = 1_000
# Remembered shapes of filters.
MAX_WAYS = 200
# Factors on the number of rows asked about after a success and a failure: one in twenty fails.
SHRINK, GROW = 0.99, 1.25
# Factor to the next size of a look, and its assumed success rate at first. The weight of each
# observation, and the searches until another size is tried: twice as many each time.
LONGER, HOPE, LEARN, AGAIN = 3, 0.8, 0.05, 100


@dataclass(eq=False, repr=False)
class Way:
    """How recent searches with a filter of some shape, whatever its values, were answered.

    Attributes:
        is_exact: whether all rows that qualify were read, and not the nearest checked.
        count: how many rows were read or asked about.
        is_sure: whether the last two searches went this way.
        look: how many of the nearest an exact search asks about first, or 0.
        rate: share of these looks that was enough.
        idle: searches since the last look.
        again: searches without a look before the next try.
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
        """Most rows to read: a power of two, so that few plans are made."""
        return max(MIN_READ, 2 << self.count.bit_length())

    def plan_look(self, index: Generation, k: int) -> None:
        """Choose the look that saves most, as far as is known, or none if none saves anything."""
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


def search(plpy: Any, collection: Collection, request: Request, changes: Changes) -> Answer | None:
    """Find the k nearest rows.

    Args:
        plpy: PL/Python's module.
        collection: as it was when last looked up.
        request: with arguments in range.
        changes: what this session knows of the collection's pending table.

    Returns:
        None if anything is not as expected. Then the search starts again in the ordinary way.
    """
    if not _may_serve(request, changes):
        return None
    index = changes.index
    entry = None
    if request.key is None:
        try:
            embedding = request.embedding(plpy, collection)
        except SiameseError:  # the ordinary search knows which error to raise
            return None
        assert embedding is not None
        query = vectors.prepare(embedding, collection.metric)
    else:
        assert isinstance(request.key, int)
        row = index.row_of_key(request.key)
        if row is None:
            return None
        entry = index.slot_of(row)
        query = index.vectors[entry : entry + 1]
    found = _FastSearch(plpy, collection, request, changes, query, entry)
    if request.trace is not None:
        request.trace.begin_faiss(changes.generation, pending=0, dead=0)
    try:
        if request.filter is None and request.exclude is None:
            near = found.all()
        else:
            near = found.filtered(request.filter, request.exclude)
    except (
        plpy.spiexceptions.UndefinedTable,
        plpy.spiexceptions.UndefinedColumn,
        plpy.spiexceptions.UndefinedFunction,
        plpy.spiexceptions.UndefinedObject,
        plpy.spiexceptions.InvalidSchemaName,
    ):
        return None
    return None if near is None else Answer.of(collection, near, query)


def _may_serve(request: Request, changes: Changes) -> bool:
    """Return whether the fast path may serve: a plain search, integer keys, nothing pending."""
    return (
        changes.is_empty
        and not changes.is_restricted
        and changes.index.keys is not None
        and changes.index.index.ntotal > 0
        and request.candidates is None
        and (request.filter or request.exclude or request.max_distance is None)
        and request.engine != "pgvector"
        and request.points is None
        and not request.left_out
        and not (request.frame and request.key is not None)
    )


class _FastSearch:
    """One search, each statement of which confirms that nothing has changed."""

    def __init__(
        self,
        plpy: Any,
        collection: Collection,
        request: Request,
        changes: Changes,
        query: NDArray[np.float32],
        entry: int | None,
    ) -> None:
        assert request.k is not None
        self.plpy, self.collection, self.changes = plpy, collection, changes
        self.index = changes.index
        self.k, self.own, self.max_distance = request.k, request.key, request.max_distance
        self.query, self.entry = query, entry
        self.trace = request.trace
        self.is_steady = True

    def all(self) -> Neighbours | None:
        """Find the nearest of all rows."""
        near = self._nearest(self.k + (self.entry is not None))
        if self.own is not None and not near.remove(self.own):
            return None
        near.cut(self.k)
        if len(near.keys) < self.k:
            return None
        if self.trace is not None:
            self.trace.consider(len(near.keys))
        asked = near.keys if self.own is None else [*near.keys, self.own]
        collection = self.collection
        plan = collection.plans.get("steady")
        if plan is None:
            plan = collection.plans["steady"] = self.plpy.prepare(
                # The table comes before the others, so that it is locked first.
                "SELECT c.generation, (SELECT pg_catalog.count(*)"
                f" FROM {collection.relation} AS b"
                f" WHERE b.{collection.key_column} = ANY($3)) AS there,"
                f" {_changed_sql(collection, '$2')}"
                f" FROM siamese.collections AS c WHERE {collection.as_it_was(self.plpy)}",
                ["text", "xid8", "bigint[]"],
            )
        with phase(self.trace, "check"):
            state = plan.execute([collection.name, str(self.changes.horizon), asked])
        if not _is_steady(state, self.changes) or state[0]["there"] < len(asked):
            return None
        return near

    def filtered(self, text: str | None, excluded: str | None) -> Neighbours | None:
        """Find the nearest of the rows that a filter and its mirror, as JSON, let through."""
        try:
            conditions = filters.parse_remembered(self.collection, text, excluded)
        except SiameseError:  # which error it is to be, the search from the start knows
            return None
        way = None if conditions is None else self.collection.ways.get(_shape(conditions, self.k))
        if conditions is None or way is None or not way.is_sure:
            return None
        way.is_sure = False  # until it has answered this search, too
        found: Neighbours | None = None
        if way.is_exact:
            way.plan_look(self.index, self.k)
            if way.look:
                found = self._among_nearest(conditions, way.look)
                if not self.is_steady:
                    return None
                way.rate += LEARN * ((found is not None) - way.rate)
            if found is None:
                found = self._exact(conditions, way)
        else:
            found = self._among_nearest(conditions, way.count)
            way.count = max(self.k + 1, int(way.count * (GROW if found is None else SHRINK)))
        way.is_sure = found is not None
        return found

    def _nearest(self, count: int) -> Neighbours:
        with phase(self.trace, "index"):
            positions, squared = self.index.search(self.query, count, self.entry)
        if self.trace is not None:
            self.trace.begin_round(NEAREST)
            if not self.index.is_flat:
                self.trace.walk(self.index.breadth)
        return Neighbours.in_order(*self.index.integer_keys(positions, squared))

    def _among_nearest(self, conditions: Conditions, count: int) -> Neighbours | None:
        """Ask which of the nearest rows qualify. Return None if these are not enough."""
        near = self._nearest(count)
        wanted = set(self._read_qualifying(conditions, 0, near.keys) or ())
        taken = [place for place, key in enumerate(near.keys) if key in wanted]
        if self.trace is not None:
            self.trace.consider(len(near.keys))
            rejected = [key for key in near.keys if key not in wanted and key != self.own]
            self.trace.reject(rejected, own=self.own in near.keys)
        complete = near.squared[-1] if near.squared else 0.0
        return self._take_nearest(
            Neighbours(
                [near.keys[place] for place in taken],
                [near.squared[place] for place in taken],
                complete,
            )
        )

    def _exact(self, conditions: Conditions, way: Way) -> Neighbours | None:
        """Compare all rows that qualify. Return None if more qualify than were read."""
        found = exact.from_send(self._read_qualifying(conditions, way.limit, None))
        if len(found) > way.limit:
            return None
        way.count = max(1, len(found))
        index = self.index
        with phase(self.trace, "index"):
            rows = index.rows_of_keys(found)
            squared = index.squared_distances(
                self.query, index.slots_of(rows), partial(interrupts.check, self.plpy)
            )
            places, _ = exact.nearest_places(squared, self.k + 1)
        if self.trace is not None:
            self.trace.begin_round(QUALIFYING)
            self.trace.consider(len(rows))
            self.trace.reject((), own=self.own is not None and self.own in found)
        assert index.rows.keys is not None
        return self._take_nearest(
            Neighbours.in_order(index.rows.keys[rows[places]].tolist(), squared[places].tolist())
        )

    def _take_nearest(self, near: Neighbours) -> Neighbours | None:
        if not self.is_steady:
            return None
        limit = math.inf
        if self.max_distance is not None:
            limit = vectors.squared_limit(self.max_distance, self.collection.metric)
        near.remove(self.own)
        if len(near.keys) < self.k and near.complete < limit:
            return None
        near.cut(min(self.k, near.within(limit)))
        return near

    def _read_qualifying(self, conditions: Conditions, limit: int, keys: list[int] | None) -> Any:
        """Ask which of ``keys`` qualify, or if None for all that do, up to ``limit``."""
        values = [
            *conditions.values,
            str(self.changes.horizon),
            self.collection.name,
            *([] if self.own is None else [self.own]),
            *([] if keys is None else [keys]),
        ]
        plans = self.collection.plans
        purpose = limit, self.own is None, *conditions.clauses
        plan = plans.get(purpose)
        if plan is None:
            if len(plans) > MAX_WAYS:
                plans.clear()
            plan = plans[purpose] = self._plan(conditions, limit)
        with phase(self.trace, "check"):
            state = plan.execute(values)
        self.is_steady = _is_steady(state, self.changes) and state[0]["is_there"]
        return state[0]["found"] if self.is_steady else None

    def _plan(self, conditions: Conditions, limit: int) -> Any:
        collection = self.collection
        where = conditions.copy()
        changed = _changed_sql(collection, where.parameter("xid8", None))
        same = collection.as_it_was(self.plpy, where.parameter("text", None))
        key = f"b.{collection.key_column}"
        exists = "true"
        if self.own is not None:
            place = where.parameter("bigint", None)
            exists = f"EXISTS (SELECT FROM {collection.relation} AS b WHERE {key} = {place})"
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
        # With the types of the columns when the filter's values were written as text.
        columns = ", ".join(
            f"({self.plpy.quote_literal(name)}, {oid})" for name, oid in where.columns.items()
        )
        return self.plpy.prepare(
            # The table comes before the others, as above.
            f"SELECT c.generation, {exists} AS is_there, ({found}) AS found, {changed}"
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


def _changed_sql(collection: Collection, horizon: str) -> str:
    return (
        f"EXISTS (SELECT FROM {collection.pending} AS y WHERE y.xact_id >= {horizon}"
        # The upper bound excludes nothing. The ordinary statement has it, too.
        f" AND y.xact_id <= '{MAX_XACT_ID}'::pg_catalog.xid8) AS changed"
    )


def _is_steady(state: Any, changes: Changes) -> bool:
    return bool(state) and state[0]["generation"] == changes.generation and not state[0]["changed"]
