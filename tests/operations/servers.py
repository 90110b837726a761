"""Servers that are copies of each other, and what the tests ask of them."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from tests.conftest import Connection, insert_images
from tools.cluster import DATABASE, THROWAWAY, Cluster, create_database

# What was committed must reach standbys and archives at once, and not after some time.
DURABLE = THROWAWAY | {"synchronous_commit": "on"}
PATIENCE = 60  # seconds


@contextmanager
def server(settings: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """Give a throw-away cluster that is not started yet; it is destroyed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="pg_siamese-", dir="/tmp"))
    cluster = Cluster(folder, settings=DURABLE | dict(settings or {}))
    try:
        yield cluster
    finally:
        cluster.destroy()


def fill(cluster: Cluster, onnx: bytes, files: list[bytes], labels: list[str]) -> None:
    """Make the database, with the medical model and images in the ready-made collection."""
    create_database(cluster)
    with connect(cluster) as db:
        db.execute("SELECT siamese.register_model('medical', %s)", (onnx,))
        db.execute("SELECT siamese.create_collection()")
        insert_images(db, files, labels)


def connect(cluster: Cluster, database: str = DATABASE, **parameters: str) -> Connection:
    """Connect (autocommit) as superuser, unless parameters say otherwise."""
    return psycopg.connect(make_conninfo(cluster.dsn(database), **parameters), autocommit=True)


def one(db: Connection, query: str, *values: Any) -> Any:
    """Return the first column of a query's first row."""
    row = db.execute(query, values or None).fetchone()
    assert row is not None, query
    return row[0]


def catch_up(primary: Connection, standby: Connection) -> None:
    """Wait until a standby has replayed all that was written so far."""
    written = one(primary, "SELECT pg_current_wal_insert_lsn()::text")
    wait_for(standby, f"SELECT pg_last_wal_replay_lsn() >= '{written}'")


def wait_for(db: Connection, condition: str) -> None:
    """Wait until a query gives true."""
    deadline = time.monotonic() + PATIENCE
    while not one(db, condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)


def index_files(cluster: Cluster) -> Path:
    """The folder of a cluster's index files."""
    return cluster.data / "pg_siamese"


def remove_files(cluster: Cluster) -> None:
    """Remove all index files of a cluster."""
    shutil.rmtree(index_files(cluster))


def notices_of(db: Connection) -> list[str]:
    """Collect the notices that a connection gets from now on."""
    found: list[str] = []
    db.add_notice_handler(
        lambda notice: found.append(f"{notice.message_primary} {notice.message_hint or ''}")
    )
    return found
