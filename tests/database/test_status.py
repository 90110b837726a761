"""What administrators look at: views, self_check, warm_up; and notices of long work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.bars.gallery import DIMENSION
from tests.conftest import Connection, Pictures, insert_images
from tests.support import sql_error


def status(db: Connection, *columns: str) -> Any:
    return db.execute(
        f"SELECT {', '.join(columns)} FROM collection_status WHERE collection = 'images'"
    ).fetchone()


def test_collection_status(db: Connection, pictures: Pictures) -> None:
    """Every number, through the life of a collection."""
    counts = ("rows_embedded", "pending", "dead", "rows_indexed")
    assert status(
        db, "relation::text", "model", "dimension", "on_error", "failures", "generation"
    ) == ("images", "medical", DIMENSION, "reject", 0, None)
    assert status(db, *counts) == (0, 0, 0, None)
    ids = insert_images(db, pictures.files[:20])
    assert status(db, *counts) == (20, 20, 0, None)
    row = db.execute("SELECT build_index()").fetchone()
    assert status(db, *counts) == (20, 0, 0, 20)
    assert status(db, "generation", "generation_file", "recall") == (*row, "present", 1.0)  # type: ignore[misc]
    insert_images(db, pictures.files[20:25])
    assert status(db, *counts) == (25, 5, 0, 20)
    db.execute("DELETE FROM images WHERE image_id = ANY(%s)", (ids[:4],))
    assert status(db, *counts) == (21, 5, 4, 20)
    assert status(db, "dead_share")[0] == pytest.approx(0.2)
    db.execute("UPDATE images SET image = %s WHERE image_id = %s", (pictures.files[30], ids[5]))
    assert status(db, *counts) == (21, 6, 5, 20)
    db.execute("DELETE FROM images WHERE image_id > %s", (ids[-1],))  # never indexed
    assert status(db, *counts) == (16, 1, 5, 20)
    db.execute("SELECT build_index()")
    assert status(db, *counts) == (16, 0, 0, 16)
    db.execute("TRUNCATE images")
    assert status(db, *counts, "generation_file") == (0, 0, 0, None, None)


def test_index_generations(db: Connection, pictures: Pictures) -> None:
    insert_images(db, pictures.files[:20] + pictures.files[:5])
    before = time.time()
    db.execute("SELECT build_index(); SELECT build_index(m => 8)")
    rows = db.execute(
        "SELECT collection, is_current, generation_file, rows, vectors, index_type, recall,"
        " bytes > 0, seconds > 0, extract(epoch FROM built_at)::float"
        " FROM index_generations ORDER BY generation"
    ).fetchall()
    assert [row[:2] for row in rows] == [("images", False), ("images", True)]
    assert {row[2:9] for row in rows} == {("present", 25, 20, "flat", 1.0, True, True)}
    assert all(before - 60 < row[9] < time.time() + 60 for row in rows)


def test_embedding_failures(db: Connection, pictures: Pictures) -> None:
    db.execute("CREATE TABLE t (id text PRIMARY KEY, image bytea)")
    db.execute("SELECT create_collection('t', 't', on_error => 'quarantine')")
    db.execute("INSERT INTO t VALUES ('good', %s), ('bad', 'x')", (pictures.files[0],))
    row = db.execute(
        "SELECT collection, key, sqlstate, message, failed_at <= now() FROM embedding_failures"
    ).fetchall()
    assert row == [("t", "bad", "22P03", "image cannot be decoded", True)]


def test_self_check_of_a_sound_database(db: Connection, pictures: Pictures) -> None:
    insert_images(db, pictures.files[:5])
    db.execute("SELECT build_index()")
    rows = {row[0]: row[1:] for row in db.execute("SELECT * FROM self_check()").fetchall()}
    assert all(ok for ok, _ in rows.values())
    assert {"server package", "package faiss-cpu", 'collection "images": index'} <= set(rows)
    assert rows['collection "images": index'][1] == "generation 1 is whole"


@pytest.mark.parametrize(
    ("damage", "subject"),
    [
        ("ALTER TABLE images DISABLE TRIGGER ALL", "triggers"),
        ("DROP TRIGGER pg_siamese_1_delete ON images", "triggers"),
        ("DELETE FROM siamese.embedding_1 WHERE key = 1", "rows without vector"),
        (
            "INSERT INTO siamese.embedding_1 (key, embedding)"
            " SELECT 99, embedding FROM siamese.embedding_1 LIMIT 1",
            "vectors without row",
        ),
        ("UPDATE models SET onnx = 'x'", "model"),
        ("UPDATE siamese.generations SET build_id = gen_random_uuid()", "index"),
    ],
)
def test_self_check_finds(
    db: Connection,
    pictures: Pictures,
    connect: Callable[..., Connection],
    damage: str,
    subject: str,
) -> None:
    insert_images(db, pictures.files[:5])
    db.execute("SELECT build_index()")
    db.execute(damage)
    rows = connect().execute("SELECT subject, detail FROM self_check() WHERE NOT ok").fetchall()
    assert [row[0] for row in rows] == [f'collection "images": {subject}']
    assert rows[0][1]


def test_backfill_mends_what_self_check_finds(db: Connection, pictures: Pictures) -> None:
    insert_images(db, pictures.files[:5])
    db.execute("DELETE FROM siamese.embedding_1 WHERE key IN (1, 2)")
    db.execute("SELECT backfill()")
    assert db.execute("SELECT bool_and(ok) FROM self_check()").fetchone() == (True,)


def test_warm_up(db: Connection, pictures: Pictures, connect: Callable[..., Connection]) -> None:
    insert_images(db, pictures.files[:20])
    cold = connect().execute("SELECT * FROM warm_up()").fetchall()
    assert [row[0] for row in cold] == ["onnxruntime", "pgvector"]
    assert cold[1][1] == "no index generation yet"
    db.execute("SELECT build_index()")
    warm = db.execute("SELECT * FROM warm_up('images')").fetchall()
    assert [row[0] for row in warm] == ["onnxruntime", "faiss"]
    assert "generation 1" in warm[1][1]
    with sql_error("42704", 'collection "none"'):
        db.execute("SELECT warm_up('none')")


def test_first_search_after_warm_up_is_quick(
    db: Connection, pictures: Pictures, connect: Callable[..., Connection]
) -> None:
    insert_images(db, pictures.files[:20])
    db.execute("SELECT build_index()")
    session = connect()
    session.execute("SELECT warm_up()")
    started = time.perf_counter()
    session.execute("SELECT similar_images(%s)", (pictures.files[0],))
    assert time.perf_counter() - started < 0.1


def test_old_version_in_a_session_is_refused(db: Connection, pictures: Pictures) -> None:
    """A session that loaded another version of the server package must not go on with it."""
    db.execute("SELECT embed_image(%s)", (pictures.files[0],))
    db.execute(
        """
        DO LANGUAGE plpython3u $$
        import sys
        GD.clear()
        sys.modules['pg_siamese_server'].__version__ = '0.0.9'
        $$
        """
    )
    with sql_error("55000", "version 0.0.9", "0.3.0", "Start a new session"):
        db.execute("SELECT embed_image(%s)", (pictures.files[0],))


def test_without_faiss(
    db: Connection, pictures: Pictures, connect: Callable[..., Connection]
) -> None:
    """FAISS can't be imported: pgvector answers, and says so."""
    insert_images(db, pictures.files[:20])
    expected = db.execute(
        "SELECT image_id FROM similar_images(%s)", (pictures.files[3],)
    ).fetchall()
    db.execute("SELECT build_index()")
    session, notices = connect(), []
    session.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
    session.execute("DO LANGUAGE plpython3u $$ import sys; sys.modules['faiss'] = None $$")
    search = "SELECT image_id FROM similar_images(%s)"
    for _ in range(2):
        assert session.execute(search, (pictures.files[3],)).fetchall() == expected
    assert len(notices) == 1 and "without its FAISS index" in notices[0]
    with sql_error("55000", "FAISS cannot answer"):
        session.execute("SELECT similar_images(%s, engine => 'faiss')", (pictures.files[3],))
    insert_images(session, pictures.files[20:22])
    rows = session.execute("SELECT subject FROM self_check() WHERE NOT ok").fetchall()
    assert ("package faiss-cpu",) in rows
    assert session.execute("SELECT generation_file FROM collection_status").fetchone()
    assert [row[0] for row in session.execute("SELECT * FROM warm_up()")] == [
        "onnxruntime",
        "pgvector",
    ]
