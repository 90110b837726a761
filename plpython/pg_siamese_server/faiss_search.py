"""The quick path: nearest by FAISS and among pending vectors, then checked against the table."""

from __future__ import annotations

import bisect
import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server import generations, interrupts, vectors
from pg_siamese_server.catalog import MAX_CHANGES, Collection, prepare
from pg_siamese_server.errors import IndexFileError
from pg_siamese_server.generations import Generation
from pg_siamese_server.pending import Changes, Snapshot

if TYPE_CHECKING:
    from pg_siamese_server.filters import Conditions
    from pg_siamese_server.search import Request

CANDIDATE_SHARE = 0.05
MIN_CANDIDATES = 500
MAX_CANDIDATES = 20_000


class FaissSearch:
    """One search, or several, of one snapshot."""

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

    @classmethod
    def open(
        cls, plpy: Any, collection: Collection, state: Any, kept: dict[int, Changes]
    ) -> FaissSearch | None:
        """Open the generation and bring the pending vectors up to date.

        Returns:
            None where so much is pending that a scan of the table is better.

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
        if changes.has_additions:
            if changes.is_too_large(collection.dimension):
                return None
            if not found.is_restricted:
                changes.fetch(plpy, collection)
        return found

    @staticmethod
    def _read_changes(
        plpy: Any, collection: Collection
    ) -> tuple[list[int] | None, list[int] | None]:
        """Read the whole pending table, where what was kept is of no use for this snapshot."""
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
        """Return what is open, for people."""
        return f"{len(self.index.rows.embedding_ids)} rows"

    def search(
        self, request: Request, embedding: NDArray[np.float32] | None, conditions: Conditions
    ) -> tuple[list[Any], list[float]] | None:
        """Find the k nearest rows that qualify.

        Returns:
            Keys and distances, or None where an exact scan is better.
        """
        assert request.k is not None
        query, entry = self._query(embedding)
        limit = math.inf
        if request.max_distance is not None:
            limit = _squared_limit(request.max_distance, self.collection.metric)
        is_plain = not conditions.clauses and not self.is_restricted
        count = self._first_count(request.k, is_plain)
        most = self._most_candidates()
        checked: dict[Any, bool] = {}
        while count <= most:
            keys, squared, complete = self._candidates(query, entry, count)
            near = min(limit, complete)
            taken = self._qualifying(request, keys, squared, near, is_plain, conditions, checked)
            if len(taken[0]) == request.k or complete >= limit or complete == math.inf:
                return taken[0], to_distances(taken[1], self.collection.metric)
            interrupts.check(self.plpy)
            share = (len(taken[0]) + 0.5) / max(1, len(checked))
            count = max(2 * count, int(1.3 * request.k / share))
        return None

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
        vector = None if self.is_restricted else self.changes.find(self.query_id)
        if vector is None:
            plan = prepare(
                self.plpy,
                f"SELECT {self.collection.vector_schema}.vector_send(e.embedding) AS vector"
                f" FROM {self.collection.embeddings} AS e WHERE e.embedding_id = $1",
                ("bigint",),
            )
            data = plan.execute([self.query_id])[0]["vector"]
            vector = vectors.prepare(vectors.from_send(data, 1), self.collection.metric)
        return vector, None

    def _first_count(self, k: int, is_plain: bool) -> int:
        """Choose how many to ask FAISS for at first: most, if not all, will qualify."""
        count = k + (self.query_id is not None)
        if not is_plain:
            return 6 * count
        dead = self.changes.dead_count()
        if dead:
            alive = max(0.1, 1 - dead / max(1, len(self.index.rows.embedding_ids)))
            count = math.ceil(count / alive) + 2
        return count

    def _most_candidates(self) -> int:
        """Return how many candidates FAISS may give before an exact scan is cheaper."""
        if self.index.is_flat:  # scanned whole anyway, and then the list is complete
            return sys.maxsize
        share = int(self.index.index.ntotal * CANDIDATE_SHARE)
        return max(MIN_CANDIDATES, min(MAX_CANDIDATES, share))

    def _candidates(
        self, query: NDArray[np.float32], entry: int | None, count: int
    ) -> tuple[list[Any], list[float], float]:
        """Return keys and squared distances, nearest first, and how far the list is complete."""
        index = self.index
        complete = math.inf
        keys: list[Any] = []
        squared: NDArray[np.float32] = np.empty(0, dtype=np.float32)
        if index.index.ntotal:
            positions, squared = index.search(query, count, entry)
            if len(positions) < index.index.ntotal:
                complete = float(squared[-1]) if len(positions) else 0.0
            rows, squared = index.expand(positions, squared)
            dead = self.changes.is_dead(rows)
            if dead is not None:
                rows, squared = rows[~dead], squared[~dead]
            if index.rows.keys is not None:
                keys = index.rows.keys[rows].tolist()
            else:
                keys = [index.rows.key(row) for row in rows.tolist()]
        distances: list[float] = squared.tolist()
        more_to_sort = self.changes.has_additions
        if more_to_sort:
            more, near, complete_here = self._pending(query, count)
            keys = keys + more
            distances = distances + near
            complete = min(complete, complete_here)
        return *in_order(keys, distances, more_to_sort), complete

    def _pending(
        self, query: NDArray[np.float32], count: int
    ) -> tuple[list[Any], list[float], float]:
        if not self.is_restricted:
            return self.changes.nearest(query, count)
        # Under row-level security, what this caller sees may change from one call to the next, so
        # nothing of it is kept.
        collection = self.collection
        key = "e.key" if collection.has_integer_keys else "e.key::text"
        plan = prepare(
            self.plpy,
            f"SELECT {key} AS key, {collection.vector_schema}.vector_send(e.embedding) AS vector"
            f" FROM {collection.pending} AS p INNER JOIN {collection.embeddings} AS e"
            " ON e.embedding_id = p.embedding_id WHERE NOT p.deleted"
            f" ORDER BY e.embedding {collection.distance_operator} $1 LIMIT $2",
            (collection.vector_type, "bigint"),
        )
        rows = list(plan.execute([vectors.to_text(query[0]), count]))
        if not rows:
            return [], [], math.inf
        matrix = vectors.from_send(b"".join(row["vector"] for row in rows), len(rows))
        near = vectors.squared_distances(vectors.prepare(matrix, collection.metric), query)
        complete = math.inf if len(rows) < count else float(near.max()) * (1 - 1e-5)
        return [row["key"] for row in rows], near.tolist(), complete

    def _qualifying(
        self,
        request: Request,
        keys: list[Any],
        squared: list[float],
        near: float,
        is_plain: bool,
        conditions: Conditions,
        checked: dict[Any, bool],
    ) -> tuple[list[Any], list[float]]:
        """Return the first k candidates within ``near`` that the table says qualify."""
        assert request.k is not None
        end = bisect.bisect_right(squared, near)
        if request.key is not None and request.key in keys:
            own = keys.index(request.key)
            del keys[own], squared[own]
            end -= own < end
        taken: tuple[list[Any], list[float]] = ([], [])
        place = 0
        while place < end and len(taken[0]) < request.k:
            after = min(end, place + request.k - len(taken[0])) if is_plain else end
            self._check(
                [key for key in keys[place:after] if key not in checked], conditions, checked
            )
            for key, distance in zip(keys[place:after], squared[place:after], strict=True):
                if checked[key] and len(taken[0]) < request.k:
                    taken[0].append(key)
                    taken[1].append(distance)
            place = after
        return taken

    def _check(self, keys: list[Any], conditions: Conditions, checked: dict[Any, bool]) -> None:
        """Ask the collection's own table, as the invoker, which rows are there and qualify."""
        if not keys:
            return
        collection = self.collection
        plan = None if conditions.clauses else collection.plans.get("check")
        if plan is None:
            plan, values = self._check_plan(keys, conditions)
        else:
            values = [keys]
        checked.update(dict.fromkeys(keys, False))
        for row in plan.execute(values):
            checked[row["key"]] = True

    def _check_plan(self, keys: list[Any], conditions: Conditions) -> tuple[Any, list[Any]]:
        collection = self.collection
        where = conditions.copy()
        type_name = "bigint[]" if collection.has_integer_keys else collection.key_array
        key = f"b.{collection.key_column}"
        shown = key if collection.has_integer_keys else f"{key}::text"
        clauses = [f"{key} = ANY({where.parameter(type_name, keys)})", *where.clauses]
        plan = prepare(
            self.plpy,
            f"SELECT {shown} AS key FROM {collection.relation} AS b WHERE {' AND '.join(clauses)}",
            tuple(where.types),
        )
        if not conditions.clauses:
            collection.plans["check"] = plan
        return plan, where.values


