"""A dump of the embedded server (PostgreSQL 15 on Debian 12) restored into the container (17)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Pictures, insert_images
from tests.operations.servers import check, connect, fill, server
from tests.support import one
from tools.cluster import DATABASE, Cluster
from tools.report import SetupError

pytestmark = pytest.mark.skipif(
    not os.environ.get("PG_SIAMESE_TEST_IMAGE"),
    reason="no container to restore into: make docker-test starts one",
)


@pytest.fixture(scope="module")
def embedded(onnx: bytes, pictures: Pictures) -> Iterator[Cluster]:
    """An embedded server with two collections, in the middle of their lives."""
    with server() as cluster:
        try:
            cluster.start()
        except SetupError as error:
            pytest.skip(f"no embedded server to dump: {error}")
        fill(cluster, onnx, pictures.files[:100], pictures.labels[:100])
        with connect(cluster) as db:
            db.execute("SELECT build_index()")
            insert_images(db, pictures.files[100:110])
            db.execute("DELETE FROM images WHERE image_id % 9 = 4")
            db.execute(
                "CREATE TABLE late (id uuid DEFAULT gen_random_uuid() PRIMARY KEY, image bytea)"
            )
            db.execute("SELECT create_collection('late', 'late', embed => 'deferred')")
            db.execute("INSERT INTO late (image) SELECT unnest(%s::bytea[])", (pictures.files[:5],))
        yield cluster


@pytest.mark.parametrize("form", ["custom", "plain"])
def test_dump_of_the_embedded_server(
    form: str,
    embedded: Cluster,
    containers: Any,
    pictures: Pictures,
    queries: Pictures,
    tmp_path: Path,
) -> None:
    query = "SELECT * FROM siamese.embedding_1 ORDER BY 1"
    with connect(embedded) as db:
        vectors = db.execute(query).fetchall()
    file = tmp_path / "dump"
    program = str(embedded.installation.bin / "pg_dump")
    source = embedded.dsn(DATABASE)
    subprocess.run([program, f"--format={form}", "-f", str(file), "-d", source], check=True)
    file.chmod(0o644)
    container = containers.start(files={"/tmp/dump": file}).healthy()
    container.exec("createdb", "--template=template0", "restored")
    if form == "custom":
        container.exec("pg_restore", "--exit-on-error", "-d", "restored", "/tmp/dump")
    else:
        container.exec("psql", "-Xqv", "ON_ERROR_STOP=1", "-d", "restored", "-f", "/tmp/dump")

    with container.connect(dbname="restored", options="-c search_path=public,siamese") as restored:
        major = int(one(restored, "SHOW server_version_num")) // 10_000
        assert major >= embedded.installation.major
        assert restored.execute(query).fetchall() == vectors
        images = [*queries.files[:5], pictures.files[105]]
        check(restored, *images)
        keys = insert_images(restored, pictures.files[200:210])
        restored.execute("DELETE FROM images WHERE image_id = %s", (keys[0],))
        assert one(restored, "SELECT embed_pending('late')") == 5
        check(restored, *images, pictures.files[205])
        restored.execute("SELECT build_index(), build_index('late')")
        check(restored, *images, pictures.files[205], engine="faiss")
        assert one(restored, "SELECT bool_and(ok) FROM self_check()")
