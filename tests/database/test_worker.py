"""`pg_siamese worker`: processes beside the server that embed what statements have queued."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import psycopg
import pytest

import pg_siamese_server
from pg_siamese.client.connection import CommandError, NoServerError
from pg_siamese.worker import Options, Totals, Worker
from tests.conftest import Connect, Connection, NewRole, Pictures
from tests.database.tables import Deferred, make_collection, register_grid, without_triggers
from tests.support import PATIENCE, grid_encoder, one, sql_error, wait_until


class Workers(Deferred):
    """Table ``t`` with a deferred collection, and workers."""

    def __init__(self, db: Connection, dsn: str, files: list[bytes]) -> None:
        super().__init__(db, files)
        self.dsn = dsn
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *options: str, dsn: str | None = None) -> subprocess.Popen[str]:
        """Start a worker process."""
        command = [sys.executable, "-m", "pg_siamese", "worker", "--dsn", dsn or self.dsn]
        process = subprocess.Popen(
            [*command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"COLUMNS": "200"},
        )
        self.processes.append(process)
        return process

    def run(self, *options: str, dsn: str | None = None) -> tuple[int, str, str]:
        """Run a worker to its end; returns exit status, stdout and stderr."""
        process = self.start(*options, dsn=dsn)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err

    def end(self, process: subprocess.Popen[str]) -> str:
        """Tell a worker to end, which it must do well; return its stderr."""
        process.terminate()
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        return err

    def embedded(self) -> int:
        return int(self.value("SELECT count(*) FROM siamese.embedding_2"))

    def is_embedding(self) -> bool:
        """Whether a worker has taken tickets and stored nothing yet."""
        return bool(
            self.value(
                "SELECT count(*) FROM pg_stat_activity AS a JOIN pg_locks AS l USING (pid)"
                " WHERE a.application_name = 'pg_siamese' AND a.state = 'idle in transaction'"
                " AND l.relation = 'siamese.queue_2'::regclass AND l.mode = 'RowShareLock'"
            )
        )

    def check(self, model: str = "medical") -> None:
        """Every row has the vector of its image, and each vector was stored once."""
        wrong = self.db.execute(
            "SELECT t.id, e.key FROM t FULL JOIN siamese.embedding_2 AS e ON t.id = e.key"
            " WHERE t.id IS NULL OR e.key IS NULL"
            " OR e.embedding <-> embed_image(t.image, %s) > 1e-4",
            (model,),
        ).fetchall()
        assert wrong == []
        assert self.waiting() == 0

    def check_stored_once(self, rows: int) -> None:
        """No vector was ever made anew."""
        sequence = "pg_get_serial_sequence('siamese.embedding_2', 'embedding_id')"
        assert self.value(f"SELECT pg_sequence_last_value({sequence}::regclass)") == rows
        counts = "SELECT count(*), count(DISTINCT embedding_id) FROM siamese.pending_2"
        assert self.db.execute(f"{counts} WHERE NOT deleted").fetchone() == (rows, rows)


WAITING = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = %s::regclass::oid"


@pytest.fixture
def workers(db: Connection, dsn: str, pictures: Pictures) -> Iterator[Workers]:
    """Workers of a collection that is not there yet."""
    workers = Workers(db, dsn, pictures.files)
    yield workers
    for process in workers.processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def table(db: Connection, workers: Workers) -> Workers:
    make_collection(db, embed="deferred")
    return workers


@pytest.fixture
def slow(db: Connection, workers: Workers) -> Workers:
    """A model that takes some 20 ms an image, so that a batch takes long enough to be met."""
    model = grid_encoder(("n", 3, 1024, 1024), pool=512)
    db.execute("SELECT register_model('slow', %s, metric => 'l2')", (model,))
    make_collection(db, model="slow", embed="deferred")
    return workers


def in_mid_batch(table: Workers, connect: Connect) -> tuple[Connection, subprocess.Popen[str]]:
    """Start a worker that a lock stops in the middle of a batch; return who holds that, and it."""
    table.insert(*range(1, 101))
    holder = connect()
    holder.execute("BEGIN; LOCK TABLE siamese.embedding_2 IN SHARE MODE")
    process = table.start("--batch", "32")
    wait_until(lambda: table.value(WAITING, "siamese.embedding_2"), "the batch")
    return holder, process


def stored_by(out: str) -> int:
    return int(re.split(" rows? embedded", out)[0].splitlines()[-1].replace(",", ""))


def test_once(table: Workers) -> None:
    table.insert(*range(1, 301))
    status, out, err = table.run("--once")
    assert (status, out) == (0, "300 rows embedded\n"), err
    table.check()
    table.check_stored_once(300)
    status, out, err = table.run("--once", "--collection", "t")
    assert (status, out) == (0, "0 rows embedded\n"), err


def test_two_workers_share(slow: Workers) -> None:
    slow.insert(*range(1, 161))
    processes = [slow.start("--once", "--batch", "8") for _ in range(2)]
    outs = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    shares = [stored_by(out) for out, _ in outs]
    assert sum(shares) == 160 and min(shares) > 0
    slow.check("slow")
    slow.check_stored_once(160)


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ended_in_mid_batch(slow: Workers, way: signal.Signals) -> None:
    """Nothing is lost and nothing is done twice; what was taken is free again."""
    slow.insert(*range(1, 121))
    process = slow.start("--batch", "32")
    wait_until(lambda: slow.embedded() >= 32, "a first batch")
    wait_until(slow.is_embedding, "another batch")
    process.send_signal(way)
    out, err = process.communicate(timeout=PATIENCE)
    if way == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 0, err
        assert stored_by(out) == slow.embedded()
    before = slow.embedded()
    assert before < 120
    wait_until(lambda: not slow.is_embedding(), "the server to notice")
    assert before + slow.waiting() == 120
    status, out, err = slow.run("--once")
    assert (status, stored_by(out)) == (0, 120 - before), err
    slow.check("slow")
    slow.check_stored_once(120)


def test_changes_while_a_worker_embeds(slow: Workers) -> None:
    """Statements wait for nothing, and old images never get a vector."""
    slow.insert(*range(1, 65))
    process = slow.start("--batch", "64")
    wait_until(slow.is_embedding, "a batch")
    slow.db.execute("SET lock_timeout = '10s'")
    slow.db.execute("UPDATE t SET image = %s WHERE id <= 3", (slow.files[100],))
    slow.db.execute("DELETE FROM t WHERE id IN (4, 5)")
    slow.db.execute("UPDATE t SET id = 1006 WHERE id = 6")
    with slow.db.transaction(force_rollback=True):
        slow.db.execute("UPDATE t SET image = 'junk' WHERE id = 7")
    wait_until(lambda: slow.embedded() == 62, "all")
    wait_until(lambda: slow.waiting() == 0, "all tickets")
    slow.check("slow")
    slow.end(process)


def test_truncate_while_a_worker_embeds(slow: Workers) -> None:
    slow.insert(*range(1, 101))
    process = slow.start("--batch", "32")
    wait_until(slow.is_embedding, "a batch")
    with slow.db.transaction():
        slow.db.execute("TRUNCATE t")
        slow.insert(*range(1, 21))
    wait_until(lambda: slow.embedded() == 20 and slow.waiting() == 0, "what was inserted after")
    slow.check("slow")
    slow.end(process)


# What becomes of a table whose collection a worker embeds, and then of the worker.
ENDS = {
    "drop": "SELECT drop_collection('t')",
    "drop table": "DROP TABLE t CASCADE",
    "truncate": "TRUNCATE t",
    "rename": "ALTER TABLE t RENAME TO u",
    "renew": "SELECT renew_collections()",
    "alter": "SELECT alter_collection('t', max_pixels => 1000000)",
    "owner": "ALTER TABLE t OWNER TO pg_database_owner",
}


@pytest.mark.parametrize("end", ENDS)
def test_ddl_while_a_worker_embeds(table: Workers, connect: Connect, end: str) -> None:
    """The worker goes on with what is there, without a word."""
    make_collection(table.db, "other", embed="deferred")
    # The statement waits for the worker, if it has to.
    holder, process = in_mid_batch(table, connect)
    relation = table.value("SELECT 't'::regclass::oid")
    session = connect()
    statement = threading.Thread(target=session.execute, args=(ENDS[end],))
    statement.start()
    wait_until(lambda: not statement.is_alive() or table.value(WAITING, relation), end)
    holder.execute("COMMIT")
    statement.join()
    table.db.execute("INSERT INTO other VALUES (1, %s)", (table.files[0],))
    wait_until(lambda: table.value("SELECT count(*) FROM siamese.embedding_3"), "the other one")
    if end not in ("drop", "drop table"):
        rows = 0 if end == "truncate" else 100
        wait_until(lambda: table.embedded() == rows and table.waiting() == 0, "all")
    err = table.end(process)
    assert err.replace("stopping", "").strip() == ""


def test_goes_on_while_a_drop_is_not_committed(table: Workers, connect: Connect) -> None:
    table.insert(*range(1, 11))
    make_collection(table.db, "other", embed="deferred")
    table.db.execute("INSERT INTO other VALUES (1, %s)", (table.files[0],))
    dropper = connect()
    dropper.execute("BEGIN; SELECT drop_collection('t')")
    options = ("--once", "--rebuild-pending", "1")
    status, out, err = table.run(*options)
    assert (status, out) == (0, "1 row embedded\n"), err
    assert '"t"' not in err
    dropper.execute("ROLLBACK")
    assert table.run(*options)[:2] == (0, "10 rows embedded\n")


def test_goes_on_after_ddl_on_the_catalogue(table: Workers, connect: Connect) -> None:
    process = table.start("--poll", "0.2")
    table.insert(1)
    wait_until(lambda: table.embedded() == 1, "the first row")
    holder = connect()
    holder.execute("BEGIN; LOCK TABLE siamese.models")
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pg_siamese'"
    wait_until(lambda: table.value(f"{waiting} AND wait_event_type = 'Lock'"), "the worker to wait")
    wait_until(lambda: not table.value(f"{waiting} AND wait_event_type = 'Lock'"), "the time-out")
    holder.execute("COMMIT")
    table.insert(2)
    wait_until(lambda: table.embedded() == 2, "the second row")
    err = table.end(process)
    assert "paused for 2 s" in err and "lock timeout" in err and "no connection" not in err


def test_ends_without_the_extension(table: Workers, connect: Connect) -> None:
    """DROP EXTENSION locks in an order of its own: it may be the one to be told of a deadlock."""
    holder, process = in_mid_batch(table, connect)
    session = connect()
    session.execute("SET client_min_messages = warning")
    dropped: list[bool] = []

    def drop() -> None:
        while not dropped:
            with contextlib.suppress(psycopg.errors.DeadlockDetected):
                session.execute("DROP EXTENSION pg_siamese CASCADE")
                dropped.append(True)

    thread = threading.Thread(target=drop)
    thread.start()
    holder.execute("COMMIT")
    thread.join()
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "Traceback" not in err
    assert "extension" in err.splitlines()[-1]


def test_poisoned_images(table: Workers) -> None:
    table.insert(*range(1, 101))
    table.db.execute("UPDATE t SET image = 'junk' WHERE id = 50")
    table.db.execute("UPDATE t SET image = NULL WHERE id = 51")
    status, out, err = table.run("--once")
    assert (status, out) == (0, "98 rows embedded, 1 failed\n"), err
    failures = "SELECT key, sqlstate FROM embedding_failures ORDER BY key"
    assert table.db.execute(failures).fetchall() == [("50", "22P03")]
    assert table.waiting() == 0
    table.db.execute("UPDATE t SET image = %s WHERE id IN (50, 51)", (table.files[0],))
    assert table.run("--once")[:2] == (0, "2 rows embedded\n")
    table.check()


# A decoder with a hole: an image of these bytes takes the process with it.
DEADLY = """
import os, signal
from pg_siamese_server.encoding import images
decode = images.decode_image
def deadly(image, *rest):
    if image == b"deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(image, *rest)
