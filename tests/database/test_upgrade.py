"""Upgrades: from a genuine earlier version with data in it, compared with a fresh install.

The earlier version's server package is a wheel in ``tests/data``; its install script is frozen in
``migrations/``. So what is upgraded was made by the code of that version.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest

from tests.catalog import describe, privileges
from tests.conftest import Connection, NewRole, Pictures, insert_images
from tests.database.tables import make_collection
from tests.support import one, rows_of, sql_error
from tools import migrate
from tools.cluster import Cluster
from tools.project import ROOT, version
from tools.report import SetupError

DATA = ROOT / "tests" / "data"
PACKAGE = "pg_siamese_server"
RELEASED = sorted(
    path.stem.split("--")[1]
    for path in (ROOT / "migrations").glob("pg_siamese--*.sql")
    if path.stem.count("--") == 1
)
_numbers = itertools.count(1)
Filled = Callable[[str], Connection]


# By the server itself, which may be in a container: the wheel beside links to the other packages.
UNPACK = """
CREATE OR REPLACE FUNCTION pg_temp.unpack(wheel bytea, packages text, folder text) RETURNS void
LANGUAGE plpython3u AS $$
import io, os, zipfile
if not os.path.isdir(folder):
    os.mkdir(folder)
    for name in os.listdir(packages):
        if not name.startswith('pg_siamese_server'):
            os.symlink(os.path.join(packages, name), os.path.join(folder, name))
    zipfile.ZipFile(io.BytesIO(wheel)).extractall(folder)
