"""All pairs of stored rows within a distance, beside plain SQL."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql

from tests.conftest import Connect, Connection, NewRole, Pictures
from tests.database.tables import make_collection, without_triggers
from tests.database.test_nearest import ENGINES, arguments, scans  # noqa: F401 -- a fixture
from tests.database.test_search import Large
from tests.support import column_of, notices_of, one, rows_of, sql_error

Found = dict[tuple[str, str], float]
CASES: list[dict[str, Any]] = [
    {"max_distance": 0.0},
    {"max_distance": 0.002},
    {"max_distance": 0.03},
    {"max_distance": -1.0},
    {"max_distance": 0.02, "filter": '{"side": "left"}'},
    {"max_distance": 0.05, "filter": '{"patient": "nobody"}'},
    {"max_distance": 0.02, "exclude": '{"side": "left"}'},
    {"max_distance": 0.05, "own_group": False, "group_by": "patient"},
    {"max_distance": 0.02, "own_group": False, "group_by": "side", "filter": '{"patient": null}'},
    {"max_distance": "Infinity"},
]
# What a filter or an exclusion of the cases says, in SQL.
CONDITIONS = {
    '{"side": "left"}': "side = 'left'",
    '{"patient": "nobody"}': "patient = 'nobody'",
    '{"patient": null}': "patient IS NULL",
}


def pairs(session: Connection, table: str = "scans", **options: Any) -> Found:
    """Return the distances of pairs, after a look at their order and number."""
    call = sql.SQL("SELECT a, b, distance FROM siamese.similar_pairs({}{})").format(
        sql.Literal(table), arguments(options)
    )
    rows = session.execute(call).fetchall()
    found = {(a, b): distance for a, b, distance in rows}
    assert len(found) == len(rows), "each pair once"
    return found


def plain(db: Connection, options: dict[str, Any]) -> Found:
    """Compare all rows with each other by pgvector's operator."""
    kind = one(db, "SELECT key_type FROM siamese.collections WHERE name = 'scans'")
    number = one(db, "SELECT collection_id FROM siamese.collections WHERE name = 'scans'")
    has_frames = one(db, "SELECT frames = 'all' FROM siamese.collections WHERE name = 'scans'")
    wanted = CONDITIONS.get(options.get("filter", ""), "true")
    unwanted = CONDITIONS.get(options.get("exclude", ""), "false")
    group = options.get("group_by", "NULL::text")
    smaller = (
        "x.id < y.id" if kind in ("bigint", "integer") else 'x.id::text < y.id::text COLLATE "C"'
    )
    rows = db.execute(
        f"WITH q AS (SELECT s.id, {group} AS label, e.embedding FROM public.scans AS s"
        f" JOIN siamese.embedding_{number} AS e ON e.key = s.id"
        f" WHERE {wanted} AND ({unwanted}) IS NOT TRUE"
        f"{' AND e.representative' if has_frames else ''})"
        " SELECT x.id::text, y.id::text, (x.embedding <=> y.embedding)::real"
        f" FROM q AS x JOIN q AS y ON {smaller}"
        " WHERE (x.label = y.label) IS NOT TRUE"
    ).fetchall()
    return {(a, b): distance for a, b, distance in rows}


def check_same(found: Found, every: Found, limit: float) -> None:
    """Check that pairs are those of ``every`` within the limit, apart from rounding at it."""
    for pair, distance in found.items():
        assert distance == pytest.approx(every[pair], abs=2e-6)
        assert distance <= np.float32(limit)
    missing = [pair for pair, distance in every.items() if distance < limit - 2e-6]
    assert set(missing) <= found.keys()


def test_as_plain_sql(scans: Connection) -> None:  # noqa: F811
    for case in CASES:
        every = plain(scans, case)
        for engine in ENGINES:
            found = pairs(scans, engine=engine, **case)
            check_same(found, every, float(case["max_distance"]))
        if case["max_distance"] == "Infinity":
            assert len(found) == len(every) > 500
    assert len(pairs(scans, max_distance=1e-6)) >= 6