images.decode_image = deadly
from pg_siamese.cli.main import app
app()
"""


def test_an_image_that_kills_workers_is_given_up(table: Workers) -> None:
    """All others are embedded, and those that were in its batch need no more than one more try."""
    table.insert(*range(1, 101))
    table.db.execute("UPDATE t SET image = 'deadly' WHERE id = 50")
    table.db.execute("INSERT INTO t VALUES (101, %s)", (table.files[0],))
    statuses: list[int] = []
    while not statuses or statuses[-1] != 0:
        assert len(statuses) < 6, "workers die without end"
        command = [sys.executable, "-c", DEADLY, "worker", "--once", "--dsn", table.dsn]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        statuses.append(done.returncode)
    assert statuses == [-signal.SIGKILL] * 4 + [0], done.stderr
    assert 'ERROR gave up on 1 row of "t": each crashed its worker\n' in done.stderr
    failures = table.db.execute("SELECT key, sqlstate, message FROM embedding_failures").fetchall()
    assert failures == [("50", "58000", "workers crashed each time they embedded this row")]
    assert (table.embedded(), table.waiting()) == (100, 0)
    assert table.value("SELECT count(*) FROM siamese.embedding_attempts") == 0
    table.db.execute("UPDATE t SET image = %s WHERE id = 50", (table.files[1],))
    assert table.run("--once")[:2] == (0, "1 row embedded\n")
    table.check()


def test_ends_that_are_no_deaths_are_forgotten(slow: Workers) -> None:
    """A worker that is told to end, or whose batch fails, leaves no suspicion behind."""
    slow.insert(*range(1, 121))
    for _ in range(3):
        process = slow.start("--batch", "64")
        wait_until(slow.is_embedding, "a batch")
        slow.end(process)
        assert slow.value("SELECT count(*) FROM siamese.embedding_attempts") == 0


def test_a_broken_model_blocks_no_other(table: Workers) -> None:
    register_grid(table.db)
    make_collection(table.db, "a", model="grid", embed="deferred")
    table.db.execute("INSERT INTO a VALUES (1, %s)", (table.files[0],))
    onnx = table.value("SELECT onnx FROM siamese.models WHERE name = 'grid'")
    table.db.execute("UPDATE siamese.models SET onnx = 'x' WHERE name = 'grid'")
    table.insert(*range(1, 51))
    status, out, err = table.run("--once")
    assert (status, out) == (1, "50 rows embedded\n")
    assert 'collection "a" skipped for 60 s: ' in err and "SHA-256" in err
    table.check()
    table.db.execute("UPDATE siamese.models SET onnx = %b WHERE name = 'grid'", (onnx,))
    assert table.run("--once")[:2] == (0, "1 row embedded\n")


def test_woken_by_a_notification(table: Workers) -> None:
    process = table.start("--poll", "3600")
    wait_until(
        lambda: table.value(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pg_siamese'"
            " AND state = 'idle' AND query ~ '_queued_collections|_build_if_needed'"
        ),
        "the worker to be idle",
    )
    for key in (1, 2):
        table.insert(key)
        wait_until(lambda key=key: table.embedded() == key, "the worker to wake")  # type: ignore[misc]
    table.end(process)


def test_poll_finds_what_no_notification_tells(table: Workers) -> None:
    """Tickets that come back after a failed try are nobody's statement."""
    process = table.start("--poll", "0.2")
    table.insert(1)
    wait_until(lambda: table.embedded() == 1, "the first row")
    table.db.execute(
        "INSERT INTO siamese.queue_2 (keys, not_before) VALUES ('{2}', now() + interval '1 s')"
    )
    with without_triggers(table.db):
        table.insert(2)
    wait_until(lambda: table.embedded() == 2, "the second row")
    table.end(process)


