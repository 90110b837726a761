"""``contact_sheet``: many stored images on one PNG file, as the caller sees them."""

from __future__ import annotations

import io

import numpy as np
import psycopg
import pytest
from PIL import Image

from pg_siamese_server.encoding.contact_sheet import GAP, LINE
from tests import dicom_files
from tests.conftest import Connect, Connection, NewRole, Pictures
from tests.database import test_frames as films
from tests.database.tables import blocks_read, insert_rows, make_collection
from tests.support import Array, encode, one, sql_error

SIDE = 80
KEYS = {
    "bigint": "{}",
    "smallint": "{}",
    "text": "it's {}",
    "uuid": "0A000000-0000-4000-8000-00000000000{}",
}


def drawn(db: Connection, arguments: str, *values: object) -> Array:
    call = f"SELECT siamese.contact_sheet({arguments}, size => {SIDE})"
    image = Image.open(io.BytesIO(one(db, call, *values)))
    assert image.format == "PNG"
    return np.asarray(image.convert("L"))


def cell(sheet: Array, place: int, columns: int = 8, lines: int = 1) -> Array:
    line, column = divmod(place, columns)
    left, top = GAP + column * (SIDE + GAP), GAP + line * (SIDE + lines * LINE + GAP)
    return sheet[top : top + SIDE, left : left + SIDE]


def plain(level: int) -> bytes:
    return encode(np.full((SIDE, SIDE), level, np.uint8))


def levels(sheet: Array, count: int, **places: int) -> list[int | None]:
    """Return the grey level of each cell, or None of a marked one."""
    cells = [cell(sheet, place, **places) for place in range(count)]
    return [int(one.max()) if one.max() == one.min() else None for one in cells]


@pytest.fixture
def scans(db: Connection) -> Connection:
    """Table ``t``: images of one grey level each, ten times their key."""
    make_collection(db, on_error="quarantine", more=", side text DEFAULT 'left'")
    insert_rows(db, range(10), [plain(10 * key) for key in range(10)])
    return db


@pytest.mark.parametrize("kind", KEYS)
def test_in_the_order_of_the_keys(db: Connection, kind: str) -> None:
    make_collection(db, "scans", kind)
    keys = [KEYS[kind].format(number) for number in range(4)]
    for number, key in enumerate(keys):
        row = (key, plain(50 * number))
        db.execute(f"INSERT INTO public.scans VALUES (%s::text::{kind}, %s)", row)
    order = [2, 0, 3, 0]
    chosen = [keys[place] for place in order]
    wanted = [50 * place for place in order]
    given = f"'scans', %s::text[]::{kind}[], captions => '{{a,b,c,d}}'"
    sheet = drawn(db, given, chosen)
    assert levels(sheet, 4) == wanted
    assert levels(drawn(db, f"{given}, columns => 3", chosen), 4, columns=3) == wanted
    assert np.array_equal(drawn(db, "'scans', %s, '{a,b,c,d}'", chosen), sheet)  # as text


def test_an_answer_of_a_search(scans: Connection) -> None:
    sheet = (
        "SELECT contact_sheet('t', array_agg(image_id ORDER BY rank), array_agg("
        "to_char(distance, '0.000') ORDER BY rank), size => 80)"
        " FROM similar_images(image_id => 3, k => 4, collection => 't')"
    )
    keys = "SELECT image_id FROM similar_images(image_id => 3, k => 4, collection => 't')"
    found = [key for (key,) in scans.execute(keys)]
    image = np.asarray(Image.open(io.BytesIO(one(scans, sheet))))
    assert levels(image, 4) == [10 * key for key in found]