@pytest.mark.law(4)
def test_rows_that_the_caller_may_not_see(
    scans: Connection,  # noqa: F811
    connect: Connect,
    new_role: NewRole,
) -> None:
    role = new_role()
    scans.execute(f"SELECT grant_usage('{role}')")
    scans.execute(f"GRANT SELECT ON scans TO {role}")
    scans.execute("ALTER TABLE scans ENABLE ROW LEVEL SECURITY")
    scans.execute(f"CREATE POLICY seen ON scans TO {role} USING (side = 'left')")
    every = plain(scans, {"filter": '{"side": "left"}'})
    session = connect(user=role)
    for engine in ENGINES:
        found = pairs(session, max_distance=0.03, engine=engine)
        check_same(found, every, 0.03)
        assert found


def test_queued_rows_are_told(db: Connection, pictures: Pictures) -> None:
    make_collection(db, "scans", embed="deferred")
    insert = "INSERT INTO scans SELECT * FROM unnest(%s::int[], %s::bytea[])"
    db.execute(insert, (list(range(10)), pictures.files[:10]))
    db.execute("SELECT embed_pending('scans')")
    db.execute(insert, ([10], pictures.files[10:11]))
    told = notices_of(db)
    assert len(pairs(db, max_distance="Infinity")) == 45
    assert [text for text in told if "has queued rows" in text] != []


# Many vectors, which never were images.


@pytest.fixture(scope="module")
def large(shared: Connection) -> Large:
    return Large(shared)


def exact(large: Large, limit: float) -> set[tuple[int, int]]:
    """Return all pairs within a distance."""
    matrix = large.points
    found = set()
    for start in range(0, len(matrix), 1000):
        near = 1 - matrix[start : start + 1000] @ matrix.T <= limit
        rows, others = np.nonzero(near)
        found |= {
            (start + row, other)
            for row, other in zip(rows.tolist(), others.tolist(), strict=True)
            if start + row < other
        }
    return found


def check_exact(
    large: Large, limit: float, keeps: Callable[[int, int], bool], **options: Any
) -> None:
    """Check that all pairs are there which ``keeps`` lets pass, apart from rounding."""
    truth = {pair for pair in exact(large, limit) if keeps(*pair)}
    found = pairs(large.db, "t", max_distance=limit, **options)
    assert len(truth) > 100
    assert len({(int(a), int(b)) for a, b in found} ^ truth) <= 1e-4 * len(truth) + 1


@pytest.mark.parametrize("limit", [0.3, 0.6])
def test_many_rows(large: Large, limit: float) -> None:
    """So many that they are divided into cells. None is missing."""
    check_exact(large, limit, lambda _a, _b: True)


@pytest.mark.law(9)
def test_many_rows_with_filters_groups_and_equal_vectors(large: Large) -> None:
    """Some of the equal vectors are in the index file, some are pending, some rows are deleted."""
    db, points = large.db, large.points
    with db.transaction(force_rollback=True):
        large.points = np.concatenate([points, points[:40], points[11_960:]])
        ids = range(12_000, len(large.points))
        with without_triggers(db):
            db.execute(f"INSERT INTO t SELECT i, '', i FROM generate_series({ids[0]}, {ids[-1]}) i")
        large.copy(ids)
        db.execute(
            "INSERT INTO siamese.pending_2 (embedding_id)"
            f" SELECT embedding_id FROM siamese.embedding_2 WHERE key >= {ids[0]}"
        )
        db.execute("DELETE FROM t WHERE id % 7 = 0")
        db.execute("UPDATE t SET n = nullif(id % 3, 2)")

        def lives(a: int, b: int) -> bool:
            return a % 7 > 0 and b % 7 > 0

        check_exact(large, 0.4, lives)
        check_exact(large, 0.4, lambda a, b: lives(a, b) and a % 3 == b % 3 == 1, filter='{"n": 1}')
        check_exact(large, 0.4, lambda a, b: lives(a, b) and a % 3 > 0 < b % 3, exclude='{"n": 0}')
        check_exact(
            large,
            0.4,
            lambda a, b: lives(a, b) and (a % 3 != b % 3 or a % 3 == 2),
            group_by="n",
            own_group=False,
        )
    large.points = points


