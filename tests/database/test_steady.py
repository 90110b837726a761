"""Searches in a row: each expects that all is as the one before found it, and notices if not."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from tests.conftest import Connect, Connection, Pictures, insert_images
from tests.database.tables import make_collection
from tests.database.test_search import Large, keys, search
from tests.support import column_of, one, sql_error

SKEWED = {"frequent": 0.6, "usual": 0.3, "rare": 0.099, "few": 0.001}


@pytest.fixture(scope="module")
def settled(shared: Connection) -> Large:
    """12,000 vectors, all of them in the index; column ``n`` is skewed."""
    large = Large(shared, pending=0)
    generator = np.random.default_rng(4)
    large.groups = generator.choice(len(SKEWED), 12_000, p=list(SKEWED.values()))
    shared.execute(
        "UPDATE t SET n = g.n FROM unnest(%s::int[]) WITH ORDINALITY AS g (n, id)"
        " WHERE t.id = g.id - 1",
        (large.groups.tolist(),),
    )
    shared.execute("CREATE INDEX ON t (n, id)")
    shared.execute("VACUUM ANALYZE t")
    return large


def check(large: Large, key: int, group: int, k: int = 10) -> float:
    return large.recall_at(key, large.groups == group, k, filter=json.dumps({"n": group}))


def calls_of_estimate(db: Connection) -> int:
    calls = (
        "SELECT coalesce(sum(calls), 0) FROM pg_stat_xact_user_functions"
        " WHERE schemaname = 'siamese' AND funcname = '_estimate'"
    )
    return int(one(db, calls))


@pytest.mark.parametrize("group", range(len(SKEWED)))
def test_from_the_third_on_nothing_is_estimated(settled: Large, group: int) -> None:
    """Whether many rows qualify or few."""
    with settled.db.transaction(force_rollback=True):
        settled.db.execute("SET LOCAL track_functions = 'all'")
        for key in (100, 200, 300):
            check(settled, key, group, 7 + group)
        before = calls_of_estimate(settled.db)
        assert before > 0
        recalls = [check(settled, key, group, 7 + group) for key in range(1_000, 1_020)]
        assert np.mean(recalls) >= 0.97
        # A look that was too short, as some are, costs two. Without memory, each search costs one.
        assert calls_of_estimate(settled.db) <= before + 10


@pytest.mark.parametrize("k", [1, 10, 200])
def test_values_of_any_frequency_in_turn(settled: Large, k: int) -> None:
    generator = np.random.default_rng(k)
    recalls = [
        check(settled, key, int(generator.integers(0, len(SKEWED))), k)
        for key in generator.integers(0, 12_000, 60).tolist()
    ]
    assert np.mean(recalls) >= 0.97
    check(settled, 5, len(SKEWED), k)  # which no row has


def test_max_distance(settled: Large) -> None:
    for key in range(0, 12_000, 900):
        distances = 1 - settled.points @ settled.points[key]
        allowed = settled.groups == 1
        allowed[key] = False
        limit = float(np.sort(distances[allowed])[20]) + 1e-5
        within = set(np.flatnonzero(allowed & (distances <= limit)).tolist())
        for k, many in ((10, 10), (100, len(within))):
            answer = keys(
                search(settled.db, key, k, collection="t", filter='{"n": 1}', max_distance=limit)
            )
            assert set(answer) <= within and len(answer) >= 0.9 * many


@pytest.fixture
def in_a_row(db: Connection, connect: Connect, pictures: Pictures) -> Callable[..., list[object]]:
    """Search five times, by image and by key; the answers must be those of an exact scan."""
    make_collection(db, "people", key="bigint", more=", name text, age int")
    db.execute("CREATE INDEX ON people (name, id)")
    for number, file in enumerate(pictures.files[:60], start=1):
        db.execute(
            "INSERT INTO people VALUES (%s, %s, %s, %s)",
            (number, file, "AB"[number % 2], number % 7),
        )
    db.execute("SELECT build_index('people')")
    db.execute("ANALYZE people")

    def look(filter_: str = '{"name": "A"}', key: int = 7) -> list[object]:
        answers = []
        for argument, value in (("image", pictures.files[3]), ("image_id", key)):
            query = (
                "SELECT rank, image_id, round(distance::numeric, 4) FROM similar_images("
                f"{argument} => %s, k => 12, collection => 'people', filter => %s, engine => %s)"
            )
            truth = db.execute(query, (value, filter_, "pgvector")).fetchall()
            for _ in range(5):
                assert db.execute(query, (value, filter_, "faiss")).fetchall() == truth
            answers += truth
        return answers

    return look


@pytest.mark.law(2)
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE people SET name = 'B' WHERE id = (SELECT min(id) FROM people WHERE name = 'A')",
        "UPDATE people SET name = 'B' WHERE name = 'A' AND id <> 8",
        "DELETE FROM people WHERE id % 4 = 0",
        "UPDATE people SET image = (SELECT image FROM people WHERE id = 9) WHERE id = 10",
        "INSERT INTO people SELECT 1000, image, 'A', 5 FROM people WHERE id = 4",
        "ALTER TABLE people RENAME name TO was; ALTER TABLE people ADD name text;"
        " UPDATE people SET name = 'A' WHERE id < 20",
        "ALTER TABLE people RENAME TO persons",
        "CREATE EXTENSION citext SCHEMA public; UPDATE people SET name = 'a' WHERE id < 30"
        " AND name = 'A'; ALTER TABLE people ALTER name TYPE citext",
        "DELETE FROM people WHERE id <> 7",
    ],
)
def test_every_change_is_noticed(
    db: Connection, in_a_row: Callable[..., list[object]], change: str
) -> None:
    before = in_a_row()
    with db.transaction():
        db.execute(change)
        inside = in_a_row()
    after = in_a_row()
    assert inside == after
    # Another name of the table changes nothing; nor does case, to a type that ignores it.
    assert (after == before) == ("RENAME TO" in change or "citext" in change)
    db.execute("SELECT build_index('people')")
    assert in_a_row() == after


@pytest.mark.law(2)
def test_a_change_that_is_taken_back(db: Connection, in_a_row: Callable[..., list[object]]) -> None:
    before = in_a_row()
    with db.transaction(force_rollback=True):
        db.execute("UPDATE people SET name = 'B' WHERE id < 30")
        assert in_a_row() != before
    assert in_a_row() == before


def test_a_column_that_is_gone(db: Connection, in_a_row: Callable[..., list[object]]) -> None:
    in_a_row('{"age": 3}')
    db.execute("ALTER TABLE people DROP age")
    with sql_error("42703", 'column "age" of table public.people does not exist'):
        in_a_row('{"age": 3}')
    db.execute("ALTER TABLE people ADD age text")
    db.execute("UPDATE people SET age = 'three' WHERE id < 30")
    in_a_row('{"age": "three"}')


def test_a_value_that_the_type_refuses(
    db: Connection, in_a_row: Callable[..., list[object]]
) -> None:
    in_a_row('{"age": 3}')
    with sql_error("22P02", "invalid"):
        in_a_row('{"age": "three"}')
    in_a_row('{"age": 3}')


@pytest.mark.law(4)
def test_an_own_row_that_is_hidden(db: Connection, in_a_row: Callable[..., list[object]]) -> None:
    """Row-level security and privileges are those of the moment, for the query's row as well."""
    in_a_row()
    db.execute("CREATE ROLE looker")
    try:
        db.execute("SELECT grant_usage('looker'); GRANT SELECT ON people TO looker")
        db.execute("SET ROLE looker")
        seen = in_a_row()
        db.execute("RESET ROLE")
        db.execute("CREATE POLICY p ON people TO looker USING (id % 3 <> 0)")
        db.execute("ALTER TABLE people ENABLE ROW LEVEL SECURITY")
        db.execute("SET ROLE looker")
        assert in_a_row() != seen
        with sql_error("P0002", 'image 6 is not in collection "people"'):
            in_a_row(key=6)
        db.execute("RESET ROLE")
        assert in_a_row() == seen
        db.execute("REVOKE SELECT ON people FROM looker")
        db.execute("SET ROLE looker")
        with sql_error("42501", "permission denied"):
            in_a_row()
    finally:
        db.execute("RESET ROLE")
        db.execute("DROP OWNED BY looker; DROP ROLE looker")


def test_similarity_is_computed_where_it_is_asked_for(db: Connection, pictures: Pictures) -> None:
    insert_images(db, pictures.files[:20])
    db.execute("SELECT build_index()")
    for columns, is_asked in (("image_id, distance", False), ("image_id, similarity", True)):
        explain = f"EXPLAIN (VERBOSE) SELECT {columns} FROM similar_images(image_id => 3)"
        assert ("_match_line" in "\n".join(column_of(db, explain))) == is_asked
