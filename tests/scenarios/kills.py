"""Kill the server under mixed load, again and again, and compare it with what clients were told.

Each writer owns some keys and remembers what was committed. Of a transaction whose COMMIT had no
answer, all or nothing may be there. Everything else must be as it was told: each committed row,
with the vector of its image, found once by every engine; nothing that was not committed.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import psycopg
from psycopg import sql

from pg_siamese.client.connection import CommandError, NoServerError
from pg_siamese.worker import Options, Signals, Worker
from tests.faults.checks import check_answers
from tests.faults.cluster import RESTART_SECONDS, FaultyCluster
from tests.scenarios.gallery import (
    DISTANCE_TOLERANCE,
    Connection,
    Gallery,
    check_no_orphans,
    check_tables,
    index_directory,
    prepare,
    search_in_one_statement,
)
from tests.support import one, wait_until

WRITERS = 4
DEFERRED_FROM = 2  # the writers from this one on write to the deferred collection
MOST_ROWS = 120  # of a writer; with more, it deletes
LONGEST_SECONDS = 1.0  # from when all sessions are at work to a random kill
COLD_SHARE = 0.15  # of the kills come earlier, while sessions begin
DRAIN_SECONDS = 10.0  # how long what is queued may take, after the crash
WATCH_SECONDS = 3.0  # how long to wait for a file that is being published
# The only errors that a crash may give; all others are failures of the test.
CRASHES = ("57P01", "57P02", "57P03", "08006", "08003", "08001", None)


@dataclass(frozen=True)
class Table:
    """A table with a collection: its name, that of its key column and of its vector table."""

    name: str
    key: str
    number: int

    @property
    def identifier(self) -> sql.Composable:
        """The table's name for SQL text."""
        return sql.Identifier(*self.name.split("."))


IMAGES = Table("siamese.images", "image_id", 1)
ARCHIVE = Table("public.archive", "archive_id", 2)


@dataclass
class Writer:
    """What one client has been told.

    Attributes:
        number: keys of this writer are this, modulo WRITERS.
        table: where it writes.
        rows: place in the gallery of each committed row's image, by key.
        maybe: the same, if a transaction whose end is not known was committed.
    """

    number: int
    table: Table
    rows: dict[int, int] = field(default_factory=dict)
    maybe: dict[int, int] | None = None
    next_key: int = 0

    def settle(self, there: dict[int, int]) -> str:
        """Compare with what the table has; returns what became of the open transaction."""
        if self.maybe is not None and there == self.maybe:
            self.rows, self.maybe = self.maybe, None
            return "unanswered, committed"
        missing = {key for key in self.rows if there.get(key) != self.rows[key]}
        phantoms = {key for key in there if there[key] != self.rows.get(key)}
        assert not missing and not phantoms, (
            f"{self.table.name}: lost or changed {sorted(missing)}, never committed"
            f" {sorted(phantoms)}"
        )
        was_open, self.maybe = self.maybe is not None, None
        return "unanswered, not committed" if was_open else "answered"


