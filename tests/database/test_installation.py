"""What a session finds of the installation: packages for its Python, and the shipped encoders."""

from __future__ import annotations

import pytest

from tests.conftest import Connect, Connection, NewRole, Pictures
from tests.database.tables import insert_rows, make_collection
from tests.support import one, rows_of, sql_error
from tools.project import ROOT, version

SHIPPED = {file.stem: file.read_bytes() for file in (ROOT / "models").glob("*.onnx")}
# A layout of the test's own, made by the server itself, which may be in a container.
LAYOUT = """
CREATE FUNCTION pg_temp.link(target text, link text) RETURNS void LANGUAGE plpython3u AS $$
import os
os.makedirs(os.path.dirname(link), exist_ok=True)
os.symlink(target, link + '.new')
os.rename(link + '.new', link)
$$
"""
PYTHON = """
CREATE FUNCTION pg_temp.python() RETURNS text LANGUAGE plpython3u AS $$
import sys
return f'python{sys.version_info.major}.{sys.version_info.minor}'
$$
"""
LOADED = """
CREATE FUNCTION pg_temp.loaded() RETURNS text LANGUAGE plpython3u AS $$
import os, sys
return os.path.dirname(os.path.dirname(sys.modules['pg_siamese_server'].__file__))
$$
"""


def packages(db: Connection) -> str:
    """The folder that the extension's SQL names."""
    source: str = one(db, "SELECT prosrc FROM pg_proc WHERE oid = 'siamese._load'::regproc")
    return source.split("link = f'")[1].split(f"/{version()}/python")[0]


def installed(db: Connection, python: str) -> str:
    """The installation's own packages, by the constant that another function holds."""
    source: str = one(
        db, "SELECT prosrc FROM pg_proc WHERE oid = 'siamese._register_shipped_models'::regproc"
    )
    return source.split("plpy, '")[1].split("/models'")[0] + f"/{python}"


def use(db: Connection, folder: str) -> None:
    """Let the database look for its packages in another folder."""
    body = one(db, "SELECT pg_get_functiondef('siamese._load'::regproc)")
    db.execute(body.replace(packages(db), folder))


def prepare(db: Connection) -> str:
    """Make the functions above; return the name of the server's Python."""
    db.execute(LAYOUT)
    db.execute(PYTHON)
    return str(one(db, "SELECT pg_temp.python()"))


@pytest.fixture
def moved(db: Connection) -> str:
    """A database whose packages are in a folder of the test's own; returns that of this version.

    As on a server that has an installation of its own.
    """
    python = prepare(db)
    real = f"{packages(db)}/{version()}/{python}"
    folder = one(db, "SELECT current_setting('data_directory')") + f"/packages-{db.info.dbname}"
    db.execute("SELECT pg_temp.link(%s, %s)", (real, f"{folder}/{version()}/{python}"))
    use(db, folder)
    return f"{folder}/{version()}"


SEARCH = "SELECT count(*) FROM similar_images(%s)"


def test_no_path_of_one_python_is_in_the_catalog(db: Connection) -> None:
    """So a server with another one, after pg_upgrade, finds its own packages."""
    query = "SELECT count(*) FROM pg_proc WHERE prosrc ~ 'python3\\.|site-packages'"
    assert one(db, query) == 0


def test_a_server_without_packages_for_its_python(
    moved: str, connect: Connect, pictures: Pictures
) -> None:
    db = connect()
    python = prepare(db)
    # Those of the server that it came from are there, and of no use.
    db.execute("SELECT pg_temp.link('nowhere', %s)", (f"{moved}/python3.2",))
    db.execute("SELECT pg_temp.link('nowhere', %s)", (f"{moved}/{python}",))
    session = connect()
    with sql_error(
        "58P01",
        "could not load the server package",
        f'There is no folder "{moved}/{python}".',
        "Run make install for this server",
    ):
        session.execute(SEARCH, (pictures.files[0],))
    # make install brings them; the next call of the same session finds them.
    db.execute("SELECT pg_temp.link(%s, %s)", (installed(db, python), f"{moved}/{python}"))
    session.execute("INSERT INTO images (image) VALUES (%s)", (pictures.files[0],))
    assert one(session, SEARCH, pictures.files[0]) == 1