$$
"""


def use_packages_of(db: Connection, released: str) -> None:
    """Let a database load the server package of an earlier version.

    Its script names the packages of the current version, as any installation's does.
    """
    load = one(db, "SELECT pg_get_functiondef('siamese._load'::regproc)")
    (packages,) = re.findall(r"^directory = '(.+)'$", load, re.MULTILINE)
    folder = f"{one(db, 'SHOW data_directory')}/packages-{released}"
    db.execute(UNPACK)
    wheel = (DATA / f"{PACKAGE}-{released}-py3-none-any.whl").read_bytes()
    db.execute("SELECT pg_temp.unpack(%s, %s, %s)", (wheel, packages, folder))
    db.execute(load.replace(packages, folder))


class Databases:
    """Makes databases; each connection is to one that nobody else has."""

    def __init__(self, cluster: Cluster, stack: ExitStack) -> None:
        self.cluster = cluster
        self.stack = stack
        self.admin = stack.enter_context(psycopg.connect(cluster.dsn("postgres"), autocommit=True))

    def create(self, of_version: str) -> Connection:
        """A database with this version of the extension, working."""
        name = f"upgrade_{next(_numbers)}"
        self.admin.execute(f"CREATE DATABASE {name}")
        self.stack.callback(self.admin.execute, f"DROP DATABASE {name} WITH (FORCE)")
        path = '"$user", public, siamese'
        self.admin.execute(f"ALTER DATABASE {name} SET search_path = {path}")
        db = self.connect(self.cluster.dsn(name))
        db.execute(f"CREATE EXTENSION pg_siamese VERSION '{of_version}' CASCADE")
        if of_version != version():
            use_packages_of(db, of_version)
        return db

    def dsn(self, db: Connection) -> str:
        """Connection string of the database that a connection is to."""
        return self.cluster.dsn(db.info.dbname)

    def connect(self, dsn: str) -> Connection:
        connection = psycopg.connect(dsn, autocommit=True)
        self.stack.callback(connection.close)
        return connection


@pytest.fixture
def databases(cluster: Cluster) -> Iterator[Databases]:
    with ExitStack() as stack:
        yield Databases(cluster, stack)


@pytest.fixture
def filled(databases: Databases, onnx: bytes, pictures: Pictures) -> Filled:
    """Make databases with a version of the extension and the data of :func:`fill`."""

    def create(of_version: str) -> Connection:
        db = databases.create(of_version)
        fill(db, onnx, pictures)
        return db

    return create


def upgrade(db: Connection) -> None:
    db.execute("ALTER EXTENSION pg_siamese UPDATE; SELECT siamese.renew_grants()")


INSTALLED = "SELECT extversion FROM pg_extension WHERE extname = 'pg_siamese'"
SEARCH = "SELECT image_id, distance FROM similar_images(%s, k => 25)"
ROWS = "SELECT (item).id, distance FROM similar_rows(NULL::t, %s, collection => 't')"


def fill(db: Connection, onnx: bytes, pictures: Pictures) -> None:
    """Two collections: one indexed with pending and dead rows, one with quarantined ones."""
    db.execute("SELECT register_model('medical', %s)", (onnx,))
    db.execute("SELECT create_collection()")
    insert_images(db, pictures.files[:40], pictures.labels[:40])
    db.execute("SELECT build_index()")
    insert_images(db, pictures.files[40:50], pictures.labels[40:50])
    db.execute("DELETE FROM images WHERE image_id = 7")
    db.execute("UPDATE images SET image = %s WHERE image_id = 8", (pictures.files[60],))
    db.execute('CREATE TABLE t (id text PRIMARY KEY COLLATE "C", image bytea)')
    db.execute("SELECT create_collection('t', 't', on_error => 'quarantine')")
    db.execute("INSERT INTO t VALUES ('a', %s), ('b', %s), ('bad', 'junk')", pictures.files[:2])
    db.execute("SELECT build_index('t')")


STATE = (
    "SELECT collection, model, rows_embedded, pending, dead, failures, generation, rows_indexed,"
    " generation_file FROM collection_status ORDER BY 1"
)


def answers(db: Connection, pictures: Pictures) -> list[Any]:
    """Whatever a session can ask of the data of :func:`fill`."""
    query = pictures.files[70]
    return [
        db.execute(SEARCH, (query,)).fetchall(),
        db.execute(
            "SELECT image_id, distance FROM similar_images(image_id => 8::bigint, k => 25)"
        ).fetchall(),
        rows_of(db, "SELECT image_id FROM similar_images(%s, engine => 'faiss', k => 25)", query),
        db.execute(ROWS, (query,)).fetchall(),
        db.execute("SELECT * FROM classify_image(%s)", (query,)).fetchall(),
        db.execute("SELECT collection, key, sqlstate, message FROM embedding_failures").fetchall(),
        db.execute(STATE).fetchall(),
    ]


def test_there_are_versions_to_upgrade_from() -> None:
    assert RELEASED
    for released in RELEASED:
        assert (DATA / f"{PACKAGE}-{released}-py3-none-any.whl").exists()


def test_every_path_to_the_current_version(databases: Databases) -> None:
    """Object by object: what an upgrade makes is what an installation makes."""
    fresh = describe(databases.create(version()))
    assert len(fresh) > 150
    paths = databases.create(version()).execute(
        "SELECT source, path FROM pg_extension_update_paths('pg_siamese')"
        " WHERE target = %s AND path IS NOT NULL",
        (version(),),
    )
    sources = {source for source, _ in paths}
    assert sources == set(RELEASED)
    for source in sorted(sources):
        db = databases.create(source)
        assert describe(db) != fresh
        db.execute("ALTER EXTENSION pg_siamese UPDATE")
        assert describe(db) == fresh


@pytest.mark.parametrize("released", RELEASED)
def test_upgrade_with_data(
    databases: Databases, filled: Filled, released: str, pictures: Pictures
) -> None:
    """Search gives the same before and after, and everything goes on."""
    db = filled(released)
    before = answers(db, pictures)
    assert len(before[0]) == 25 and len(before[3]) == 2 and len(before[5]) == 1
    vectors = "SELECT embedding_id, key, embedding::text FROM siamese.embedding_1 ORDER BY 1"
    stored = db.execute(vectors).fetchall()
    upgrade(db)
    session = databases.connect(databases.dsn(db))
    assert session.execute(vectors).fetchall() == stored
    assert answers(session, pictures) == before
    assert one(session, "SELECT bool_and(ok) FROM self_check()") is True
    rows = session.execute("SELECT embed, waiting FROM collection_status").fetchall()
    assert set(rows) == {("sync", 0)}
    # Old collections go on as they were, and new ones can be deferred.
    session.execute("INSERT INTO images (image) VALUES (%s)", (pictures.files[70],))
    nearest, *_ = rows_of(session, SEARCH, pictures.files[70])
    assert nearest[0] == 51 and nearest[1] < 1e-5
    session.execute("UPDATE t SET image = %s WHERE id = 'bad'", (pictures.files[2],))
    assert session.execute("SELECT FROM embedding_failures").fetchall() == []
    session.execute("SELECT build_index('images'), build_index('t')")
    assert len(session.execute(ROWS, (pictures.files[2],)).fetchall()) == 3
    make_collection(session, "later", embed="deferred")
    session.execute("INSERT INTO later VALUES (1, %s)", (pictures.files[3],))
    assert one(session, "SELECT embed_pending()") == 1
    session.execute("SELECT drop_collection('images'), drop_collection('t')")


@pytest.mark.parametrize("released", RELEASED)
def test_objects_of_collections_are_upgraded(filled: Filled, released: str) -> None:
    """Tables, triggers, policies and functions of single collections are those of new ones."""
    old, new = filled(released), filled(version())
    upgrade(old)
    assert describe(old) == describe(new)


@pytest.mark.parametrize("released", RELEASED)
def test_sessions_from_before(
    databases: Databases, filled: Filled, released: str, pictures: Pictures
) -> None:
    """They hold the old package in memory: each call says so, and writes nothing."""
    db = filled(released)
    old, idle = databases.connect(databases.dsn(db)), databases.connect(databases.dsn(db))
    assert old.execute(SEARCH, (pictures.files[0],)).fetchall()
    upgrade(db)
    count = "SELECT count(*) FROM images"
    before = old.execute(count).fetchone()
    for statement in (SEARCH, "INSERT INTO images (image) VALUES (%s)"):
        with sql_error("55000", f"version {released}", version(), "Start a new session"):
            old.execute(statement, (pictures.files[0],))
    assert old.execute(count).fetchone() == before
    assert idle.execute(SEARCH, (pictures.files[0],)).fetchall()  # had loaded nothing yet


@pytest.mark.parametrize("released", RELEASED)
def test_privileges_after_an_upgrade(filled: Filled, released: str, new_role: NewRole) -> None:
    reader, admin = new_role(), new_role()
    labels = {reader: "reader", admin: "admin"}
    old, new = filled(released), filled(version())
    for db in (old, new):
        db.execute("SELECT grant_usage(%s), grant_admin(%s)", (reader, admin))
    upgrade(old)
    assert privileges(old, labels) == privileges(new, labels)


def test_an_upgrade_can_be_rolled_back(filled: Filled, pictures: Pictures) -> None:
    db = filled(RELEASED[0])
    before, objects = answers(db, pictures), describe(db)
    with db.transaction(force_rollback=True):
        upgrade(db)
    assert describe(db) == objects
    assert answers(db, pictures) == before


def test_make_migrate(
    databases: Databases, filled: Filled, capsys: pytest.CaptureFixture[str]
) -> None:
    db = filled(RELEASED[0])
    dsn = databases.dsn(db)
    assert migrate.main(["--dsn", dsn, "--show"]) == 0
    said = capsys.readouterr().out
    assert f"installed: {RELEASED[0]}" in said
    assert f"available: {version()} (by {RELEASED[0]}--" in said and "would upgrade" in said
    assert one(db, INSTALLED) == RELEASED[0]
    assert migrate.main(["--dsn", dsn]) == 0
    assert f"Upgraded from {RELEASED[0]} to {version()}" in capsys.readouterr().out
    assert one(db, INSTALLED) == version()
    assert migrate.main(["--dsn", dsn]) == 0
    assert "Nothing to upgrade" in capsys.readouterr().out
    db.execute("DROP EXTENSION pg_siamese CASCADE")
    assert migrate.main(["--dsn", dsn]) == 1
    assert "no extension pg_siamese" in capsys.readouterr().err


def test_psql_errors_are_one_report(cluster: Cluster) -> None:
    with pytest.raises(SetupError, match="nonsense"):
        migrate.run_sql(cluster.dsn("postgres"), "SELECT nonsense")


def test_beside_a_transaction_that_goes_on_to_write(
    databases: Databases, filled: Filled, pictures: Pictures
) -> None:
    db = filled("0.2.0")
    writer, watch = (databases.connect(databases.dsn(db)) for _ in range(2))
    for session in (db, writer):
        session.execute("SET deadlock_timeout = '50ms'")
    writer.execute("BEGIN")
    writer.execute("SELECT FROM images FOR UPDATE")
    thread = threading.Thread(target=upgrade, args=(db,))
    thread.start()
    waits = "SELECT cardinality(pg_blocking_pids(%s)) > 0"
    while watch.execute(waits, (db.info.backend_pid,)).fetchone() != (True,):
        assert thread.is_alive()
    writer.execute("UPDATE images SET image = %s WHERE image_id = 9", (pictures.files[71],))
    writer.execute("COMMIT")
    thread.join()
    assert one(watch, INSTALLED) == version()
