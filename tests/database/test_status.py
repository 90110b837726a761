"""What administrators look at: views, self_check, warm_up; and notices of long work."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from psycopg import sql

from pg_siamese_server.status import pgvector_line
from tests.conftest import Connect, Connection, Pictures, insert_images
from tests.database.tables import make_collection
from tests.scenarios.gallery import DIMENSION
from tests.server import path_of
from tests.support import column_of, notices_of, one, rows_of, sql_error


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
        ("ALTER TABLE images DISABLE TRIGGER pg_siamese_1_change", "triggers"),
        ("ALTER TABLE images SET UNLOGGED", "table"),
        (
            "UPDATE siamese.embedding_1 SET image_hash = 'another' WHERE key = 3",
            "vectors of other images",
        ),
        ("DROP TRIGGER pg_siamese_1_delete ON images", "triggers"),
        ("DELETE FROM siamese.embedding_1 WHERE key = 1", "rows without vector"),
        (
            "INSERT INTO siamese.embedding_1 (key, embedding)"
            " SELECT 99, embedding FROM siamese.embedding_1 LIMIT 1",
            "vectors without row",
        ),
        ("UPDATE models SET onnx = 'x'", "model"),
        ("UPDATE siamese.generations SET build_id = gen_random_uuid()", "index"),
        ("ALTER TABLE images ADD COLUMN patient_name text", "personal data"),
    ],
)
def test_self_check_finds(
    db: Connection, pictures: Pictures, connect: Connect, damage: str, subject: str
) -> None:
    insert_images(db, pictures.files[:5])
    db.execute("SELECT build_index()")
    db.execute(damage)
    rows = connect().execute("SELECT subject, detail FROM self_check() WHERE NOT ok").fetchall()
    assert [row[0] for row in rows] == [f'collection "images": {subject}']
    assert rows[0][1]


def test_self_check_warns_of_columns_that_name_persons(db: Connection) -> None:
    """By their names, in any spelling: what they hold is not read."""
    bad = (
        *("PatientName", "patient_s_name", "name_of_patient", "last_name", "Surname", "fullName"),
        *("birth_date", "date_of_birth", "PatientBirthDate", "address", "PatientAddress"),
        *("e_mail", "phone_number", "ReferringPhysicianName", "OperatorsName", "ssn"),
    )
    good = ("patient_id", "name", "file_name", "model_name", "study_date", "addressee", "sop_uid")
    for name in (*bad, *good):
        db.execute(sql.SQL("ALTER TABLE images ADD COLUMN {} text").format(sql.Identifier(name)))
    ((subject, detail),) = rows_of(db, "SELECT subject, detail FROM self_check() WHERE NOT ok")
    assert subject == 'collection "images": personal data'
    found = re.search(r"columns that may name a person: (.*); keep them in a table", detail)
    assert found is not None, detail
    assert [name.strip('"') for name in found[1].split(", ")] == list(bad)


def test_self_check_warns_of_keywords_that_identify(db: Connection) -> None:
    line = "SELECT ok, detail FROM self_check() WHERE subject = 'dicom_keywords'"
    db.execute(
        "INSERT INTO siamese.dicom_keywords VALUES ('StudyDate', true), ('PatientName', false)"
    )
    assert db.execute(line).fetchone() == (True, "none that identifies a person")
    db.execute("UPDATE siamese.dicom_keywords SET shown = true")
    found = db.execute(line).fetchone()
    assert found is not None and not found[0]
    assert "who a person is: PatientName; delete these rows" in found[1]


def test_self_check_says_that_the_index_directory_is_a_link(
    db: Connection, pictures: Pictures, tmp_path: Path
) -> None:
    """Base backups leave links out."""
    insert_images(db, pictures.files[:5])
    db.execute("SELECT build_index()")
    directory = path_of(one(db, "SELECT current_setting('data_directory')")) / "pg_siamese"
    line = "SELECT ok, detail FROM self_check() WHERE subject = 'index directory'"
    assert db.execute(line).fetchone() == (True, "in the data directory")
    directory.rename(directory.with_name("elsewhere"))
    try:
        directory.symlink_to("elsewhere")
        found = db.execute(line).fetchone()
        assert found is not None and found[0] and "pg_basebackup leaves out" in found[1]
    finally:
        directory.unlink()
        directory.with_name("elsewhere").rename(directory)


def test_a_check_that_fails_is_a_line(db: Connection, pictures: Pictures) -> None:
    """And all the others are made."""
    insert_images(db, pictures.files[:5])
    make_collection(db, embed="deferred")
    count = "SELECT count(*) FROM self_check()"
    before = db.execute(count).fetchone()
    db.execute("ALTER TABLE siamese.embedding_1 RENAME TO gone")
    db.execute("DROP TABLE siamese.queue_2")
    assert db.execute(count).fetchone() == before
    rows = db.execute("SELECT subject, detail FROM self_check() WHERE NOT ok").fetchall()
    assert {row[0] for row in rows} == {
        'collection "images": rows without vector',
        'collection "images": vectors without row',
        'collection "images": vectors of other images',
        'collection "t": rows without vector',
    }
    assert all("does not exist" in row[1] for row in rows)


@pytest.mark.law(5)
def test_self_check_can_be_cancelled(db: Connection, pictures: Pictures) -> None:
    """No check takes a cancel for its own failure."""
    insert_images(db, pictures.files[:2])
    db.execute("ALTER TABLE images DISABLE TRIGGER USER")
    db.execute(
        "INSERT INTO images (image) SELECT decode(repeat(md5(i::text), 65536), 'hex')"
        " FROM generate_series(1, 50) AS i"
    )
    db.execute(
        "INSERT INTO siamese.embedding_1 (key, embedding, image_hash) SELECT b.image_id,"
        " e.embedding, 'x' FROM images AS b CROSS JOIN (SELECT embedding FROM siamese.embedding_1"
        " LIMIT 1) AS e ON CONFLICT DO NOTHING"
    )
    db.execute("SET statement_timeout = '50ms'")
    with sql_error("57014"):
        db.execute("SELECT * FROM self_check(full => true)")
    db.execute("RESET statement_timeout")


def test_self_check_knows_unsafe_versions_of_pgvector(db: Connection) -> None:
    """With an HNSW index of the user's own: this extension makes none."""
    line = "SELECT ok, detail FROM self_check() WHERE subject = 'pgvector'"
    available = "SELECT default_version FROM pg_available_extensions WHERE name = 'vector'"
    version = one(db, available)
    assert db.execute(line).fetchone() == (True, f"version {version}")
    db.execute("CREATE TABLE public.items (v vector(3))")
    db.execute("CREATE INDEX items_v ON public.items USING hnsw (v vector_l2_ops)")
    ((ok, detail),) = rows_of(db, line)
    assert (ok, detail.replace("public.", "")) == pgvector_line(version, "items_v")[1:]


