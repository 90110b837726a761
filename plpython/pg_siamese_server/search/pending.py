"""Keep the changes that no index generation has, per session, up to date with each snapshot.

Every row of a collection's pending table names the transaction that wrote it. Changes by
transactions before the oldest running one are *settled*, and read once. Younger ones are *open*,
and each search reads them again. So a search costs what is new, not what is pending.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pg_siamese_server import vectors
from pg_siamese_server.catalog import Collection, prepare
from pg_siamese_server.index.generations import SUBTRACTED
from pg_siamese_server.search.request import Neighbours

if TYPE_CHECKING:
    from pg_siamese_server.index.generations import Generation

# Most bytes of vectors in a session. With more pending, pgvector scans the table instead.
MAX_BYTES = 12 * 1024 * 1024


@dataclass(frozen=True)
class Snapshot:
    """A snapshot as ``pg_current_snapshot()`` prints it."""

    text: str
    xmin: int
    xmax: int

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """Parse ``xmin:xmax:xip,xip``. On a standby the list of running transactions is empty."""
        xmin, xmax, _ = text.split(":", 2)
        return cls(text, int(xmin), int(xmax))

    def includes(self, other: Snapshot) -> bool:
        """Return whether whatever is settled for ``other`` is settled for this snapshot."""
        return self.xmin >= other.xmin

    def sees_all_of(self, other: Snapshot) -> bool:
        """Return whether this snapshot certainly sees all that ``other`` sees.

        Both bounds only grow, so the snapshot with a larger bound is the later one. If both bounds
        are equal, this is certain only if nothing was running between them.
        """
        return (
            self.xmax > other.xmax or self.xmin > other.xmin or self.xmin == self.xmax == other.xmax
        )


class Added:
    """Vectors added since the build of the generation, in a flat index of their own."""

    def __init__(self, dimension: int) -> None:
        self.ids: list[int] = []
        self.keys: list[Any] = []
        self._index = faiss.IndexFlatL2(dimension)

    def extend(self, ids: list[int], keys: list[Any], matrix: NDArray[np.float32]) -> None:
        """Append rows. The matrix is float32 (rows, dimension), prepared."""
        self.ids.extend(ids)
        self.keys.extend(keys)
        self._index.add(matrix)

    def discard(self, dead: set[int]) -> None:
        """Remove rows that were deleted again."""
        kept = [place for place, item in enumerate(self.ids) if item not in dead]
        if len(kept) < len(self.ids):
            matrix = self._index.reconstruct_n(0, len(self.ids))[kept]
            ids = [self.ids[place] for place in kept]
            keys = [self.keys[place] for place in kept]
            self.__init__(self._index.d)  # type: ignore[misc]
            self.extend(ids, keys, matrix)

    def nearest(
        self, query: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return places and squared distances of the nearest, exactly, at most ``count``."""
        squared, places = self._index.search(query, min(count, len(self.ids)))
        return places[0], squared[0]

    def nearest_each(
        self, queries: NDArray[np.float32], count: int, poll: Callable[[], None]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the same of many queries, (queries, at most ``count``)."""
        places, squared = [], []
        for start in range(0, len(queries), SUBTRACTED):
            part = queries[start : start + SUBTRACTED]
            near = self._index.search(part, min(count, len(self.ids)))
            squared.append(near[0])
            places.append(near[1])
            poll()
        return np.concatenate(places), np.concatenate(squared)

    def find(self, embedding_id: int) -> NDArray[np.float32] | None:
        """Return an added vector, float32 (1, dimension), or None."""
        if embedding_id not in self.ids:
            return None
        vector: NDArray[np.float32] = self._index.reconstruct(self.ids.index(embedding_id))
        return vector[None]


@dataclass(eq=False, repr=False)
class Changes:
    """What a session knows of one collection's pending table, for one generation.

    Attributes:
        generation: its number.
        index: the generation itself.
        snapshot: the last one that this was brought up to date for.
        horizon: transactions before it are settled.
        added, unfetched: settled additions, with their vectors and still without.
        dead: settled deletions of vectors that are not in the generation.
        open_ids, open_added, open_dead: what the last snapshot saw of open transactions.
        is_restricted: whether row-level security hid rows from the last caller.
    """

    generation: int
    index: Generation
    snapshot: Snapshot | None = None
    horizon: int = 0
    added: Added = field(init=False)
    unfetched: set[int] = field(default_factory=set)
    dead: set[int] = field(default_factory=set)
    open_ids: set[int] = field(default_factory=set)
    open_added: Added = field(init=False)
    open_dead: set[int] = field(default_factory=set)
    is_restricted: bool = False
    _dead_rows: NDArray[np.bool_] | None = None
    _dead_row_count: int = 0

    def __post_init__(self) -> None:
        self.added = Added(self.index.index.d)
        self.open_added = Added(self.index.index.d)

    def usable_for(self, generation: int, snapshot: Snapshot) -> bool:
        """Return whether what is settled for this object is also settled for this snapshot."""
        return self.generation == generation and (
            self.snapshot is None or snapshot.includes(self.snapshot)
        )

    def is_up_to_date(self, generation: int, snapshot: str, opened: list[int] | None) -> bool:
        """Return whether it was updated for this very snapshot, with nothing left to fetch."""
        return (
            self.snapshot is not None
            and self.snapshot.text == snapshot
            and self.generation == generation
            and not opened
            and not self.open_ids
            and not self.open_dead
            and not self.unfetched
        )

    def take(self, settled: list[int] | None, opened: list[int] | None, snapshot: Snapshot) -> None:
        """Record changes as embedding_ids, which are negative for deletions."""
        if settled:
            changes = np.array(settled, dtype=np.int64)
            self.unfetched.update(changes[changes > 0].tolist())
            self._note_dead(-changes[changes < 0])
            self.unfetched -= self.dead
        self.snapshot = snapshot
        self.horizon = snapshot.xmin
        self.open_dead = {-change for change in opened or () if change < 0}
        self.open_ids = {change for change in opened or () if change > 0} - self.open_dead

    @property
    def is_empty(self) -> bool:
        """Whether the generation holds all that the last snapshot saw."""
        return not (
            self.snapshot is None
            or self.has_additions
            or self._dead_row_count
            or self.dead
            or self.open_dead
        )

    @property
    def has_additions(self) -> bool:
        """Whether the generation may lack vectors."""
        return bool(self.added.ids or self.unfetched or self.open_ids)

    def is_too_large(self) -> bool:
        """Return whether a scan by pgvector is better than a copy in this session."""
        return self.addition_bytes() > MAX_BYTES

    def addition_count(self) -> int:
        """Return how many vectors the generation lacks, at most."""
        return len(self.added.ids) + len(self.unfetched) + len(self.open_ids)

    def addition_bytes(self) -> int:
        """Return how many bytes the vectors have that the generation lacks, at most."""
        return self.addition_count() * int(self.index.index.d) * 4

    def read_added(
        self, plpy: Any, collection: Collection
    ) -> tuple[list[int], list[Any], NDArray[np.float32]]:
        """Read all vectors that the generation lacks, as the invoker sees them, and keep none.

        Returns:
            Their embedding_ids and items (``Collection.items``), and float32 (rows, dimension).
        """
        ids = ({*self.added.ids} | self.unfetched | self.open_ids) - self.open_dead
        return _fetch(plpy, collection, sorted(ids))

    def fetch(self, plpy: Any, collection: Collection) -> None:
        """Read the missing vectors, as the invoker sees them."""
        if self.unfetched:
            ids, keys, matrix = _fetch(plpy, collection, sorted(self.unfetched))
            if ids:
                self.added.extend(ids, keys, matrix)
                # A vector that is not visible was deleted by this very transaction. It may be
                # rolled back, so it is asked for again next time.
                self.unfetched.difference_update(ids)
        if set(self.open_added.ids) != self.open_ids:
            self.open_added = Added(self.index.index.d)
            if self.open_ids:
                self.open_added.extend(*_fetch(plpy, collection, sorted(self.open_ids)))

    def _note_dead(self, ids: NDArray[np.int64]) -> None:
        """Record settled deletions: a bit per row of the generation, and a set of all others."""
        if not len(ids):
            return
        rows = self.index.rows_of(ids)
        if len(rows):
            if self._dead_rows is None:
                self._dead_rows = np.zeros(len(self.index.rows.embedding_ids), dtype=bool)
            self._dead_rows[rows] = True
            self._dead_row_count += len(rows)
        if len(rows) < len(ids):
            held = self.index.rows.embedding_ids[rows]
            self.dead.update(ids[~np.isin(ids, held)].tolist())
            self.added.discard(self.dead)

    def is_dead(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.bool_] | None:
        """Return which rows of the generation are deleted or replaced, or None if none are."""
        if self._dead_rows is None and not self.open_dead:
            return None
        if self._dead_rows is None:
            result = np.zeros(len(rows), dtype=bool)
        else:
            result = self._dead_rows[rows]
        if self.open_dead:
            ids = np.fromiter(self.open_dead, dtype=np.int64, count=len(self.open_dead))
            result |= np.isin(self.index.rows.embedding_ids[rows], ids)
        return result

    def dead_count(self) -> int:
        """Return how many rows of the generation are deleted or replaced, at most."""
        return self._dead_row_count + len(self.open_dead)

    def nearest(self, query: NDArray[np.float32], count: int) -> Neighbours:
        """Find the nearest of the added vectors, exactly and in no order."""
        found = Neighbours()
        for added in (self.added, self.open_added):
            if not added.ids:
                continue
            places, squared = added.nearest(query, count + len(self.open_dead))
            if len(places) < len(added.ids):
                found.complete = min(found.complete, float(squared[-1]))
            for place, distance in zip(places.tolist(), squared.tolist(), strict=True):
                if added.ids[place] not in self.open_dead:
                    found.keys.append(added.keys[place])
                    found.squared.append(distance)
        return found

    def nearest_each(
        self, queries: NDArray[np.float32], count: int, poll: Callable[[], None]
    ) -> tuple[NDArray[np.int64], list[Any], NDArray[np.float32], NDArray[np.float64]]:
        """Find the nearest of the added vectors for each of many queries, in no order.

        Returns:
            Of each row found: the number of its query, its item (``Collection.items``) and its
            squared distance. Of each query: the squared distance within which no row is missing.
        """
        complete = np.full(len(queries), math.inf)
        owners, distances = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        keys: list[Any] = []
        for added in (self.added, self.open_added):
            if not added.ids:
                continue
            places, squared = added.nearest_each(queries, count + len(self.open_dead), poll)
            if places.shape[1] < len(added.ids):
                complete = np.minimum(complete, squared[:, -1])
            alive = np.isin(np.array(added.ids)[places], list(self.open_dead), invert=True)
            owners.append(np.nonzero(alive)[0])
            distances.append(squared[alive])
            keys += [added.keys[place] for place in places[alive].tolist()]
        return np.concatenate(owners), keys, np.concatenate(distances), complete

    def find(self, embedding_id: int) -> NDArray[np.float32] | None:
        """Return an added vector, float32 (1, dimension), or None."""
        found = self.added.find(embedding_id)
        return self.open_added.find(embedding_id) if found is None else found


def _fetch(
    plpy: Any, collection: Collection, ids: list[int]
) -> tuple[list[int], list[Any], NDArray[np.float32]]:
    plan = prepare(
        plpy,
        f"SELECT e.embedding_id AS id, {collection.label} AS label,"
        f" {collection.vector_schema}.vector_send(e.embedding) AS vector"
        f" FROM {collection.embeddings} AS e WHERE e.embedding_id = ANY($1)",
        ("bigint[]",),
    )
    rows = list(plan.execute([ids]))
    if not rows:
        return [], [], np.empty((0, collection.dimension), dtype=np.float32)
    matrix = vectors.from_send(b"".join(row["vector"] for row in rows), len(rows))
    prepared = vectors.prepare(matrix, collection.metric)
    return [row["id"] for row in rows], collection.items([row["label"] for row in rows]), prepared
