"""Facts of explain_search, recall and figures by labels, beside plain SQL and NumPy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pg_siamese.evaluation import retrieval
from tests.conftest import Connect, Connection, NewRole
from tests.database.tables import without_triggers
from tests.scenarios.gallery import gallery
from tests.support import column_of, one, rows_of, sql_error

ROWS, MORE = 140, 12
LABELS = ("cat", "dog", "owl", None)
COUNTS = (
    "returned", "rejected_by_visibility", "rejected_by_filter", "rejected_by_group",
    "rejected_by_distance",
)  # fmt: skip


@pytest.fixture
def scans(db: Connection) -> Connection:
    """Patients of four images, and rows without a patient, a label or a vector; two splits."""
    files = gallery(ROWS + MORE).files
    db.execute(
        "CREATE TABLE public.scans"
        " (id bigint PRIMARY KEY, image bytea, label text, patient text, split text)"
    )
    db.execute("SELECT create_collection('scans', 'public.scans', 'id', group_column => 'patient')")
    rows = [
        (
            number,
            file,
            LABELS[number * number % 7 % 4],
            None if number % 40 == 11 else f"p{number // 4}",
            "test" if number % 3 == 0 else "train",
        )
        for number, file in enumerate(files)
    ]
    insert = "INSERT INTO public.scans VALUES (%s, %s, %s, %s, %s)"
    with db.cursor() as cursor:
        cursor.executemany(insert, rows[:ROWS])
        db.execute("SELECT build_index('scans')")
        db.execute("DELETE FROM public.scans WHERE id % 17 = 3")
        cursor.executemany(insert, rows[ROWS:])
    db.execute("INSERT INTO public.scans (id) VALUES (1000)")
    return db


@pytest.fixture
def ward(scans: Connection, new_role: NewRole, connect: Connect) -> Connection:
    """A session that sees three rows of four."""
    role = new_role()
    scans.execute(f"SELECT grant_usage('{role}')")
    scans.execute(f"GRANT SELECT ON public.scans TO {role}")
    scans.execute("ALTER TABLE public.scans ENABLE ROW LEVEL SECURITY")
    scans.execute(f"CREATE POLICY seen ON public.scans TO {role} USING (id % 4 <> 1)")
    return connect(user=role)


def explain(session: Connection, arguments: str, *values: Any) -> dict[str, str | None]:
    return dict(
        rows_of(
            session,
            f"SELECT fact, value FROM siamese.explain_search(collection => 'scans', {arguments})",
            *values,
        )
    )


def number(value: str | None) -> int:
    assert value is not None
    return int(value)


# --- explain_search -------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "faiss", "pgvector"])
@pytest.mark.parametrize(
    "arguments",
    [
        "image_id => 6",
        'image_id => 6, k => 40, filter => \'{"label": "cat"}\'',
        'image_id => 6, k => 40, exclude => \'{"split": "test"}\', max_distance => 0.3',
        "image_id => 6, k => 20, group_by => 'patient'",
        "image_id => 6, k => 20, own_group => false",
        "image_id => 6, k => 50, candidates => ARRAY[6, 7, 20, 21, 145, 999, NULL]",
        "image_id => 145, k => 1000",
    ],
)
def test_facts_fit_the_answer(scans: Connection, engine: str, arguments: str) -> None:
    given = f"{arguments}, engine => '{engine}'"
    answer = column_of(
        scans, f"SELECT image_id FROM similar_images(collection => 'scans', {given})"
    )
    for _ in range(4):  # the later ones may go another way
        facts = explain(scans, given)
        assert facts["engine"] == ("pgvector" if engine == "pgvector" else "faiss")
        assert number(facts["returned"]) == len(answer)
        if engine == "pgvector":
            assert facts["candidates"] is None and facts["exact"] == "true"
        else:
            counts = [number(facts[name]) for name in COUNTS]
            assert min(counts) >= 0 and sum(counts) == number(facts["candidates"]), facts
            assert number(facts["rounds"]) >= 1


def test_counts_are_those_of_plain_sql(scans: Connection) -> None:
    others = "FROM public.scans WHERE image IS NOT NULL AND id <> 6"
    all_others = one(scans, f"SELECT count(*) {others}")
    facts = explain(scans, "image_id => 6, k => 1000")
    assert number(facts["candidates"]) == all_others == number(facts["returned"])
    added, dead = one(scans, "SELECT ARRAY[pending, dead] FROM collection_status WHERE"
                             " collection = 'scans'")  # fmt: skip
    assert (number(facts["pending"]), number(facts["dead"])) == (added, dead)
    assert added == MORE and dead > 5

    near = one(scans, "SELECT count(*) FROM similar_images(image_id => 6, k => 1000,"
                      " collection => 'scans', max_distance => 0.2)")  # fmt: skip
    facts = explain(scans, "image_id => 6, k => 1000, max_distance => 0.2")
    assert 0 < near < all_others
    assert number(facts["rejected_by_distance"]) == number(facts["candidates"]) - near

    patients = one(scans, f"SELECT count(DISTINCT coalesce(patient, '')) {others}")
    facts = explain(scans, "image_id => 6, k => 1000, group_by => 'patient'")
    assert number(facts["returned"]) == patients
    assert number(facts["rejected_by_group"]) == all_others - patients

    facts = explain(scans, "image_id => 6, k => 1000, candidates => ARRAY[7, 21, 145]")
    assert number(facts["returned"]) == 3

    dogs = one(scans, f"SELECT count(*) {others} AND label = 'dog'")
    facts = explain(scans, 'image_id => 6, k => 1000, filter => \'{"label": "dog"}\'')
    assert number(facts["returned"]) == dogs
    read = number(facts["candidates"]) - number(facts["rejected_by_filter"])
    assert read == dogs


def test_rows_that_are_gone(scans: Connection) -> None:
    """Deletes with triggers off leave vectors of rows that the table does not have."""
    near = column_of(
        scans, "SELECT image_id FROM similar_images(image_id => 6, k => 5, collection => 'scans')"
    )
    with without_triggers(scans):
        scans.execute("DELETE FROM public.scans WHERE id = ANY(%s)", (near[:3],))
    facts = explain(scans, "image_id => 6, k => 5")
    assert number(facts["rejected_by_visibility"]) == 3
    assert number(facts["rejected_by_filter"]) == 0


def test_reason_and_phases(scans: Connection) -> None:
    image = one(scans, "SELECT image FROM public.scans WHERE id = 6")
    facts = explain(scans, "image => %s", image)
    times = {name: float(value or 0) for name, value in facts.items() if name.endswith("_ms")}
    total = times.pop("total_ms")
    assert sum(times.values()) == pytest.approx(total, abs=0.01)
    for phase in ("embed_ms", "index_ms", "pending_ms", "check_ms"):
        assert times[phase] > 0, phase
    reasons = "SELECT value, detail FROM explain_search(%s) WHERE fact = 'engine'"

    def reason(arguments: str) -> Any:
        return rows_of(scans, reasons.replace("%s", f"collection => 'scans', {arguments}"))[0]

    assert reason("image_id => 6") == ("faiss", "Generation 1.")
    assert reason("image_id => 6, engine => 'pgvector'") == (
        "pgvector", "It was asked for by name.",
    )  # fmt: skip
    assert reason("image_id => 1000") == (None, "The image has no vector.")
    scans.execute("CREATE TABLE public.bare (id int PRIMARY KEY, image bytea)")
    scans.execute("SELECT create_collection('bare', 'public.bare')")
    scans.execute("INSERT INTO public.bare SELECT id, image FROM public.scans WHERE id = 6")
    assert rows_of(scans, reasons.replace("%s", "image_id => 6, collection => 'bare'")) == [
        ("pgvector", "The collection has no index generation.")
    ]


def test_other_kinds_of_keys(scans: Connection) -> None:
    scans.execute("CREATE TABLE public.named (name text PRIMARY KEY, image bytea)")
    scans.execute("SELECT create_collection('named', 'public.named', 'name')")
    scans.execute("INSERT INTO public.named SELECT 'n' || id, image FROM scans WHERE id < 50")
    scans.execute("SELECT build_index('named')")
    with without_triggers(scans):
        scans.execute("DELETE FROM public.named WHERE name = 'n7'")
    facts = dict(
        rows_of(
            scans,
            "SELECT fact, value FROM explain_search("
            "image_id => 'n6', k => 1000, collection => 'named')",
        )
    )
    rows = one(scans, "SELECT count(*) FROM public.named")
    assert number(facts["returned"]) == rows - 1
    assert number(facts["rejected_by_visibility"]) == 1


@pytest.mark.parametrize(
    "arguments",
    ["image_id => 6", 'image_id => 6, k => 30, filter => \'{"label": ["cat", "dog"]}\''],
)
def test_row_level_security_hides_counts(
    scans: Connection, ward: Connection, arguments: str
) -> None:
    def shown() -> dict[str, str | None]:
        return {name: value for name, value in facts_of().items() if not name.endswith("_ms")}

    def facts_of() -> dict[str, str | None]:
        return explain(ward, arguments)

    wanted = one(
        ward, f"SELECT count(*) FROM siamese.similar_images(collection => 'scans', {arguments})"
    )
    before = shown()
    assert {name for name, value in facts_of().items() if value is not None} == {
        "engine", "returned", "embed_ms", "total_ms",
    }  # fmt: skip
    assert number(before["returned"]) == wanted
    details = {
        detail
        for (detail,) in rows_of(
            ward,
            "SELECT detail FROM siamese.explain_search("
            f"collection => 'scans', {arguments}) WHERE value IS NULL",
        )
    }
    assert details == {"hidden by row-level security"}
    # Rows that are hidden, as near as can be.
    scans.execute(
        "INSERT INTO public.scans SELECT 2001 + 4 * n, image, label, patient, split"
        " FROM public.scans, generate_series(1, 30) AS n WHERE id = 6"
    )
    assert shown() == before
    # Also in a session that has searched as someone who sees all.
    role = ward.info.user
    explain(scans, arguments)
    scans.execute(f"SET ROLE {role}")
    seen = explain(scans, arguments)
    assert {name for name in seen if seen[name] is not None} == {
        "engine", "returned", "embed_ms", "total_ms",
    }  # fmt: skip


# --- measure_recall -------------------------------------------------------------------------------

RECALL = "SELECT sampled, recall, minimum FROM siamese.measure_recall('scans'"


def test_recall(scans: Connection) -> None:
    embedded = one(scans, "SELECT count(*) FROM public.scans WHERE image IS NOT NULL")
    assert rows_of(scans, f"{RECALL})") == [(100, 1, 1)]
    assert rows_of(scans, f"{RECALL}, queries => 1000, k => 3)") == [(embedded, 1, 1)]
    assert rows_of(scans, f'{RECALL}, filter => \'{{"label": "cat"}}\')') == [(100, 1, 1)]
    assert rows_of(scans, f'{RECALL}, filter => \'{{"label": "none"}}\')') == [(0, None, None)]
    times = rows_of(
        scans, "SELECT milliseconds, exact_milliseconds FROM measure_recall('scans', 5)"
    )[0]
    assert min(times) > 0


def test_recall_of_an_index_that_errs(scans: Connection) -> None:
    """The index has other vectors than the table, for half of the rows."""
    scans.execute("SELECT build_index('scans')")
    number = one(scans, "SELECT collection_id FROM collections WHERE name = 'scans'")
    scans.execute(
        f"UPDATE siamese.embedding_{number} AS e SET embedding = o.embedding FROM"
        f" siamese.embedding_{number} AS o WHERE o.key = e.key + 61 AND e.key < 61"
    )
    (sampled, recall, minimum), (_, same, _), (_, other, _) = (
        rows_of(scans, f"{RECALL}, queries => 20, seed => {seed})")[0] for seed in (1, 1, 2)
    )
    assert sampled == 20 and 0 <= minimum < recall < 0.95
    assert same == recall != other


def test_recall_as_the_caller_sees_it(scans: Connection, ward: Connection) -> None:
    seen = one(ward, "SELECT count(*) FROM public.scans WHERE image IS NOT NULL")
    assert seen < one(scans, "SELECT count(*) FROM public.scans WHERE image IS NOT NULL")
    assert rows_of(ward, f"{RECALL}, queries => 1000)") == [(seen, 1, 1)]


# --- retrieval_quality ----------------------------------------------------------------------------


def quality(session: Connection, arguments: str = "") -> list[float]:
    given = f"'scans'{arguments and ', '}{arguments}"
    return list(rows_of(session, f"SELECT * FROM siamese.retrieval_quality({given})")[0])


def outside(
    db: Connection, queries: str = "true", gallery: str = "true", own_group: bool = False
) -> list[float]:
    """The same by the package for training, on the vectors of the rows that meet conditions."""

    def embedded(condition: str) -> retrieval.Embedded:
        rows = rows_of(
            db,
            "SELECT s.id, s.label, s.patient, v.embedding::text FROM public.scans AS s"
            " JOIN siamese.vectors_scans AS v ON v.key = s.id"
            f" WHERE s.label IS NOT NULL AND ({condition}) ORDER BY s.id",
        )
        vectors = [np.array(json.loads(row[3]), np.float32) for row in rows]
        return retrieval.Embedded(
            np.stack(vectors),
            np.array([LABELS.index(row[1]) for row in rows]),
            np.zeros(len(rows), np.int64),
            np.array([_group(row, own_group) for row in rows]),
        )

    asked, known = embedded(queries), embedded(gallery)
    found = retrieval.neighbours(known, asked, 5)
    figures = retrieval.retrieval(known.labels[found], asked.labels)
    return [len(asked.labels), figures.map5, figures.mmv5, figures.acc1, figures.acc3, figures.acc5]


def _group(row: Sequence[Any], own_group: bool) -> int:
    """The patient's number. A query is its own group if its patient is unknown or counts."""
    return -1 - row[0] if own_group or row[2] is None else int(row[2][1:])


