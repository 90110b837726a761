"""Fixtures of the database tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import sql

from tests.conftest import Connection
from tests.server import ExternalServer, login_role
from tools.cluster import Cluster

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def shared(cluster: Cluster | ExternalServer, template: str) -> Iterator[Connection]:
    """A connection to one database for all tests of a file that change nothing."""
    name = sql.Identifier(f"shared_{next(_numbers)}")
    with psycopg.connect(cluster.dsn("postgres"), autocommit=True) as admin:
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
        admin.execute(statement.format(name, sql.Identifier(template)))
        with psycopg.connect(cluster.dsn(name.as_string()[1:-1]), autocommit=True) as connection:
            connection.execute("SET search_path = public, siamese")
            yield connection
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


@pytest.fixture(scope="session")
def new_role(cluster: Cluster | ExternalServer) -> Iterator[Callable[[], str]]:
    """Make login roles, of names of their own, that live as long as the cluster."""
    with psycopg.connect(cluster.dsn("postgres"), autocommit=True) as admin:

        def create() -> str:
            name = f"role_{next(_numbers)}"
            admin.execute(login_role(name))
            return name

        yield create
