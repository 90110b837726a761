"""A full disk, while an index is built and while rows are written: a clear error, nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from tests.conftest import make_template
from tests.faults.checks import Connect, check_answers, check_repair
from tests.faults.cluster import SETTINGS, FaultyCluster
from tests.scenarios.gallery import (
    Connection,
    Gallery,
    check_tables,
    index_directory,
    insert,
    prepare,
)
from tests.support import one, sql_error

MEGABYTE = 1024 * 1024


@contextmanager
def small_disk(path: Path, megabytes: float) -> Iterator[Path]:
    """Mount a disk of this size on a directory, with what is in it and its owner and mode."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a disk of its own")
    there = path.stat()
    kept = path.with_name(path.name + ".kept")
    kept.mkdir()
    _copy(path, kept)
    size = f"size={int(megabytes * MEGABYTE)},mode={there.st_mode & 0o777:o}"
    options = f"{size},uid={there.st_uid},gid={there.st_gid}"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(kept)
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        _copy(kept, path)
        yield path
    finally:
        shutil.rmtree(kept)
        # Lazily: sessions may have files open or mapped.
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def _copy(source: Path, target: Path) -> None:
    """Copy what is in a directory, and owner and mode of all, its own included."""
    subprocess.run(["cp", "-a", f"{source}/.", str(target)], check=True)


