"""Collections of all frames: a vector and an answer per frame, with exact SQL beside them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import pytest
from PIL import Image
from psycopg import sql

from pg_siamese.worker import Options, Worker
from pg_siamese_server.encoding.images import MAX_FRAMES
from tests import dicom_files
from tests.conftest import Connection
from tests.server import login_role
from tests.support import one, rows_of, sql_error
from tools.project import ROOT

SIDE = 64
ROWS = 40
WINDOW = {"WindowCenter": "128", "WindowWidth": "256"}
Row = tuple[Any, int, float]


def stack(number: int, count: int) -> np.ndarray:
    """Return frames (count, SIDE, SIDE) of a blob that moves, from a place of its own."""
    generator = np.random.default_rng(number)
    y, x = np.mgrid[:SIDE, :SIDE]
    (top, left), step = generator.uniform(10, 54, 2), generator.uniform(-3, 3, 2)
    places = [(top + step[0] * place, left + step[1] * place) for place in range(count)]
    return np.stack(
        [(255 * np.exp(-((y - v) ** 2 + (x - h) ** 2) / 200)).astype(np.uint8) for v, h in places]
    )


def file(number: int, count: int, **elements: Any) -> bytes:
    return dicom_files.frames(stack(number, count), **WINDOW, **elements)


def png(number: int) -> bytes:
    target = io.BytesIO()
    Image.fromarray(stack(number, 1)[0]).save(target, "PNG")
    return target.getvalue()


def frame_count(number: int) -> int:
    return number % 7 + 1


@pytest.fixture(params=["bigint", "text"])
def loops(request: pytest.FixtureRequest, db: Connection) -> Connection:
    """A table with images of one to seven frames, indexed, pending, changed and deleted."""
    db.execute(
        f"CREATE TABLE public.loops (id {request.param} PRIMARY KEY, image bytea, part text)"
    )
    db.execute("SELECT siamese.create_collection('loops', 'public.loops', frames => 'all')")
    for number in range(ROWS):
        if number == ROWS - 8:
            db.execute("SELECT siamese.build_index('loops')")
        # The frames of 11 and of 18 are the same.
        data = file(11 if number == 18 else number, frame_count(number))
        data = png(number) if number % 7 == 0 else data
        db.execute(
            "INSERT INTO public.loops VALUES (%s::text::" + request.param + ", %s, %s)",
            (number, data, ("left", "right", None)[number % 3]),
        )
    db.execute("DELETE FROM public.loops WHERE id::text IN ('3', '16', '38')")
    db.execute("UPDATE public.loops SET image = %s WHERE id::text = '9'", (file(500, 5),))
    # The same once more, pending.
    db.execute("UPDATE public.loops SET image = %s WHERE id::text = '10'", (file(11, 5),))
    return db


def key_type(db: Connection) -> str:
    return str(one(db, "SELECT key_type FROM siamese.collections WHERE name = 'loops'"))


EXACT = """
WITH near AS (
    SELECT t.id, t.part, e.frame, (e.embedding <=> q.embedding) AS distance
    FROM public.loops AS t JOIN siamese.vectors_loops AS e ON e.key = t.id
    CROSS JOIN siamese.vectors_loops AS q
    WHERE q.key = %(key)s AND q.frame = %(frame)s AND t.id <> %(key)s AND {condition}
), ranked AS (
    SELECT *, row_number() OVER (PARTITION BY {group} ORDER BY distance, id, frame) AS place
    FROM near
)
SELECT id, frame, distance::real FROM ranked WHERE place <= %(per_group)s
ORDER BY ranked.distance, id, frame LIMIT %(k)s
"""


def exact(
    db: Connection,
    key: Any,
    k: int,
    frame: int,
    condition: str = "true",
    group: str = "id, frame",
    per_group: int = 1,
) -> list[Row]:
    statement = EXACT.format(condition=condition, group=group)
    return db.execute(
        statement.encode(), {"key": key, "k": k, "frame": frame, "per_group": per_group}
    ).fetchall()


def found(session: Connection, key: Any, k: int, **arguments: Any) -> list[Row]:
    given = sql.SQL(", ").join(
        sql.SQL("{} => {}").format(sql.Identifier(name), sql.Literal(value))
        for name, value in {"k": k, "collection": "loops", **arguments}.items()
    )
    if isinstance(key, int):
        query = "SELECT image_id, frame, distance FROM siamese.similar_images(image_id => {}, {})"
    else:
        query = (
            "SELECT (item).id, frame, distance"
            " FROM siamese.similar_rows(NULL::public.loops, key => {}, {})"
        )
    return session.execute(sql.SQL(query).format(sql.Literal(key), given)).fetchall()


def same(answer: list[Row], truth: list[Row]) -> None:
    """Equal, but for frames that are equally far to within rounding."""
    assert len(answer) == len(truth)
    known = {(key, frame): distance for key, frame, distance in truth}
    assert len({(key, frame) for key, frame, _ in answer}) == len(answer)
    for (key, frame, distance), (*_, other) in zip(answer, truth, strict=True):
        assert distance == pytest.approx(other, abs=2e-6)
        if distance < truth[-1][2] - 1e-5:
            assert known[key, frame] == pytest.approx(distance, abs=2e-6)


def keys_of(db: Connection, *numbers: int) -> list[Any]:
    return [str(number) if key_type(db) == "text" else number for number in numbers]


ENGINES = pytest.mark.parametrize("engine", ["faiss", "pgvector"])


def test_a_vector_of_each_frame(loops: Connection) -> None:
    stored = rows_of(
        loops,
        "SELECT t.image, v.frame, v.embedding <=> siamese.embed_image(t.image, frame => v.frame)"
        " FROM public.loops AS t JOIN siamese.vectors_loops AS v ON v.key = t.id",
    )
    assert max(distance for *_, distance in stored) < 1e-6
    numbers = set(range(ROWS)) - {3, 16, 38, 9, 10}
    assert len(stored) == sum(map(frame_count, numbers)) + 5 + 5
    assert one(loops, "SELECT bool_and(ok) FROM siamese.self_check(true)")


@ENGINES
def test_nearest_frames(loops: Connection, engine: str) -> None:
    for key in keys_of(loops, 4, 9, 11, 20, 36):
        count = one(loops, "SELECT count(*) FROM siamese.vectors_loops WHERE key = %s", key)
        for k in (1, 10, 1000):
            same(found(loops, key, k, engine=engine), exact(loops, key, k, count // 2 + 1))
            answer = found(loops, key, k, engine=engine, query_frame=count)
            same(answer, exact(loops, key, k, count))


@ENGINES
def test_equally_far_in_order_of_key_and_frame(loops: Connection, engine: str) -> None:
    """The frames of 10 and 18 are those of 11."""
    (key,) = keys_of(loops, 11)
    answer = found(loops, key, 1000, engine=engine)
    assert answer == sorted(answer, key=lambda row: (row[2], row[0], row[1]))
    assert {row[:2] for row in answer[:2]} == {(near, 3) for near in keys_of(loops, 10, 18)}
    assert answer[1][2] < 1e-6


@ENGINES
def test_among_some(loops: Connection, engine: str) -> None:
    (key,) = keys_of(loops, 20)
    for _ in range(4):
        answer = found(loops, key, 10, engine=engine, filter='{"part": "left"}')
        same(answer, exact(loops, key, 10, 4, "part = 'left'"))
    answer = found(loops, key, 10, engine=engine, exclude='{"part": "left"}')
    same(answer, exact(loops, key, 10, 4, "part IS DISTINCT FROM 'left'"))
    truth = exact(loops, key, 1000, 4)
    limit = truth[12][2] + 1e-5
    answer = found(loops, key, 1000, engine=engine, max_distance=limit)
    same(answer, [row for row in truth if row[2] <= limit])
    chosen = keys_of(loops, 4, 5, 13, 36, 3)
    answer = found(loops, key, 1000, engine=engine, candidates=chosen)
    same(answer, exact(loops, key, 1000, 4, "t.id::text IN ('4', '5', '13', '36')"))


@ENGINES
def test_the_best_of_each_image(loops: Connection, engine: str) -> None:
    for key in keys_of(loops, 4, 20, 36):
        count = one(loops, "SELECT count(*) FROM siamese.vectors_loops WHERE key = %s", key)
        for k, per_group in ((5, 1), (30, 1), (20, 2), (1000, 1)):
            answer = found(loops, key, k, engine=engine, group_by="id", per_group=per_group)
            truth = exact(loops, key, k, count // 2 + 1, group="id", per_group=per_group)
            same(answer, truth)


def cut_short(number: int, count: int) -> bytes:
    """Return an image whose last frame is missing."""
    return file(number, count, PixelData=stack(number, count)[:-1].tobytes())


@pytest.fixture(params=["sync", "deferred", "worker"])
def embed(request: pytest.FixtureRequest, db: Connection, dsn: str) -> Callable[[], None]:
    """Table ``scans`` with a collection; the function embeds what is queued."""
    create(db, "deferred" if request.param != "sync" else "sync", "quarantine")

    def run() -> None:
        if request.param == "worker":
            Worker(Options(dsn, once=True)).run()
        elif request.param == "deferred":
            db.execute("SELECT siamese.embed_pending()")

    return run


def create(db: Connection, embed: str = "sync", on_error: str = "reject") -> None:
    db.execute("CREATE TABLE public.scans (id bigint PRIMARY KEY, image bytea)")
    db.execute(
        "SELECT siamese.create_collection('scans', 'public.scans', frames => 'all', embed => %s,"
        " on_error => %s)",
        (embed, on_error),
    )


def insert(db: Connection, key: int, data: bytes | None) -> None:
    db.execute("INSERT INTO public.scans VALUES (%s, %s)", (key, data))


def update(db: Connection, key: int, data: bytes) -> None:
    db.execute("UPDATE public.scans SET image = %s WHERE id = %s", (data, key))


def check(db: Connection, counts: dict[int, int]) -> None:
    """Compare the vectors with the images, and the number of each image's with ``counts``."""
    stored = rows_of(
        db,
        "SELECT t.id, v.frame, v.embedding <=> siamese.embed_image(t.image, frame => v.frame)"
        " FROM public.scans AS t JOIN siamese.vectors_scans AS v ON v.key = t.id ORDER BY 1, 2",
    )
    assert one(db, "SELECT count(*) FROM siamese.vectors_scans") == len(stored)
    frames = [(key, frame + 1) for key, count in counts.items() for frame in range(count)]
    assert [row[:2] for row in stored] == frames
    assert all(distance < 1e-5 for *_, distance in stored)
    assert rows_of(db, "SELECT subject, detail FROM siamese.self_check(true) WHERE NOT ok") == []


