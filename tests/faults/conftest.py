"""A cluster for faults: not that of the other tests, which must not notice."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import psycopg
import pytest

from tests.conftest import Connection, make_template
from tests.faults.checks import Connect
from tests.faults.cluster import SETTINGS, FaultyCluster
from tests.scenarios.gallery import Gallery, gallery, insert, prepare


@pytest.fixture(scope="session")
def is_long(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--faults-long"))


@pytest.fixture(scope="session")
def cycles(pytestconfig: pytest.Config, is_long: bool) -> int:
    given = pytestconfig.getoption("--faults-cycles")
    return int(given) if given is not None else 100 if is_long else 6


@pytest.fixture
def seed(pytestconfig: pytest.Config) -> int:
    """Seed of what is random; printed, so that a failure shows it."""
    given = pytestconfig.getoption("--faults-seed")
    number = int(given) if given is not None else secrets.randbelow(10**6)
    print(f"seed: --faults-seed {number}")
    return number


@pytest.fixture(scope="session")
def cluster() -> Iterator[FaultyCluster]:
    """A throw-away cluster whose commits survive SIGKILL."""
    with FaultyCluster.temporary(SETTINGS) as running:
        assert isinstance(running, FaultyCluster)
        yield running


@pytest.fixture(scope="session")
def images() -> Gallery:
    return gallery(700)


@pytest.fixture(scope="session")
def empty(cluster: FaultyCluster, onnx: bytes) -> str:
    """As the other tests' template, in this cluster."""
    return make_template(cluster, onnx)


@pytest.fixture(scope="session")
def template(cluster: FaultyCluster, empty: str, images: Gallery) -> str:
    """Name of a database to copy, with the first 100 images in it."""
    name = "template_filled"
    with psycopg.connect(cluster.dsn("postgres"), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {empty} STRATEGY file_copy")
    with psycopg.connect(cluster.dsn(name), autocommit=True) as connection:
        prepare(connection, images)
        insert(connection, images.files[:100])
    return name


@pytest.fixture
def db(connect: Connect) -> Connection:
    """One superuser connection to the test's database, whose images are in an index."""
    connection = connect()
    connection.execute("SELECT build_index()")
    return connection
