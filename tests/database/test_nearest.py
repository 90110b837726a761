"""Neighbours of many rows at once, beside a search for each of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql

from tests.conftest import Connect, Connection, NewRole, Pictures
from tests.database import test_frames
from tests.database.tables import make_collection
from tests.database.test_search import Large
from tests.support import column_of, notices_of, one, rows_of, sql_error

ROWS, PENDING = 140, 20
# (neighbour, distance, frame) of each key, nearest first.
Answers = dict[str, list[tuple[str, float, int | None]]]
KINDS = [
    ("bigint", "one"),
    ("integer", "one"),
    ("text", "one"),
    ("uuid", "one"),
    ("bigint", "all"),
    ("text", "all"),
]
ENGINES = ["auto", "faiss", "pgvector"]
CASES: list[dict[str, Any]] = [
    {},
    {"k": 1},
    {"k": 1000},
    {"filter": '{"side": "left"}'},
    {"filter": '{"patient": ["rare", "rarer"]}', "k": 3},
    {"filter": '{"patient": "nobody"}'},
    {"exclude": '{"side": "left"}'},
    {"max_distance": 0.002},
    {"max_distance": 0.02, "filter": '{"side": "right"}'},
    {"group_by": "patient", "k": 5},
    {"group_by": "patient", "per_group": 3, "own_group": False, "k": 7},
    {"group_by": "side", "k": 10},
    {"group_by": "patient", "filter": '{"side": "left"}', "max_distance": 0.05},
]


def key_of(kind: str, number: int) -> str:
    """Return a key of a type as text, in an order that is not that of the numbers."""
    if kind == "uuid":
        return f"00000000-0000-4000-8000-{number * 7919 % 100_003:012d}"
    return f'k "{number * 7919 % 100_003},\\' if kind == "text" else str(number * 3 + 5)


def patient_of(number: int) -> str | None:
    if number % 40 == 11:
        return None
    return "rare" if number % 29 == 5 else f"five {number // 5}"


@pytest.fixture(params=KINDS, ids=" ".join)
def scans(request: pytest.FixtureRequest, db: Connection, pictures: Pictures) -> Connection:
    make_scans(db, pictures, *request.param)
    return db


def make_scans(db: Connection, pictures: Pictures, kind: str, frames: str) -> None:
    """Make a table with pending, dead, changed, equal and failed rows, and one without image."""
    many = ROWS if frames == "one" else 40
    files: list[bytes | None] = list(pictures.files[: many + PENDING])
    if frames == "all":
        files = [
            test_frames.file(number, test_frames.frame_count(number))
            for number in range(many + PENDING)
        ]
    files[30:34] = [files[20]] * 4
    files[many - 2], files[many - 1] = b"no image", None
    make_collection(
        db, "scans", kind, ", patient text, side text", frames=frames, on_error="quarantine"
    )
    insert = f"INSERT INTO scans VALUES (%s::text::{kind}, %s, %s, %s)"
    values = [
        (key_of(kind, number), file, patient_of(number), ("left", "right", None)[number % 3])
        for number, file in enumerate(files)
    ]
    with db.cursor() as cursor:
        cursor.executemany(insert.encode(), values[:many])
    db.execute("SELECT build_index('scans')")
    keys = {number: key_of(kind, number) for number in range(many + PENDING)}
    db.execute(
        "DELETE FROM scans WHERE id::text = ANY(%s)",
        ([keys[place] for place in range(3, many, 17)],),
    )
    with db.cursor() as cursor:
        cursor.executemany(insert.encode(), values[many:])
    db.execute(
        "UPDATE scans SET image = (SELECT image FROM scans WHERE id::text = %s)"
        " WHERE id::text = %s",
        (keys[20], keys[9]),
    )


def arguments(options: dict[str, Any]) -> sql.Composed:
    return sql.SQL("").join(
        sql.SQL(", {} => {}").format(sql.Identifier(name), sql.Literal(value))
        for name, value in options.items()
    )


def nearest(session: Connection, **options: Any) -> Answers:
    """Return the answers, after a look at the order and the ranks of their rows."""
    call = sql.SQL("SELECT * FROM siamese.nearest('scans'{})").format(arguments(options))
    return answers_of(session.execute(call).fetchall())


def answers_of(rows: list[Any]) -> Answers:
    answers: Answers = {}
    previous = None
    for key, rank, neighbour, distance, frame in rows:
        assert (key not in answers) == (key != previous), "a key's rows stand together"
        answers.setdefault(key, []).append((neighbour, distance, frame))
        assert rank == len(answers[key])
        previous = key
    return answers


def one_by_one(session: Connection, keys: list[str] | None = None, **options: Any) -> Answers:
    """Search for each row by itself."""
    call = sql.SQL(
        "SELECT b.id::text, (n.item).id::text, n.distance, n.frame FROM public.scans AS b"
        " CROSS JOIN LATERAL siamese.similar_rows("
        "NULL::public.scans, key => b.id::text, collection => 'scans'{}) AS n"
    ).format(arguments(options))
    answers: Answers = {}
    for key, *row in session.execute(call).fetchall():
        if keys is None or key in keys:
            answers.setdefault(key, []).append(tuple(row))
    return answers


def check_same(found: Answers, wanted: Answers) -> None:
    """Check that answers are equal, apart from rows that are equally far."""
    assert found.keys() == wanted.keys()
    for key, rows in found.items():
        distances = [row[1] for row in rows]
        assert distances == pytest.approx([row[1] for row in wanted[key]], abs=2e-6), key
        assert key not in [row[0] for row in rows]
        assert len({(row[0], row[2]) for row in rows}) == len(rows)
        inner = distances[-1] - 1e-5
        assert {(row[0], row[2]) for row in rows if row[1] < inner} == {
            (row[0], row[2]) for row in wanted[key] if row[1] < inner
        }, key


def test_as_a_search_for_each(scans: Connection) -> None:
    for case in CASES:
        wanted = one_by_one(scans, **case)
        for engine in ENGINES:
            check_same(nearest(scans, engine=engine, **case), wanted)


def test_keys(scans: Connection) -> None:
    """Each once, whatever their order. Unknown ones, null and none at all have no neighbours."""
    keys = column_of(scans, "SELECT id::text FROM scans ORDER BY md5(id::text) LIMIT 30")
    kind = one(scans, "SELECT key_type FROM siamese.collections WHERE name = 'scans'")
    unknown = key_of(kind, 9999)
    found = nearest(scans, keys=[*keys, None, keys[3], unknown, *keys[:5]])
    check_same(found, one_by_one(scans, keys))
    assert len(found) > 25
    for call in ("'{}'", "NULL", "'{NULL}'", "(SELECT array_agg(id::text) FROM scans WHERE false)"):
        assert rows_of(scans, f"SELECT * FROM nearest('scans', keys => {call})") == []


@pytest.mark.law(4)
def test_rows_that_the_caller_may_not_see(
    scans: Connection, connect: Connect, new_role: NewRole
) -> None:
    """Neither as a query nor as a neighbour, nor by a gap in the ranks."""
    role = new_role()
    scans.execute(f"SELECT grant_usage('{role}')")
    scans.execute(f"GRANT SELECT ON scans TO {role}")
    scans.execute("ALTER TABLE scans ENABLE ROW LEVEL SECURITY")
    scans.execute(f"CREATE POLICY seen ON scans TO {role} USING (side = 'left')")
    seen = set(column_of(scans, "SELECT id::text FROM scans WHERE side = 'left'"))
    every = column_of(scans, "SELECT id::text FROM scans")
    session = connect(user=role)
    for case in ({}, {"k": 1000}, {"filter": '{"patient": ["rare"]}'}, {"group_by": "patient"}):
        found = nearest(session, keys=every, **case)
        check_same(found, one_by_one(session, **case))
        assert found.keys() <= seen
        assert found or "filter" in case
        assert {row[0] for rows in found.values() for row in rows} <= seen


def test_rows_that_are_queued(db: Connection, pictures: Pictures) -> None:
    make_collection(db, "scans", embed="deferred")
    insert = "INSERT INTO scans SELECT * FROM unnest(%s::int[], %s::bytea[])"
    db.execute(insert, (list(range(10)), pictures.files[:10]))
    db.execute("SELECT embed_pending('scans')")
    db.execute("SELECT build_index('scans')")
    db.execute(insert, ([10], pictures.files[10:11]))
    told = notices_of(db)
    found = nearest(db)
    assert found.keys() == {str(key) for key in range(10)}
    assert all(len(rows) == 9 for rows in found.values())
    assert [text for text in told if "has queued rows" in text] != []


# A graph index, of vectors that never were images.

GRAPH_KEYS = list(range(100, 12_000, 120))


@pytest.fixture(scope="module")
def large(shared: Connection) -> Large:
    return Large(shared)


def found_in(large: Large, **options: Any) -> dict[int, list[int]]:
    """Return the neighbours of GRAPH_KEYS."""
    call = sql.SQL("SELECT * FROM siamese.nearest('t'{})").format(
        arguments({"keys": list(map(str, GRAPH_KEYS)), **options})
    )
    answers = answers_of(large.db.execute(call).fetchall())
    return {int(key): [int(row[0]) for row in rows] for key, rows in answers.items()}


def recall_of(large: Large, allowed: np.ndarray[Any, Any], k: int, **options: Any) -> float:
    """Check that answers are full, and return their mean recall."""
    answers = found_in(large, k=k, **options)
    shares = []
    for key, found in answers.items():
        truth = large.nearest(key, allowed, k)
        assert len(set(found)) == len(found) == len(truth)
        assert all(allowed[one] and one != key for one in found)
        shares.append(len(set(found) & set(truth)) / len(truth))
    return float(np.mean(shares))


@pytest.mark.parametrize("k", [1, 10, 200, 1_000])
def test_graph(large: Large, k: int) -> None:
    """As good as single searches: they find the same."""
    answers = found_in(large, k=k)
    assert answers.keys() == set(GRAPH_KEYS)
    alone = large.db.execute(
        "SELECT q.key, array_agg(s.image_id ORDER BY s.rank) FROM unnest(%s::bigint[]) AS q (key)"
        " CROSS JOIN LATERAL similar_images(image_id => q.key, k => %s, collection => 't') AS s"
        " GROUP BY 1",
        (GRAPH_KEYS, k),
    ).fetchall()
    same = sum(len(set(answers[key]) & set(found)) for key, found in alone)
    assert same >= 0.999 * k * len(GRAPH_KEYS)
    assert recall_of(large, np.ones(12_000, bool), k) >= 0.97


@pytest.mark.law(9)
@pytest.mark.parametrize("share", [2, 10, 100, 1_000])
def test_graph_with_a_filter(large: Large, share: int) -> None:
    allowed = np.arange(12_000) % share == 100 % share
    with large.db.transaction(force_rollback=True):
        large.db.execute(f"UPDATE t SET n = n % {share}")
        for options in ({}, {"engine": "faiss"}):
            recall = recall_of(large, allowed, 10, filter=f'{{"n": {100 % share}}}', **options)
            assert recall >= 0.97


@pytest.mark.law(9)
def test_graph_after_deletions(large: Large) -> None:
    with large.db.transaction(force_rollback=True):
        for share in (5, 10):
            large.db.execute(f"DELETE FROM t WHERE id % {share} <> 0")
            assert recall_of(large, np.arange(12_000) % share == 0, 10) >= 0.97


def test_threads_change_nothing(large: Large) -> None:
    assert found_in(large, threads=8) == found_in(large)


@pytest.mark.law(2)
def test_one_snapshot(db: Connection, connect: Connect) -> None:
    """Whatever is committed and searched for between two portions."""
    Large(db)
    other = connect()
    wanted = rows_of(db, "SELECT key, rank, neighbour FROM nearest('t', k => 2)")
    assert len(wanted) == 24_000
    with db.transaction():
        db.execute("DECLARE c CURSOR FOR SELECT key, rank, neighbour FROM nearest('t', k => 2)")
        found = rows_of(db, "FETCH 10 FROM c")
        other.execute("DELETE FROM t WHERE id BETWEEN 11000 AND 11600")
        other.execute("SELECT build_index('t')")
        # This one sees what the cursor does not.
        later = column_of(
            db, "SELECT neighbour::int FROM nearest('t', keys => '{11601}', k => 900)"
        )
        assert later and not set(later) & set(range(11_000, 11_601))
        found += rows_of(db, "FETCH ALL FROM c")
    assert len(found) == len(wanted)
    assert len({row[0] for row in found}) == 12_000
    same = set(found) & set(wanted)
    assert len(same) >= 0.99 * len(wanted)
    assert {row[0] for row in found if 11_000 <= int(row[0]) <= 11_600} != set()


def test_rows_are_streamed(db: Connection) -> None:
    """A plan that calls the function for a portion at a time, and not for all first."""
    plan = "\n".join(column_of(db, "EXPLAIN SELECT * FROM nearest('images')"))
    assert "ProjectSet" in plan and "Function Scan on nearest" not in plan


@pytest.mark.law(5)
def test_it_stops(large: Large) -> None:
    db = large.db
    db.execute("SET statement_timeout = '300ms'")
    with pytest.raises(psycopg.errors.QueryCanceled):
        db.execute("SELECT count(*) FROM nearest('t', k => 3000)")
    db.execute("RESET statement_timeout")
    assert one(db, "SELECT count(*) FROM nearest('t', keys => '{5}')") == 10


@pytest.mark.law(14)
def test_refused(large: Large) -> None:
    for given, error in (
        ("collection => NULL", ("22004", "collection is null")),
        ("k => NULL", ("22004", "k is null")),
        ("filter => NULL", ("22004", "filter is null")),
        ("exclude => NULL", ("22004", "exclude is null")),
        ("max_distance => NULL", ("22004", "max_distance is null")),
        ("engine => NULL", ("22004", "engine is null")),
        ("group_by => NULL", ("22004", "group_by is null")),
        ("per_group => NULL", ("22004", "per_group is null")),
        ("own_group => NULL", ("22004", "own_group is null")),
        ("threads => NULL", ("22004", "threads is null")),
        ("collection => 'tt'", ("42704", 'collection "tt" does not exist', '"t"')),
        ("collection => 't', k => 0", ("22023", "k must be between 1 and 10000")),
        ("collection => 't', threads => 0", ("22023", "threads must be between 1 and 64")),
        ("collection => 't', engine => 'a'", ("22023", 'unknown engine "a"')),
        ("collection => 't', own_group => false", ("22023", "need a column in group_by")),
        ("collection => 't', group_by => 'who'", ("42703", 'column "who" of table public.t')),
        ("collection => 't', filter => '{\"who\": 1}'", ("42703", 'column "who" of table')),
        ("collection => 't', filter => '{\"n\": \"x\"}'", ("22P02", '"x"')),
        ("collection => 't', keys => '{a}'", ("22P02", '"a"')),
    ):
        with sql_error(*error):
            large.db.execute(f"SELECT * FROM siamese.nearest({given})")
