"""A real PostgreSQL server for the tests, and real images to put into it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pg_siamese import datasets
from pg_siamese.client.sources import png
from tests import server
from tests.server import ExternalServer
from tools.cluster import Cluster, create_database
from tools.project import ROOT

MODELS = ROOT / "models"
TEMPLATE = "template_siamese"

Connection = psycopg.Connection[Any]
Connect = Callable[..., Connection]
NewRole = Callable[[], str]
_numbers = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--renew-golden", action="store_true", help="write the lists in tests/golden/ anew"
    )
    faults = parser.getgroup("faults", "tests/faults/")
    faults.addoption("--faults-long", action="store_true", help="run the long form")
    faults.addoption("--faults-cycles", type=int, help="how often to kill (6; long form: 100)")
    faults.addoption("--faults-seed", type=int, help="seed of what is random; drawn by default")


@dataclass(frozen=True)
class Pictures:
    """Real images: pixels uint8 (count, height, width[, 3]), PNG files and labels of the same."""

    name: str
    pixels: np.ndarray[Any, Any]
    files: list[bytes]
    labels: list[str]


@functools.cache
def pictures_of(name: str, split: str, count: int) -> Pictures:
    """Return the first images of a data set; Fashion-MNIST stands in where it can't be had."""
    try:
        found = datasets.load_medmnist(name, split, download=False)
    except datasets.DataNotFoundError:
        found = datasets.load_fashion_mnist("train" if split == "val" else split)
    pixels = found.images[:count]
    labels = [str(label) for label in found.labels[:count]]
    return Pictures(found.name, pixels, [png(image) for image in pixels], labels)


@pytest.fixture(scope="session")
def pictures() -> Pictures:
    """2,000 X-ray images (or pictures of clothes)."""
    return pictures_of("pneumoniamnist", "train", 2000)


@pytest.fixture(scope="session")
def queries() -> Pictures:
    """100 images of the same kind that are not among ``pictures``."""
    return pictures_of("pneumoniamnist", "test", 100)


@pytest.fixture(scope="session")
def onnx() -> bytes:
    """The medical encoder as an ONNX file."""
    return (MODELS / "medical.onnx").read_bytes()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster | ExternalServer]:
    """A throw-away cluster for the whole run, or the server that the environment names."""
    if server.DSN:
        yield ExternalServer()
        return
    with Cluster.temporary() as running:
        yield running


def make_template(cluster: Cluster | ExternalServer, onnx: bytes) -> str:
    """Make a database with the extension, the medical model and an empty collection ``images``."""
    if isinstance(cluster, Cluster):
        create_database(cluster, TEMPLATE)
    else:
        create_database_elsewhere(cluster)
    with psycopg.connect(cluster.dsn(TEMPLATE), autocommit=True) as connection:
        connection.execute("SELECT siamese.register_model('medical', %s)", (onnx,))
        connection.execute("SELECT siamese.create_collection()")
    return TEMPLATE


def create_database_elsewhere(server: ExternalServer) -> None:
    """Make the template, instead of one that an earlier run left."""
    name = sql.Identifier(TEMPLATE)
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))
        admin.execute(sql.SQL("CREATE DATABASE {}").format(name))
    with psycopg.connect(server.dsn(TEMPLATE), autocommit=True) as connection:
        connection.execute("CREATE EXTENSION pg_siamese CASCADE")


@pytest.fixture(scope="session")
def template(cluster: Cluster | ExternalServer, onnx: bytes) -> str:
    """Name of a database to copy; see :func:`make_template`."""
    return make_template(cluster, onnx)


@contextmanager
def copied_database(cluster: Cluster | ExternalServer, template: str) -> Iterator[str]:
    """Give the connection string of a fresh copy of a database, which is dropped at the end."""
    name = f"test_{next(_numbers)}"
    with psycopg.connect(cluster.dsn("postgres"), autocommit=True) as admin:
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
        admin.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))
        # Not copied with a template.
        statement = sql.SQL('ALTER DATABASE {} SET search_path = "$user", public, siamese')
        admin.execute(statement.format(sql.Identifier(name)))
    yield cluster.dsn(name)
    with psycopg.connect(cluster.dsn("postgres"), autocommit=True) as admin:
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def dsn(cluster: Cluster | ExternalServer, template: str) -> Iterator[str]:
    """Connection string of a fresh database made from the template; dropped after the test."""
    with copied_database(cluster, template) as found:
        yield found


@pytest.fixture
def connect(dsn: str) -> Iterator[Connect]:
    """Open connections (autocommit) to the test's database; closed after the test.

    Keyword arguments are connection parameters, as ``user="reader"``.
    """
    opened: list[Connection] = []

    def open_one(**parameters: str) -> Connection:
        connection = psycopg.connect(make_conninfo(dsn, **parameters), autocommit=True)
        opened.append(connection)
        return connection

    yield open_one
    for connection in opened:
        connection.close()


@pytest.fixture
def db(connect: Connect) -> Connection:
    """One superuser connection to the test's database."""
    return connect()


def insert_images(db: Connection, files: list[bytes], labels: list[str] | None = None) -> list[int]:
    """Insert images into ``siamese.images`` in one statement; returns their ids."""
    cursor = db.execute(
        "INSERT INTO siamese.images (image, label)"
        " SELECT * FROM unnest(%s::bytea[], %s::text[]) RETURNING image_id",
        (files, labels or list[str | None]([None] * len(files))),
        binary=True,
    )
    return [row[0] for row in cursor.fetchall()]