@pytest.mark.law(2)
def test_beside_changes_and_builds(db: Connection, connect: Connect) -> None:
    """Each answer is that of one moment: rows that another session moves together count twice."""
    large, other = Large(db), connect()
    stop = threading.Event()

    def moves() -> None:
        while not stop.is_set():
            other.execute("DELETE FROM t WHERE id BETWEEN 100 AND 2000 AND n = 1")
            other.execute("SELECT build_index('t')")

    db.execute("UPDATE t SET n = CASE WHEN id BETWEEN 100 AND 2000 THEN 1 ELSE 0 END")
    before = exact(large, 0.3)
    after = {(a, b) for a, b in before if not (100 <= a <= 2000 or 100 <= b <= 2000)}
    thread = threading.Thread(target=moves)
    thread.start()
    try:
        for _ in range(2):
            found = {(int(a), int(b)) for a, b in pairs(db, "t", max_distance=0.3)}
            assert min(len(found ^ before), len(found ^ after)) <= 1e-4 * len(before) + 1
    finally:
        stop.set()
        thread.join()


def test_threads_change_nothing(large: Large) -> None:
    one_thread = pairs(large.db, "t", max_distance=0.3)
    assert pairs(large.db, "t", max_distance=0.3, threads=8) == one_thread


@pytest.mark.law(2)
def test_one_snapshot(db: Connection, connect: Connect) -> None:
    """Whatever is committed and searched for between two portions."""
    Large(db)
    other = connect()
    statement = "SELECT a, b FROM similar_pairs('t', 0.3)"
    wanted = set(rows_of(db, statement))
    with db.transaction():
        db.execute(f"DECLARE c CURSOR FOR {statement}")
        found = rows_of(db, "FETCH 5 FROM c")
        other.execute("DELETE FROM t WHERE id BETWEEN 6000 AND 11600")
        other.execute("SELECT build_index('t')")
        assert rows_of(db, "SELECT * FROM nearest('t', keys => '{6001}')") == []
        found += rows_of(db, "FETCH ALL FROM c")
    assert set(found) == wanted
    assert [pair for pair in found if 6000 <= int(pair[0]) <= 11_600] != []


def test_pairs_are_streamed(db: Connection) -> None:
    plan = "\n".join(column_of(db, "EXPLAIN SELECT * FROM similar_pairs('images', 0.1)"))
    assert "ProjectSet" in plan and "Function Scan on similar_pairs" not in plan


@pytest.mark.law(5)
@pytest.mark.parametrize("engine", ["auto", "pgvector"])
def test_it_stops(large: Large, engine: str) -> None:
    db = large.db
    db.execute("SET statement_timeout = '300ms'")
    with pytest.raises(psycopg.errors.QueryCanceled):
        db.execute("SELECT count(*) FROM similar_pairs('t', 2, engine => %s)", (engine,))
    db.execute("RESET statement_timeout")
    assert one(db, "SELECT count(*) FROM nearest('t', keys => '{5}')") == 10


@pytest.mark.law(14)
def test_refused(large: Large) -> None:
    for given, error in (
        ("NULL, 1", ("22004", "collection is null")),
        ("'t', NULL", ("22004", "max_distance is null")),
        ("'t', 1, filter => NULL", ("22004", "filter is null")),
        ("'t', 1, exclude => NULL", ("22004", "exclude is null")),
        ("'t', 1, engine => NULL", ("22004", "engine is null")),
        ("'t', 1, group_by => NULL", ("22004", "group_by is null")),
        ("'t', 1, own_group => NULL", ("22004", "own_group is null")),
        ("'t', 1, threads => NULL", ("22004", "threads is null")),
        ("'tt', 1", ("42704", 'collection "tt" does not exist', '"t"')),
        ("'t', 'NaN'", ("22023", "max_distance is not a number")),
        ("'t', 1, threads => 0", ("22023", "threads must be between 1 and 64")),
        ("'t', 1, engine => 'a'", ("22023", 'unknown engine "a"')),
        ("'t', 1, own_group => false", ("22023", "need a column in group_by")),
        ("'t', 1, group_by => 'n'", ("22023", "group_by of pairs needs own_group => false")),
        (
            "'t', 1, own_group => false, group_by => 'who'",
            ("42703", 'column "who" of table public.t'),
        ),
        ("'t', 1, filter => '{\"who\": 1}'", ("42703", 'column "who" of table')),
        ("'t', 1, filter => '{\"n\": \"x\"}'", ("22P02", '"x"')),
    ):
        with sql_error(*error):
            large.db.execute(f"SELECT * FROM siamese.similar_pairs({given})")