@contextmanager
def filled_up(disk: Path, leave: int = 0) -> Iterator[None]:
    """Leave no more than so many bytes free."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        free = shutil.disk_usage(disk).free - leave
        os.posix_fallocate(file.fileno(), 0, max(1, free))
    try:
        yield
    finally:
        filler.unlink()


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


@pytest.mark.law(6)
def test_during_builds(db: Connection, connect: Connect, images: Gallery) -> None:
    """At whatever point the disk is full: searches by the old file go on, and nothing is left."""
    directory = index_directory(db)
    with small_disk(directory.parents[1], 4) as disk:
        insert(db, images.files[100:200])
        db.execute("DELETE FROM siamese.images WHERE image_id % 7 = 0")
        before = {path.name for path in directory.iterdir()}
        needed = size_of(directory)
        # None at all; in mid-file; all but the last page, so that the second file has no room.
        texts = ("could not write index file", "No space left on device", "Make room")
        for leave in (0, 8192, needed // 2, needed + needed // 4):
            with filled_up(disk, leave):
                with sql_error("53100", *texts, "No table is affected"):
                    connect().execute("SELECT build_index()")
                assert {path.name for path in directory.iterdir()} == before, leave
                check_answers(connect(), images, "faiss", f"{leave} bytes free")
                check_answers(db, images, "faiss", "a session from before")
                insert(db, images.files[500:510])
        check_repair(connect, images)


def test_orphans_make_room(db: Connection, connect: Connect, images: Gallery) -> None:
    """What a build left that was killed is removed first: the next one may need its room."""
    directory = index_directory(db)
    with small_disk(directory.parents[1], 4) as disk:
        (current,) = directory.glob("*.faiss")
        for number in range(100, 105):
            for suffix in (".faiss", ".meta", ".faiss.tmp"):
                shutil.copy(current, directory / f"{number}{suffix}")
        with filled_up(disk):
            check_repair(connect, images)


def test_no_room_for_rows(
    db: Connection, dsn: str, connect: Connect, cluster: FaultyCluster, images: Gallery
) -> None:
    """The disk of the tables: the statement fails as any would, and takes all of itself back."""
    name = db.info.dbname
    folder = cluster.folder / "tablespace"
    folder.mkdir()
    owner = cluster.data.stat()
    os.chown(folder, owner.st_uid, owner.st_gid)
    insert(db, images.files[100:200])
    db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea)")
    db.execute("SELECT create_collection('t', 't', embed => 'deferred')")
    db.execute(
        "INSERT INTO t SELECT * FROM unnest(%s::int[], %s::bytea[])",
        (list(range(200)), images.files[:200]),
    )
    with small_disk(folder, 64) as disk:
        db.execute(sql.SQL("CREATE TABLESPACE small LOCATION {}").format(str(disk)))
        db.close()
        with psycopg.connect(cluster.dsn("postgres"), autocommit=True) as admin:
            move = sql.SQL("ALTER DATABASE {} SET TABLESPACE {}")
            admin.execute(move.format(sql.Identifier(name), sql.Identifier("small")))
        try:
            full(connect, disk, images)
        finally:
            with psycopg.connect(cluster.dsn("postgres"), autocommit=True) as admin:
                end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
                admin.execute(end, (name,))
                admin.execute(move.format(sql.Identifier(name), sql.Identifier("pg_default")))
                admin.execute("DROP TABLESPACE small")
    check_repair(connect, images)


def full(connect: Connect, disk: Path, images: Gallery) -> None:
    """Write until nothing goes any more, look, make room, and write again."""
    session = connect()
    deferred = connect()
    # PostgreSQL itself may refuse new connections later: it can't write its cache of the catalog.
    reader = connect()
    session.execute("SELECT build_index()")
    with filled_up(disk):
        count = 200
        with pytest.raises(psycopg.errors.DiskFull, match="could not extend file"):
            for _ in range(1000):
                place = count % 600
                insert(session, images.files[place : place + 20])
                count += 20
        assert one(session, "SELECT count(*) FROM siamese.images") == count
        check_answers(reader, images, "auto", "tables full")
        # Each row has its one vector.
        query = (
            "SELECT count(*) FROM siamese.images AS b FULL JOIN siamese.embedding_1 AS e"
            " ON e.key = b.image_id WHERE b.image_id IS NULL OR e.key IS NULL"
        )
        assert one(session, query) == 0
        # What waits stays waiting; nobody took note of a failure that is none of the image's.
        with pytest.raises(psycopg.errors.DiskFull):
            for _ in range(1000):
                deferred.execute("INSERT INTO t SELECT max(id) + 1, %s FROM t", (images.files[0],))
        total = one(deferred, "SELECT count(*) FROM t")
        with pytest.raises(psycopg.errors.DiskFull):
            deferred.execute("SELECT embed_pending('t')")
            for _ in range(1000):  # where there was room for these few vectors
                deferred.execute("INSERT INTO t SELECT max(id) + 1, %s FROM t", (images.files[0],))
                total = one(deferred, "SELECT count(*) FROM t")
        waiting = deferred.execute(
            "SELECT waiting + (SELECT count(*) FROM siamese.embedding_2), failures"
            " FROM embedding_queue_status"
        ).fetchone()
        assert waiting == (total, 0)
    # With room again, all goes on by itself.
    session = connect()
    insert(session, images.files[600:620])
    check_answers(session, images, "auto", "room again")
    session.execute("SELECT embed_pending('t')")
    query = "SELECT count(*) - (SELECT count(*) FROM siamese.embedding_2) FROM t"
    assert one(session, query) == 0
    session.close()


def test_no_room_for_anything(images: Gallery, onnx: bytes, is_long: bool) -> None:
    """A whole cluster, down to its write-ahead log: PostgreSQL may stop, and comes back."""
    if not is_long:
        pytest.skip("in the long form only: needs a cluster of its own")
    wal = {"max_wal_size": "64MB", "min_wal_size": "32MB"}
    with FaultyCluster.temporary(SETTINGS | wal) as own:
        assert isinstance(own, FaultyCluster)
        name = make_template(own, onnx)
        own.stop()
        with small_disk(own.folder, 300) as disk:
            own.start()
            sessions: list[Connection] = []

            def connect() -> Connection:
                sessions.append(psycopg.connect(own.dsn(name), autocommit=True))
                return sessions[-1]

            db = connect()
            prepare(db, images)
            insert(db, images.files[:200])
            db.execute("SELECT build_index()")
            committed = 200
            # DiskFull is one of these; so is a connection that ends, where the server stops.
            with filled_up(disk), pytest.raises(psycopg.OperationalError):
                for _ in range(2000):
                    insert(db, images.files[committed % 600 : committed % 600 + 20])
                    committed += 20
            for session in sessions:
                session.close()
            own.recover()
            # The last statement may have been committed without an answer.
            count = one(connect(), "SELECT count(*) FROM siamese.images")
            assert count in (committed, committed + 20)
            check_answers(connect(), images, "auto", "after recovery")
            check_tables(connect())
            check_repair(connect, images)
            for session in sessions:
                session.close()
            own.stop("immediate")
