"""Settings of a collection: limits of images, what a bad one does; apart from the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.conftest import Connect, Connection, NewRole, Pictures
from tests.database.tables import make_collection
from tests.support import encode, one, rows_of, sql_error

LARGE = encode(np.zeros((100, 100, 3), dtype=np.uint8), "BMP")


def failures(db: Connection) -> list[tuple[str, str]]:
    return rows_of(db, "SELECT key, sqlstate FROM embedding_failures ORDER BY key")


@pytest.mark.parametrize(
    ("limit", "above", "below"), [("max_bytes", 30_000, 31_000), ("max_pixels", 9_999, 10_000)]
)
def test_limits_are_changed_without_another_model(
    db: Connection, connect: Connect, embed: str, limit: str, above: int, below: int
) -> None:
    options: dict[str, Any] = {limit: above, "on_error": "quarantine"}
    make_collection(db, embed=embed, **options)
    other = connect()
    search = "SELECT image_id FROM similar_images(%s, k => 5, collection => 't')"
    db.execute("INSERT INTO t VALUES (1, %s)", (LARGE,))
    db.execute("SELECT embed_pending()")
    assert failures(db) == [("1", "54000")]
    db.execute("SELECT backfill('t')")
    assert failures(db) == [("1", "54000")]
    with sql_error("54000", "too large"):  # the query as well
        other.execute(search, (LARGE,))
    db.execute(f"SELECT alter_collection('t', {limit} => {below})")
    assert one(db, "SELECT backfill('t')") == 1
    assert failures(db) == []
    # In a session that knew the old limit.
    assert other.execute(search, (LARGE,)).fetchall() == [(1,)]
    before = db.execute("SELECT embedding::text FROM siamese.embedding_2").fetchone()
    db.execute("SELECT drop_collection('t')")
    db.execute(f"SELECT create_collection('t', 't', embed => '{embed}')")
    db.execute("SELECT embed_pending()")
    assert db.execute("SELECT embedding::text FROM siamese.embedding_3").fetchone() == before


def test_limits_above_the_models(db: Connection, embed: str, onnx: bytes) -> None:
    db.execute("SELECT register_model('narrow', %s, max_bytes => 1000, max_pixels => 100)", (onnx,))
    make_collection(
        db, model="narrow", embed=embed, on_error="quarantine", max_bytes=40_000, max_pixels=10_000
    )
    db.execute("INSERT INTO t VALUES (1, %s)", (LARGE,))
    db.execute("SELECT embed_pending()")
    assert failures(db) == []
    with sql_error("54000", "too large"):  # no collection, so the model's own
        db.execute("SELECT embed_image(%s, 'narrow')", (LARGE,))
    db.execute("SELECT build_index('t')")
    assert db.execute("SELECT similar_images(%s, 1, 't')", (LARGE,)).rowcount == 1
    db.execute("SELECT alter_collection('t', max_bytes => -1)")
    with sql_error("54000", "too large"):
        db.execute("SELECT similar_images(%s, 1, 't')", (LARGE,))


def settings(db: Connection) -> object:
    return db.execute(
        "SELECT on_error, max_bytes, max_pixels FROM siamese.collections WHERE name = 'images'"
    ).fetchone()


def test_alter_collection(db: Connection) -> None:
    """NULL leaves a setting as it is; -1 is the model's limit."""
    assert settings(db) == ("reject", None, None)
    db.execute("SELECT alter_collection('images', max_bytes => 5, max_pixels => 48000000::bigint)")
    assert settings(db) == ("reject", 5, 48_000_000)
    db.execute("SELECT alter_collection('images', 'quarantine', max_bytes => -1)")
    assert settings(db) == ("quarantine", None, 48_000_000)
    db.execute("SELECT alter_collection('images')")
    db.execute("SELECT alter_collection('images', NULL, NULL, NULL)")
    assert settings(db) == ("quarantine", None, 48_000_000)


@pytest.mark.parametrize(
    ("arguments", "sqlstate", "message"),
    [
        ("'none'", "42704", 'collection "none" does not exist'),
        ("'images', on_error => 'ignore'", "22023", 'invalid value for "on_error": "ignore"'),
        ("'images', max_bytes => 0", "22023", "max_bytes must be between 1"),
        ("'images', max_bytes => -2", "22023", "max_bytes must be between 1"),
        ("'images', max_bytes => 2000000000", "22023", "max_bytes must be between 1"),
        ("'images', max_pixels => 0", "22023", "max_pixels must be between 1"),
        ("'images', max_pixels => 5000000000", "22023", "max_pixels must be between 1"),
    ],
)
def test_settings_that_are_refused(
    shared: Connection, arguments: str, sqlstate: str, message: str
) -> None:
    with sql_error(sqlstate, message):
        shared.execute(f"SELECT alter_collection({arguments})")
    if sqlstate == "22023":
        with sql_error(sqlstate, message):
            shared.execute(f"SELECT create_collection({arguments.replace('images', 'new')})")


def test_on_error_is_changed(db: Connection, pictures: Pictures) -> None:
    with sql_error("22P03", "image_id = 1"):
        db.execute("INSERT INTO images (image) VALUES ('junk')")
    db.execute("SELECT alter_collection('images', on_error => 'quarantine')")
    db.execute("INSERT INTO images (image) VALUES ('junk')")
    assert failures(db) == [("2", "22P03")]
    db.execute("SELECT alter_collection('images', on_error => 'reject')")
    db.execute("UPDATE images SET image = %s", (pictures.files[0],))
    assert one(db, "SELECT count(*) FROM siamese.embedding_1") == 1
    db.execute("SELECT backfill()")
    assert failures(db) == []


def test_only_owners_alter(db: Connection, new_role: NewRole, connect: Connect) -> None:
    admin = new_role()
    db.execute("SELECT grant_admin(%s)", (admin,))
    make_collection(db)
    session = connect(user=admin)
    with sql_error("42501", "must be owner of table"):
        session.execute("SELECT alter_collection('t', max_bytes => 1)")
    session.execute("SELECT alter_collection('images', max_bytes => 1000000)")