def test_vectors_follow_the_rows(db: Connection, embed: Callable[[], None]) -> None:
    for number, data in enumerate((file(1, 5), png(2), file(3, 3), None)):
        insert(db, number, data)
    embed()
    check(db, {0: 5, 1: 1, 2: 3})
    update(db, 0, file(4, 2))
    update(db, 3, file(5, 70))
    db.execute("UPDATE public.scans SET id = 7 WHERE id = 1")
    db.execute("DELETE FROM public.scans WHERE id = 2")
    embed()
    check(db, {0: 2, 3: 70, 7: 1})
    with db.transaction():
        db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        update(db, 0, file(6, 4))
    embed()
    check(db, {0: 4, 3: 70, 7: 1})
    status = "SELECT rows_embedded FROM siamese.collection_status WHERE collection = 'scans'"
    assert one(db, status) == 75
    db.execute("TRUNCATE public.scans")
    check(db, {})


def test_a_bad_frame_fails_the_image(db: Connection, embed: Callable[[], None]) -> None:
    for number, data in enumerate((file(1, 3), cut_short(2, 70), file(3, 2))):
        insert(db, number, data)
    embed()
    check(db, {0: 3, 2: 2})
    failures = "SELECT key, sqlstate, message FROM siamese.embedding_failures"
    message = "frame 70 of 70: DICOM image cannot be decoded"
    assert rows_of(db, failures) == [("1", "22P03", message)]
    update(db, 0, cut_short(1, 3))
    update(db, 1, file(2, 70))
    embed()
    check(db, {1: 70, 2: 2})
    message = "frame 3 of 3: DICOM image cannot be decoded"
    assert rows_of(db, failures) == [("0", "22P03", message)]


