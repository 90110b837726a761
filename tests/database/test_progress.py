"""The view ``progress``: what other sessions see of work while it goes on.

Work is held up in mid-way by locks, or by triggers on the tables of vectors.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Connect, Connection, NewRole, Pictures, insert_images
from tests.database.commands import works
from tests.database.running import Running
from tests.database.tables import insert_rows, make_collection, without_triggers
from tests.server import path_of
from tests.support import heeding_interrupts, one, rows_of, sql_error, wait_until

WORK = "SELECT collection, kind, phase, done, total FROM progress ORDER BY collection, phase DESC"
# Whoever stores vectors of table t beyond so many waits here.
GATE = """
CREATE FUNCTION public.gate() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT count(*) FROM siamese.embedding_2) > TG_ARGV[0]::integer THEN
        PERFORM pg_advisory_xact_lock_shared(1, 1);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER gate AFTER INSERT ON siamese.embedding_2
FOR EACH STATEMENT EXECUTE FUNCTION public.gate(%s);
"""
PATIENT_GATE = """
CREATE OR REPLACE FUNCTION public.gate() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    WHILE (SELECT count(*) FROM siamese.embedding_2) > TG_ARGV[0]::integer
        AND NOT pg_try_advisory_xact_lock_shared(1, 1)
    LOOP
        PERFORM pg_sleep(0.01);
    END LOOP;
    RETURN NULL;
