"""Search right after each step is exact up to the stated recall."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.scenarios.gallery import (
    FILTERS,
    Connection,
    Content,
    Found,
    Gallery,
    check_files,
    check_tables,
    index_directory,
    insert,
    prepare,
)
from tests.support import notices_of, one, sql_error

LEAST = 0.99


@dataclass
class Recall:
    """The steps, each followed by searches in an old session and in a new one.

    Args:
        images: the last ``held_out`` of them are never inserted.
        rows: how many are loaded at first.
        more: how many are added without a build.
        queries: searches by image, and as many by id, after each step and in each session.
        least_of_step: the recall that each step must have; lower than the bar where so few
            searches can't measure it. All steps together must have LEAST in any case.
    """

    connect: Callable[[], Connection]
    images: Gallery
    rows: int
    more: int
    queries: int
    held_out: int = 500
    least_of_step: float = LEAST
    report: Callable[[str], None] = print
    since: float = field(default_factory=time.monotonic)
    total: Found = field(default_factory=Found)
    _random: Any = field(default_factory=lambda: np.random.default_rng(1))

    def run(self) -> None:
        self.owner = self.connect()
        self.session = self.connect()
        prepare(self.owner, self.images)
        self.load()
        self.build()
        self.insert_more()
        self.delete()
        self.update()
        self.roll_back()
        self.filters()
        self.old_snapshots()
        self.lose_directory()
        self.truncate()
        self.report(f"all steps: recall@10 {self.total.recall:.4f}")
        assert self.total.recall >= LEAST

    # --- steps ----------------------------------------------------------------------------------

    def load(self) -> None:
        """Insert in statements of different sizes, some of which are rolled back."""
        start = 0
        for size in (1, 10, 100, self.rows):
            end = min(self.rows, start + size)
            insert(self.owner, self.images.files[start:end], start)
            with self.owner.transaction(force_rollback=True):
                insert(self.owner, self.images.files[:50])
            start = end
        self.used = self.rows
        self.check("after load", "auto")

    def build(self) -> None:
        """Build the index: from here on FAISS must answer."""
        self.owner.execute("SELECT build_index()")
        kind = "index_type || ', efSearch ' || coalesce(ef_search::text, '-')"
        built = one(self.owner, f"SELECT {kind} FROM siamese.generations")
        self.check(f"after build ({built})", "faiss")

    def insert_more(self) -> None:
        """Insert without a build."""
        end = self.used + self.more
        insert(self.owner, self.images.files[self.used : end], self.used)
        self.used = end
        self.check(f"after {self.more} more", "faiss")

    def delete(self) -> None:
        """Delete a fifth of all rows, in the index and not."""
        self.owner.execute("DELETE FROM siamese.images WHERE image_id % 5 = 0")
        self.check("after deleting 20 %", "faiss")

    def update(self) -> None:
        """Update images to new ones and to copies, other columns, and keys."""
        self.owner.execute("UPDATE siamese.images SET label = label WHERE image_id % 3 = 0")
        rows = self.owner.execute("SELECT image_id FROM siamese.images WHERE image_id % 17 = 1")
        for place, (image_id,) in enumerate(rows.fetchall()):
            file = self.images.files[(place * 7) % (len(self.images) - self.held_out)]
            self.owner.execute(
                "UPDATE siamese.images SET image = %s WHERE image_id = %s", (file, image_id)
            )
        self.owner.execute(
            "UPDATE siamese.images AS a SET image = b.image FROM siamese.images AS b"
            " WHERE a.image_id % 23 = 2 AND b.image_id = a.image_id + 1"
        )
        # To keys that were deleted before, so that the index holds another image by that key.
        self.owner.execute(
            "UPDATE siamese.images SET image_id = image_id - 1"
            " WHERE image_id % 5 = 1 AND image_id % 11 = 3"
        )
        self.check("after updates", "faiss")

    def roll_back(self) -> None:
        """Change a lot in a transaction, search in it, and roll it back; savepoints, too."""
        with self.session.transaction(force_rollback=True):
            self.change(self.session, 3)
            self.check("in a transaction with changes", "faiss", [self.session])
            self.session.execute("SAVEPOINT before")
            self.change(self.session, 4)
            self.check("after a savepoint", "faiss", [self.session])
            self.session.execute("ROLLBACK TO before")
            self.check("after rollback to savepoint", "faiss", [self.session])
        self.check("after rollback", "faiss")

    def filters(self) -> None:
        """Filter by columns that match 100 %, 10 %, 1 % and 0.1 % of the rows."""
        content = Content.read(self.session, self.images)
        for share, (column, modulo) in FILTERS.items():
            found = Found()
            for number in range(2 * self.queries):
                session = (self.session, self.owner)[number % 2]
                condition = {column: str(int(self._random.integers(modulo)))}
                for engine in ("auto", "faiss") if share == 1.0 else ("auto",):
                    for query in self.some_query(content, number):
                        what = {"engine": engine, "what": f"filter on {column}, {query}"}
                        options: Any = query | what | {"condition": condition}
                        found.add(content.check(session, self.images, **options))
            self.conclude(f"filter matching {share:.1%}", found)

    def old_snapshots(self) -> None:
        """Search in REPEATABLE READ transactions older than the last build, and the one before."""
        used, unused, fresh = self.connect(), self.connect(), self.connect()
        for session in (used, unused):
            session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            session.execute("SELECT 1 FROM siamese.models")
        self.check("in a new transaction", "faiss", [used])
        self.change(self.owner, 5)
        self.owner.execute("SELECT build_index()")
        # The generation before the current one stays on disk for them.
        self.check("snapshot older than the last build", "faiss", [used, unused])
        self.check("snapshot newer than the last build", "faiss", [fresh, self.session])
        late = self.connect()
        late.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        late.execute("SELECT 1 FROM siamese.models")
        for step in (6, 7):
            self.change(self.owner, step)
            self.owner.execute("SELECT build_index()")
        self.check("snapshot older than the last three builds", "auto", [used, unused])
        self.check("snapshot whose generation is gone", "auto", [late])
        for session in (used, unused, late):
            session.execute("COMMIT")
        self.check("after the old transactions", "faiss", [used, unused, late, self.session])

    def lose_directory(self) -> None:
        """Remove the index directory: answers stay exact, and a build repairs it."""
        shutil.rmtree(index_directory(self.owner))
        fresh = self.connect()
        notices = notices_of(fresh)
        self.check("after rm -rf of the index directory", "auto", [fresh, self.session])
        assert sum("without its FAISS index" in notice for notice in notices) == 1, notices
        with sql_error("55000"):
            fresh.execute("SELECT similar_images(image_id => 1::bigint, engine => 'faiss')")
        self.change(self.owner, 8)
        self.check("changes after it", "auto", [fresh, self.session])
        self.owner.execute("SELECT build_index()")
        self.check("after the repair", "faiss", [fresh, self.session, self.connect()])
        check_tables(self.owner)
        check_files(self.owner)

    def truncate(self) -> None:
        """Empty the table and load it anew."""
        self.owner.execute("TRUNCATE siamese.images")
        self.check("after truncate", "auto", [self.session, self.owner])
        insert(self.owner, self.images.files[: self.more])
        self.check("after truncate and load", "auto")
        self.owner.execute("SELECT build_index()")
        self.check("after truncate, load and build", "faiss")
        check_tables(self.owner)

    # --- below ----------------------------------------------------------------------------------

    def change(self, session: Connection, step: int) -> None:
        start = (step * 131) % (len(self.images) - self.held_out - 60)
        insert(session, self.images.files[start : start + 60], start)
        session.execute("DELETE FROM siamese.images WHERE image_id %% 29 = %s", (step % 29,))
        session.execute(
            "UPDATE siamese.images AS a SET image = b.image FROM siamese.images AS b"
            " WHERE a.image_id %% 31 = %s AND b.image_id = a.image_id + 3",
            (step % 31,),
        )

    def some_query(self, content: Content, number: int) -> list[dict[str, Any]]:
        """Return searches: by an image that was never inserted, and by some row, if any."""
        queries: list[dict[str, Any]] = [{"image": len(self.images) - 1 - number % self.held_out}]
        if len(content.ids):
            queries.append({"row": int(self._random.integers(len(content.ids)))})
        return queries

    def check(self, step: str, engine: str, sessions: list[Connection] | None = None) -> None:
        """Search by image and by id, in these sessions (an old and a new one by default)."""
        found = Found()
        for session in sessions or [self.session, self.connect()]:
            content = Content.read(session, self.images)
            for number in range(self.queries):
                for query in self.some_query(content, number):
                    options: Any = query | {"engine": engine, "what": f"{step}, {query}"}
                    found.add(content.check(session, self.images, **options))
        self.conclude(step, found)

    def conclude(self, step: str, found: Found) -> None:
        """Report a step's recall and hold it to the bar."""
        took = time.monotonic() - self.since
        self.report(
            f"{step}: recall@10 {found.recall:.4f} of {found.searches} searches ({took:.1f} s)"
        )
        self.since = time.monotonic()
        assert found.recall >= self.least_of_step, f"{step}: recall {found.recall}"
        self.total.add(found)