TEST, TRAIN = '{"split": "test"}', '{"split": "train"}'


@pytest.mark.parametrize(
    ("arguments", "queries", "rows", "own_group"),
    [
        ("", "true", "true", False),
        ("own_group => true", "true", "true", True),
        (f"queries => '{TEST}', gallery => '{TRAIN}'", "split = 'test'", "split = 'train'", False),
        ('gallery => \'{"label": ["cat", "owl"]}\'', "true", "label IN ('cat', 'owl')", False),
    ],
)
def test_quality(
    scans: Connection, arguments: str, queries: str, rows: str, own_group: bool
) -> None:
    figures = quality(scans, arguments)
    assert figures == pytest.approx(outside(scans, queries, rows, own_group), rel=1e-6)
    assert 0 < figures[1] < 100


def test_quality_as_the_caller_sees_it(scans: Connection, ward: Connection) -> None:
    seen = "s.id % 4 <> 1"
    assert quality(ward) == pytest.approx(outside(scans, seen, seen), rel=1e-6)


def test_sample(scans: Connection) -> None:
    first, again, other = (quality(scans, f"sample => 25, seed => {n}") for n in (1, 1, 2))
    assert first[0] == other[0] == 25
    assert first == again != other


def test_fewer_than_five_neighbours(scans: Connection) -> None:
    """What is missing is no neighbour with a label."""
    one_owl = one(scans, "SELECT min(id) FROM scans WHERE label = 'owl' AND image IS NOT NULL")
    few = f"gallery => '{{\"id\": {one_owl}}}', own_group => true"
    count, *figures = quality(scans, f'queries => \'{{"label": "owl"}}\', {few}')
    share = 100 * (count - 1) / count  # the row itself has no neighbour
    assert figures == pytest.approx([share] * 5)
    count, *figures = quality(scans, f'queries => \'{{"label": "cat"}}\', {few}')
    assert count > 10 and figures == [0] * 5
    assert quality(scans, 'queries => \'{"label": "none"}\'') == [0, *[None] * 5]


