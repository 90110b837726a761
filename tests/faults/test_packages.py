"""Python packages that are gone: a clear error, or pgvector in place of FAISS."""

from __future__ import annotations

import numpy as np
import pytest

from tests import dicom_files
from tests.faults.checks import Connect, check_answers, check_fallback, check_repair
from tests.faults.cluster import FaultyCluster
from tests.scenarios.gallery import Connection, Gallery, insert
from tests.support import sql_error


def failed_checks(session: Connection) -> list[str]:
    return [row[0] for row in session.execute("SELECT subject FROM self_check() WHERE NOT ok")]


@pytest.mark.parametrize(("module", "package"), [("faiss", "faiss-cpu"), ("xxhash", "xxhash")])
def test_without_what_index_files_need(
    db: Connection,
    connect: Connect,
    cluster: FaultyCluster,
    images: Gallery,
    module: str,
    package: str,
) -> None:
    """Searches and inserts go on; only builds can't."""
    with cluster.without(module):
        check_fallback(connect, images, f"No module named '{module}'")
        session = connect()
        session.execute("INSERT INTO siamese.images (image) VALUES (%s)", (images.files[150],))
        found = session.execute("SELECT distance FROM similar_images(%s, 1)", (images.files[150],))
        assert (found.fetchone() or (1,))[0] < 1e-6
        session.execute(
            "DELETE FROM siamese.images WHERE image_id IN (1, (SELECT max(image_id)"
            " FROM siamese.images))"
        )
        with sql_error("58P01", f'package "{module}"', "cannot be imported", "make install"):
            session.execute("SELECT build_index()")
        assert f"package {package}" in failed_checks(session)
        row = session.execute("SELECT generation_file FROM collection_status").fetchone()
        assert row in (("FAISS is missing",), ("present",))
    check_answers(connect(), images, "faiss", "with the package again")
    check_repair(connect, images)


@pytest.mark.parametrize(("module", "package"), [("onnxruntime", "onnxruntime"), ("PIL", "pillow")])
def test_without_what_encoders_need(
    db: Connection,
    connect: Connect,
    cluster: FaultyCluster,
    images: Gallery,
    module: str,
    package: str,
) -> None:
    """What needs no encoder works: searches by stored image, deletes, index builds."""
    error = ("58P01", f'package "{module}"', "cannot be imported", "make install")
    with cluster.without(module):
        session = connect()
        for statement in (
            "INSERT INTO siamese.images (image) VALUES (%s)",
            "SELECT similar_images(%s)",
            "SELECT embed_image(%s)",
        ):
            with sql_error(*error):
                session.execute(statement, (images.files[150],))
        assert db.execute("SELECT count(*) FROM siamese.images").fetchone() == (100,)
        assert (
            len(
                session.execute(
                    "SELECT similar_images(image_id => 5, k => 99, engine => 'faiss')"
                ).fetchall()
            )
            == 99
        )
        session.execute("DELETE FROM siamese.images WHERE image_id < 10")
        session.execute("SELECT build_index()")
        assert (
            len(session.execute("SELECT similar_images(image_id => 50, k => 99)").fetchall()) == 90
        )
        assert f"package {package}" in failed_checks(session)
    check_repair(connect, images)


def test_without_onnx(
    connect: Connect, cluster: FaultyCluster, images: Gallery, onnx: bytes
) -> None:
    """Only registering models needs it."""
    with cluster.without("onnx"):
        session = connect()
        with sql_error("58P01", 'package "onnx"', "cannot be imported", "make install"):
            session.execute("SELECT register_model('another', %s)", (onnx,))
        insert(session, images.files[100:120])
        session.execute("SELECT build_index()")
        check_answers(connect(), images, "faiss", "without onnx")
        assert failed_checks(session) == ["package onnx"]
    connect().execute("SELECT register_model('another', %s)", (onnx,))


@pytest.mark.parametrize("module", ["pydicom", "imagecodecs"])
def test_without_what_dicom_needs(
    db: Connection, connect: Connect, cluster: FaultyCluster, images: Gallery, module: str
) -> None:
    """No good DICOM file is taken for a bad one, and other formats go on."""
    dicom = dicom_files.image(np.zeros((8, 8), np.uint8))
    with cluster.without(module):
        session = connect()
        insert(session, images.files[100:120])
        session.execute("SELECT alter_collection('images', on_error => 'quarantine')")
        with sql_error("58P01", f'package "{module}"', "cannot be imported", "make install"):
            session.execute("INSERT INTO siamese.images (image) VALUES (%s)", (dicom,))
        assert session.execute("SELECT count(*) FROM embedding_failures").fetchone() == (0,)
        assert failed_checks(session) == [f"package {module}"]
    session = connect()
    session.execute("INSERT INTO siamese.images (image) VALUES (%s)", (dicom,))
    assert session.execute("SELECT count(*) FROM embedding_failures").fetchone() == (0,)


@pytest.mark.parametrize("module", ["numpy", "pg_siamese_server"])
def test_without_what_everything_needs(
    db: Connection, connect: Connect, cluster: FaultyCluster, images: Gallery, module: str
) -> None:
    """Every call says so; no row goes in without its vector, and what needs none goes on."""
    error = ("58P01", "could not load the server package", f"No module named '{module}'")
    with cluster.without(module):
        session = connect()
        for statement in (
            "INSERT INTO siamese.images (image) VALUES (%s)",
            "SELECT similar_images(%s)",
        ):
            with sql_error(*error, "Run make install for this server"):
                session.execute(statement, (images.files[130],))
        for statement in (
            "UPDATE siamese.images SET image = image || image",
            "SELECT build_index()",
            "SELECT self_check()",
        ):
            with sql_error(*error, "Run make install for this server"):
                session.execute(statement)
        # Not of the extension's functions, and works: what an administrator looks at.
        assert session.execute("SELECT count(*) FROM siamese.images").fetchone() == (100,)
        session.execute("UPDATE siamese.images SET label = 'still'")
        session.execute("DELETE FROM siamese.images WHERE image_id <= 5")
        assert session.execute("SELECT count(*) FROM siamese.embedding_1").fetchone() == (95,)
    check_repair(connect, images)