def test_captions(scans: Connection) -> None:
    bare = drawn(scans, "'t', '{1,2}', captions => ARRAY[NULL, '']")
    assert bare.shape == (SIDE + 2 * GAP, 2 * (SIDE + GAP) + GAP)
    keys = drawn(scans, "'t', '{1,2}'")
    assert np.array_equal(keys, drawn(scans, "'t', '{1,2}', '{1,2}'"))
    named = drawn(scans, "'t', '{1,2}', E'{\"a\\nb\",NULL}'")
    assert named.shape[0] == bare.shape[0] + 2 * LINE
    below = named[GAP + SIDE :]
    assert (below[:, : GAP + SIDE] < 128).any() and (below[:, GAP + SIDE :] == 255).all()


def test_rows_that_cannot_be_shown_are_marked(scans: Connection, pictures: Pictures) -> None:
    cut_off = pictures.files[0][:200]
    insert_rows(scans, range(10, 13), [None, b"no image", cut_off])
    scans.execute("INSERT INTO t VALUES (13, %s)", (encode(np.zeros((2, 9), np.uint8), "GIF"),))
    sheet = drawn(scans, "'t', '{1,10,11,12,99,NULL,2}'")
    assert levels(sheet, 7) == [10, None, None, None, None, None, 20]
    texts = {cell(sheet, place).tobytes() for place in (1, 2, 4)}
    assert len(texts) == 3
    assert np.array_equal(cell(sheet, 2), cell(sheet, 3))
    assert np.array_equal(cell(sheet, 4), cell(sheet, 5))


def test_files_over_the_limit_are_not_read(scans: Connection) -> None:
    """Nor are they in the way of others."""
    scans.execute("SELECT alter_collection('t', max_bytes => 50000, max_pixels => 7000)")
    large = np.random.default_rng(0).bytes(500_000)
    insert_rows(scans, [20, 21], [large, encode(np.zeros((90, 80), np.uint8))])
    before = blocks_read(scans, "t")
    assert levels(drawn(scans, "'t', '{20,21,3}'"), 3) == [None, None, 30]
    assert blocks_read(scans, "t") - before < 20
    scans.execute("SELECT md5(image) FROM t WHERE id = 20")
    assert blocks_read(scans, "t") - before > 50  # this reads it


@pytest.mark.law(4)
def test_rows_that_the_caller_may_not_see(
    scans: Connection, connect: Connect, new_role: NewRole
) -> None:
    """They look as rows that do not exist."""
    scans.execute("UPDATE t SET side = 'right' WHERE id > 4")
    role = new_role()
    scans.execute(f"SELECT grant_usage('{role}')")
    reader = connect(user=role)
    with sql_error("42501", "permission denied for table t"):
        drawn(reader, "'t', '{1}'")
    scans.execute(f"GRANT SELECT (id) ON t TO {role}")
    with sql_error("42501", "permission denied for table t"):
        drawn(reader, "'t', '{1}'")
    scans.execute(f"GRANT SELECT ON t TO {role}")
    scans.execute("ALTER TABLE t ENABLE ROW LEVEL SECURITY")
    scans.execute(f"CREATE POLICY seen ON t TO {role} USING (side = 'left')")
    captions = "captions => '{a,a,a,a}'"
    sheet = drawn(reader, f"'t', '{{1,6,99,4}}', {captions}")
    assert levels(sheet, 4) == [10, None, None, 40]
    assert np.array_equal(cell(sheet, 1), cell(sheet, 2))
    assert levels(drawn(scans, f"'t', '{{1,6,99,4}}', {captions}"), 4) == [10, 60, None, 40]


@pytest.mark.law(2)
def test_the_snapshot_is_that_of_the_statement(scans: Connection) -> None:
    """What the statement itself changes meanwhile does not show."""
    changed, file = scans.execute(
        "WITH changed AS (UPDATE t SET image = %s WHERE id = 2 RETURNING id)"
        " SELECT (SELECT count(*) FROM changed), contact_sheet('t', '{1,2}', size => 80)",
        (plain(200),),
    ).fetchall()[0]
    assert changed == 1
    assert levels(np.asarray(Image.open(io.BytesIO(file))), 2) == [10, 20]
    assert levels(drawn(scans, "'t', '{1,2}'"), 2) == [10, 200]