@dataclass
class Kills:
    """So many cycles of load, kill, recovery and checks.

    Attributes:
        cluster: with a database of which ``dsn`` is the connection string.
        seed: of what is random; when the kernel kills is not.
    """

    cluster: FaultyCluster
    dsn: str
    images: Gallery
    cycles: int
    seed: int
    report: Callable[[str], None] = print
    done: Counter[str] = field(default_factory=Counter)
    errors: list[BaseException] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _at_work: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.writers = [
            Writer(number, IMAGES if number < DEFERRED_FROM else ARCHIVE, next_key=number)
            for number in range(WRITERS)
        ]
        self.directories: list[Path] = []

    def run(self) -> None:
        with self.connect("owner") as owner:
            prepare(owner, self.images)
            owner.execute(
                "CREATE TABLE public.archive (archive_id bigint PRIMARY KEY, image bytea NOT NULL,"
                " digest uuid GENERATED ALWAYS AS (md5(image)::uuid) STORED)"
            )
            owner.execute("SELECT create_collection('archive', 'archive', embed => 'deferred')")
            place = index_directory(owner)
            self.directories = [place.with_name(str(each.number)) for each in (IMAGES, ARCHIVE)]
        for number in range(self.cycles):
            what = self.cycle(number)
            try:
                self.check(number)
            except AssertionError as error:
                raise AssertionError(f"cycle {number}, {what}: {error}") from error
            if number % 10 == 9:
                self.report(f"{number + 1} cycles")
        self.report(", ".join(f"{what} {count}" for what, count in sorted(self.done.items())))

    def connect(self, name: str) -> Connection:
        return psycopg.connect(self.dsn, autocommit=True, application_name=name)

    def count(self, what: str, number: int = 1) -> None:
        """Note that something was done, and that the thread is at work."""
        with self._lock:
            self.done[what] += number
            self._at_work.add(threading.current_thread().name)

    # --- one cycle ------------------------------------------------------------------------------

    def cycle(self, number: int) -> str:
        """Put load on, kill, and start again; returns what was done."""
        self._stop.clear()
        self._at_work.clear()
        signals = Signals()
        bodies: dict[str, Callable[[], None]] = {
            f"writer {writer.number}": partial(self.write, writer, number)
            for writer in self.writers
        }
        bodies |= {"builder": partial(self.build, number), "searcher": partial(self.search, number)}
        bodies["worker"] = partial(self.work, signals)
        threads = [
            threading.Thread(target=self.guarded, args=(body,), name=name)
            for name, body in bodies.items()
        ]
        with self.connect("probe") as probe:
            for thread in threads:
                thread.start()
            if self.random.random() >= COLD_SHARE:
                self.await_sessions(set(bodies) - {"worker"})
            moment = self.await_moment()
            if self.random.random() < 0.5:
                victim = "cluster"
                self.cluster.kill()
            else:
                victim = self.kill_one(probe)
            self._stop.set()
            signals.stop()
            self.await_crash(probe)
        for thread in threads:
            thread.join(RESTART_SECONDS)
            assert not thread.is_alive(), f"{thread.name} hangs"
        if self.errors:
            raise self.errors[0]
        self.cluster.recover()
        self.count(f"killed {victim.split(' ')[0]} {moment}")
        return f"killed {victim} {moment}"

    def await_sessions(self, names: set[str]) -> None:
        """Return once all sessions have done something, or one has failed."""
        wait_until(lambda: self._stop.is_set() or not self._at_work < names, "some do not begin")

    def await_moment(self) -> str:
        """Wait for a moment to kill at: any, or when an index file is just being published."""
        if self.random.random() < 0.5:
            time.sleep(float(self.random.random()) * LONGEST_SECONDS)
            return "at random"
        before = self.files()
        deadline = time.monotonic() + WATCH_SECONDS
        while self.files() <= before and time.monotonic() < deadline:
            time.sleep(0.0002)
        time.sleep(float(self.random.random()) * 0.01)
        return "while publishing"

    def files(self) -> set[Path]:
        return {path for directory in self.directories for path in directory.glob("*")}

    def kill_one(self, probe: Connection) -> str:
        """Kill one of the sessions; returns whose it was."""
        sessions = probe.execute(
            "SELECT pid, application_name FROM pg_stat_activity"
            " WHERE datname = current_database() AND backend_type = 'client backend'"
            " AND pid <> pg_backend_pid() ORDER BY application_name"
        ).fetchall()
        builders = [session for session in sessions if session[1] == "builder"]
        if builders and self.random.random() < 0.4:
            sessions = builders
        pid, name = sessions[int(self.random.integers(len(sessions)))]
        self.cluster.kill_backend(pid)
        return str(name)

    def await_crash(self, probe: Connection) -> None:
        """Return once the server has taken notice."""
        deadline = time.monotonic() + RESTART_SECONDS
        try:
            while time.monotonic() < deadline:
                probe.execute("SELECT 1")
                time.sleep(0.002)
        except psycopg.OperationalError:
            return
        raise AssertionError("the server lives on without a killed session")

    # --- sessions -------------------------------------------------------------------------------

    def guarded(self, body: Callable[[], None]) -> None:
        """Run a thread's body until the crash, or until told to stop."""
        try:
            body()
        except psycopg.OperationalError as error:
            if error.sqlstate not in CRASHES:
                self.errors.append(error)
                self._stop.set()
        except (CommandError, NoServerError) as error:  # the worker had no connection yet
            self.count(f"{type(error).__name__} of the worker")
        except BaseException as error:
            self.errors.append(error)
            self._stop.set()

    def write(self, writer: Writer, cycle: int) -> None:
        """Insert, update and delete rows of this writer's keys, in transactions of all kinds."""
        random = np.random.default_rng([self.seed, cycle, writer.number])
        with self.connect(f"writer {writer.number}") as session:
            while not self._stop.is_set():
                state = dict(writer.rows)
                statements = [
                    self.change(writer, state, random)
                    for _ in range(int(random.choice([1, 1, 1, 2, 4])))
                ]
                if len(statements) == 1 and random.random() < 0.7:
                    writer.maybe = state
                    session.execute(*statements[0])
                else:
                    session.execute("BEGIN")
                    for statement in statements:
                        session.execute(*statement)
                    if random.random() < 0.15:
                        session.execute("ROLLBACK")
                        self.count("rollbacks")
                        continue
                    writer.maybe = state
                    session.execute("COMMIT")
                writer.rows, writer.maybe = state, None
                self.count("commits")

    def change(
        self, writer: Writer, state: dict[int, int], random: np.random.Generator
    ) -> tuple[sql.Composed, tuple[object, ...]]:
        """Return a statement, and make its change in ``state``."""
        table = writer.table.identifier, sql.Identifier(writer.table.key)
        size = int(random.choice([1, 1, 3, 10, 25]))
        kind = random.choice(["insert", "insert", "update", "delete"])
        if kind != "insert" and len(state) > size:
            keys = [int(key) for key in random.choice(list(state), size, replace=False)]
            if kind == "delete" or len(state) > MOST_ROWS:
                for key in keys:
                    del state[key]
                return sql.SQL("DELETE FROM {} WHERE {} = ANY(%s)").format(*table), (keys,)
            statement = "UPDATE {} AS t SET image = u.image FROM unnest(%s::bigint[], %s::bytea[])"
            statement += " AS u (key, image) WHERE t.{} = u.key"
        else:
            # Some keys are used again, after their rows have gone.
            first = writer.next_key
            if random.random() < 0.3:
                first = WRITERS * int(random.integers(1 + first // WRITERS)) + writer.number
            keys = [
                key for key in range(first, first + WRITERS * size, WRITERS) if key not in state
            ]
            writer.next_key = max(writer.next_key, first + WRITERS * size)
            statement = "INSERT INTO {} ({}, image) SELECT * FROM unnest(%s::bigint[], %s::bytea[])"
        places = random.integers(len(self.images), size=len(keys)).tolist()
        state |= dict(zip(keys, places, strict=True))
        files = [self.images.files[place] for place in places]
        return sql.SQL(statement).format(*table), (keys, files)

    def build(self, cycle: int) -> None:
        """Build both indexes back to back, now and then rolled back."""
        random = np.random.default_rng([self.seed, cycle, WRITERS])
        with self.connect("builder") as session:
            while not self._stop.is_set():
                name = str(random.choice(["images", "images", "archive"]))
                session.execute("BEGIN")
                session.execute("SELECT build_index(%s, threads => 1)", (name,))
                session.execute("ROLLBACK" if random.random() < 0.2 else "COMMIT")
                self.count("builds")

    def search(self, cycle: int) -> None:
        """Search, and compare with the exact answer of the same snapshot."""
        random = np.random.default_rng([self.seed, cycle, WRITERS + 1])
        with self.connect("searcher") as session:
            while not self._stop.is_set():
                search_in_one_statement(
                    session,
                    self.images,
                    image=int(random.integers(len(self.images))),
                    k=int(random.choice([1, 10, 100])),
                    what=f"under load, cycle {cycle}",
                )
                self.count("searches")

    def work(self, signals: Signals) -> None:
        """Embed what the deferred collection's statements queue, and build its index."""
        options = Options(dsn=self.dsn, poll=0.05, rebuild_pending=200)
        totals = Worker(options, signals=signals).run()
        self.count("embedded by workers", totals.stored)

    # --- checks ---------------------------------------------------------------------------------

    def check(self, cycle: int) -> None:
        """Compare everything with what the writers were told, in a session that knows nothing."""
        with self.connect("check") as session:
            self.check_rows(session)
            # Before anyone embeds what is queued: each row has its vector, or waits for it.
            check_tables(session)
            self.check_images(session)
            self.check_archive(session)
            self.drain_archive(session)
            self.check_archive(session, is_drained=True)
            if cycle % 3 == 2 or cycle == self.cycles - 1:
                for name in ("images", "archive"):
                    session.execute("SELECT build_index(%s)", (name,))
                for directory in self.directories:
                    check_no_orphans(session, directory)
                self.check_images(session)
                self.check_archive(session, is_drained=True)

    def check_rows(self, session: Connection) -> None:
        """Compare the tables with what each writer knows."""
        for table in (IMAGES, ARCHIVE):
            statement = sql.SQL("SELECT {}, digest FROM {}")
            rows = session.execute(
                statement.format(sql.Identifier(table.key), table.identifier)
            ).fetchall()
            there = {key: self.images.places[digest.hex] for key, digest in rows}
            assert len(there) == len(rows)
            for writer in self.writers:
                if writer.table is table:
                    own = {
                        key: place for key, place in there.items() if key % WRITERS == writer.number
                    }
                    self.count(writer.settle(own))
            self.count("rows compared", len(rows))

    def check_images(self, session: Connection) -> None:
        """Search for few and for all rows of ``images``, by each engine."""
        query = "SELECT generation IS NOT NULL FROM siamese.collections WHERE name = 'images'"
        for engine in (
            ("auto", "pgvector", "faiss") if one(session, query) else ("auto", "pgvector")
        ):
            check_answers(session, self.images, engine, f"after the crash, {engine}")

    def drain_archive(self, session: Connection) -> None:
        """Embed what is queued; rows that a writer had locked come again a second later."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline:
            session.execute("SELECT embed_pending('archive')")
            if one(session, "SELECT waiting FROM embedding_queue_status") == 0:
                return
            time.sleep(0.1)

    def check_archive(self, session: Connection, is_drained: bool = False) -> None:
        """Each vector is that of its row's image; each row has one, or is queued; all are found."""
        row = session.execute(
            "SELECT count(*) FILTER (WHERE a.archive_id IS NULL),"
            " count(*) FILTER (WHERE e.embedding OPERATOR(public.<=>) t.vector > 1e-5),"
            " count(*) FILTER (WHERE e.key IS NULL AND NOT EXISTS ("
            "   SELECT FROM siamese.queue_2 AS q WHERE a.archive_id = ANY(q.keys)))"
            " FROM public.archive AS a FULL JOIN siamese.embedding_2 AS e ON e.key = a.archive_id"
            " LEFT JOIN public.truth AS t USING (digest)"
        ).fetchone()
        assert row == (0, 0, 0), f"vectors without row, wrong, rows lost: {row}"
        if not is_drained:
            return
        state = session.execute("SELECT waiting, failures FROM embedding_queue_status").fetchone()
        assert state == (0, 0), f"waiting, failures: {state}"
        place = int(self.random.integers(len(self.images)))
        true = dict(
            session.execute(
                "SELECT a.archive_id, t.vector OPERATOR(public.<=>) %s::public.vector"
                " FROM public.archive AS a INNER JOIN public.truth AS t USING (digest)",
                (str(self.images.vectors[place].tolist()),),
            ).fetchall()
        )
        found = session.execute(
            "SELECT image_id, distance FROM similar_images(%s, k => %s, collection => 'archive')",
            (self.images.files[place], len(true) + 10),
        ).fetchall()
        keys = [key for key, _ in found]
        assert sorted(keys) == sorted(true), "archive: missing, duplicate or foreign rows"
        error = max((abs(true[key] - distance) for key, distance in found), default=0)
        assert error < DISTANCE_TOLERANCE, f"archive: distances wrong by {error}"
