"""Memory of a session: what a search costs, and that none is lost over thousands of statements."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import psycopg
import pytest

from tests.scenarios.gallery import Connection, Gallery, insert
from tests.scenarios.process import MEGABYTE, private_bytes

LARGEST_SESSION = 60 * MEGABYTE
# Of the second half of a long run: less than a hundred bytes a statement is allocators' noise.
LARGEST_SLOPE = 1_000  # bytes a statement; a page more now and then is no leak
SAMPLES = 20


@dataclass
class Memory:
    """Searches and inserts, so many of each kind, in a collection of so many rows."""

    connect: Callable[[], Connection]
    images: Gallery
    rows: int
    statements: int = 1500
    report: Callable[[str], None] = print

    def run(self) -> None:
        owner = self.connect()
        ids = insert(owner, self.images.files[: self.rows])
        owner.execute("SELECT build_index()")
        # Some changes since the build, as there always are.
        ids += insert(owner, self.images.files[self.rows : self.rows + 200])
        self.ids = np.array(ids)
        self.first_search()
        self.session_that_searches()
        for by in ("image", "id"):
            self.slope(f"searches by {by}", self.searches(by))
        self.slope("inserts of a row", self.inserts())
        # Errors take a little more for longer.
        self.slope("failing statements", self.failures(), 2)

    def first_search(self) -> None:
        """Measure the first search of new connections; shown only, since machines differ."""
        for by in ("id", "image"):
            seconds = []
            for number in range(5):
                session = self.connect()
                started = time.monotonic()
                self.search(session, number, by)
                seconds.append(time.monotonic() - started)
                session.close()
            self.report(
                f"first search of a connection by {by}: {1000 * min(seconds):.0f} to"
                f" {1000 * max(seconds):.0f} ms"
            )

    def session_that_searches(self) -> None:
        """A session that searches by image and by id keeps within the bar."""
        session = self.connect()
        pid = session.info.backend_pid
        empty = private_bytes(pid)
        self.search(session, 0, "id")
        after_id = private_bytes(pid)
        for number in range(100):
            self.search(session, number, "id")
            self.search(session, number, "image")
        private = private_bytes(pid)
        self.report(
            f"private memory of a session: {empty / MEGABYTE:.1f} MB new,"
            f" {after_id / MEGABYTE:.1f} MB after one search by id,"
            f" {private / MEGABYTE:.1f} MB after 200 searches"
        )
        assert private <= LARGEST_SESSION

    def search(self, session: Connection, number: int, by: str) -> None:
        if by == "id":
            image_id = int(self.ids[number * 37 % len(self.ids)])
            rows = session.execute(
                "SELECT * FROM similar_images(image_id => %s::bigint)", (image_id,)
            )
        else:
            file = self.images.files[number * 37 % len(self.images)]
            rows = session.execute("SELECT * FROM similar_images(%s::bytea)", (file,))
        assert len(rows.fetchall()) == 10

    def slope(self, what: str, statements: Iterator[int], times: int = 1) -> None:
        """Run the statements of an iterator of backend pids, and see that memory levels off."""
        count = times * self.statements
        taken: list[tuple[int, int]] = []
        every = max(1, count // SAMPLES)
        for number, pid in enumerate(statements):
            if number % every == 0:
                taken.append((number, private_bytes(pid)))
        half = np.array(taken[len(taken) // 2 :], dtype=float)
        slope = float(np.polyfit(half[:, 0], half[:, 1], 1)[0])
        first, last = taken[1][1], taken[-1][1]
        self.report(
            f"{count} {what}: private memory {first / MEGABYTE:.1f} MB near the start,"
            f" {last / MEGABYTE:.1f} MB at the end, slope of the second half {slope:.0f} bytes each"
        )
        assert slope < LARGEST_SLOPE, f"{what}: {taken}"

    def searches(self, by: str) -> Iterator[int]:
        """Search by image or by id, in one session."""
        session = self.connect()
        for number in range(self.statements):
            self.search(session, number, by)
            yield session.info.backend_pid

    def inserts(self) -> Iterator[int]:
        """Insert row by row, in one session."""
        session = self.connect()
        for number in range(self.statements):
            file = self.images.files[number % len(self.images)]
            session.execute("INSERT INTO siamese.images (image) VALUES (%s)", (file,))
            yield session.info.backend_pid

    def failures(self) -> Iterator[int]:
        """Make statements fail, in one session: errors keep tracebacks, if anything does."""
        session = self.connect()
        for number in range(2 * self.statements):
            file = self.images.files[number % len(self.images)][: number % 60]
            sql = (
                "INSERT INTO siamese.images (image) VALUES (%s)"
                if number % 2
                else "SELECT * FROM similar_images(%s::bytea)"
            )
            with pytest.raises(psycopg.DataError):
                session.execute(sql, (file,))
            yield session.info.backend_pid