def test_frames(db: Connection) -> None:
    make_collection(db, "films", "bigint", frames="all")
    db.execute("INSERT INTO public.films VALUES (1, %s)", (films.file(1, 3),))
    given = "frames => '{1,2,3,NULL,4}', captions => array_fill(''::text, '{5}')"
    each = drawn(db, f"'films', '{{1,1,1,1,1}}', {given}")
    cells = [cell(each, place, lines=0) for place in range(5)]
    first = drawn(db, "'films', '{1}', captions => ARRAY['']")
    assert np.array_equal(cells[3], cell(first, 0, lines=0))
    assert not np.array_equal(cells[0], cells[2])
    assert sum(np.array_equal(cells[3], shown) for shown in cells[:3]) == 1
    assert not any(np.array_equal(cells[4], shown) for shown in cells[:4])


def test_window_of_the_collection(db: Connection) -> None:
    values = np.linspace(-1000, 1000, SIDE * SIDE).round().astype(np.int16).reshape(SIDE, SIDE)
    data = dicom_files.image(values, Modality="CT", RescaleSlope="1", RescaleIntercept="0")
    make_collection(db, dicom_window="lung")
    insert_rows(db, [1], [data])
    shown = cell(drawn(db, "'t', '{1}'"), 0)
    assert np.array_equal(shown, dicom_files.windowed(values, -600, 1500))


@pytest.mark.law(14)
def test_without_keys_there_is_no_sheet(scans: Connection) -> None:
    for keys in ("'{}'", "NULL", "(SELECT array_agg(id) FROM t WHERE false)"):
        assert one(scans, f"SELECT contact_sheet('t', {keys})") is None
    nested = "ARRAY[ARRAY[1,2],ARRAY[3,4]]"
    assert levels(drawn(scans, f"'t', {nested}"), 4) == [10, 20, 30, 40]


def test_refused(scans: Connection) -> None:
    many = "(SELECT array_agg(n) FROM generate_series(1, 501) AS n)"
    for given, *error in (
        ("NULL, '{1}'", "22004", "collection is null"),
        ("'scans', '{1}'", "42704", 'collection "scans" does not exist'),
        ("'t', '{a}'", "22P02", '"a"'),
        ("'t', '{1}', size => 15", "22023", "size must be between 16 and 1024"),
        ("'t', '{1}', columns => 0", "22023", "columns must be between 1 and 100"),
        ("'t', '{1}', columns => 101", "22023", "columns must be between 1 and 100"),
        ("'t', '{1,2}', '{a}'", "22023", "captions has 1 element, but keys has 2"),
        ("'t', '{1,2}', frames => '{1,1,1}'", "22023", "frames has 3 elements, but keys has 2"),
        (f"'t', {many}", "54000", "contact_sheet takes at most 500 keys"),
        (
            "'t', array_fill(1, '{20}'), size => 1024",
            "54000",
            "contact sheet of 8264 x 3149 pixels is too large",
            "fewer keys, or a smaller size",
        ),
    ):
        with sql_error(*error):
            scans.execute(f"SELECT contact_sheet({given})")


@pytest.mark.law(5)
def test_it_stops(db: Connection, connect: Connect) -> None:
    make_collection(db)
    random = np.random.default_rng(0)
    noise = encode(random.integers(0, 256, (1000, 1000, 3), dtype=np.uint8))
    insert_rows(db, range(10), [noise] * 10)
    call = "SELECT contact_sheet('t', ARRAY(SELECT n %% 10 FROM generate_series(1, %s) AS n))"
    one(db, call, 1)
    db.execute("SET statement_timeout = '300ms'")
    with pytest.raises(psycopg.errors.QueryCanceled):
        one(db, call, 500)
    db.execute("RESET statement_timeout")
    assert one(db, call, 1)
