"""Searches by several examples, beside the same in NumPy."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql

from tests.conftest import MODELS, Connect, Connection, NewRole, Pictures, insert_images
from tests.database import test_nearest
from tests.database.tables import make_collection, register_grid
from tests.database.test_nearest import ENGINES, KINDS, arguments, key_of
from tests.database.test_search import Large
from tests.support import column_of, notices_of, one, rows_of, sql_error
from tools.project import ROOT

Row = dict[str, Any]
# Numbers of rows in ``make_scans``: with equal ones, pending, of patients of their own and of one.
LIKED, UNLIKED = (30, 7, 6, 45, 150), (13, 36)
STRATEGIES = ["mean", "best"]
# Arguments, the rows that qualify by them, and the rest of the arguments.
CASES: list[tuple[dict[str, Any], Callable[[Row], bool]]] = [
    ({}, lambda row: True),
    ({"k": 1}, lambda row: True),
    ({"k": 1000}, lambda row: True),
    ({"filter": '{"side": "left"}', "k": 7}, lambda row: row["side"] == "left"),
    ({"exclude": '{"side": "left"}'}, lambda row: row["side"] != "left"),
    ({"filter": '{"patient": "nobody"}'}, lambda row: False),
    ({"max_distance": 0.05, "k": 1000}, lambda row: True),
    ({"group_by": "patient", "k": 5}, lambda row: True),
    ({"group_by": "patient", "per_group": 2, "own_group": False, "k": 9}, lambda row: True),
    ({"group_by": "side", "k": 10}, lambda row: True),
]


class Scans:
    """Table ``scans``, with what a superuser reads of it."""

    def __init__(self, db: Connection) -> None:
        self.db = db
        self.number = one(db, "SELECT collection_id FROM siamese.collections WHERE name = 'scans'")

    @functools.cached_property
    def rows(self) -> list[Row]:
        """Return all vectors with their rows, each as float64 and of length one."""
        has_frames = one(
            self.db, "SELECT frames = 'all' FROM siamese.collections WHERE name = 'scans'"
        )
        frame, one_per_image = ("e.frame", "e.representative") if has_frames else ("NULL", "true")
        found = rows_of(
            self.db,
            f'SELECT b.id::text, b.id::text COLLATE "C", {frame}, b.patient, b.side,'
            f" e.embedding::real[], {one_per_image}"
            f" FROM scans AS b JOIN siamese.embedding_{self.number} AS e ON e.key = b.id",
        )
        names = "key", "text", "frame", "patient", "side", "vector", "is_main"
        rows = [dict(zip(names, row, strict=True)) for row in found]
        kind = one(self.db, "SELECT key_type FROM siamese.collections WHERE name = 'scans'")
        for row in rows:
            vector = np.array(row["vector"], dtype=np.float64)
            row["vector"] = vector / np.linalg.norm(vector)
            row["order"] = int(row["key"]) if kind in ("integer", "bigint") else row["key"]
        return rows

    def exact(
        self,
        liked: list[str],
        unliked: list[str],
        strategy: str,
        *,
        qualifies: Callable[[Row], bool] = lambda row: True,
        k: int = 10,
        penalty: float = 1.0,
        max_distance: float = np.inf,
        group_by: str = "",
        per_group: int = 1,
        own_group: bool = True,
        **_: Any,
    ) -> list[tuple[str, float, int | None]]:
        rows = self.rows
        by_key = {row["key"]: row for row in rows if row["is_main"]}
        near = [by_key[key]["vector"] for key in liked]
        far = [by_key[key]["vector"] for key in unliked]
        examples = [*liked, *unliked]
        own = {by_key[key].get(group_by) for key in examples} - {None}
        found = []
        for row in rows:
            if row["key"] in examples or not qualifies(row):
                continue
            if not own_group and row[group_by] in own:
                continue
            score = score_of(row["vector"], near, far, strategy, penalty)
            if np.float32(score) <= np.float32(max_distance):
                found.append((score, row["order"], row["frame"] or 0, row))
        found.sort(key=lambda item: item[:3])
        taken: list[tuple[str, float, int | None]] = []
        groups: dict[Any, int] = {}
        for score, _order, _frame, row in found:
            if group_by:
                groups[row[group_by]] = groups.get(row[group_by], 0) + 1
                if groups[row[group_by]] > per_group:
                    continue
            taken.append((row["key"], score, row["frame"]))
        return taken[:k]

    def search(
        self,
        liked: list[str],
        unliked: list[str],
        session: Connection | None = None,
        **options: Any,
    ) -> list[tuple[str, float, int | None]]:
        given = {"collection": "scans", "like": liked, "unlike": unliked, **options}
        call = sql.SQL(
            "SELECT (n.item).id::text, n.distance, n.frame"
            " FROM siamese.similar_rows(NULL::public.scans{}) AS n"
        ).format(arguments(given))
        return (session or self.db).execute(call).fetchall()


def score_of(
    vector: np.ndarray[Any, Any],
    liked: list[np.ndarray[Any, Any]],
    unliked: list[np.ndarray[Any, Any]],
    strategy: str,
    penalty: float,
) -> float:
    """What the documentation says."""
    if strategy == "mean":
        query = np.mean(liked, axis=0)
        if unliked:
            query = query + penalty * (query - np.mean(unliked, axis=0))
        return float(1 - vector @ query / np.linalg.norm(query))
    near = max(0.0, min(float(1 - vector @ example) for example in liked))
    if not unliked:
        return near
    far = max(0.0, min(float(1 - vector @ example) for example in unliked))
    return near * (1 + penalty * (2 * near / (near + far) if near + far > 1e-12 else 0))


def check_same(found: list[Any], wanted: list[Any]) -> None:
    """Check that answers are equal, apart from rows that are equally far."""
    distances = [row[1] for row in found]
    assert distances == pytest.approx([row[1] for row in wanted], abs=5e-6)
    assert len({(row[0], row[2]) for row in found}) == len(found)
    if found:
        inner = distances[-1] - 2e-5
        assert {(row[0], row[2]) for row in found if row[1] < inner} == {
            (row[0], row[2]) for row in wanted if row[1] < inner
        }


@pytest.fixture(params=KINDS, ids=" ".join)
def scans(request: pytest.FixtureRequest, db: Connection, pictures: Pictures) -> Scans:
    test_nearest.make_scans(db, pictures, *request.param)
    return Scans(db)


def keys_of(scans: Scans, numbers: tuple[int, ...]) -> list[str]:
    kind = one(scans.db, "SELECT key_type FROM siamese.collections WHERE name = 'scans'")
    every = {row["key"] for row in scans.rows}
    keys = [key_of(kind, number) for number in numbers]
    return [key for key in keys if key in every]


def test_as_in_numpy(scans: Scans) -> None:
    liked, unliked = keys_of(scans, LIKED), keys_of(scans, UNLIKED)
    assert len(liked) > 2 and unliked
    for some, others in ((liked, []), (liked, unliked), (liked[:1], unliked)):
        for strategy, (options, qualifies) in itertools.product(STRATEGIES, CASES):
            wanted = scans.exact(some, others, strategy, qualifies=qualifies, **options)
            for engine in ENGINES:
                found = scans.search(some, others, strategy=strategy, engine=engine, **options)
                check_same(found, wanted)
    assert not set(liked + unliked) & {row[0] for row in scans.search(liked, unliked, k=1000)}


@pytest.mark.law(4)
def test_rows_that_the_caller_may_not_see(
    scans: Scans, connect: Connect, new_role: NewRole
) -> None:
    db, role = scans.db, new_role()
    db.execute(f"SELECT grant_usage('{role}')")
    db.execute(f"GRANT SELECT ON scans TO {role}")
    db.execute("ALTER TABLE scans ENABLE ROW LEVEL SECURITY")
    db.execute(f"CREATE POLICY seen ON scans TO {role} USING (side = 'left')")
    session = connect(user=role)
    scans.rows = [row for row in scans.rows if row["side"] == "left"]
    seen = [row["key"] for row in scans.rows if row["is_main"]]
    hidden = one(db, "SELECT id::text FROM scans WHERE side = 'right' LIMIT 1")
    liked, unliked = seen[:3], seen[3:5]
    for strategy, (options, qualifies) in itertools.product(STRATEGIES, CASES):
        wanted = scans.exact(liked, unliked, strategy, qualifies=qualifies, **options)
        for engine in ENGINES:
            given = {"strategy": strategy, "engine": engine, **options}
            check_same(scans.search(liked, unliked, session, **given), wanted)
    for strategy in STRATEGIES:
        for examples in ([hidden], []), (liked, [hidden]):
            with sql_error("P0002", "is not in collection", "not visible to you"):
                scans.search(*examples, session, strategy=strategy)


@pytest.fixture
def table(db: Connection, pictures: Pictures) -> Connection:
    """Table ``t`` with pictures 0 to 39, all but the last ten in an index."""
    make_collection(db, on_error="quarantine")
    insert = "INSERT INTO t SELECT * FROM unnest(%s::int[], %s::bytea[])"
    db.execute(insert, (list(range(30)), pictures.files[:30]))
    db.execute("SELECT build_index('t')")
    db.execute(insert, (list(range(30, 40)), pictures.files[30:40]))
    db.execute(insert, ([40, 41], [b"no image", None]))
    return db


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_images_are_as_good_as_keys(table: Connection, pictures: Pictures, strategy: str) -> None:
    """Also a mixture of both. Only keys are left out of the answer."""
    query = (
        "SELECT image_id, distance FROM similar_images(collection => 't', k => 100,"
        " strategy => %s, {}) WHERE image_id <> ALL('{{3,33,5,36}}')"
    )
    keys = rows_of(table, query.format("like => %s, unlike => %s"), strategy, [3, 33], [5, 36])
    assert len(keys) == 36
    files = pictures.files
    for call, values in (
        ("like_images => %s, unlike_images => %s", ([files[3], files[33]], [files[5], files[36]])),
        ('like => %s, like_images => %s, unlike => %s, unlike_images => %s',
         ([3], [files[33]], [36], [files[5]])),
    ):  # fmt: skip
        found = rows_of(table, query.format(call), strategy, *values)
        check_same([(*row, None) for row in found], [(*row, None) for row in keys])
    by_image = "SELECT image_id FROM similar_images(collection => 't', like_images => %s, k => 1)"
    assert column_of(table, by_image, [files[3]]) == [3]


def test_one_example_is_a_search_by_it(table: Connection) -> None:
    plain = "SELECT image_id, distance FROM similar_images(collection => 't', {})"
    wanted = rows_of(table, plain.format("image_id => 3"))
    for strategy in STRATEGIES:
        found = rows_of(table, plain.format(f"like => '{{3,3}}', strategy => '{strategy}'"))
        check_same([(*row, None) for row in found], [(*row, None) for row in wanted])


def test_no_similarity(db: Connection, pictures: Pictures) -> None:
    """The calibration is of distances between two images."""
    # The encoder whose domain the pictures are in.
    name = "medical" if pictures.name == "pneumoniamnist" else "fashion_mnist"
    encoder = (MODELS / f"{name}.onnx").read_bytes()
    db.execute("SELECT register_model('calibrated', %s)", (encoder,))
    make_collection(db, model="calibrated")
    insert = "INSERT INTO t SELECT * FROM unnest(%s::int[], %s::bytea[])"
    db.execute(insert, (list(range(8)), pictures.files[:8]))
    query = "SELECT DISTINCT similarity IS NULL FROM similar_images(collection => 't', {})"
    assert column_of(db, query.format("image_id => 3")) == [False]
    for strategy in STRATEGIES:
        call = f"like => '{{3}}', strategy => '{strategy}'"
        assert column_of(db, query.format(call)) == [True]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_metrics(db: Connection, pictures: Pictures, strategy: str) -> None:
    """Euclidean distances, by all engines, beside plain SQL."""
    register_grid(db)
    make_collection(db, model="grid")
    insert = "INSERT INTO t SELECT * FROM unnest(%s::int[], %s::bytea[])"
    db.execute(insert, (list(range(200)), pictures.files[:200]))
    db.execute("SELECT build_index('t')")
    near = (
        "(SELECT min(e.embedding <-> q.embedding)"
        " FROM siamese.embedding_2 AS q WHERE q.key IN (3, 8))"
    )
    far = near.replace("(3, 8)", "(5, 9)")
    score = f"{near} + 2 * 0.5 * {near} * {near} / ({near} + {far})"
    if strategy == "mean":
        mean = "(SELECT avg(q.embedding) FROM siamese.embedding_2 AS q WHERE q.key IN ({}))"
        half = "(SELECT array_agg(0.5) FROM generate_series(1, vector_dims(e.embedding)))::vector"
        liked, unliked = mean.format("3, 8"), mean.format("5, 9")
        score = f"e.embedding <-> ({liked} + ({liked} - {unliked}) * {half})"
    wanted = rows_of(
        db,
        f"SELECT e.key, ({score})::real FROM siamese.embedding_2 AS e"
        f" WHERE e.key NOT IN (3, 8, 5, 9) ORDER BY {score}, e.key LIMIT 15",
    )
    for engine in ENGINES:
        found = rows_of(
            db,
            "SELECT image_id, distance FROM similar_images(collection => 't', like => '{3,8}',"
            " unlike => '{5,9}', k => 15, penalty => 0.5, strategy => %s, engine => %s)",
            strategy, engine,
        )  # fmt: skip
        assert [row[1] for row in found] == pytest.approx([row[1] for row in wanted], rel=1e-5)
        assert {row[0] for row in found[:-2]} <= {row[0] for row in wanted}


def test_equal_to_both(table: Connection) -> None:
    """A row with the vector of a liked and of an unliked example: its distance is zero."""
    table.execute("UPDATE t SET image = (SELECT image FROM t WHERE id = 3) WHERE id IN (5, 7)")
    for engine in ENGINES:
        found = rows_of(
            table,
            "SELECT image_id, distance FROM similar_images(collection => 't', like => '{3}',"
            " unlike => '{5}', strategy => 'best', k => 1, engine => %s)",
            engine,
        )
        assert found == [(7, pytest.approx(0, abs=1e-6))]


def test_examples_without_a_vector(table: Connection) -> None:
    for key in (40, 41):
        with sql_error("55000", f'image {key} of collection "t" has no vector', "Leave it out"):
            table.execute(f"SELECT similar_images(like => '{{3,{key}}}', collection => 't')")


def test_deleted_and_changed_examples(table: Connection, pictures: Pictures) -> None:
    table.execute("DELETE FROM t WHERE id = 4")
    with sql_error("P0002", 'image 4 is not in collection "t"'):
        table.execute("SELECT similar_images(like => '{3,4}', collection => 't')")
    query = "SELECT image_id, distance FROM similar_images(like => '{3,6}', collection => 't')"
    before = rows_of(table, query)
    with table.transaction(force_rollback=True):
        table.execute("UPDATE t SET image = %s WHERE id = 6", (pictures.files[50],))
        assert rows_of(table, query) != before
    assert rows_of(table, query) == before


def test_queued_rows_are_told(db: Connection, pictures: Pictures) -> None:
    make_collection(db, embed="deferred")
    insert = "INSERT INTO t SELECT * FROM unnest(%s::int[], %s::bytea[])"
    db.execute(insert, (list(range(5)), pictures.files[:5]))
    db.execute("SELECT embed_pending('t')")
    db.execute(insert, ([5], pictures.files[5:6]))
    told = notices_of(db)
    assert one(db, "SELECT count(*) FROM similar_images(like => '{1,2}', collection => 't')") == 3
    assert [text for text in told if "has queued rows" in text]


# A graph index, of vectors that never were images.


@pytest.fixture(scope="module")
def large(shared: Connection) -> Large:
    return Large(shared)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("share", [1, 10, 1000])
def test_graph(large: Large, strategy: str, share: int) -> None:
    """As good as a search by one image, and exact by pgvector: 12,000 rows, 500 pending."""
    points = large.points.astype(np.float64)
    hits = expected = 0
    with large.db.transaction(force_rollback=True):
        large.db.execute(f"UPDATE t SET n = id % {share}")
        allowed = np.arange(12_000) % share == 100 % share
        for first in range(0, 11_900, 1_700):
            nearest = large.nearest(first, np.ones(12_000, bool), 9)
            liked, unliked = [first, *nearest[:2]], [nearest[5], nearest[8], 11_990]
            near, far = [points[key] for key in liked], [points[key] for key in unliked]
            scores = np.array([score_of(p, near, far, strategy, 1.0) for p in points])
            scores[~allowed] = np.inf
            scores[[*liked, *unliked]] = np.inf
            k = min(10, int(np.isfinite(scores).sum()))
            true = np.sort(scores)[:k]
            for engine in ("auto", "pgvector"):
                found = rows_of(
                    large.db,
                    "SELECT image_id, distance FROM similar_images(like => %s, unlike => %s,"
                    " collection => 't', filter => %s, strategy => %s, engine => %s)",
                    liked, unliked, f'{{"n": {100 % share}}}', strategy, engine,
                )  # fmt: skip
                assert [row[1] for row in found] == pytest.approx(
                    scores[[row[0] for row in found]], abs=5e-6
                )
                assert len(found) == k
                if engine == "pgvector":
                    assert [row[1] for row in found] == pytest.approx(true, abs=5e-6)
                hits += sum(row[1] <= true[-1] + 1e-5 for row in found)
                expected += k
    assert hits >= 0.97 * expected


def test_many_candidates(large: Large) -> None:
    """More than a session is to hold: pgvector compares them all, or FAISS says that it can't."""
    query = (
        "SELECT image_id, distance FROM similar_images(like => '{1,2000,4000,8000}',"
        " strategy => 'best', k => 9000, collection => 't', engine => %s)"
    )
    wanted = rows_of(large.db, query, "pgvector")
    assert rows_of(large.db, query, "auto") == wanted
    with sql_error("55000", "FAISS cannot answer this search", "Too many candidates"):
        large.db.execute(query, ("faiss",))


