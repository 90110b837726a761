"""Fixtures of the database tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import psycopg
import pytest

from tests.conftest import Connection, NewRole, copied_database
from tests.server import ExternalServer, login_role
from tools.cluster import Cluster

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def shared(cluster: Cluster | ExternalServer, template: str) -> Iterator[Connection]:
    """A connection to one database for all tests of a file that change nothing."""
    with (
        copied_database(cluster, template) as dsn,
        psycopg.connect(dsn, autocommit=True) as connection,
    ):
        yield connection


@pytest.fixture(params=["sync", "deferred"])
def embed(request: pytest.FixtureRequest) -> str:
    """When a collection's images are embedded."""
    return str(request.param)


@pytest.fixture(scope="session")
def new_role(cluster: Cluster | ExternalServer) -> Iterator[NewRole]:
    """Make login roles, of names of their own, that live as long as the cluster."""
    with psycopg.connect(cluster.dsn("postgres"), autocommit=True) as admin:

        def create() -> str:
            name = f"role_{next(_numbers)}"
            admin.execute(login_role(name))
            return name

        yield create