def test_backfill(db: Connection, embed: Callable[[], None]) -> None:
    """It embeds and repairs what triggers did not see, and counts rows."""
    insert(db, 1, file(1, 3))
    insert(db, 2, file(2, 5))
    embed()
    with db.transaction():
        db.execute("SET LOCAL session_replication_role = replica")
        insert(db, 3, file(3, 4))
        update(db, 2, file(4, 2))
        db.execute("DELETE FROM public.scans WHERE id = 1")
    wrong = rows_of(
        db,
        "SELECT split_part(subject, ': ', 2), split_part(detail, ';', 1)"
        " FROM siamese.self_check(true) WHERE NOT ok ORDER BY 1",
    )
    assert wrong == [
        ("rows without vector", "1"),
        ("vectors of other images", "1 of all rows"),
        ("vectors without row", "3"),
    ]
    assert one(db, "SELECT siamese.backfill('scans')") == 2
    check(db, {2: 2, 3: 4})


def test_a_rejected_image_leaves_nothing(db: Connection) -> None:
    create(db)
    insert(db, 1, file(1, 3))
    with sql_error("22P03", "frame 4 of 4: DICOM image cannot be decoded (row id = 3 of table"):
        insert(db, 3, cut_short(3, 4))
    check(db, {1: 3})


