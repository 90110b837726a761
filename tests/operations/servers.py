"""Servers that are copies of each other, and what the tests ask of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from tests.conftest import Connection, insert_images
from tests.support import assert_exact, exact_distances, one, wait_until
from tools.cluster import DATABASE, THROWAWAY, Cluster, create_database

# What was committed must reach standbys and archives at once, and not after some time.
DURABLE = THROWAWAY | {"synchronous_commit": "on"}
K = 10


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


def catch_up(primary: Connection, standby: Connection) -> None:
    """Wait until a standby has replayed all that was written so far."""
    written = one(primary, "SELECT pg_current_wal_insert_lsn()::text")
    wait_for(standby, f"SELECT pg_last_wal_replay_lsn() >= '{written}'")


def wait_for(db: Connection, condition: str) -> None:
    """Wait until a query gives true."""
    wait_until(lambda: one(db, condition), condition)


def index_files(cluster: Cluster) -> Path:
    return cluster.data / "pg_siamese"


def remove_files(cluster: Cluster) -> None:
    shutil.rmtree(index_files(cluster))


def search(db: Connection, image: bytes, engine: str = "auto", k: int = K) -> list[Any]:
    return db.execute(
        "SELECT * FROM similar_images(image => %s, k => %s, engine => %s)", (image, k, engine)
    ).fetchall()


def check(db: Connection, *images: bytes, engine: str = "auto") -> None:
    """Compare answers with plain SQL in the same session."""
    for image in images:
        assert_exact(search(db, image, engine), exact_distances(db, image), K)


def embedding_ids(db: Connection, where: str = "true", *values: Any) -> set[int]:
    """Return the numbers of vectors of ``siamese.images``."""
    query = f"SELECT array_agg(embedding_id) FROM siamese.embedding_1 WHERE {where}"
    return set(one(db, query, *values))
