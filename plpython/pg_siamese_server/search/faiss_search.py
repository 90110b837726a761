"""Search by FAISS and among pending vectors, and check the result against the table."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server import interrupts, vectors
from pg_siamese_server.catalog import MAX_CHANGES, Collection, prepare
from pg_siamese_server.errors import IndexFileError
from pg_siamese_server.index import generations
from pg_siamese_server.index.generations import Generation
from pg_siamese_server.search import exact, fast_path, filters
from pg_siamese_server.search.pending import Changes, Snapshot
from pg_siamese_server.search.request import Answer, Neighbours, Request
from pg_siamese_server.search.trace import NEAREST, QUALIFYING, phase

if TYPE_CHECKING:
    from pg_siamese_server.search.filters import Conditions

# Microseconds to look up one of the caller's candidates, and to compare it.
CHECK_CANDIDATE, COMPARE_CANDIDATE = 0.1, 0.1
# Factor on the number of rows that is expected to be enough.
ENOUGH = 1.25
# A first look is taken if this many of it cost no more than the rest.
LITTLE = 3
# Rows to read at most, if any number is expected.
MAX_READ = 2**62


class FaissSearch:
    """One or several searches of one snapshot."""

    def __init__(
        self, plpy: Any, collection: Collection, state: Any, index: Generation, changes: Changes
    ) -> None:
        self.plpy = plpy
        self.collection = collection
        self.query_id: int | None = state["query_id"]
        self.is_restricted: bool = state["is_restricted"]
        self.index = index
        self.changes = changes
        changes.is_restricted = self.is_restricted
        # Under row-level security, what this caller sees may change between calls.
        self.keeps_pending = not self.is_restricted and not changes.is_too_large()

    @classmethod
    def open(
        cls, plpy: Any, collection: Collection, state: Any, kept: dict[int, Changes]
    ) -> FaissSearch | None:
        """Open the generation and bring the pending vectors up to date.

        Returns:
            None if so many vectors are pending that a scan of the table is better.

        Raises:
            IndexFileError: the generation's file can't be used.
        """
        generation = state["generation"]
        index = generations.get(plpy, collection, generation)
        settled, opened = state["settled"], state["opened"]
        snapshot = Snapshot.parse(state["snapshot"])
        if index.made_for and not snapshot.sees_all_of(Snapshot.parse(index.made_for)):
            raise IndexFileError(
                f"index file of generation {generation} was made after this transaction began",
                hint="Later transactions can use it.",
            )
        changes = kept.get(collection.collection_id)
        if changes is not None and changes.is_up_to_date(generation, state["snapshot"], opened):
            return cls(plpy, collection, state, index, changes)
        if changes is None or not changes.usable_for(generation, snapshot):
            read_from_start = changes is None or not changes.horizon
            changes = kept[collection.collection_id] = Changes(generation, index)
            if not read_from_start:
                settled, opened = cls._read_changes(plpy, collection)
        if len(settled or ()) + len(opened or ()) > MAX_CHANGES:
            del kept[collection.collection_id]
            return None
        changes.take(settled, opened, snapshot)
        found = cls(plpy, collection, state, index, changes)
        if changes.has_additions and found.keeps_pending:
            changes.fetch(plpy, collection)
        return found

    @staticmethod
    def _read_changes(
        plpy: Any, collection: Collection
    ) -> tuple[list[int] | None, list[int] | None]:
        """Read the whole pending table, if what was kept is of no use for this snapshot."""
        plan = prepare(
            plpy,
            "SELECT array_agg(x.change) FILTER (WHERE x.is_settled) AS settled,"
            " array_agg(x.change) FILTER (WHERE NOT x.is_settled) AS opened FROM ("
            "SELECT CASE WHEN y.deleted THEN -y.embedding_id ELSE y.embedding_id END AS change,"
            " y.xact_id < pg_snapshot_xmin(pg_current_snapshot()) AS is_settled"
            f" FROM {collection.pending} AS y LIMIT {MAX_CHANGES + 1}) AS x",
        )
        row = plan.execute([])[0]
        return row["settled"], row["opened"]

    def describe(self) -> str:
        """Return a description of what is open."""
        return f"{len(self.index.rows.embedding_ids)} rows"

    def search(self, request: Request, conditions: Conditions) -> Answer:
        """Find the k nearest rows that qualify."""
        if request.trace is not None:
            changes = self.changes
            request.trace.begin_faiss(
                changes.generation, changes.addition_count(), changes.dead_count()
            )
        query, entry = self._query(request.embedding(self.plpy, self.collection))
        search = _Search(self, request, conditions, query, entry)
        found = search.run()
        if search.way is not None and request.candidates is None and conditions.clauses:
            fast_path.note_way(self.collection, conditions, search.k, *search.way)
        return Answer.of(self.collection, found, query)

    def _query(
        self, embedding: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32], int | None]:
        """Return the prepared query, float32 (1, d), and its position in the index, if any."""
        if embedding is not None:
            return vectors.prepare(embedding, self.collection.metric), None
        assert self.query_id is not None
        row = self.index.row_of(self.query_id)
        if row is not None:
            slot = self.index.slot_of(row)
            return self.index.vectors[slot : slot + 1], slot
        vector = self.changes.find(self.query_id) if self.keeps_pending else None
        if vector is None:
            vector = vectors.stored(self.plpy, self.collection, self.query_id)
        return vector, None

    def items(self, rows: NDArray[np.integer[Any]]) -> list[Any] | NDArray[np.int64]:
        """Return what identifies rows of the index: keys, or pairs of key and frame.

        Integer keys are an array, int64 (rows,).
        """
        held = self.index.rows
        if held.keys is not None:
            keys: NDArray[np.int64] = held.keys[rows]
            return keys
        return self.collection.items([held.key(row) for row in rows.tolist()])

    def pending(self, query: NDArray[np.float32], count: int) -> Neighbours:
        """Find the nearest pending vectors, exactly and in no order."""
        if self.keeps_pending:
            return self.changes.nearest(query, count)
        collection = self.collection
        plan = prepare(
            self.plpy,
            f"SELECT {collection.label} AS label,"
            f" {collection.vector_schema}.vector_send(e.embedding) AS vector"
            f" FROM {collection.pending} AS p INNER JOIN {collection.embeddings} AS e"
            " ON e.embedding_id = p.embedding_id WHERE NOT p.deleted"
            f" ORDER BY e.embedding {collection.distance_operator} $1 LIMIT $2",
            (collection.vector_type, "bigint"),
        )
        rows = list(plan.execute([vectors.to_text(query[0]), count]))
        if not rows:
            return Neighbours()
        matrix = vectors.from_send(b"".join(row["vector"] for row in rows), len(rows))
        near = vectors.squared_distances(vectors.prepare(matrix, collection.metric), query)
        complete = math.inf if len(rows) < count else float(near.max()) * (1 - 1e-5)
        items = collection.items([row["label"] for row in rows])
        return Neighbours(items, near.tolist(), complete)


class _Search:
    """One search, by the nearest rows or by those that qualify, whichever is cheaper.

    The first way asks FAISS for the nearest rows, and the table which of these qualify. The second
    way reads all rows that qualify, and compares them. The planner's estimate chooses the way to
    begin with. What was found corrects it.
    """

    def __init__(
        self,
        finder: FaissSearch,
        request: Request,
        conditions: Conditions,
        query: NDArray[np.float32],
        entry: int | None,
    ) -> None:
        assert request.k is not None
        self.finder = finder
        self.plpy, self.collection, self.index = finder.plpy, finder.collection, finder.index
        self.changes = finder.changes
        self.query, self.entry = query, entry
        self.trace = request.trace
        self.k, self.own = request.k, request.key
        self.limit = math.inf
        if request.max_distance is not None:
            self.limit = vectors.squared_limit(request.max_distance, self.collection.metric)
        self.conditions = conditions
        self.among: NDArray[np.int64] | None = None
        if request.candidates is not None:
            if self.collection.is_by_integer:
                wanted = request.candidates
                if None in wanted:
                    wanted = [key for key in wanted if key is not None]
                self.among = np.fromiter(wanted, dtype=np.int64, count=len(wanted))
            else:
                self.conditions = conditions.copy()
                place = self.conditions.parameter(
                    self.collection.candidate_array, request.candidates
                )
                key = f"b.{self.collection.key_column}"
                self.conditions.clauses.append(f"{key} = ANY({place})")
        self.is_plain = not self.conditions.clauses and not finder.is_restricted
        self.poll = partial(interrupts.check, self.plpy)
        self.checked: dict[Any, bool] = {}
        # Integer keys of all rows that qualify, if they have been read.
        self.qualifying: NDArray[np.int64] | None = None
        self.seen = 0
        # Whether the answer was found exactly, and from how many rows.
        self.way: tuple[bool, int] | None = None

    def run(self) -> Neighbours:
        """Return the k nearest rows that qualify."""
        if self.is_plain and self.among is None:
            return self._run_unfiltered()
        total = max(1, len(self.index.rows.embedding_ids) + self.changes.addition_count())
        expected = self._estimate()
        prior = min(1.0, max(0.5, expected.rows) / total)
        most = expected.most
        if expected.microseconds < LITTLE * exact.CALL:  # less than the quickest look
            answer = self._exact(most)
            if answer is not None:
                return answer
        # The nearest rows may qualify, so look at them if that costs little.
        look = exact.LOOK * (self.k + 1)
        count = math.ceil(ENOUGH * (self.k + 1) / prior)
        if look < count:
            cost = min(self._cost(count), expected.microseconds)
            count = look if LITTLE * self._cost(look) <= cost else count
        while True:
            if self._cost(count) > expected.microseconds:
                answer = self._exact(most)
                if answer is not None:
                    return answer
                expected = exact.Estimate(total, expected.microseconds * total / most)
                prior, most = min(1.0, most / total), MAX_READ
                count = max(count, math.ceil(ENOUGH * (self.k + 1) / prior))
                continue
            answer = self._nearest(count)
            if self._is_complete(answer):
                self.way = False, count
                return answer
            self.poll()
            share = (len(answer.keys) + 1) / (self.seen + 1 / prior)
            count = max(2 * count, math.ceil(ENOUGH * (self.k + 1) / share))

    def _run_unfiltered(self) -> Neighbours:
        count = self.k + (self.own is not None)
        dead = self.changes.dead_count()
        if dead:
            alive = max(0.1, 1 - dead / max(1, len(self.index.rows.embedding_ids)))
            count = math.ceil(count / alive) + 2
        while True:
            answer = self._nearest(count)
            if self._is_complete(answer):
                return answer
            self.poll()
            count *= 2

    def _estimate(self) -> exact.Estimate:
        if self.among is None:
            return exact.estimate(self.plpy, self.collection, self.conditions)
        rows = len(self.among)
        return exact.Estimate(rows, rows * COMPARE_CANDIDATE)

    def _cost(self, count: int) -> float:
        """Estimate the microseconds of a search through ``count`` nearest rows."""
        check = exact.CHECK_ROW if self.among is None else CHECK_CANDIDATE
        return self.index.microseconds(count) + count * check + exact.CALL

    def _is_complete(self, found: Neighbours) -> bool:
        return len(found.keys) == self.k or found.complete >= self.limit

    def _nearest(self, count: int) -> Neighbours:
        """Return the k nearest that qualify among the nearest ``count`` rows."""
        index = self.index
        complete = math.inf
        keys: list[Any] = []
        squared: NDArray[np.float32] = np.empty(0, dtype=np.float32)
        if self.trace is not None:
            self.trace.begin_round(NEAREST)
        if index.index.ntotal:
            is_scanned = index.is_scanned(count)
            with phase(self.trace, "index"):
                if is_scanned and not index.is_flat:
                    positions, squared = index.scan(self.query, count, self.poll)
                else:
                    positions, squared = index.search(self.query, count, self.entry)
            if self.trace is not None and not is_scanned:
                self.trace.walk(index.breadth)
            if len(positions) < index.index.ntotal:
                complete = float(squared[-1]) if len(positions) else 0.0
            rows, squared = index.expand(positions, squared)
            dead = self.changes.is_dead(rows)
            if dead is not None:
                rows, squared = rows[~dead], squared[~dead]
            self.seen = len(rows)
            if self.among is None:
                keys = self._items(rows)
            else:
                assert index.rows.keys is not None
                found = index.rows.keys[rows]
                taken = np.isin(found, _intersection(found, self.among))
                keys, squared = found[taken].tolist(), squared[taken]
            if self.trace is not None:
                self.trace.consider(self.seen, self.seen - len(keys))
        return self._merge(Neighbours(keys, squared.tolist(), complete), count)

    def _exact(self, most: int) -> Neighbours | None:
        """Return the k nearest of all rows that qualify, or None if more than ``most`` do."""
        index = self.index
        if self.among is not None:
            labels = np.unique(self.among)
        else:
            with phase(self.trace, "check"):
                read = exact.read_keys(self.plpy, self.collection, self.conditions, most)
            if read is None:
                return None
            labels = read
            if self.collection.is_by_integer:
                self.qualifying = labels
            self.way = True, len(labels)
        by_key = self.collection.is_by_integer
        with phase(self.trace, "index"):
            rows = index.rows_of_keys(labels) if by_key else index.rows_of(labels)
            dead = self.changes.is_dead(rows)
            if dead is not None:
                rows = rows[~dead]
            squared = index.squared_distances(self.query, index.slots_of(rows), self.poll)
        count = 4 * (self.k + 1)
        while True:
            if self.trace is not None:
                self.trace.begin_round(QUALIFYING)
                self.trace.consider(len(rows))
            places, complete = exact.nearest_places(squared, count)
            keys = self._items(rows[places])
            if self.among is None:
                self.checked.update(dict.fromkeys(keys, True))
            answer = self._merge(Neighbours(keys, squared[places].tolist(), complete), count)
            if self._is_complete(answer):
                return answer
            self.poll()
            count *= 8

    def _items(self, rows: NDArray[np.integer[Any]]) -> list[Any]:
        items = self.finder.items(rows)
        return items if isinstance(items, list) else items.tolist()

    def _merge(self, near: Neighbours, count: int) -> Neighbours:
        """Add pending rows and return the k nearest that qualify, as far as the lists go."""
        is_mixed = self.changes.has_additions
        keys, squared, complete = near.keys, near.squared, near.complete
        if is_mixed:
            with phase(self.trace, "pending"):
                more = self.finder.pending(self.query, count)
            if self.trace is not None:
                self.trace.consider(len(more.keys))
            wanted = self.among if self.qualifying is None else self.qualifying
            if wanted is not None:
                found = set(_intersection(np.array(more.keys, dtype=np.int64), wanted).tolist())
                kept = [place for place, key in enumerate(more.keys) if key in found]
                if self.trace is not None:
                    self.trace.consider(0, outside=len(more.keys) - len(kept))
                more.keys = [more.keys[place] for place in kept]
                more.squared = [more.squared[place] for place in kept]
            if self.qualifying is not None:
                self.checked.update(dict.fromkeys(more.keys, True))
            keys, squared = keys + more.keys, squared + more.squared
            complete = min(complete, more.complete)
        return self._first_k(Neighbours.in_order(keys, squared, complete, is_mixed=is_mixed))

    def _first_k(self, near: Neighbours) -> Neighbours:
        """Return the first k rows that qualify by the table, as far as all rows are known."""
        given = len(near.keys)
        if self.collection.has_frames:
            near.remove_frames(self.own)
        else:
            near.remove(self.own)
        own = given - len(near.keys)
        end = near.within(min(self.limit, near.complete))
        taken = Neighbours(complete=near.complete)
        place = 0
        while place < end and len(taken.keys) < self.k:
            after = min(end, place + self.k - len(taken.keys)) if self.is_plain else end
            self._check([key for key in near.keys[place:after] if key not in self.checked])
            for key, distance in zip(
                near.keys[place:after], near.squared[place:after], strict=True
            ):
                if self.checked[key] and len(taken.keys) < self.k:
                    taken.keys.append(key)
                    taken.squared.append(distance)
            place = after
        if self.trace is not None:
            self.trace.reject((key for key in near.keys[:place] if not self.checked[key]), own)
        return taken

    def _check(self, keys: list[Any]) -> None:
        """Note which rows exist and qualify."""
        if not keys:
            return
        collection = self.collection
        asked = list({key for key, _ in keys}) if collection.has_frames else keys
        self.checked.update(dict.fromkeys(keys, False))
        with phase(self.trace, "check"):
            found = filters.qualifying(self.plpy, collection, self.conditions, asked)
        if found and collection.has_frames:
            seen = set(found)
            self.checked.update((item, True) for item in keys if item[0] in seen)
        elif found:
            self.checked.update(dict.fromkeys(found, True))


def _intersection(few: NDArray[np.int64], many: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the elements of ``few``, sorted, that are also in ``many``."""
    order = np.sort(few)
    if not len(order):
        return order
    places = np.minimum(order.searchsorted(many), len(order) - 1)
    found: NDArray[np.int64] = order[places[order[places] == many]]
    return found