def test_idle_timeout(table: Workers) -> None:
    table.insert(*range(1, 11))
    assert table.run("--idle-timeout", "0.5")[:2] == (0, "10 rows embedded\n")
    table.check()


def test_rebuilds(table: Workers) -> None:
    """Where so many vectors are pending, or such a share of the index is dead."""
    generation = "SELECT generation FROM siamese.collections WHERE name = 't'"
    table.insert(*range(1, 100))
    options = ("--once", "--rebuild-pending", "100", "--rebuild-dead", "0.5")
    assert table.run(*options)[0] == 0
    assert table.value(generation) is None
    table.insert(100)
    _, _, err = table.run(*options, "--no-rebuild")
    assert table.value(generation) is None
    _, _, err = table.run(*options)
    first = table.value(generation)
    assert first is not None and f'INFO index of "t" built: generation {first}\n' in err
    table.db.execute("DELETE FROM t WHERE id <= 49")
    table.run(*options)
    assert table.value(generation) == first
    table.db.execute("DELETE FROM t WHERE id = 50")
    table.run(*options)
    assert table.value(generation) > first
    status = "SELECT pending, dead FROM collection_status WHERE collection = 't'"
    assert table.db.execute(status).fetchone() == (0, 0)


def test_one_rebuild_at_a_time(table: Workers, connect: Connect) -> None:
    table.insert(*range(1, 11))
    table.run("--once", "--no-rebuild")
    other = connect()
    with other.transaction():
        other.execute("SELECT build_index('t')")
        assert one(table.db, "SELECT siamese._build_if_needed(2, 1, 0.1)") is None