def test_warm_up(db: Connection, pictures: Pictures, connect: Connect) -> None:
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


MODULES = """
CREATE FUNCTION pg_temp.modules() RETURNS integer LANGUAGE plpython3u AS $$
import sys
return len(sys.modules)
$$
"""


def test_first_search_after_warm_up_has_little_left_to_load(
    db: Connection, pictures: Pictures, connect: Connect
) -> None:
    insert_images(db, pictures.files[:20])
    db.execute("SELECT build_index()")
    loaded = []
    for statement in ("SELECT 1", "SELECT warm_up()"):
        session = connect()
        session.execute(MODULES)
        session.execute(statement)
        before = one(session, "SELECT pg_temp.modules()")
        session.execute("SELECT similar_images(%s)", (pictures.files[0],))
        loaded.append(one(session, "SELECT pg_temp.modules()") - before)
    cold, warm = loaded
    assert cold > 100  # NumPy, FAISS, ONNX Runtime and Pillow
    assert warm < cold / 10  # Pillow's part for the format of this image


def test_without_faiss(db: Connection, pictures: Pictures, connect: Connect) -> None:
    """FAISS can't be imported: pgvector answers, and says so."""
    insert_images(db, [*pictures.files[:20], pictures.files[0]])
    expected = rows_of(db, "SELECT image_id FROM similar_images(%s)", pictures.files[3])
    db.execute("SELECT build_index()")
    session = connect()
    notices = notices_of(session)
    session.execute("DO LANGUAGE plpython3u $$ import sys; sys.modules['faiss'] = None $$")
    search = "SELECT image_id FROM similar_images(%s)"
    for _ in range(2):
        assert session.execute(search, (pictures.files[3],)).fetchall() == expected
    assert len(notices) == 1 and "without its FAISS index" in notices[0]
    with sql_error("55000", "FAISS cannot answer"):
        session.execute("SELECT similar_images(%s, engine => 'faiss')", (pictures.files[3],))
    keys = [row[0] for row in expected[:2]]
    for query in (
        "SELECT key, rank, neighbour FROM nearest(keys => %(keys)s, k => 3)",
        "SELECT a, b FROM similar_pairs('images', max_distance => 0.2) ORDER BY 1, 2",
        "SELECT group_number, key FROM near_duplicates() ORDER BY 1, 2",
    ):
        asked = {"keys": keys}
        found = session.execute(query, asked).fetchall()
        assert found and found == db.execute(query, asked).fetchall()
    insert_images(session, pictures.files[20:22])
    rows = session.execute("SELECT subject FROM self_check() WHERE NOT ok").fetchall()
    assert ("package faiss-cpu",) in rows
    assert session.execute("SELECT generation_file FROM collection_status").fetchone()
    assert column_of(session, "SELECT * FROM warm_up()") == ["onnxruntime", "pgvector"]