def test_rows_that_are_there_already(db: Connection) -> None:
    create(db)
    db.execute("SELECT siamese.drop_collection('scans')")
    insert(db, 1, file(1, 3))
    insert(db, 2, png(2))
    call = "SELECT siamese.create_collection('scans', 'public.scans', frames => 'all')"
    assert one(db, call) == 2
    check(db, {1: 3, 2: 1})


def test_vectors_that_were_left_over(db: Connection) -> None:
    """An insert replaces them, whatever their number."""
    create(db)
    insert(db, 1, file(1, 3))
    with db.transaction():
        db.execute("SET LOCAL session_replication_role = replica")
        db.execute("DELETE FROM public.scans")
    insert(db, 1, file(2, 6))
    check(db, {1: 6})


def test_a_long_image_can_be_cancelled(db: Connection) -> None:
    create(db)
    many = np.zeros((MAX_FRAMES, 8, 8), np.uint8)
    many[:, 4, 4] = 255
    data = dicom_files.frames(many)
    db.execute("SET statement_timeout = '300ms'")
    with pytest.raises(psycopg.errors.QueryCanceled):
        insert(db, 1, data)
    db.execute("SET statement_timeout = 0")
    check(db, {})


def test_a_vote_per_frame_or_per_image(loops: Connection) -> None:
    (key,) = keys_of(loops, 20)
    votes = (
        "SELECT label, votes FROM siamese.classify_image(image_id => %s, k => 1000,"
        " collection => 'loops', label_column => 'part', group_by => %s)"
    )
    counts = (
        "SELECT part, count({}) FROM public.loops AS t JOIN siamese.vectors_loops AS v"
        " ON v.key = t.id WHERE t.id <> %s AND part IS NOT NULL GROUP BY 1"
    )
    for group, counted in (("", "*"), ("id", "DISTINCT t.id")):
        found = dict(rows_of(loops, votes, key, group))
        assert found == dict(rows_of(loops, counts.format(counted), key))


@ENGINES
def test_without_the_own_group(loops: Connection, engine: str) -> None:
    (key,) = keys_of(loops, 20)  # its part is unknown
    answer = found(loops, key, 20, engine=engine, group_by="part", per_group=9, own_group=False)
    same(answer, exact(loops, key, 20, 4, group="part", per_group=9))
    (key,) = keys_of(loops, 13)  # on the right
    answer = found(loops, key, 20, engine=engine, group_by="part", per_group=9, own_group=False)
    condition = "part IS DISTINCT FROM 'right'"
    same(answer, exact(loops, key, 20, 4, condition, group="part", per_group=9))


def test_own_frames_are_left_out(loops: Connection) -> None:
    (key,) = keys_of(loops, 13)
    assert key not in [row[0] for row in found(loops, key, 1000)]