def test_privileges(table: Workers, new_role: NewRole, connect: Connect) -> None:
    role = new_role()
    table.insert(*range(1, 11))
    dsn = psycopg.conninfo.make_conninfo(table.dsn, user=role)
    status, _, err = table.run("--once", dsn=dsn)
    assert status == 1 and "permission denied" in err and "grant_worker" in err
    table.db.execute("SELECT grant_worker(%s)", (role,))
    assert table.run("--once", "--rebuild-pending", "5", dsn=dsn)[:2] == (0, "10 rows embedded\n")
    table.check()
    assert table.value("SELECT generation FROM siamese.collections WHERE name = 't'")
    session = connect(user=role)
    for statement in (
        "SELECT FROM public.t",
        "SELECT FROM siamese.embedding_2",
        "SELECT FROM siamese.queue_2",
        "DELETE FROM siamese.embedding_batches",
        "SELECT siamese.drop_collection('t')",
        "SELECT siamese.backfill('t')",
        "SELECT siamese._forget_vectors(2, '{1}')",
        "SELECT siamese.similar_images(image_id => 1::bigint, collection => 't')",
    ):
        with sql_error("42501", "permission denied"):
            session.execute(statement)
    # Nor the images of collections that are embedded by their own statements.
    with pytest.raises(psycopg.Error):
        session.execute("SELECT * FROM siamese._read_images(1, '{1}')")