# --- all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "sqlstate", "message"),
    [
        ("measure_recall('scans', queries => 0)", "22023", "queries must be between 1 and 10000"),
        ("measure_recall('scans', k => 0)", "22023", "k must be between"),
        ("measure_recall('none')", "42704", 'collection "none"'),
        ("measure_recall('scans', filter => '{\"x\": 1}')", "42703", 'column "x"'),
        ("measure_recall('scans', filter => '{\"id\": \"x\"}')", "22P02", 'column "id"'),
        ("retrieval_quality('scans', sample => 0)", "22023", "sample must be positive"),
        ("retrieval_quality('scans', 'x')", "42703", 'column "x"'),
        ("retrieval_quality('scans', queries => '{\"id\": \"x\"}')", "22P02", 'column "id"'),
        ("retrieval_quality('scans', gallery => '{\"id\": \"x\"}')", "22P02", 'column "id"'),
        ("explain_search(image_id => 6, collection => 'scans', k => 0)", "22023", "k must be"),
        ("explain_search(image_id => 2, collection => 'scans', filter => '{\"id\": \"x\"}')",
         "22P02", 'column "id"'),
    ],
)  # fmt: skip
def test_errors(scans: Connection, call: str, sqlstate: str, message: str) -> None:
    with sql_error(sqlstate, message):
        scans.execute(f"SELECT siamese.{call}")


@pytest.mark.parametrize("call", ["measure_recall('scans'", "retrieval_quality('scans'"])
def test_time_out(scans: Connection, call: str) -> None:
    scans.execute("SET statement_timeout = 500")
    with sql_error("57014"):
        scans.execute(f"SELECT {call}, seed => n) FROM generate_series(1, 100000) AS n")
    scans.execute("SET statement_timeout = 0")
    assert rows_of(scans, f"{RECALL})") == [(100, 1, 1)]