END $$;
"""


@contextmanager
def gate(db: Connection, connect: Connect, after: int = 0) -> Iterator[None]:
    """Keep more than ``after`` vectors from being stored while the body runs."""
    db.execute(GATE % after)
    with connect() as holder:
        holder.execute("SELECT pg_advisory_lock(1, 1)")
        yield


@contextmanager
def locked(connect: Connect, what: str) -> Iterator[None]:
    """Hold a lock while the body runs."""
    with connect() as holder:
        holder.execute(f"BEGIN; {what}")
        yield
        holder.execute("COMMIT")


def filled(db: Connection, pictures: Pictures, count: int, **options: Any) -> None:
    """Make table ``t`` and a collection that lacks its rows, or has them in its queue."""
    make_collection(db, **options)
    with nullcontext() if options.get("embed") == "deferred" else without_triggers(db):
        for start in range(0, count, 10):  # a ticket for each ten
            keys = range(start, min(count, start + 10))
            insert_rows(db, keys, [pictures.files[key] for key in keys])


def has_rows(db: Connection, query: str, count: int) -> bool:
    return len(rows_of(db, query)) == count


def files(db: Connection) -> list[Path]:
    """Return the files of all backends."""
    folder = path_of(one(db, "SELECT current_setting('data_directory')"))
    return list((folder / "pg_siamese" / "progress").iterdir())


def test_a_build_by_phases(db: Connection, connect: Connect, pictures: Pictures) -> None:
    insert_images(db, pictures.files[:30])
    assert rows_of(db, WORK) == []
    build = Running(connect, "SELECT build_index()")
    with locked(connect, "SELECT FROM siamese.collections FOR NO KEY UPDATE"):
        with locked(connect, "LOCK TABLE siamese.embedding_1 IN ACCESS EXCLUSIVE MODE"):
            assert build.start().waits()
            assert rows_of(db, WORK) == [("images", "build_index", "reading vectors", 0, None)]
            row = db.execute("SELECT pid, started_at < clock_timestamp(), ends_at FROM progress")
            assert row.fetchone() == (build.session.info.backend_pid, True, None)
            second = Running(connect, "SELECT build_index()")
            assert second.start().waits()
            waiting = ("images", "build_index", "waiting for another build", 0, None)
            assert waiting in rows_of(db, WORK)
        wait_until(lambda: ("images", "build_index", "publishing", 0, None) in rows_of(db, WORK))
        pids = {str(each.session.info.backend_pid) for each in (build, second)}
        assert {path.name for path in files(db)} == pids
    assert [build.result(), second.result()] == [[(1,)], [(2,)]]
    assert rows_of(db, WORK) == []
    assert files(db) == []


def test_builds_of_two_collections(db: Connection, connect: Connect, pictures: Pictures) -> None:
    insert_images(db, pictures.files[:30])
    make_collection(db)
    insert_rows(db, range(20), pictures.files[:20])
    names = ("images", "t")
    builds = [Running(connect, "SELECT build_index(%s)", (name,)) for name in names]
    tables = "siamese.embedding_1, siamese.embedding_2"
    with locked(connect, f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE"):
        assert all([build.start().waits() for build in builds])
        phase = ("build_index", "reading vectors", 0, None)
        assert rows_of(db, WORK) == [(name, *phase) for name in names]
        pids = [build.session.info.backend_pid for build in builds]
        assert rows_of(db, "SELECT pid FROM progress ORDER BY collection") == [(p,) for p in pids]
    for build in builds:
        build.result()
    assert rows_of(db, WORK) == []


@pytest.mark.parametrize("call", ["backfill", "embed_pending"])
def test_embedding_in_the_server(
    db: Connection, connect: Connect, pictures: Pictures, call: str
) -> None:
    filled(db, pictures, 30, embed="deferred" if call == "embed_pending" else "sync")
    running = Running(connect, f"SELECT {call}('t')")
    with gate(db, connect):
        assert running.start().waits()
        assert rows_of(db, WORK) == [("t", call, "embedding", 0, 30)]
    assert running.result() == [(30,)]
    assert rows_of(db, WORK) == []


def test_counts_move_and_tell_the_end(db: Connection, connect: Connect, pictures: Pictures) -> None:
    filled(db, pictures, 400)
    db.execute(
        "CREATE FUNCTION public.slow() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(0.6); RETURN NULL; END $$;"
        "CREATE TRIGGER slow AFTER INSERT ON siamese.embedding_2"
        " FOR EACH STATEMENT EXECUTE FUNCTION public.slow()"
    )
    running = Running(connect, "SELECT backfill('t')").start()
    seen: dict[int, bool] = {}

    def moves() -> bool:
        query = "SELECT done, ends_at >= started_at FROM progress WHERE total = 400"
        seen.update(rows_of(db, query))
        return len(seen) > 2

    wait_until(moves)
    assert running.result() == [(400,)]
    assert all(0 <= done <= 400 for done in seen)
    assert {is_known for done, is_known in seen.items() if done > 0} == {True}
    assert seen.get(0) is None  # nothing to estimate from


def test_a_collection_that_is_not_committed_yet(
    db: Connection, connect: Connect, pictures: Pictures
) -> None:
    db.execute("CREATE TABLE public.t (id integer PRIMARY KEY, image bytea)")
    insert_rows(db, range(5), pictures.files[:5])
    create = Running(connect, "SELECT create_collection('pets', 't')")
    with locked(connect, "LOCK TABLE siamese.failures IN ACCESS EXCLUSIVE MODE"):
        assert create.start().waits()
        assert rows_of(db, WORK) == [("pets", "backfill", "looking for rows", 0, None)]
        assert one(db, "SELECT count(*) FROM collections WHERE name = 'pets'") == 0
    assert create.result() == [(5,)]


def test_workers(
    db: Connection, dsn: str, connect: Connect, new_role: NewRole, pictures: Pictures
) -> None:
    """Two of them wait before they store their second batch of ten, or their first, of 50 rows."""
    filled(db, pictures, 50, embed="deferred")
    reader, stranger = new_role(), new_role()
    db.execute("SELECT grant_usage(%s), grant_usage(%s)", (reader, stranger))
    db.execute(f"GRANT SELECT (id) ON t TO {reader}")
    command = [sys.executable, "-m", "pg_siamese", "worker", "--once", "--batch", "10"]
    with gate(db, connect, after=10), ExitStack() as stack:
        # They don't wait for a lock, which they give up soon.
        db.execute(PATIENT_GATE)
        batches = (
            "SELECT pid FROM pg_locks WHERE classid = hashtext('pg_siamese worker')::oid"
            " AND (SELECT count(*) FROM siamese.embedding_2) = 10 ORDER BY pid"
        )
        for count in (1, 2):
            process = subprocess.Popen([*command, "--dsn", dsn], stdout=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            wait_until(partial(has_rows, db, batches, count))
        lines = rows_of(db, "SELECT * FROM progress ORDER BY pid")
        assert [(line[-1],) for line in lines] == rows_of(db, batches)
        assert {line[:3] for line in lines} == {("t", "worker", "embedding")}
        # The second one has not stored anything yet.
        assert sorted(line[3:5] for line in lines) == [(0, 40), (10, 50)]
        assert all(began < ends for *_, began, ends, _ in lines)
        assert rows_of(connect(user=reader), WORK) == rows_of(db, WORK)
        assert rows_of(connect(user=stranger), WORK) == []


def test_who_sees_it(
    db: Connection, connect: Connect, new_role: NewRole, pictures: Pictures
) -> None:
    filled(db, pictures, 5)
    names = {name: new_role() for name in ("reader", "owner", "stranger", "admin")}
    for name, role in names.items():
        db.execute(f"SELECT {'grant_admin' if name == 'admin' else 'grant_usage'}(%s)", (role,))
    db.execute(f"GRANT SELECT (id) ON t TO {names['reader']}")
    db.execute(f"ALTER TABLE t OWNER TO {names['owner']}")
    sessions = {name: connect(user=role) for name, role in names.items()}
    work = ("t", "build_index", "reading vectors")
    counts, hidden = (*work, 0), (*work, None)

    def check(**expected: tuple[Any, ...]) -> None:
        for name, session in sessions.items():
            lines = [expected[name]] if name in expected else []
            query = "SELECT collection, kind, phase, done FROM {}"
            for source in ("progress", "siamese._progress()"):
                assert rows_of(session, query.format(source)) == lines, name

    build = Running(connect, "SELECT build_index('t')")
    with locked(connect, "LOCK TABLE siamese.embedding_2 IN ACCESS EXCLUSIVE MODE"):
        assert build.start().waits()
        check(reader=counts, owner=counts, admin=counts)
        db.execute("ALTER TABLE t ENABLE ROW LEVEL SECURITY")
        check(reader=hidden, owner=counts, admin=hidden)
        db.execute(f"ALTER ROLE {names['reader']} BYPASSRLS")
        check(reader=counts, owner=counts, admin=hidden)
        db.execute(f"REVOKE SELECT (id) ON t FROM {names['reader']}")
        check(owner=counts, admin=hidden)
    build.result()


def test_what_only_looks_like_work(
    db: Connection, connect: Connect, new_role: NewRole, pictures: Pictures
) -> None:
    """A lock that anybody can take, and a file of another transaction of the same session."""
    filled(db, pictures, 5, embed="deferred")
    role = new_role()
    lock = "SELECT pg_advisory_lock(hashtext('pg_siamese worker'), 2)"
    connect(user=role).execute(lock)
    assert rows_of(db, WORK) == []
    embed = Running(connect, "SELECT embed_pending('t')")
    with gate(db, connect):
        assert embed.start().waits()  # which does not wait for that lock
        (path,) = files(db)
        content = json.loads(path.read_text())
        owner = path.stat()
    assert embed.result() == [(5,)]
    path.write_text(json.dumps(content))
    try:
        os.chown(path, owner.st_uid, owner.st_gid)
        embed.session.execute("BEGIN")
        embed.session.execute("SELECT 1")
        assert rows_of(db, WORK) == []
    finally:
        path.unlink()


@pytest.mark.law(5)
def test_cancelled_work_is_gone(db: Connection, connect: Connect, pictures: Pictures) -> None:
    filled(db, pictures, 30)
    running = Running(connect, "SELECT backfill('t')")
    with gate(db, connect):
        assert running.start().waits()
        assert one(db, "SELECT pg_cancel_backend(pid) FROM progress") is True
        with sql_error("57014"):
            running.result()
    assert rows_of(db, WORK) == []
    assert files(db) == []


def test_a_directory_that_cannot_be_written(db: Connection, pictures: Pictures) -> None:
    """The work goes on, and nothing is shown."""
    insert_images(db, pictures.files[:5])
    db.execute("SELECT build_index()")
    folder = path_of(one(db, "SELECT current_setting('data_directory')")) / "pg_siamese/progress"
    folder.rmdir()
    folder.write_text("no directory")
    try:
        assert rows_of(db, "SELECT build_index(), backfill()") == [(2, 0)]
        assert rows_of(db, WORK) == []
    finally:
        folder.unlink()
    db.execute("SELECT build_index()")
    assert folder.is_dir()


def test_status_shows_it(db: Connection, dsn: str, connect: Connect, pictures: Pictures) -> None:
    filled(db, pictures, 30)
    assert "under way" not in works(dsn, "status")
    running = Running(connect, "SELECT backfill('t')")
    command = [sys.executable, "-m", "pg_siamese", "status", "--watch", "--dsn", dsn]
    with gate(db, connect):
        assert running.start().waits()
        line = "backfill of t: embedding, 0% (0 of 30), since "
        assert line in works(dsn, "status").partition("under way")[2]
        watch = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, preexec_fn=heeding_interrupts
        )
        assert watch.stdout is not None
        assert watch.stdout.readline().startswith(line)
    running.result()
    assert "nothing is under way\n" in iter(watch.stdout.readline, "")
    watch.send_signal(signal.SIGINT)
    assert watch.wait(60) == 0