def in_order(
    keys: list[Any], distances: list[float], is_mixed: bool = False
) -> tuple[list[Any], list[float]]:
    """Sort by distance and then by key.

    FAISS has sorted by distance, unless ``is_mixed``; equal distances are for the keys to order.
    """
    if is_mixed or len(set(distances)) < len(distances):
        order = sorted(range(len(keys)), key=lambda place: (distances[place], keys[place]))
        return [keys[place] for place in order], [distances[place] for place in order]
    return keys, distances


def to_distances(squared: list[float], metric: str) -> list[float]:
    """Turn squared Euclidean distances of prepared vectors into those that callers see."""
    if metric == "cosine":
        return [0.5 * square for square in squared]
    return [math.sqrt(square) for square in squared]


def _squared_limit(max_distance: float, metric: str) -> float:
    """Return the squared Euclidean distance between prepared vectors that a distance means."""
    if max_distance < 0:
        return -1.0
    if metric == "cosine":
        return 2 * max_distance
    # The largest square whose root, as callers see it, is still within.
    distance = np.float32(max_distance)
    limit = distance * distance
    while np.isfinite(limit) and np.sqrt(np.nextafter(limit, np.float32(np.inf))) <= distance:
        limit = np.nextafter(limit, np.float32(np.inf))
    while np.sqrt(limit) > distance:
        limit = np.nextafter(limit, np.float32(0))
    return float(limit)