@pytest.mark.law(5)
@pytest.mark.parametrize("engine", ["auto", "pgvector"])
def test_it_stops(large: Large, engine: str) -> None:
    db = large.db
    query = (
        "SELECT count(*) FROM generate_series(1, 100000) AS g"
        " CROSS JOIN LATERAL similar_images(like => ARRAY[g %% 5000, 7000, 8000],"
        " unlike => '{9000}', strategy => 'best', k => 500, collection => 't', engine => %s)"
    )
    db.execute("SET statement_timeout = '300ms'")
    with pytest.raises(psycopg.errors.QueryCanceled):
        db.execute(query, (engine,))
    db.execute("RESET statement_timeout")
    assert one(db, "SELECT count(*) FROM similar_images(like => '{5,6}', collection => 't')") == 10


@pytest.mark.law(14)
def test_refused(table: Connection, pictures: Pictures) -> None:
    bad = {"image": pictures.files[0]}
    for given, error in (
        ('like => NULL', ("22004", "like is null")),
        ("like => '{3,NULL}'", ("22004", "an element of like is null")),
        ("like => '{3}', unlike => '{NULL}'", ("22004", "an element of unlike is null")),
        ("like_images => '{NULL}'", ("22004", "an element of like_images is null")),
        ("like => '{3}', unlike => (SELECT array_agg(id) FROM t WHERE false)",
         ("22004", "unlike is null")),
        ("unlike => '{3}'", ("22023", "no example is liked")),
        ("like => '{99}'", ("P0002", 'image 99 is not in collection "t"')),
        ("like => '{3,4}', unlike => '{4}'", ("22023", "image 4 is in both like and unlike")),
        ("like => '{3}', strategy => 'worst'", ("22023", 'unknown strategy "worst"', "mean, best")),
        ("like => '{3}', strategy => NULL", ("22004", "strategy is null")),
        ("image_id => 3, strategy => NULL", ("22004", "strategy is null")),
        ("like => '{3}', penalty => -1", ("22023", "penalty must be between 0 and 10")),
        ("like => '{3}', penalty => 'NaN'", ("22023", "penalty must be between 0 and 10")),
        ("like => '{3}', k => 0", ("22023", "k must be between 1 and 10000")),
        ("like => '{3}', image_id => 4", ("22023", "an image and examples are given")),
        ("like => '{3}', image => %(image)s", ("22023", "an image and examples are given")),
        ("like => '{3}', query_frame => 1", ("22023", "query_frame and examples are given")),
        ("like => '{3}', region => '0,0,0.5,0.5'", ("22023", "region and examples are given")),
        ("like => '{3}', filter => '{\"who\": 1}'", ("42703", 'column "who"')),
        ("like_images => ARRAY[%(image)s, 'abc']", ("22P03", "(like_images, element 2)")),
        ("like => ARRAY(SELECT n %% 30 FROM generate_series(1, 101) AS n)",
         ("54000", "more than 100 examples are given")),
        ("like => '{1}',"
         " like_images => (SELECT array_agg(image) FROM t, generate_series(1, 4) WHERE id < 25)",
         ("54000", "more than 100 examples are given")),
    ):  # fmt: skip
        with sql_error(*error):
            table.execute(f"SELECT similar_images(collection => 't', {given})", bad)
    with sql_error("22P02", '"a"'):
        table.execute("SELECT similar_rows(NULL::t, like => '{a}')")
    table.execute("CREATE TABLE words AS SELECT id::text, image FROM t WHERE id < 3")
    table.execute("ALTER TABLE words ADD PRIMARY KEY (id)")
    table.execute("SELECT create_collection('words', 'words')")
    with sql_error("0A000", "has keys of type text", "Use similar_rows"):
        table.execute("SELECT similar_images(like => '{1}', collection => 'words')")


def test_the_documentation(db: Connection, pictures: Pictures) -> None:
    insert_images(db, pictures.files[:20])
    text = (ROOT / "docs" / "examples.md").read_text()
    statements = [
        statement
        for block in re.findall(r"^```sql\n(.*?)^```", text, re.M | re.S)
        for statement in block.split(";\n")
        if statement.strip()
    ]
    assert len(statements) == 6
    for statement in statements:
        values = [pictures.files[30]] * statement.count("$1")
        rows = rows_of(db, statement.replace("$1", "%b"), *values)
        assert len(rows) == 10, statement
