"""Sessions that insert, delete, update and search while index builds run back to back."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import psycopg

from tests.scenarios.gallery import (
    Connection,
    Content,
    Found,
    Gallery,
    check_files,
    check_tables,
    insert,
    prepare,
    search_in_one_statement,
)
from tests.support import in_threads, one

LEAST = 0.99
# A row that was there a moment ago may be gone: the caller of a search by id asks for that error.
GONE = psycopg.errors.NoDataFound


@dataclass
class Mixed:
    """Eight sessions (and one that builds) for some seconds, then all checks once more.

    Rows belong to a session by ``image_id`` modulo the number of sessions. Of rows of others, one
    statement changes at most one, so that no deadlock is the workload's own doing.

    Args:
        rows: how many are loaded at first.
        sessions: how many sessions beside the one that builds.
    """

    connect: Callable[[], Connection]
    images: Gallery
    rows: int
    seconds: float
    sessions: int = 8
    seed: int = 0
    report: Callable[[str], None] = print
    done: Counter[str] = field(default_factory=Counter)
    found: Found = field(default_factory=Found)
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        owner = self.connect()
        prepare(owner, self.images)
        insert(owner, self.images.files[: self.rows])
        bodies: list[Callable[[], object]] = [self.builder, partial(self.stop.wait, self.seconds)]
        bodies += [partial(self.session, number) for number in range(self.sessions)]
        errors = in_threads(*(partial(self.guarded, body) for body in bodies))
        self.report(", ".join(f"{what} {count}" for what, count in sorted(self.done.items())))
        self.report(f"recall@10 meanwhile {self.found.recall:.4f}, {self.found.searches} searches")
        for error in errors[:5]:
            self.report(f"{type(error).__name__}: {error}")
        if errors:
            raise errors[0]
        assert self.found.recall >= LEAST
        self.check_end(owner)

    def guarded(self, body: Callable[[], object]) -> None:
        """Run a thread's body; the first that ends, by an error or in time, stops all."""
        try:
            body()
        finally:
            self.stop.set()

    def count(self, what: str, found: Found | None = None) -> None:
        """Note that something was done."""
        with self._lock:
            self.done[what] += 1
            if found is not None:
                self.found.add(found)

    # --- sessions -------------------------------------------------------------------------------

    def builder(self) -> None:
        """Build back to back; by other parameters, now and then in a longer transaction."""
        session = self.connect()
        for number in itertools.count(1):
            if self.stop.is_set():
                return
            is_rolled_back = number % 14 == 7
            with session.transaction(force_rollback=is_rolled_back):
                session.execute("SELECT build_index(threads => 1)")
                if number % 7 == 0:
                    time.sleep(0.1)
            self.count("builds rolled back" if is_rolled_back else "builds")

    def session(self, number: int) -> None:
        """One session: random operations, each with checks."""
        random = np.random.default_rng([self.seed, number])
        session = self.connect()
        operations = [
            (self.search_image, 5),
            (self.search_id, 5),
            (self.add, 3),
            (self.delete, 2),
            (self.update_own, 2),
            (self.update_any, 2),
            (self.move_key, 1),
            (self.give_up, 1),
            (self.old_snapshot, 1),
            (self.cursor, 1),
            (self.replicate, 1),
        ]
        weights = np.array([weight for _, weight in operations], dtype=float)
        while not self.stop.is_set():
            operation = operations[random.choice(len(operations), p=weights / weights.sum())][0]
            if random.random() < 0.02:
                session.close()
                session = self.connect()
            operation(session, number, random)

    def a_file(self, random: np.random.Generator) -> int:
        """Choose an image of the gallery, of a small part of it more often than not: copies."""
        few = random.random() < 0.3
        return int(random.integers(50 if few else len(self.images)))

    def search_image(self, session: Connection, number: int, random: np.random.Generator) -> None:
        """Search by image, sometimes with a filter or for many."""
        k = int(random.choice([1, 10, 10, 10, 200]))
        condition = {"split": str(random.integers(10))} if random.random() < 0.3 else None
        found = search_in_one_statement(
            session,
            self.images,
            image=self.a_file(random),
            k=k,
            condition=condition,
            what=f"search for {k} by image, filter {condition}",
        )
        self.count("searches by image", found if k == 10 else None)

    def search_id(self, session: Connection, number: int, random: np.random.Generator) -> None:
        """Search by the id of a row that was there a moment ago."""
        image_id = self.some_id(session, random)
        try:
            found = search_in_one_statement(
                session, self.images, image_id=image_id, what=f"search by id {image_id}"
            )
        except GONE:
            self.count("searches for a row just deleted")
        else:
            self.count("searches by id", found)

    def some_id(self, session: Connection, random: np.random.Generator) -> int:
        query = (
            "SELECT image_id FROM siamese.images WHERE image_id >= %s * (SELECT max(image_id)"
            " FROM siamese.images) ORDER BY image_id LIMIT 1"
        )
        return int(one(session, query, float(random.random() ** 0.7)))

    def add(self, session: Connection, number: int, random: np.random.Generator) -> None:
        """Insert some images; at once they must be found."""
        places = [self.a_file(random) for _ in range(int(random.choice([1, 1, 5, 20])))]
        ids = insert(session, [self.images.files[place] for place in places], places[0])
        self.count("inserts")
        found = session.execute(
            "SELECT s.distance, b.image_id FROM similar_images(%s, 1) AS s"
            " LEFT JOIN siamese.images AS b USING (image_id)",
            (self.images.files[places[-1]],),
        ).fetchone()
        # Others may have changed the row meanwhile, but hardly all copies of a fresh one.
        assert found is not None and found[1] is not None, f"{ids} not found at once"
        self.count("inserts found at once" if found[0] < 1e-5 else "inserts changed meanwhile")

    def delete(self, session: Connection, number: int, random: np.random.Generator) -> None:
        """Delete some rows of its own, and as many as keep the table's size."""
        session.execute(
            "DELETE FROM siamese.images WHERE image_id IN (SELECT image_id FROM siamese.images"
            " WHERE image_id %% %s = %s AND image_id >= %s ORDER BY image_id LIMIT %s)",
            (self.sessions, number, self.some_id(session, random), int(random.choice([1, 5, 20]))),
        )
        self.count("deletes")

    def update_own(self, session: Connection, number: int, random: np.random.Generator) -> None:
        """Give some rows of its own another image, some the same one."""
        file = self.images.files[self.a_file(random)]
        session.execute(
            "UPDATE siamese.images SET image = CASE WHEN image_id %% 3 = 0 THEN image ELSE %s END"
            " WHERE image_id IN (SELECT image_id FROM siamese.images WHERE image_id %% %s = %s"
            " AND image_id >= %s ORDER BY image_id LIMIT 5)",
            (file, self.sessions, number, self.some_id(session, random)),
        )
        self.count("updates")

    def update_any(self, session: Connection, number: int, random: np.random.Generator) -> None:
        """Change one of a few rows that all sessions fight for."""
        session.execute(
            "UPDATE siamese.images SET image = %s WHERE image_id = (SELECT image_id"
            " FROM siamese.images ORDER BY image_id OFFSET %s LIMIT 1)",
            (self.images.files[self.a_file(random)], int(random.integers(4))),
        )
        self.count("updates of contended rows")

    def move_key(self, session: Connection, number: int, random: np.random.Generator) -> None:
        """Delete a row and insert another image by the same key, in one transaction or two."""
        row = session.execute(
            "SELECT image_id FROM siamese.images WHERE image_id %% %s = %s AND image_id >= %s"
            " ORDER BY image_id LIMIT 1",
            (self.sessions, number, self.some_id(session, random)),
        ).fetchone()
        if row is None:
            return
        if random.random() < 0.5:
            session.execute("BEGIN")
        session.execute("DELETE FROM siamese.images WHERE image_id = %s", row)
        session.execute(
            "INSERT INTO siamese.images (image_id, image, dataset, split, label, source)"
            " VALUES (%s, %s, '0', '1', '2', '3')",
            (row[0], self.images.files[self.a_file(random)]),
        )
        session.execute("COMMIT")
        self.count("keys used again")

    def give_up(self, session: Connection, number: int, random: np.random.Generator) -> None:
        """Change, search, roll back to a savepoint, search, roll all back."""
        session.execute("BEGIN")
        self.add(session, number, random)
        session.execute("SAVEPOINT here")
        self.delete(session, number, random)
        self.update_own(session, number, random)
        self.search_image(session, number, random)
        session.execute("ROLLBACK TO here")
        self.search_image(session, number, random)
        session.execute("ROLLBACK")
        self.search_image(session, number, random)
        self.count("rollbacks")

    def old_snapshot(self, session: Connection, number: int, random: np.random.Generator) -> None:
        """Search several times in a REPEATABLE READ transaction, while builds go on."""
        session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        image_id = self.some_id(session, random)
        for step in range(3):
            # In this snapshot the row stays, whatever others do.
            found = search_in_one_statement(
                session, self.images, image_id=image_id, what=f"old snapshot, id {image_id}"
            )
            self.count("searches in old snapshots", found)
            self.search_image(session, number, random)
            if step == 1 and random.random() < 0.5:
                self.add(session, number, random)
            time.sleep(float(random.random()) * 0.4)
        session.execute("COMMIT" if random.random() < 0.7 else "ROLLBACK")

    def cursor(self, session: Connection, number: int, random: np.random.Generator) -> None:
        """Search in the snapshot of a cursor, and in newer ones between its rows."""
        session.execute("BEGIN")
        session.execute(
            "DECLARE old CURSOR FOR SELECT p.image_id, a.strangers, a.wrong, a.number, a.there"
            " FROM (SELECT b.image_id FROM siamese.images AS b WHERE b.image_id >= %s"
            "   ORDER BY b.image_id LIMIT 4) AS p"
            " CROSS JOIN LATERAL (SELECT count(*) FILTER (WHERE b.image_id IS NULL) AS strangers,"
            "   count(*) FILTER (WHERE abs((t.vector OPERATOR(public.<=>) (SELECT o.vector"
            "     FROM public.truth AS o INNER JOIN siamese.images AS i USING (digest)"
            "     WHERE i.image_id = p.image_id)) - s.distance) > 1e-5) AS wrong,"
            "   count(DISTINCT s.image_id) AS number,"
            "   (SELECT least(count(*) - 1, 10) FROM siamese.images) AS there"
            "   FROM similar_images(image_id => p.image_id) AS s"
            "   LEFT JOIN siamese.images AS b USING (image_id)"
            "   LEFT JOIN public.truth AS t USING (digest)) AS a",
            (self.some_id(session, random),),
        )
        for _ in range(3):
            row = session.execute("FETCH 1 FROM old").fetchone()
            if row is not None:
                assert row[1:] == (0, 0, row[4], row[4]), f"cursor: {row}"
            self.search_image(session, number, random)
            if random.random() < 0.3:
                self.add(session, number, random)
        session.execute("COMMIT")
        self.count("cursors")

    def replicate(self, session: Connection, number: int, random: np.random.Generator) -> None:
        """Insert without triggers, as a replica does, and fill the gap in the same transaction."""
        session.execute("BEGIN")
        session.execute("SET LOCAL session_replication_role = replica")
        insert(session, [self.images.files[self.a_file(random)] for _ in range(3)])
        session.execute("SET LOCAL session_replication_role = origin")
        session.execute("SELECT backfill()")
        session.execute("COMMIT")
        self.count("backfills")

    # --- the end --------------------------------------------------------------------------------

    def check_end(self, owner: Connection) -> None:
        """Check everything at rest: tables, recall in a new session, a last build, files."""
        check_tables(owner)
        for step in ("at the end", "after a last build"):
            session = self.connect()
            content = Content.read(session, self.images)
            total = Found()
            random = np.random.default_rng(self.seed)
            for _ in range(50):
                place, row = self.a_file(random), int(random.integers(len(content.ids)))
                total.add(content.check(session, self.images, image=place, what=step))
                total.add(content.check(session, self.images, row=row, what=step))
            self.report(f"{step}: recall@10 {total.recall:.4f}, {len(content.ids)} rows")
            assert total.recall >= LEAST
            owner.execute("SELECT build_index()")
        check_tables(owner)
        check_files(owner)
        status = owner.execute(
            "SELECT rows_embedded, pending, dead, generation_file FROM siamese.collection_status"
        ).fetchone()
        rows = len(content.ids)
        assert status == (rows, 0, 0, "present"), f"status {status} with {rows} rows"
