"""Nothing leaves the server: no connection but PostgreSQL's, no file where none belongs.

The environment is that of a server and a user who know nothing of ONNX Runtime's telemetry: none of
the switches that `make` sets outside the packages is there, nor the variables of CI systems, at
which ONNX Runtime is silent by itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psycopg
import pytest
from PIL import Image

from tests import server
from tests.conftest import MODELS, Connection, Pictures, insert_images
from tests.database import guard
from tests.database.tables import make_collection
from tests.support import one, rows_of
from tools.cluster import Cluster, create_database
from tools.packages import OWN_PYTHON, server_folder
from tools.project import ROOT

pytestmark = pytest.mark.skipif(
    bool(server.DSN), reason="the processes of a server elsewhere can't be watched"
)

# As the command `pg_siamese`, but without the environment's own switch: -S leaves out .pth files.
START = """
import sys
sys.path[:0] = {paths!r}
sys.argv[0] = "pg_siamese"
from pg_siamese.cli.main import app
app()
"""
IMPORT = "import sys; sys.path.insert(0, {packages!r}); import onnxruntime"
QUEUE = "Microsoft/DeveloperTools/.onnxruntime"
EXPERIMENT = """
title = "A tiny encoder"
data = []
epochs = 1
batch_size = 8
intended_use = "Tests."
limits = "Knows two colours."
[input]
width = 20
height = 16
[network]
name = "conv3_gap"
dimension = 8
[objective]
name = "cosface"
[sampling]
kind = "classes"
per_epoch = 16
"""


class PlainCluster(Cluster):
    """A cluster with the environment of any server: a home to write into, and nothing switched."""

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def init(self) -> None:
        super().init()
        self.home.mkdir(exist_ok=True)
        self._give_to_user(self.home)

    def _environment(self) -> dict[str, str]:
        chosen = super()._environment() | {"HOME": str(self.home)}
        del chosen["ORT_DISABLE_TELEMETRY"]
        return chosen


@pytest.fixture(scope="module")
def plain() -> Iterator[PlainCluster]:
    guard.require_strace()
    with PlainCluster.temporary() as cluster:
        assert isinstance(cluster, PlainCluster)
        create_database(cluster)
        yield cluster


@contextmanager
def session(cluster: Cluster) -> Iterator[Connection]:
    with psycopg.connect(cluster.dsn(), autocommit=True) as connection:
        yield connection


class User:
    """Someone who uses the client: a home, a folder to work in, and the commands."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.home = folder / "home"
        self.work = folder / "work"
        self.cluster = cluster
        self.packages = sysconfig.get_path("purelib")
        for each in (self.home, self.work):
            each.mkdir()

    def python(self, *arguments: str) -> tuple[guard.Record, subprocess.CompletedProcess[str]]:
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "LANG": "C.UTF-8"}
        return guard.run([sys.executable, "-S", *arguments], environment, self.work)

    def command(self, *arguments: str | Path) -> None:
        """Run a command of `pg_siamese`, which must work and keep to itself."""
        paths = [str(ROOT / "python"), str(ROOT / "plpython"), self.packages]
        record, done = self.python("-c", START.format(paths=paths), *map(str, arguments))
        assert done.returncode == 0, done.stdout + done.stderr
        assert record.strangers(self.cluster.socket_folder) == []
        strays = record.strays(self.work)
        # Python keeps its byte code beside the sources.
        assert [each for each in strays if "__pycache__" not in Path(each).parts] == []
        assert list(self.home.iterdir()) == []


@pytest.fixture
def user(plain: PlainCluster, tmp_path: Path) -> User:
    return User(tmp_path, plain)


def own_places(cluster: PlainCluster) -> list[Path]:
    return [cluster.data, cluster.log, cluster.socket_folder]


def colours(folder: Path, count: int = 12) -> Path:
    """Write a folder of red and of blue pictures."""
    random = np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 100, (20, 20, 3), np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(folder / name / f"{number:02}.png")
    return folder


