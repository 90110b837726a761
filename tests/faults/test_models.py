"""A row of siamese.models changed by hand: nothing is embedded by what is not the model."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import MODELS
from tests.faults.checks import Connect, check_answers, check_repair
from tests.scenarios.gallery import Connection, Gallery
from tests.support import one, sql_error

ERROR = ("XX001", "ONNX file of model", "does not match its SHA-256", "register_model")
CORRUPTIONS = {
    "a flipped bit": "set_byte(onnx, 70000, get_byte(onnx, 70000) # 1)",
    "cut": "substr(onnx, 1, 1000)",
    "empty": "''",
    "longer": "onnx || '\\x00'::bytea",
}


@pytest.mark.parametrize("value", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_corrupted_onnx(
    db: Connection, connect: Connect, images: Gallery, onnx: bytes, value: str
) -> None:
    old = connect()
    check_answers(old, images, "faiss", "before")
    db.execute(f"UPDATE siamese.models SET onnx = {value}")
    # A session that has the encoder open keeps the right one.
    check_answers(old, images, "faiss", "a session from before")
    session = connect()
    for statement in (
        "INSERT INTO siamese.images (image) VALUES (%s)",
        "UPDATE siamese.images SET image = %s WHERE image_id = 7",
        "SELECT similar_images(%s)",
        "SELECT embed_image(%s)",
    ):
        with sql_error(*ERROR):
            session.execute(statement, (images.files[150],))
    # What needs no encoder goes on.
    assert len(session.execute("SELECT similar_images(image_id => 7, k => 200)").fetchall()) == 99
    session.execute("DELETE FROM siamese.images WHERE image_id = 9")
    session.execute("SELECT build_index()")
    row = session.execute("SELECT ok, detail FROM self_check() WHERE subject ~ ': model$'")
    ok, detail = row.fetchone() or (True, "")
    assert not ok and "does not match its SHA-256" in detail and "register_model" in detail
    # The same file once more, under the same name.
    session.execute("SELECT register_model('medical', %s)", (onnx,))
    check_repair(connect, images)
    session.execute("INSERT INTO siamese.images (image) VALUES (%s)", (images.files[150],))


@pytest.mark.law(3)
def test_another_file_does_not_repair(db: Connection, connect: Connect, images: Gallery) -> None:
    """Only the file whose SHA-256 is known is the model."""
    db.execute("UPDATE siamese.models SET onnx = ''")
    other = (MODELS / "fashion_mnist.onnx").read_bytes()
    with sql_error("42710", "already exists", "another ONNX file"):
        db.execute("SELECT register_model('medical', %s)", (other,))
    with sql_error(*ERROR):
        connect().execute("SELECT embed_image(%s)", (images.files[0],))


@pytest.mark.law(3)
def test_another_sha256(db: Connection, connect: Connect, images: Gallery) -> None:
    """The index file is of another model then, too; the row's own digest mends both."""
    db.execute("UPDATE siamese.models SET sha256 = repeat('ab', 32)")
    session = connect()
    with sql_error(*ERROR):
        session.execute("SELECT embed_image(%s)", (images.files[0],))
    assert len(session.execute("SELECT similar_images(image_id => 7)").fetchall()) == 10
    with sql_error("55000", "belongs to another build"):
        session.execute("SELECT similar_images(image_id => 7, engine => 'faiss')")
    db.execute("UPDATE siamese.models SET sha256 = encode(sha256(onnx), 'hex')")
    check_answers(connect(), images, "faiss", "mended")


def test_a_deferred_collection_waits(
    db: Connection, connect: Connect, dsn: str, images: Gallery, onnx: bytes
) -> None:
    """Neither embed_pending nor a worker loses a row that it can't embed."""
    db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea)")
    db.execute("SELECT create_collection('t', 't', embed => 'deferred')")
    db.execute("UPDATE siamese.models SET onnx = '\\x00'")
    db.execute(
        "INSERT INTO t SELECT * FROM unnest(%s::int[], %s::bytea[])",
        (list(range(70)), images.files[:70]),
    )
    with sql_error(*ERROR):
        connect().execute("SELECT embed_pending('t')")
    command = [sys.executable, "-m", "pg_siamese.cli.main", "worker", "--once", "--dsn", dsn]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "does not match its SHA-256" in done.stdout + done.stderr
    state = "SELECT waiting, failures FROM embedding_queue_status"
    assert db.execute(state).fetchone() == (70, 0)
    db.execute("SELECT register_model('medical', %s)", (onnx,))
    assert one(connect(), "SELECT embed_pending('t')") == 70
    assert db.execute(state).fetchone() == (0, 0)
    query = (
        "SELECT count(*) FROM t JOIN siamese.embedding_2 AS e ON e.key = t.id"
        " WHERE e.embedding <=> embed_image(t.image) < 1e-5"
    )
    assert one(db, query) == 70