@ENGINES
def test_rows_that_the_caller_may_not_see(
    loops: Connection, connect: Callable[..., Connection], engine: str
) -> None:
    role = f"ward_{loops.info.dbname}"
    loops.execute(login_role(role))
    loops.execute("SELECT siamese.grant_usage(%s)", (role,))
    loops.execute(f"GRANT SELECT ON public.loops TO {role}".encode())
    loops.execute("ALTER TABLE public.loops ENABLE ROW LEVEL SECURITY")
    loops.execute(f"CREATE POLICY seen ON public.loops TO {role} USING (part <> 'left')".encode())
    session = connect(user=role)
    for key in keys_of(loops, 4, 13):
        answer = found(session, key, 20, engine=engine)
        same(answer, exact(loops, key, 20, frame_count(int(key)) // 2 + 1, "part <> 'left'"))
    assert one(session, "SELECT count(*) FROM siamese.vectors_loops") == one(
        loops,
        "SELECT count(*) FROM siamese.vectors_loops AS v JOIN loops AS t ON t.id = v.key"
        " WHERE part <> 'left'",
    )


def test_by_an_image(loops: Connection) -> None:
    data = file(20, frame_count(20))
    for given, wanted in ((0, 4), (1, 1), (7, 7)):
        row = loops.execute(
            "SELECT (item).id::text, frame, distance"
            " FROM siamese.similar_rows(NULL::loops, %s, 1, query_frame => %s)",
            (data, given),
        ).fetchone()
        assert row is not None
        assert row[:2] == ("20", wanted) and row[2] < 1e-6


def test_the_representative_frame_of_the_file(db: Connection) -> None:
    db.execute("SELECT siamese.drop_collection('images')")
    db.execute("SELECT siamese.create_collection(frames => 'all')")
    data = file(1, 6, RepresentativeFrameNumber=2)
    db.execute("INSERT INTO siamese.images (image) VALUES (%s), (%s)", (data, file(1, 6)))
    assert rows_of(db, "SELECT frame FROM siamese.similar_images(image_id => 1, k => 1)") == [(2,)]
    assert rows_of(db, "SELECT frame FROM siamese.similar_images(image_id => 2, k => 1)") == [(4,)]


def test_one_frame_has_no_number(db: Connection) -> None:
    db.execute("INSERT INTO siamese.images (image) VALUES (%s), (%s)", (file(1, 6), png(2)))
    for engine in ("faiss", "pgvector"):
        db.execute("SELECT siamese.build_index()")
        assert rows_of(
            db,
            "SELECT image_id, frame FROM siamese.similar_images(image_id => 1, engine => %s)",
            engine,
        ) == [(2, None)]


def test_refused(loops: Connection) -> None:
    (key,) = keys_of(loops, 20)
    range_error = ("22023", "is out of range", "The image has 7 frames.")
    with sql_error(*range_error):
        found(loops, key, 1, query_frame=8)
    with sql_error(*range_error):
        found(loops, key, 1, query_frame=-1)
    with sql_error("22004", "query_frame is null"):
        found(loops, key, 1, query_frame=None)
    data = file(20, 7)
    with sql_error(*range_error):
        loops.execute("SELECT siamese.embed_image(%s, frame => 8)", (data,))
    with sql_error("22004", "frame is null"):
        loops.execute("SELECT siamese.embed_image(%s, frame => NULL)", (data,))
    with sql_error("22023", "The image has 1 frame."):
        loops.execute("SELECT siamese.embed_image(%s, frame => 2)", (png(7),))
    with sql_error("22023", 'invalid value for "frames": "some"', 'Use "one" or "all".'):
        loops.execute("SELECT siamese.create_collection('x', frames => 'some')")
    loops.execute("SELECT siamese.create_collection('single', 'public.loops')")
    with sql_error("22023", 'collection "single" has one vector of each image'):
        loops.execute(
            "SELECT siamese.similar_rows(NULL::loops, key => 20, collection => 'single',"
            " query_frame => 1)"
        )


def test_the_documentation(db: Connection) -> None:
    text = (ROOT / "docs" / "dicom.md").read_text()
    blocks = re.findall(r"^```sql\n(.*?)^```", text, re.M | re.S)
    (block,) = [each for each in blocks if "query_frame" in each]
    lines = re.sub(r"^--.*\n", "", block, flags=re.M).strip().rstrip(";")
    answers = []
    for statement in lines.split(";\n"):
        given = (file(1, 5),) if "$1" in statement else ()
        cursor = db.execute(statement.replace("$1", "%s").encode(), given)
        answers.append(cursor.fetchall() if cursor.description else [])
    nearest, best, of_stored, _ = answers[-4:]
    assert sorted(frame for _, frame, _ in nearest) == [1, 2, 3, 4, 5]
    assert [row[:2] for row in nearest[:1]] == [row[:2] for row in best] == [(1, 3)]
    assert of_stored == []
