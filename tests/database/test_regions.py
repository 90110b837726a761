"""Searches for a part of an image, beside searches for that part as a file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pg_siamese.client.sources import png
from tests.conftest import Connect, Connection, NewRole, Pictures
from tests.database import test_frames
from tests.database.tables import blocks_read, make_collection
from tests.support import one, rows_of, sql_error

BOX = "(12,4),(26,27)"
SHARES = f"({12 / 28!r},{4 / 28!r}),({26 / 28!r},{27 / 28!r})"


def part_of(pictures: Pictures, place: int) -> bytes:
    return png(np.ascontiguousarray(pictures.pixels[place][4:27, 12:26]))


@pytest.fixture
def table(db: Connection, pictures: Pictures) -> Connection:
    """Table ``t`` with pictures 0 to 49 by patients, all but the last ten in an index."""
    make_collection(db, more=", patient text", group_column="patient")
    insert = (
        "INSERT INTO t SELECT i, f, 'p' || i / 5 FROM unnest(%s::int[], %s::bytea[]) AS u (i, f)"
    )
    db.execute(insert, (list(range(40)), pictures.files[:40]))
    db.execute("SELECT build_index('t')")
    db.execute(insert, (list(range(40, 50)), pictures.files[40:50]))
    return db


def found(session: Connection, arguments: str, *values: Any) -> list[Any]:
    return rows_of(
        session,
        "SELECT image_id, distance, similarity FROM siamese.similar_images("
        f"collection => 't', {arguments})",
        *values,
    )


@pytest.mark.parametrize("engine", ["auto", "faiss", "pgvector"])
def test_as_the_part_itself(table: Connection, pictures: Pictures, engine: str) -> None:
    options = f"k => 20, engine => '{engine}'"
    for place in (7, 44):
        wanted = found(table, f"image => %s, {options}", part_of(pictures, place))
        for box in (BOX, SHARES):
            answer = found(
                table, f"image => %s, region => %s, {options}", pictures.files[place], box
            )
            assert answer == wanted
        # The stored image itself is left out.
        others = found(
            table, f"image => %s, {options}, exclude => %s",
            part_of(pictures, place), f'{{"id": {place}}}',
        )  # fmt: skip
        assert found(table, f"image_id => %s, region => %s, {options}", place, BOX) == others
        assert found(table, f"image_id => %s, {options}", place) != others


def test_the_whole_image_is_no_region(table: Connection) -> None:
    for box in ("(0,0),(1,1)", "1,0,0,1"):
        found(table, "image_id => 3")
        before = blocks_read(table, "t")
        assert found(table, "image_id => 3, region => %s", box) == found(table, "image_id => 3")
        assert blocks_read(table, "t") == before


def test_rows_of_any_key(db: Connection, pictures: Pictures) -> None:
    for kind, key in (("uuid", "00000000-0000-4000-8000-00000000000A"), ("text", "a, b")):
        make_collection(db, f"of_{kind}", kind)
        db.execute(f"INSERT INTO of_{kind} VALUES (%s, %s)", (key, pictures.files[1]))
        other = "00000000-0000-4000-8000-00000000000b"
        db.execute(f"INSERT INTO of_{kind} VALUES (%s, %s)", (other, pictures.files[2]))
        query = f"SELECT (item).id::text, distance FROM similar_rows(NULL::of_{kind}, {{}})"
        answer = rows_of(db, query.format("key => %s, region => %s"), key, BOX)
        wanted = rows_of(db, query.format("%s, k => 2"), part_of(pictures, 1))
        assert answer == [row for row in wanted if row[0] == other]


def test_without_the_own_group(table: Connection, pictures: Pictures) -> None:
    """That of the stored image whose part is searched for."""
    for engine in ("auto", "pgvector"):
        options = f"own_group => false, k => 10, engine => '{engine}'"
        answer = found(table, f"image_id => 7, region => '{BOX}', {options}")
        wanted = found(
            table, "image => %s, exclude => '{\"patient\": \"p1\"}', k => 10",
            part_of(pictures, 7),
        )  # fmt: skip
        assert [row[0] for row in answer] == [row[0] for row in wanted]


def test_a_frame(db: Connection) -> None:
    db.execute("CREATE TABLE t (id bigint PRIMARY KEY, image bytea)")
    db.execute("SELECT create_collection('t', 't')")
    for number in range(8):
        db.execute("INSERT INTO t VALUES (%s, %s)", (number, test_frames.file(number, 4)))
    part = np.ascontiguousarray(test_frames.stack(3, 4)[1][8:40, 10:50])
    wanted = found(db, "image => %s", png(part))
    box = "10,8,50,40"
    data = test_frames.file(3, 4)
    assert found(db, "image => %s, region => %s, query_frame => 2", data, box) == wanted
    answer = found(db, "image_id => 3, region => %s, query_frame => 2", box)
    assert answer == [row for row in wanted if row[0] != 3]
    with sql_error("22023", "frame 5 is out of range"):
        found(db, "image_id => 3, region => %s, query_frame => 5", box)


@pytest.mark.law(4)
def test_an_image_that_the_caller_may_not_see(
    table: Connection, connect: Connect, new_role: NewRole
) -> None:
    role = new_role()
    table.execute(f"SELECT grant_usage('{role}')")
    table.execute(f"GRANT SELECT ON t TO {role}")
    table.execute("ALTER TABLE t ENABLE ROW LEVEL SECURITY")
    table.execute(f"CREATE POLICY seen ON t TO {role} USING (id % 2 = 0)")
    session = connect(user=role)
    answer = found(session, f"image_id => 8, region => '{BOX}', k => 100")
    assert {row[0] for row in answer} == set(range(0, 50, 2)) - {8}
    for key in (7, 99):
        with sql_error("P0002", f'image {key} is not in collection "t"'):
            found(session, f"image_id => {key}, region => '{BOX}'")
    table.execute(f"REVOKE SELECT ON t FROM {role}")
    table.execute(f"GRANT SELECT (id) ON t TO {role}")
    assert len(found(session, "image_id => 8")) == 10
    with sql_error("42501", "permission denied for table t"):
        found(session, f"image_id => 8, region => '{BOX}'")


@pytest.mark.law(14)
def test_refused(table: Connection, pictures: Pictures) -> None:
    table.execute("INSERT INTO t (id) VALUES (60)")
    for box, error in (
        (None, ("22004", "region is null")),
        ("0,0,0.5,0", ("22023", "region is empty")),
        ("0.2,0.2,1.2,0.9", ("22023", "region is neither relative nor in whole pixels")),
        ("0,0,29,28", ("22023", "region is not inside the image", "28 x 28 pixels")),
        ("0.5,0.5,0.51,0.9", ("22023", "region is smaller than a pixel", "28 x 28 pixels")),
    ):
        with sql_error(*error):
            found(table, "image_id => 3, region => %s", box)
        with sql_error(*error):
            found(table, "image => %s, region => %s", pictures.files[3], box)
    with sql_error("22004", "image is null"):
        found(table, f"image_id => 60, region => '{BOX}'")
    table.execute("SELECT alter_collection('t', max_pixels => 700)")
    with sql_error("54000", "image of 28 x 28 pixels is too large"):
        found(table, f"image_id => 3, region => '{BOX}'")


def test_explained(table: Connection) -> None:
    query = "SELECT value FROM explain_search(image_id => 3, collection => 't', region => %s)"
    assert one(table, f"{query} WHERE fact = 'returned'", BOX) == "10"
    embed = f"{query} WHERE fact = 'embed_ms'"
    assert float(one(table, embed, BOX)) > 0 == float(one(table, embed, "0,0,1,1"))
