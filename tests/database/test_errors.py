"""Bad input: each a clear error with a proper SQLSTATE that names the row or the argument."""

from __future__ import annotations

import zlib

import numpy as np
import psycopg
import pytest

from tests.conftest import Connection, Pictures, insert_images
from tests.scenarios.mutations import png_file
from tests.support import assert_plain, column_of, encode, one, sql_error
from tools.project import version

GOOD = encode(np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8))
BAD_IMAGES = {
    "empty": (b"", "22P03", "image is empty"),
    "truncated": (GOOD[:200], "22P03", "image cannot be decoded"),
    "text": (b"this is no image", "22P03", "image cannot be decoded"),
    "bomb": (png_file(50_000, 50_000, 8, 2, zlib.compress(bytes(100))), "54000", "is too large"),
}


@pytest.mark.law(9)
@pytest.mark.parametrize(("image", "sqlstate", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_image_in_a_statement(
    shared: Connection, image: bytes, sqlstate: str, message: str
) -> None:
    """The row is named, wherever in the statement it is, and nothing of the statement stays."""
    row = "row image_id = 77 of table siamese.images"
    with sql_error(sqlstate, message, row):
        shared.execute(
            "INSERT INTO images (image_id, image) SELECT * FROM unnest(%s::bigint[], %s::bytea[])",
            ([75, 76, 77, 78], [GOOD, GOOD, image, GOOD]),
        )
    assert one(shared, "SELECT count(*) FROM images") == 0
    assert one(shared, "SELECT count(*) FROM siamese.embedding_1") == 0


@pytest.mark.parametrize(
    "call",
    [
        "similar_images(%(image)s)",
        "classify_image(%(image)s)",
        "similar_rows(NULL::images, %(image)s)",
        "embed_image(%(image)s)",
        "image_distance(%(good)s, %(image)s)",
        "same_class(%(image)s, %(good)s)",
        "any_two_match(%(good)s, %(image)s, %(good)s)",
    ],
)
def test_bad_image_in_a_call(shared: Connection, call: str) -> None:
    for image, sqlstate, message in BAD_IMAGES.values():
        with sql_error(sqlstate, message):
            shared.execute(f"SELECT {call}", {"image": image, "good": GOOD})
    null = call.replace("%(image)s", "NULL::bytea")
    with sql_error("22004", "image is null"):
        shared.execute(f"SELECT {null}", {"good": GOOD})


@pytest.mark.parametrize(
    ("call", "sqlstate", "message"),
    [
        ("similar_images(image_id => 1, k => 0)", "22023", "k must be between 1 and 10000"),
        ("similar_images(image_id => 1, k => -1)", "22023", "k must be between"),
        ("similar_images(image_id => 1, k => 1000000)", "22023", "k must be between 1 and 10000"),
        ("similar_images(image_id => 1, k => NULL)", "22004", "k is null"),
        ("similar_images(image_id => 1, engine => 'magic')", "22023", 'unknown engine "magic"'),
        ("similar_images(image_id => 1, engine => NULL)", "22004", "engine is null"),
        (
            "similar_images(image_id => 1, max_distance => 'NaN')",
            "22023",
            "max_distance is not a number",
        ),
        (
            "similar_images(image_id => 1, collection => 'none')",
            "42704",
            'collection "none" does not exist',
        ),
        ("similar_images(image_id => 1, collection => NULL)", "22004", "collection is null"),
        ("similar_images(image_id => NULL)", "22004", "image is null"),
        ("similar_images(image_id => 12345)", "P0002", 'image 12345 is not in collection "images"'),
        ("similar_rows(1, '')", "42704", "not a row of a table with a collection"),
        ("similar_rows(NULL::models, '')", "42704", "not a row of a table with a collection"),
        (
            "similar_rows(NULL::images, '', collection => 'x')",
            "42704",
            'collection "x" is not one of table',
        ),
        ("classify_image('', k => 0)", "22023", "k must be between"),
        ("classify_image('', collection => 'none')", "42704", 'collection "none"'),
        ("embed_image('', 'none')", "42704", 'model "none" does not exist'),
        ("image_distance('', '', 'none')", "42704", 'model "none" does not exist'),
        ("same_class('', '', 'none')", "42704", 'model "none" does not exist'),
        ("any_two_match('')", "22023", "at least two images"),
        ("warm_up('none')", "42704", 'collection "none" does not exist'),
        ("warm_up(NULL)", "22004", "collection is null"),
        ("backfill('none')", "42704", 'collection "none" does not exist'),
        ("backfill(NULL)", "22004", "collection is null"),
        ("backfill(max_rows => 0)", "22023", "max_rows must be positive"),
        ("build_index('none')", "42704", 'collection "none" does not exist'),
        ("build_index(NULL)", "22004", "collection is null"),
        ("build_index(m => 3)", "22023", "m must be between 4 and 64"),
        ("build_index(m => NULL)", "22004", "m is null"),
        ("build_index(ef_construction => 0)", "22023", "ef_construction must be between"),
        ("build_index(target_recall => 2)", "22023", "target_recall must be between"),
        ("build_index(target_recall => 'NaN')", "22023", "target_recall must be between"),
        ("build_index(threads => 1000)", "22023", "threads must be between"),
        ("create_collection('')", "22023", "must have a name"),
        ("create_collection()", "42710", 'collection "images" already exists'),
        ("create_collection('x', on_error => 'ignore')", "22023", "ignore"),
        ("create_collection('x', model => 'none')", "42704", 'model "none" does not exist'),
        ("create_collection('x', image_column => 'none')", "42703", 'column "none"'),
        ("create_collection('x', image_column => 'label')", "42804", "has type text, not bytea"),
        ("create_collection('x', key_column => 'none')", "42703", 'column "none"'),
        ("create_collection('x', key_column => 'label')", "42P16", "is not a key"),
        ("create_collection('x', key_column => 'inserted_at')", "0A000", "has type timestamp"),
        ("create_collection('x', 99999999::regclass)", "42703", "does not exist"),
        ("drop_collection('none')", "42704", 'collection "none" does not exist'),
        ("drop_collection(NULL)", "22004", "name is null"),
        ("alter_collection(NULL)", "22004", "name is null"),
        ("drop_model('none')", "42704", 'model "none" does not exist'),
        ("drop_model(NULL)", "42704", "does not exist"),
        ("register_model(NULL, '')", "22023", "must have a name"),
        ("register_model('', '')", "22023", "must have a name"),
        ("register_model('x', NULL)", "22004", "onnx is null"),
        ("register_model('x', '')", "22023", "not an ONNX file"),
        ("grant_usage('nobody at all')", "42704", 'role "nobody at all" does not exist'),
        ("grant_usage(NULL)", "42704", "does not exist"),
        ("grant_admin('nobody at all')", "42704", 'role "nobody at all" does not exist'),
    ],
)
def test_bad_argument(shared: Connection, call: str, sqlstate: str, message: str) -> None:
    with sql_error(sqlstate, message):
        shared.execute(f"SELECT siamese.{call}")


SETTINGS = """
name relation key_column image_column model on_error backfill embed max_bytes max_pixels
group_column dicom_window
"""


@pytest.mark.law(14)
@pytest.mark.parametrize("argument", SETTINGS.split())
def test_create_collection_takes_no_null(shared: Connection, argument: str) -> None:
    """NULL is what a mistyped name gives, as of to_regclass: never the default."""
    name = "" if argument == "name" else "name => 'x', "
    with sql_error("22004", f"{argument} is null"):
        shared.execute(f"SELECT create_collection({name}{argument} => NULL)")
    count = "SELECT count(*) FROM siamese.collections"
    assert one(shared, count) == 1


def test_defaults_of_create_collection(shared: Connection) -> None:
    shared.execute("SELECT create_collection('x')")
    query = (
        "SELECT relation::text, key_column, model_id, on_error, embed, max_bytes, max_pixels,"
        " group_column, dicom_window"
        " FROM siamese.collections WHERE name = '{}'"
    )
    made = shared.execute(query.format("x")).fetchone()
    assert made and made[0] in ("images", "siamese.images")
    assert made == shared.execute(query.format("images")).fetchone()


# What the tests above, of filters, of models and of settings do not try; sql_error looks as well.
PLAIN_ERRORS = [
    "INSERT INTO siamese.images (image) VALUES (''), ('junk')",
    "UPDATE siamese.images SET image = 'junk'",
    "MERGE INTO siamese.images AS i USING (VALUES (1)) AS v (n) ON i.image_id = v.n"
    " WHEN MATCHED THEN UPDATE SET image = 'junk'",
    "COPY siamese.images (image) FROM PROGRAM 'echo junk'",
    "INSERT INTO copy (image_id, image) VALUES (1, 'junk')",
    "DELETE FROM copy",
    "TRUNCATE copy",
    "SELECT siamese.rebuild_file('none')",
]


@pytest.mark.parametrize("statement", PLAIN_ERRORS)
def test_errors_are_plain(db: Connection, pictures: Pictures, statement: str) -> None:
    """No name of an exception in the message, and no traceback in the context."""
    insert_images(db, pictures.files[:2])
    db.execute("CREATE TABLE copy (LIKE siamese.images)")
    db.execute("INSERT INTO copy SELECT * FROM siamese.images")
    db.execute(
        """
        CREATE TRIGGER i AFTER INSERT ON copy REFERENCING NEW TABLE AS new_rows
        FOR EACH STATEMENT EXECUTE FUNCTION siamese._on_change(1);
        CREATE TRIGGER d AFTER DELETE ON copy REFERENCING OLD TABLE AS old_rows
        FOR EACH STATEMENT EXECUTE FUNCTION siamese._on_change(1);
        CREATE TRIGGER t AFTER TRUNCATE ON copy
        FOR EACH STATEMENT EXECUTE FUNCTION siamese._on_change(1)
        """
    )
    with pytest.raises(psycopg.Error) as caught:
        db.execute(statement)
    assert_plain(caught.value)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO siamese.images (image) VALUES ('junk')",
        "SELECT similar_images(image_id => 1)",
        "SELECT embed_image('')",
        "SELECT backfill()",
        "SELECT build_index()",
        "SELECT embed_pending()",
        "SELECT register_model('x', '')",
        "SELECT register_shipped_models()",
        "SELECT self_check()",
        "SELECT warm_up()",
    ],
)
def test_errors_of_loading_are_plain(db: Connection, statement: str) -> None:
    """The first call of a session finds packages of another version."""
    db.execute("SELECT siamese._load()")
    db.execute(
        "DO LANGUAGE plpython3u"
        " $$ import sys; GD.clear(); sys.modules['pg_siamese_server'].__version__ = '0.0.9' $$"
    )
    with sql_error("55000", "version 0.0.9", version(), "Start a new session"):
        db.execute(statement)


