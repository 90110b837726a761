"""Near-duplicates and leaks: which stored images are the same picture."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import psutil
import psycopg
import pytest
from PIL import Image, ImageFilter
from psycopg import sql

from tests.conftest import Connect, Connection, NewRole, insert_images
from tests.database.tables import make_collection, without_triggers
from tests.database.test_nearest import arguments
from tests.scenarios.gallery import filled_up
from tests.support import column_of, one, rows_of, sql_error
from tools.project import ROOT

SIDE = 128
EVERY = {"max_distance": "Infinity"}


def drawn(seed: int, side: int = SIDE) -> Image.Image:
    """Draw a picture that no other seed gives: blobs of several sizes."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((side, side))
    for radius in (2, 6, 16):
        noise = Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8))
        layer = np.asarray(noise.filter(ImageFilter.GaussianBlur(radius)), dtype=float)
        pixels += (layer - layer.mean()) / layer.std()
    return Image.fromarray(np.clip(128 + 25 * pixels, 0, 255).astype(np.uint8))


def saved(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def copy_of(picture: Image.Image, kind: str) -> bytes:
    """Return a copy as an image file."""
    if kind == "encoded":
        return saved(picture, "JPEG", quality=50)
    if kind == "small":
        return saved(picture.resize((SIDE // 2, SIDE // 2), Image.Resampling.LANCZOS))
    if kind == "large":
        return saved(picture.resize((SIDE * 3 // 2, SIDE * 3 // 2), Image.Resampling.BICUBIC))
    if kind == "darker":
        return saved(picture.point(lambda value: round(0.8 * value)))
    if kind == "brighter":
        return saved(picture.point(lambda value: min(255, round(1.2 * value))))
    if kind == "cropped":
        return saved(picture.crop((4, 2, SIDE - 2, SIDE - 4)), "JPEG", quality=90)
    if kind == "mirrored":
        return saved(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert kind == "turned"
    return saved(picture.transpose(Image.Transpose.ROTATE_90))


COPIES = ["encoded", "small", "large", "darker", "brighter", "cropped"]


def groups_of(session: Connection, table: str = "t", **options: Any) -> list[set[str]]:
    """Return the groups in their order, after a look at what is said of each row."""
    call = sql.SQL("SELECT * FROM siamese.near_duplicates({}{})").format(
        sql.Literal(table), arguments(EVERY | options)
    )
    found: list[set[str]] = []
    first = ""
    for number, key, representative, difference, distance, _ in session.execute(call).fetchall():
        if number == len(found) + 1:
            found.append(set())
            first = key
            assert (difference, distance) == (0, pytest.approx(0, abs=1e-6))
        assert number == len(found)
        assert representative == first
        found[-1].add(key)
    return found


def fill(db: Connection, files: dict[Any, bytes], key: str = "integer", **options: Any) -> None:
    make_collection(db, "t", key, ", split text, patient text", **options)
    with db.cursor() as cursor:
        cursor.executemany(b"INSERT INTO t (id, image) VALUES (%s, %s)", list(files.items()))


@pytest.mark.parametrize("has_index", [True, False])
def test_copies(db: Connection, has_index: bool) -> None:
    """Each kind of copy is found, and other pictures stay by themselves."""
    originals = [drawn(seed) for seed in range(3 + 2 * len(COPIES))]
    files = {number: saved(picture) for number, picture in enumerate(originals)}
    wanted = []
    for place, kind in enumerate(COPIES * 2):
        files[100 + place] = copy_of(originals[place], kind)
        wanted.append({str(place), str(100 + place)})
    fill(db, files)
    if has_index:
        db.execute("SELECT build_index('t')")
    assert groups_of(db) == wanted


def test_what_is_no_copy(db: Connection) -> None:
    """Mirrored or turned pictures, other contrasts, and plain ones of different grey."""
    picture = drawn(0)
    flat = picture.point(lambda value: round(128 + 0.4 * (value - 128)))
    files = [saved(picture), copy_of(picture, "mirrored"), copy_of(picture, "turned"), saved(flat)]
    files += [saved(Image.new("L", (SIDE, SIDE), grey)) for grey in (0, 90, 180)]
    fill(db, dict(enumerate(files)))
    assert groups_of(db) == []
    assert groups_of(db, mirrored=True) == [{"0", "1"}]
    told = rows_of(
        db, "SELECT key, is_mirrored FROM near_duplicates('t', 'Infinity', mirrored => true)"
    )
    assert told == [("0", False), ("1", True)]
    fill_again = "INSERT INTO t (id, image) SELECT id + 10, image FROM t WHERE id = 5"
    db.execute(fill_again)
    assert groups_of(db) == [{"5", "15"}]


def test_groups(db: Connection) -> None:
    """Chains are one group, and groups are numbered by their smallest keys, whatever their type."""
    pictures = [drawn(seed) for seed in range(3)]
    names = ["q", "b", "z"]
    files = {name: saved(picture) for name, picture in zip(names, pictures, strict=True)}
    files |= {"a": copy_of(pictures[2], "small"), "c": copy_of(pictures[2], "encoded")}
    files |= {"aa": copy_of(pictures[1], "darker"), "B": copy_of(pictures[1], "small")}
    fill(db, files, key="text")
    wanted = [{"B", "aa", "b"}, {"a", "c", "z"}]
    for engine in ("auto", "pgvector"):
        assert groups_of(db, engine=engine) == wanted
    db.execute("SELECT build_index('t')")
    assert groups_of(db) == wanted
    assert groups_of(db, max_difference=0) == []
    assert groups_of(db, max_distance=-1) == []


@pytest.mark.law(4)
def test_groups_of_rows_that_the_caller_sees(
    db: Connection, connect: Connect, new_role: NewRole
) -> None:
    """Nothing shows that others exist, not even a gap in the numbers."""
    pictures = [drawn(seed) for seed in range(3)]
    files = {3 * number + 1: saved(picture) for number, picture in enumerate(pictures)}
    files |= {3 * number + 2: copy_of(p, "encoded") for number, p in enumerate(pictures)}
    files |= {3 * number + 3: copy_of(p, "darker") for number, p in enumerate(pictures)}
    fill(db, files)
    db.execute("SELECT build_index('t')")
    db.execute("UPDATE t SET split = CASE WHEN id % 3 = 0 THEN 'test' ELSE 'train' END")
    role = new_role()
    db.execute(f"SELECT grant_usage('{role}')")
    db.execute(f"GRANT SELECT ON t TO {role}")
    db.execute("ALTER TABLE t ENABLE ROW LEVEL SECURITY")
    db.execute(f"CREATE POLICY seen ON t TO {role} USING (id NOT IN (1, 2, 6))")
    session = connect(user=role)
    assert groups_of(session) == [{"4", "5"}, {"7", "8", "9"}]
    assert groups_of(session, filter='{"split": "train"}') == [{"4", "5"}, {"7", "8"}]
    found = rows_of(session, "SELECT a, b FROM leaks('t', max_distance => 'Infinity') ORDER BY 1")
    assert found == [("7", "9"), ("8", "9")]


def test_an_image_that_cannot_be_compared(db: Connection) -> None:
    """After the limits became narrower."""
    fill(db, {number: saved(drawn(number)) for number in range(3)})
    db.execute("SELECT alter_collection('t', max_pixels => 1000)")
    with sql_error("54000", "cannot be compared: image of 128 x 128 pixels is too large"):
        groups_of(db)


@pytest.mark.law(5)
def test_it_stops(db: Connection) -> None:
    fill(db, {number: saved(drawn(number % 40)) for number in range(400)})
    db.execute("SET statement_timeout = '150ms'")
    with pytest.raises(psycopg.errors.QueryCanceled):
        groups_of(db)
    db.execute("RESET statement_timeout")
    assert len(groups_of(db)) == 40


def test_it_starts_no_threads(db: Connection, connect: Connect) -> None:
    """Which would handle PostgreSQL's signals. Without an index file, too."""
    fill(db, {number: saved(drawn(number % 20)) for number in range(40)})
    session = connect()
    process = psutil.Process(session.info.backend_pid)
    before = process.num_threads()
    assert len(groups_of(session, engine="pgvector")) == 20
    assert process.num_threads() == before


@pytest.fixture
def split(db: Connection) -> Connection:
    """Table ``t`` with one picture in two splits, a copy of another, and a patient in both."""
    pictures = [drawn(seed) for seed in range(8)]
    files = {number: saved(picture) for number, picture in enumerate(pictures)}
    files |= {10: files[0], 11: copy_of(pictures[1], "encoded"), 12: copy_of(pictures[2], "small")}
    fill(db, files)
    db.execute("SELECT build_index('t')")
    db.execute("UPDATE t SET split = CASE WHEN id < 7 THEN 'train' WHEN id < 12 THEN 'test' END")
    db.execute("UPDATE t SET patient = CASE id WHEN 3 THEN 'p' WHEN 7 THEN 'p' WHEN 4 THEN 'p' END")
    return db


LEAKS = [
    ("near duplicate", "1", "train", "11", "test", None),
    ("same group", "3", "train", "7", "test", "p"),
    ("same group", "4", "train", "7", "test", "p"),
    ("same image", "0", "train", "10", "test", None),
]


@pytest.mark.parametrize("engine", ["auto", "pgvector"])
def test_leaks(split: Connection, engine: str) -> None:
    """A row without a split is in none."""
    call = (
        "SELECT kind, a, split_a, b, split_b, group_label"
        f" FROM leaks('t', max_distance => 'Infinity', engine => '{engine}'"
    )
    assert rows_of(split, f"{call}, group_column => 'patient') ORDER BY 1, 2") == LEAKS
    images = [row for row in LEAKS if row[0] != "same group"]
    assert rows_of(split, f"{call}) ORDER BY 1, 2") == images
    split.execute("SELECT alter_collection('t', group_column => 'patient')")
    assert rows_of(split, f"{call}) ORDER BY 1, 2") == LEAKS
    assert rows_of(split, f"{call}, group_column => '') ORDER BY 1, 2") == images
    assert rows_of(split, f'{call}, filter => \'{{"split": "train"}}\')') == []
    told = column_of(
        split, "SELECT difference < 0.5 FROM leaks('t', max_distance => 'Infinity') ORDER BY kind"
    )
    assert told == [False, None, None, True]


# Ten thousand rows, each with a vector of its own making.

ROWS = 10_000


@pytest.fixture(scope="module")
def many(shared: Connection) -> Connection:
    """Table ``t``: rows from 8,000 on are copies of others, and their vectors nearly the same.

    Rows from 7,000 on have vectors near others too, but pictures of their own. Rows from 9,500 on
    are pending.
    """
    random = np.random.default_rng(5)
    points = random.standard_normal((ROWS, 64))
    points[7_000:8_000] = points[:1_000] + 0.05 * random.standard_normal((1_000, 64))
    points[8_000:] = points[SOURCES] + 0.02 * random.standard_normal((2_000, 64))
    points = filled_up(points / np.linalg.norm(points, axis=1, keepdims=True))
    pixels = random.integers(0, 256, (8_000, 12, 12), dtype=np.uint8)
    files = [saved(Image.fromarray(picture)) for picture in pixels]
    files += [files[source] for source in SOURCES]
    make_collection(shared, "t", more=", split text, patient text")
    statement = "COPY t (id, image, split, patient) FROM STDIN (FORMAT binary)"
    with without_triggers(shared), shared.cursor() as cursor, cursor.copy(statement) as copy:
        copy.set_types(["int4", "bytea", "text", "text"])
        for number, file in enumerate(files):
            patient = None if number % 5 == 0 else str(number % 3_001)
            copy.write_row((number, file, SPLITS[number], patient))
    for some in (range(9_500), range(9_500, ROWS)):
        statement = "COPY siamese.embedding_2 (key, embedding) FROM STDIN"
        with shared.cursor() as cursor, cursor.copy(statement) as copy:
            for number in some:
                copy.write_row((number, str(points[number].tolist())))
        shared.execute(
            "INSERT INTO siamese.pending_2 (embedding_id) SELECT embedding_id"
            f" FROM siamese.embedding_2 WHERE key >= {some[0]}"
        )
        shared.execute("SELECT build_index('t')" if some[0] == 0 else "ANALYZE t")
    return shared


# Of which row each from 8,000 on is a copy: 1,500 of one row each, 500 of 50 rows.
SOURCES = [*range(2_000, 3_500), *(3_500 + number % 50 for number in range(500))]
SPLITS = ["train" if number % 3 else "test" if number % 2 else None for number in range(ROWS)]


def planted(rows: set[int]) -> list[set[str]]:
    """Return the groups of copies among some rows, in the order of their smallest keys."""
    groups: dict[int, set[int]] = {}
    for number in sorted(rows):
        source = number if number < 8_000 else SOURCES[number - 8_000]
        groups.setdefault(source, set()).add(number)
    found = sorted((min(group), group) for group in groups.values() if len(group) > 1)
    return [{str(number) for number in group} for _, group in found]


@pytest.mark.law(9)
@pytest.mark.parametrize("engine", ["auto", "pgvector"])
def test_many_duplicates(many: Connection, engine: str) -> None:
    test = {number for number in range(ROWS) if SPLITS[number] == "test"}
    options: dict[str, Any] = {"max_distance": 0.25, "engine": engine}
    assert groups_of(many, filter='{"split": "test"}', **options) == planted(test)
    if engine == "auto":  # pgvector compares all with all
        assert groups_of(many, **options) == planted(set(range(ROWS)))


@pytest.mark.law(9)
def test_many_leaks(many: Connection) -> None:
    """As a join in plain SQL gives them."""
    rows = "SELECT id, split, patient, image FROM t WHERE split IS NOT NULL AND id % 11 <> 3"
    wanted = [
        row
        for kind, column in (("same image", "image"), ("same group", "patient"))
        for row in rows_of(
            many,
            f"WITH q AS ({rows}) SELECT '{kind}', x.id::text, x.split, y.id::text, y.split,"
            " CASE WHEN x.patient = y.patient THEN x.patient END"
            f" FROM q AS x JOIN q AS y USING ({column})"
            " WHERE x.id < y.id AND x.split <> y.split",
        )
    ]
    with many.transaction(force_rollback=True):
        many.execute("DELETE FROM t WHERE id % 11 = 3")
        found = rows_of(
            many,
            "SELECT kind, a, split_a, b, split_b, group_label"
            " FROM leaks('t', group_column => 'patient')",
        )
    assert sorted(found) == sorted(wanted)
    assert {row[0] for row in found} == {"same image", "same group"}
    assert len(found) > 1_000


@pytest.mark.law(14)
def test_refused(split: Connection) -> None:
    for function in ("near_duplicates", "leaks"):
        for given, error in (
            ("collection => NULL", ("22004", "collection is null")),
            ("max_distance => NULL", ("22004", "max_distance is null")),
            ("max_difference => NULL", ("22004", "max_difference is null")),
            ("max_difference => -1", ("22023", "max_difference must not be negative")),
            ("max_difference => 'NaN'", ("22023", "max_difference must not be negative")),
            ("filter => NULL", ("22004", "filter is null")),
            ("exclude => NULL", ("22004", "exclude is null")),
            ("engine => NULL", ("22004", "engine is null")),
            ("threads => NULL", ("22004", "threads is null")),
        ):
            default = "" if given.startswith("collection") else "collection => 't', "
            with sql_error(*error):
                split.execute(f"SELECT * FROM siamese.{function}({default}{given})")
    for given, error in (
        ("mirrored => NULL", ("22004", "mirrored is null")),
        ("collection => 'tt'", ("42704", 'collection "tt" does not exist')),
    ):
        with sql_error(*error):
            split.execute(f"SELECT * FROM siamese.near_duplicates({given})")
    for given, error in (
        ("split_column => NULL", ("22004", "split_column is null")),
        ("group_column => NULL", ("22004", "group_column is null")),
        ("split_column => 'who'", ("42703", 'column "who" of table public.t')),
        ("group_column => 'who'", ("42703", 'column "who" of table public.t')),
    ):
        with sql_error(*error):
            split.execute(f"SELECT * FROM siamese.leaks('t', {given})")
    assert one(split, "SELECT count(*) FROM leaks('t')") is not None


def test_the_documentation(db: Connection) -> None:
    """A copy in another split, among other pictures."""
    files = [saved(drawn(seed)) for seed in range(10)]
    first, *_, last = insert_images(db, [*files, copy_of(drawn(0), "encoded")])
    splits = "UPDATE images SET split = CASE image_id WHEN %s THEN 'test' ELSE 'train' END"
    db.execute(splits, (last,))
    text = (ROOT / "docs" / "duplicates.md").read_text()
    pairs, groups, kinds = re.findall(r"^```sql\n(.*?)^```", text, re.M | re.S)
    assert (str(first), str(last)) in [row[:2] for row in rows_of(db, pairs)]
    assert [row[:3] for row in rows_of(db, groups)] == [
        (1, str(first), str(first)),
        (1, str(last), str(first)),
    ]
    assert rows_of(db, kinds) == [("near duplicate", 1)]
