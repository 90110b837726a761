"""Start the benchmark's own server: a temporary cluster, set up as for production."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.session import connect, first_row
from tools.cluster import Cluster, create_database
from tools.installation import Installation

# The server waits for the disk, as in production. Autovacuum would disturb a measurement, so tables
# of all sides are vacuumed and analysed before it.
SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "1GB",
    "maintenance_work_mem": "1GB",
    "max_parallel_maintenance_workers": "2",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
    "jit": "off",
    "autovacuum": "off",
}
# pgvector's table, graph and build at a million vectors all fit into memory.
LARGE_SETTINGS = SETTINGS | {"shared_buffers": "3GB", "maintenance_work_mem": "3GB"}


@contextmanager
def server(settings: dict[str, str], installation: Installation | None = None) -> Iterator[Cluster]:
    """Start a cluster with the extension in its database, and remove it at the end."""
    with Cluster.temporary(settings, installation) as cluster:
        create_database(cluster)
        with connect(cluster.dsn()) as admin:
            admin.execute("CREATE SCHEMA bench")
        yield cluster


def index_file(cluster: Cluster, collection: str) -> Path:
    """Return the FAISS file of a collection's current generation."""
    query = (
        "SELECT d.oid, c.collection_id, c.generation FROM siamese.collections AS c,"
        " pg_database AS d WHERE c.name = %s AND d.datname = current_database()"
    )
    with connect(cluster.dsn()) as admin:
        database, number, generation = first_row(admin, query, collection)
    return cluster.data / "pg_siamese" / str(database) / str(number) / f"{generation}.faiss"
