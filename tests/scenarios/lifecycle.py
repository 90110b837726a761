"""Collections that come and go while sessions write, search, embed and build, and workers run."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import psycopg

from pg_siamese.worker import LOGGER, Options, Worker
from tests.scenarios.gallery import Connection, Gallery
from tests.support import in_threads

TABLES = ("a", "b", "c")
DROPPED_TABLE = "c"  # the one that is itself dropped now and then
# The errors that are expected: a collection, table, view or row is gone, a collection is there
# already, a build was overtaken, a table has another name at the moment.
CLEAN = {
    "42704": (
        "does not exist",
        "no longer exists",
        "is not one of table",
        "is not a row of a table",
    ),
    "42P01": ("does not exist",),
    "42710": ("already exists",),
    "P0002": ("is not in collection",),
    "55000": ("was truncated or dropped while its index was built", "no longer matches its table"),
}
Body = Callable[[np.random.Generator, Connection], None]
CREATE = "CREATE TABLE IF NOT EXISTS {0} (id integer PRIMARY KEY, image bytea, label text)"


@dataclass
class Lifecycle:
    """Some seconds of it, then checks; ``dsn`` is of the same database, for workers."""

    connect: Callable[[], Connection]
    dsn: str
    images: Gallery
    seconds: float
    seed: int = 0
    report: Callable[[str], None] = print
    done: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """Run all sessions and workers, and check."""
        owner = self.connect()
        for table in TABLES:
            owner.execute(CREATE.format(table))
        bodies: list[Body] = [partial(self.owner, table) for table in TABLES]
        bodies += [self.writer, self.writer, self.searcher, self.searcher]
        bodies += [self.embedder, self.builder, self.watcher]
        workers = [
            Worker(Options(self.dsn, batch=16, poll=0.2, rebuild_pending=10)) for _ in range(2)
        ]
        LOGGER.addFilter(self.said)
        in_threads(
            *(partial(self.guarded, body, number) for number, body in enumerate(bodies)),
            *(partial(self.work, worker) for worker in workers),
            partial(self.end, workers),
        )
        LOGGER.removeFilter(self.said)
        self.report(", ".join(f"{what} {count}" for what, count in sorted(self.done.items())))
        self.report(f"embedded by workers: {sum(worker.totals.stored for worker in workers)}")
        for what, count in sorted(self.refused.items()):
            self.report(f"refused {count:5}: {what}")
        for what, count in Counter(self.errors).most_common():
            self.report(f"ERROR {count}: {what}")
        assert not self.errors
        self.check_end(owner)

    def end(self, workers: list[Worker]) -> None:
        """Tell all to end, when it is time."""
        time.sleep(self.seconds)
        self.stop.set()
        for worker in workers:
            worker.signals.stop()

    def work(self, worker: Worker) -> None:
        """Run a worker, which must go on until it is told to end."""
        try:
            worker.run()
            assert self.stop.is_set(), "ended by itself"
        except BaseException as error:
            self.errors.append(f"worker: {type(error).__name__}: {error}")

    def said(self, record: logging.LogRecord) -> bool:
        """Take a record of a worker's log, which should be about builds only."""
        line = record.getMessage()
        if "built: generation" not in line and "truncated or dropped while" not in line:
            self.errors.append(f"worker: {line}")
        return False

    def guarded(self, body: Body, number: int) -> None:
        """Repeat a body; errors that are not clean are noted."""
        random = np.random.default_rng([self.seed, number])
        session = self.connect()
        while not self.stop.is_set():
            try:
                body(random, session)
            except psycopg.Error as error:
                if session.closed:
                    session = self.connect()
                elif session.info.transaction_status:
                    session.execute("ROLLBACK")
                message = (error.diag.message_primary or str(error)).replace("\n", " ")
                place = (error.diag.context or "").splitlines()[-1:]
                where = f"{error.sqlstate} {message} {place}"
                texts = CLEAN.get(error.sqlstate or "", ())
                # What is the extension's own is nobody's mistake.
                if any(text in message for text in texts) and '"siamese.' not in message:
                    with self._lock:
                        self.refused[f"{error.sqlstate} {re.sub(r'[0-9]+', '…', message)}"] += 1
                else:
                    self.errors.append(where)
            except BaseException as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                self.stop.set()

    def count(self, what: str) -> None:
        """Note that something was done."""
        with self._lock:
            self.done[what] += 1

    def one(self, random: np.random.Generator) -> str:
        return str(random.choice(TABLES))

    def file(self, random: np.random.Generator) -> bytes:
        """Choose an image, or now and then what is none."""
        if random.random() < 0.05:
            return b"junk"
        return self.images.files[int(random.integers(len(self.images)))]

    # --- sessions -------------------------------------------------------------------------------

    def owner(self, table: str, random: np.random.Generator, session: Connection) -> None:
        """Create a collection, change it, and drop it."""
        session.execute(CREATE.format(table))
        with contextlib.suppress(psycopg.errors.UndefinedObject):  # after an error
            session.execute("SELECT drop_collection(%s)", (table,))
        embed = random.choice(["sync", "deferred", "deferred"])
        session.execute(
            "SELECT create_collection(%s, to_regclass(%s), model => 'medical',"
            " on_error => 'quarantine', embed => %s)",
            (table, f"public.{table}", str(embed)),
        )
        self.count("created")
        for _ in range(int(random.integers(4))):
            time.sleep(float(random.random()) * 0.7)
            statements = {
                "altered": ["SELECT alter_collection('{0}', max_pixels => 1000000)"],
                "renewed": ["SELECT renew_collections()"],
                "truncated": ["TRUNCATE {0}"],
                "table renamed": [
                    "ALTER TABLE {0} RENAME TO {0}2",
                    "ALTER TABLE {0}2 RENAME TO {0}",
                ],
                "renamed": [
                    "UPDATE siamese.collections SET name = '{0}2' WHERE name = '{0}'",
                    "UPDATE siamese.collections SET name = '{0}' WHERE name = '{0}2'",
                ],
                "drop rolled back": ["BEGIN", "SELECT drop_collection('{0}')", "ROLLBACK"],
            }
            what = str(random.choice(list(statements)))
            for statement in statements[what]:
                session.execute(statement.format(table))
                time.sleep(float(random.random()) * 0.05)
            self.count(what)
        if table == DROPPED_TABLE and random.random() < 0.4:
            session.execute(f"DROP TABLE {table} CASCADE")
            self.count("table dropped")
        if random.random() < 0.3:
            session.execute("BEGIN")
            session.execute("SELECT drop_collection(%s)", (table,))
            time.sleep(float(random.random()))
            session.execute("COMMIT")
        else:
            session.execute("SELECT drop_collection(%s)", (table,))
        self.count("dropped")

    def writer(self, random: np.random.Generator, session: Connection) -> None:
        """Write in a transaction of one to three statements, to one table and few of its rows."""
        table = self.one(random)
        key = int(random.integers(300))
        session.execute("BEGIN")
        for _ in range(int(random.integers(1, 4))):
            key += int(random.integers(1, 20))  # ascending: no deadlock of the workload's own
            what = int(random.integers(4))
            if what <= 1:
                count = int(random.choice([1, 10]))
                session.execute(
                    f"INSERT INTO {table} SELECT * FROM unnest(%s::int[], %s::bytea[])"
                    " ON CONFLICT (id) DO UPDATE SET image = excluded.image",
                    (list(range(key, key + count)), [self.file(random) for _ in range(count)]),
                )
                key += count
            elif what == 2:
                session.execute(
                    f"UPDATE {table} SET image = %s WHERE id = %s", (self.file(random), key)
                )
            else:
                session.execute(f"DELETE FROM {table} WHERE id = %s", (key,))
        session.execute("COMMIT" if random.random() < 0.9 else "ROLLBACK")
        self.count("written")

    def searcher(self, random: np.random.Generator, session: Connection) -> None:
        """Search in each way, as an ordinary role half of the time."""
        table = self.one(random)
        what = int(random.integers(5))
        if what == 0:
            session.execute(
                "SELECT * FROM similar_images(%s, 5, %s)",
                (self.images.files[int(random.integers(len(self.images)))], table),
            )
        elif what == 1:
            session.execute(
                "SELECT * FROM similar_images(image_id => %s, collection => %s, engine => %s)",
                (int(random.integers(300)), table, str(random.choice(["auto", "pgvector"]))),
            )
        elif table != DROPPED_TABLE and what == 2:
            session.execute(
                f"SELECT * FROM similar_rows(NULL::{table}, key => %s, collection => %s)",
                (int(random.integers(300)), table),
            )
        elif table != DROPPED_TABLE and what == 3:
            session.execute(f"SELECT count(*) FROM vectors_{table}")
        else:
            session.execute(
                "SELECT * FROM similar_images(image_id => %s, collection => %s, filter => %s)",
                (int(random.integers(300)), table, '{"label": null}'),
            )
        self.count("searched")

    def embedder(self, random: np.random.Generator, session: Connection) -> None:
        """Embed in the server, what is named or everything."""
        call = random.choice(["embed_pending()", "embed_pending('{0}')", "backfill('{0}')"])
        try:
            session.execute(f"SELECT {call}".format(self.one(random)))
            self.count("embedded in the server")
        except psycopg.errors.InvalidParameterValue:  # not deferred
            pass
        time.sleep(float(random.random()) * 0.1)

    def builder(self, random: np.random.Generator, session: Connection) -> None:
        session.execute("SELECT build_index(%s, threads => 1)", (self.one(random),))
        self.count("built")

    def watcher(self, random: np.random.Generator, session: Connection) -> None:
        """Look at what administrators look at."""
        views = ("collection_status", "embedding_queue_status", "index_generations", "self_check()")
        session.execute(f"SELECT * FROM {random.choice(views)}")
        self.count("looked at")
        time.sleep(0.05)

    # --- the end --------------------------------------------------------------------------------

    def check_end(self, owner: Connection) -> None:
        """Whatever collections are there are whole, and of others nothing is left."""
        for table in TABLES:
            owner.execute(CREATE.format(table))
        owner.execute("SELECT embed_pending()")
        bad = owner.execute("SELECT subject, detail FROM self_check(true) WHERE NOT ok").fetchall()
        bad = [line for line in bad if "no longer exists" not in line[1]]
        assert bad == [], bad
        names = owner.execute("SELECT name FROM siamese.collections").fetchall()
        for (name,) in names:
            owner.execute("SELECT drop_collection(%s)", (name,))
        left = owner.execute(
            "SELECT relname::text FROM pg_class WHERE relnamespace = 'siamese'::regnamespace"
            r" AND relkind IN ('r', 'v') AND relname ~ '(_\d+|^vectors_.*)$'"
            " UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = 'siamese'::regnamespace"
            r" AND proname ~ '_\d+$' UNION ALL SELECT tgname FROM pg_trigger"
            r" WHERE tgname ~ '^pg_siamese_' UNION ALL SELECT concat('batch of ', collection_id)"
            " FROM siamese.embedding_batches UNION ALL SELECT concat('try of ', collection_id)"
            " FROM siamese.embedding_attempts"
        ).fetchall()
        assert left == [], left