@pytest.mark.law(10)
def test_the_server_keeps_to_itself(plain: PlainCluster, onnx: bytes, pictures: Pictures) -> None:
    """Registering, inserting, building, searching, deferred embedding and checking."""
    with guard.watched(plain.pid() or 0, plain.data) as record:
        with session(plain) as db:
            db.execute("SELECT siamese.register_model('medical', %s)", (onnx,))
            db.execute("SELECT siamese.create_collection()")
            ids = insert_images(db, pictures.files[:30])
            db.execute("SELECT siamese.build_index(threads => 2)")
            make_collection(db, "later", embed="deferred")
            db.execute("INSERT INTO later VALUES (1, %s)", (pictures.files[0],))
            db.execute("SELECT siamese.embed_pending('later')")
        with session(plain) as db:
            assert db.execute("SELECT siamese.warm_up()").fetchall()
            search = "SELECT count(*) FROM siamese.similar_images({}, k => 5)"
            assert one(db, search.format("image => %s"), pictures.files[40]) == 5
            assert one(db, search.format("image_id => %s"), ids[3]) == 5
            assert one(db, "SELECT siamese.contact_sheet('images', ARRAY[%s])", ids[3])
            db.execute("DELETE FROM siamese.images WHERE image_id = %s", (ids[0],))
            assert rows_of(db, "SELECT * FROM siamese.self_check() WHERE NOT ok") == []
    assert record.strangers(plain.socket_folder) == []
    assert any(path.suffix == ".faiss" for path in record.written), "the guard saw nothing"
    assert list(plain.home.iterdir()) == []
    plain.restart()  # what belongs to the running server, as its shared memory, is gone then
    assert record.strays(*own_places(plain)) == []


@pytest.mark.law(10)
def test_the_client_keeps_to_itself(
    plain: PlainCluster, user: User, onnx: bytes, pictures: Pictures
) -> None:
    """Registering, loading, searching with a picture of the answers, and a worker."""
    images = colours(user.work / "photos")
    query = images / "red" / "00.png"
    dsn = ("--dsn", plain.dsn())
    user.command("register-model", MODELS / "medical.onnx", "--name", "second", *dsn)
    with session(plain) as db:
        make_collection(db, "photos", key="bigserial", more=", label text", model="second")
        make_collection(db, "waiting", model="second", embed="deferred")
        db.execute("INSERT INTO waiting VALUES (1, %s)", (pictures.files[0],))
    user.command("load", images, "--collection", "photos", *dsn)
    user.command("build-index", "--collection", "photos", *dsn)
    sheet = user.work / "sheet.png"
    user.command("query", query, "--collection", "photos", "--sheet", sheet, *dsn)
    assert sheet.is_file()
    user.command("worker", "--once", *dsn)
    user.command("status", *dsn)
    with session(plain) as db:
        numbers = dict(rows_of(db, "SELECT name, collection_id FROM siamese.collections"))
        for name, rows in (("photos", 24), ("waiting", 1)):
            assert one(db, f"SELECT count(*) FROM siamese.embedding_{numbers[name]}") == rows


@pytest.mark.law(10)
def test_training_keeps_to_itself(user: User) -> None:
    """One epoch of two steps, exported and evaluated with pictures."""
    pytest.importorskip("torch")
    pytest.importorskip("lightning")
    images = colours(user.work / "colours", 20)
    settings = user.work / "tiny.toml"
    settings.write_text(EXPERIMENT)
    model = user.work / "tiny.onnx"
    data = ("--data", f"folder:{images}")
    user.command("train", settings, *data, "--runs", user.work / "runs", "--output", model)
    results, drawn = user.work / "tiny.json", user.work / "pictures"
    user.command("evaluate", model, *data, "--output", results, "--pictures", drawn)
    assert any(drawn.iterdir())


def test_the_guard_sees_a_client_that_talks(user: User) -> None:
    """ONNX Runtime by itself, and a connection that nobody answers."""
    record, done = user.python("-c", IMPORT.format(packages=user.packages))
    assert done.returncode == 0, done.stderr
    assert any(QUEUE in each for each in record.strays(user.work))
    call = "import socket; socket.socket().connect_ex(('127.0.0.1', 9))"
    record, _ = user.python("-c", call)
    (stranger,) = record.strangers(user.cluster.socket_folder)
    assert 'inet_addr("127.0.0.1")' in stranger


def test_a_session_that_imported_it_first_is_told(plain: PlainCluster) -> None:
    """The guard sees the server talk too, and `self_check` says what to do, then and later."""
    packages = str(server_folder(ROOT / "build" / "packages", OWN_PYTHON).resolve())
    code = IMPORT.format(packages=packages)
    check = "SELECT ok, detail FROM siamese.self_check() WHERE subject = 'telemetry'"
    with guard.watched(plain.pid() or 0, plain.data) as record, session(plain) as db:
        db.execute(f"DO LANGUAGE plpython3u $$ {code} $$")
        ok, detail = db.execute(check).fetchone() or (None, "")
        assert ok is False
        assert "ORT_DISABLE_TELEMETRY=1" in detail
    assert any(QUEUE in each for each in record.strays(*own_places(plain)))
    with session(plain) as db:
        ok, detail = db.execute(check).fetchone() or (None, "")
        assert ok is False
        assert f'"{plain.home}/.cache/{QUEUE}"' in detail and "remove" in detail
    subprocess.run(["rm", "-r", plain.home / ".cache"], check=True)
    with session(plain) as db:
        assert db.execute(check).fetchone() == (True, "off")