def test_session_works_on_after_errors(db: Connection, pictures: Pictures) -> None:
    ids = insert_images(db, pictures.files[:20])
    for _ in range(3):
        with sql_error("22P03", "cannot be decoded"):
            insert_images(db, [pictures.files[0], b"bad"])
        with sql_error("42703", "nothing"):
            db.execute(
                "SELECT similar_images(image_id => %s, filter => '{\"nothing\": 1}')", (ids[0],)
            )
    with db.transaction():
        for _ in range(3):
            with sql_error("22P03", "cannot be decoded"), db.transaction():
                insert_images(db, [b"bad"])
        more = insert_images(db, pictures.files[20:21])
    assert set(
        column_of(db, "SELECT image_id FROM similar_images(image_id => %s, k => 100)", ids[0])
    ) == {*ids[1:], *more}


def test_error_inside_an_exception_block(db: Connection, pictures: Pictures) -> None:
    """PL/pgSQL's EXCEPTION rolls back to a savepoint: what was open must not be left behind."""
    db.execute(
        """
        CREATE FUNCTION try(images bytea[]) RETURNS text LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO siamese.images (image) SELECT unnest(images);
            RETURN 'fine';
        EXCEPTION WHEN invalid_binary_representation THEN
            RETURN 'bad';
        END $$
        """
    )
    good = pictures.files[:5]
    answers = [
        db.execute("SELECT try(%s::bytea[])", (images,)).fetchone()
        for images in (good, [*good, b"x"], [b"", *good], good)
    ]
    assert answers == [("fine",), ("bad",), ("bad",), ("fine",)]
    assert one(db, "SELECT count(*) FROM siamese.embedding_1") == 10