def test_table_with_a_new_owner(table: Workers, new_role: NewRole) -> None:
    owner = new_role()
    table.insert(*range(1, 6))
    table.db.execute(f"GRANT CREATE ON SCHEMA public TO {owner}; ALTER TABLE t OWNER TO {owner}")
    table.db.execute("REVOKE ALL ON t FROM postgres")
    assert table.run("--once")[:2] == (0, "5 rows embedded\n")


def test_reconnects(table: Workers) -> None:
    process = table.start()
    others = "FROM pg_stat_activity WHERE application_name = 'pg_siamese'"
    for key in (1, 2):
        table.insert(key)
        wait_until(lambda key=key: table.embedded() == key, "a row")  # type: ignore[misc]
        table.db.execute(f"SELECT pg_terminate_backend(pid) {others}")
    table.insert(3)
    wait_until(lambda: table.embedded() == 3, "the worker to come back")
    err = table.end(process)
    line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING no connection: .+; next try in \d"
    assert re.search(f"^{line}", err, re.MULTILINE), err


def test_a_mistaken_connection_ends_at_once(table: Workers) -> None:
    status, _, err = table.run(dsn="host=/nonexistent")
    assert status == 1 and err.startswith("error:")


@pytest.mark.parametrize(
    ("name", "message"), [("none", "does not exist"), ("images", "is not deferred")]
)
def test_collections_that_are_not_deferred(table: Workers, name: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        Worker(Options(table.dsn, collections=(name,), once=True)).run()


def test_only_some_collections(table: Workers) -> None:
    make_collection(table.db, "other", embed="deferred")
    table.db.execute("INSERT INTO other VALUES (1, %s)", (table.files[0],))
    table.insert(*range(1, 6))
    assert table.run("--once", "-c", "t")[:2] == (0, "5 rows embedded\n")
    waiting = "SELECT collection, waiting FROM embedding_queue_status ORDER BY 1"
    assert table.db.execute(waiting).fetchall() == [("other", 1), ("t", 0)]


def test_another_version_is_refused(table: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pg_siamese_server, "__version__", "9.9.9")
    with pytest.raises(CommandError, match=r"version 9\.9\.9, but the database has"):
        Worker(Options(table.dsn, once=True)).run()


def test_an_upgrade_meanwhile_ends_it(table: Workers) -> None:
    process = table.start()
    table.insert(1)
    wait_until(lambda: table.embedded() == 1, "the worker")
    table.db.execute("UPDATE pg_extension SET extversion = '9.9.9' WHERE extname = 'pg_siamese'")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "the database has version 9.9.9" in err


def test_progress(table: Workers) -> None:
    table.insert(*range(1, 21))
    shown: list[int] = []
    worker = Worker(
        Options(table.dsn, once=True, batch=8),
        progress=lambda totals: shown.append(totals.stored),
    )
    assert worker.run() == Totals(stored=20)
    assert shown == [8, 16, 20]


def test_waits_longer_from_try_to_try(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the server is gone, the delay doubles, up to a limit."""
    worker = Worker(Options())
    delays: list[float] = []

    def wait(seconds: float, *files: int) -> None:
        delays.append(seconds)
        if len(delays) == 9:
            worker.signals.stop()

    calls = iter(range(100))

    class Lost:
        def __enter__(self) -> Lost:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    def connect(dsn: str | None) -> Lost:
        if next(calls) > 1:  # a worker has two connections
            raise NoServerError("nobody answers")
        return Lost()

    def serve(connection: object, notes: object) -> None:
        raise psycopg.OperationalError("the connection is lost")

    monkeypatch.setattr("pg_siamese.worker.connect", connect)
    monkeypatch.setattr(worker, "_serve", serve)
    monkeypatch.setattr(worker.signals, "wait", wait)
    worker.run()
    assert len(delays) == len(caplog.records) == 9
    assert 0.4 <= delays[0] <= 0.6 and 24 <= delays[-1] <= 36
    assert all(later > earlier for earlier, later in itertools.pairwise(delays[:7]))