def test_writes_that_need_no_embedding(
    moved: str, connect: Connect, pictures: Pictures, embed: str
) -> None:
    """They go on without packages, and what they leave is right when the packages are back."""
    db = connect()
    make_collection(db, more=", label text DEFAULT 'x'", embed=embed)
    insert_rows(db, range(1, 7), pictures.files[:6])
    db.execute("SELECT backfill('t'), build_index('t')")
    python = prepare(db)
    db.execute("SELECT pg_temp.link('nowhere', %s)", (f"{moved}/{python}",))
    session = connect()
    session.execute("UPDATE t SET label = 'y'")
    session.execute("DELETE FROM t WHERE id IN (1, 2)")
    session.execute("DELETE FROM t WHERE id = 99")
    session.execute("INSERT INTO t SELECT * FROM t WHERE id = 99")
    if embed == "sync":
        for statement in (
            "INSERT INTO t VALUES (7, %s, 'z')",
            "UPDATE t SET image = %s WHERE id = 3",
            "MERGE INTO t USING (VALUES (3)) AS v (n) ON t.id = v.n"
            " WHEN MATCHED THEN UPDATE SET image = %s",
        ):
            with sql_error("58P01", "could not load the server package"):
                session.execute(statement, (pictures.files[9],))
    vectors = "SELECT array_agg(key ORDER BY key) FROM siamese.embedding_2"
    assert one(db, vectors) == [3, 4, 5, 6]
    db.execute("SELECT pg_temp.link(%s, %s)", (installed(db, python), f"{moved}/{python}"))
    query = "SELECT (item).id FROM similar_rows(NULL::t, %s, 10, 't') ORDER BY 1"
    assert rows_of(connect(), query, pictures.files[0]) == [(3,), (4,), (5,), (6,)]
    checks = "SELECT subject, detail FROM self_check() WHERE NOT ok"
    assert connect().execute(checks).fetchall() == []
    db.execute("SELECT pg_temp.link('nowhere', %s)", (f"{moved}/{python}",))
    connect().execute("TRUNCATE t")
    assert one(db, vectors) is None
    assert one(db, "SELECT count(*) FROM siamese.pending_2") == 0


def test_a_reinstallation_leaves_running_sessions_alone(
    moved: str, connect: Connect, pictures: Pictures
) -> None:
    """They import the rest from where they began, whatever the link leads to by then."""
    old = connect()
    old.execute("SELECT siamese._load()")
    db = connect()
    python = prepare(db)
    db.execute("SELECT pg_temp.link('nowhere', %s)", (f"{moved}/{python}",))
    # Has loaded neither ONNX Runtime nor FAISS yet.
    old.execute("INSERT INTO images (image) VALUES (%s)", (pictures.files[0],))
    old.execute("SELECT build_index()")
    assert one(old, SEARCH, pictures.files[0]) == 1
    old.execute(LOADED)
    assert moved not in one(old, "SELECT pg_temp.loaded()")


def registered(db: Connection) -> dict[str, tuple[int, bool]]:
    rows = db.execute("SELECT model, model_id, registered FROM register_shipped_models()")
    return {name: (number, new) for name, number, new in rows.fetchall()}


def test_shipped_models(db: Connection) -> None:
    db.execute("SELECT drop_collection('images'), drop_model('medical')")
    first = registered(db)
    assert set(first) == set(SHIPPED) and all(new for _, new in first.values())
    stored = db.execute("SELECT name, onnx FROM siamese.models").fetchall()
    assert dict(stored) == SHIPPED
    # Once more is nothing more.
    assert registered(db) == {name: (number, False) for name, (number, _) in first.items()}
    assert one(db, "SELECT count(*) FROM siamese.models") == len(SHIPPED)


def test_shipped_models_under_names_that_are_taken(db: Connection, onnx: bytes) -> None:
    """A name stands for one file for ever: another file gets the version behind its name."""
    db.execute("SELECT register_model('fashion_mnist', %s, max_pixels => 1000)", (onnx,))
    found = registered(db)
    assert found["medical"][1] is False  # the template has it
    assert found[f"fashion_mnist_{version()}"][1] is True
    assert registered(db).keys() == found.keys()


def test_shipped_models_are_administrators_business(
    db: Connection, connect: Connect, new_role: NewRole
) -> None:
    reader, admin = new_role(), new_role()
    db.execute("SELECT grant_usage(%s), grant_admin(%s)", (reader, admin))
    with sql_error("42501", "register_shipped_models"):
        registered(connect(user=reader))
    assert set(registered(connect(user=admin))) == set(SHIPPED)


def test_an_installation_without_models(db: Connection) -> None:
    body = one(db, "SELECT pg_get_functiondef('siamese._register_shipped_models'::regproc)")
    db.execute(body.replace("/models'", "/no-models'"))
    with sql_error("58P01", "no shipped models", '/no-models"', "make install"):
        registered(db)
