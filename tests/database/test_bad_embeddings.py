"""An encoder that gives no number for some image: its vector is never stored, on whatever path."""

from __future__ import annotations

from typing import Any

import numpy as np
import psycopg
import pytest
from onnx import TensorProto, helper

from pg_siamese.worker import Options, Worker
from tests.conftest import Connection
from tests.database.tables import insert_rows, without_triggers
from tests.support import Array, column_of, encode, graph, one, sql_error

FLOAT = TensorProto.FLOAT
BLACK = encode(np.zeros((8, 8, 3), np.uint8))
TEXT = "row id = 2 of table"


def picture(number: int) -> bytes:
    return encode(np.random.default_rng(number).integers(1, 256, (8, 8, 3), dtype=np.uint8))


def normalising(scale: float) -> bytes:
    """An encoder that divides by the largest value, times ``scale``: of a black image, by zero."""
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("ReduceMax", ["means"], ["most"], axes=[1], keepdims=1),
        helper.make_node("Div", ["means", "most"], ["shares"]),
        helper.make_node("Mul", ["shares", "scale"], ["embedding"]),
    ]
    return graph(nodes, constants={"scale": np.array([scale], np.float32)})


@pytest.fixture(params=["cosine", "l2"])
def table(request: pytest.FixtureRequest, db: Connection) -> Connection:
    """Table ``t`` and a model "dividing"; no collection yet."""
    db.execute(
        "SELECT register_model('dividing', %s, metric => %s)", (normalising(1.0), request.param)
    )
    db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea)")
    return db


def create(db: Connection, **options: str) -> None:
    given = "".join(f", {name} => '{value}'" for name, value in options.items())
    db.execute(f"SELECT create_collection('t', 't', model => 'dividing'{given})")


def insert(db: Connection, images: list[bytes]) -> None:
    insert_rows(db, range(1, len(images) + 1), images)


IMAGES = [picture(1), BLACK, picture(3)]


def stored(db: Connection) -> list[int]:
    number = one(db, "SELECT collection_id FROM siamese.collections WHERE name = 't'")
    return column_of(db, f"SELECT key FROM siamese.embedding_{number} ORDER BY 1")


def failed(db: Connection) -> list[Any]:
    return db.execute("SELECT key, sqlstate, message FROM embedding_failures").fetchall()


FAILURE = [("2", "22P03", "encoder gave an embedding that is not finite")]


@pytest.mark.law(9)
def test_trigger_refuses(table: Connection) -> None:
    create(table)
    with sql_error("22P03", "not finite", TEXT, "quarantine"):
        insert(table, IMAGES)
    insert(table, [picture(1), picture(2)])
    with sql_error("22P03", "not finite", TEXT):
        table.execute("UPDATE t SET image = %s WHERE id = 2", (BLACK,))


@pytest.mark.law(9)
def test_trigger_quarantines(table: Connection) -> None:
    create(table, on_error="quarantine")
    insert(table, IMAGES)
    assert stored(table) == [1, 3] and failed(table) == FAILURE
    table.execute("UPDATE t SET image = %s WHERE id = 3", (BLACK,))
    assert stored(table) == [1]


def test_rows_that_were_there_before(table: Connection) -> None:
    insert(table, IMAGES)
    with sql_error("22P03", "not finite", TEXT):
        create(table)
    create(table, on_error="quarantine")
    assert stored(table) == [1, 3] and failed(table) == FAILURE


def test_backfill(table: Connection) -> None:
    create(table, on_error="quarantine")
    with without_triggers(table):
        insert(table, IMAGES)
    assert one(table, "SELECT backfill('t')") == 2
    assert stored(table) == [1, 3] and failed(table) == FAILURE


@pytest.mark.law(9)
def test_deferred(table: Connection) -> None:
    create(table, embed="deferred")
    insert(table, IMAGES)
    assert one(table, "SELECT embed_pending('t')") == 2
    assert stored(table) == [1, 3] and failed(table) == FAILURE


def test_worker(table: Connection, dsn: str) -> None:
    create(table, embed="deferred")
    insert(table, IMAGES)
    Worker(Options(dsn, once=True, rebuild_pending=None)).run()
    assert stored(table) == [1, 3] and failed(table) == FAILURE


def test_queries(table: Connection) -> None:
    create(table)
    insert(table, [picture(1), picture(2)])
    for call in (
        "embed_image(%(black)s, 'dividing')",
        "image_distance(%(black)s, %(good)s, 'dividing')",
        "similar_images(image => %(black)s, k => 1, collection => 't')",
    ):
        with sql_error("22P03", "not finite"):
            table.execute(f"SELECT * FROM {call}", {"black": BLACK, "good": picture(1)})


def test_vectors_from_elsewhere(table: Connection) -> None:
    """pgvector's type has no such values, whoever writes them: none can come into an index."""
    create(table)
    for value in ("NaN", "Infinity", "-Infinity"):
        with pytest.raises(psycopg.DataError):
            table.execute(
                "INSERT INTO siamese.embedding_2 (key, embedding) VALUES (9, %s::vector)",
                (f"[1,{value},1]",),
            )
    bits = b"\0\x03\0\0" + np.array([1, np.nan, 1], ">f4").tobytes()
    with (
        pytest.raises(psycopg.DataError),
        table.cursor().copy(
            "COPY siamese.embedding_2 (key, embedding) FROM STDIN (FORMAT binary)"
        ) as copy,
    ):
        copy.set_types(["int4", "bytea"])
        copy.write_row((9, bits))


@pytest.mark.parametrize(("metric", "scale"), [("cosine", 1e-25), ("cosine", 1e25), ("l2", 1e25)])
def test_lengths_that_have_no_distance(db: Connection, metric: str, scale: float) -> None:
    """pgvector counts in single precision: distances of such vectors would be no numbers."""
    model = normalising(scale)
    db.execute("SELECT register_model('m', %s, metric => %s)", (model, metric))
    with sql_error("22P03", "length is out of range"):
        db.execute("SELECT embed_image(%s, 'm')", (picture(1),))


def test_all_of_one_batch(table: Connection) -> None:
    create(table, on_error="quarantine")
    insert(table, [BLACK] * 5)
    assert stored(table) == [] and len(failed(table)) == 5


def test_index_after_a_quarantine_finds_all(table: Connection) -> None:
    create(table, on_error="quarantine")
    images: list[bytes] = [picture(number) for number in range(1, 60)]
    images[1] = BLACK
    insert(table, images)
    table.execute("SELECT build_index('t')")
    found = table.execute(
        "SELECT image_id FROM similar_images(image => %s, k => 100, collection => 't')",
        (images[9],),
    ).fetchall()
    keys: Array = np.sort(np.array(found).ravel())
    assert found[0] == (10,)
    assert keys.tolist() == [1, *range(3, 60)]
