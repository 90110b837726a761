"""Searches by group and rows to leave out, beside the same in plain SQL."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from psycopg import sql

from tests.conftest import Connection
from tests.scenarios.gallery import Gallery, gallery
from tests.server import login_role
from tests.support import one, sql_error
from tools.project import ROOT

ROWS = 240


@pytest.fixture(scope="module")
def images() -> Gallery:
    return gallery(ROWS + 20)


@pytest.fixture
def patients(db: Connection, images: Gallery) -> Connection:
    """A table with patients of one, five and many images, one without, and all kinds of rows."""
    db.execute(
        "CREATE TABLE public.scans (id bigint PRIMARY KEY, image bytea, patient text, side text)"
    )
    db.execute("SELECT siamese.create_collection('scans', 'public.scans', 'id')")
    with db.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO public.scans VALUES (%s, %s, %s, %s)",
            [
                (
                    number,
                    images.files[number],
                    _patient(number),
                    ("left", "right", None)[number % 3],
                )
                for number in range(ROWS)
            ],
        )
    db.execute("SELECT siamese.build_index('scans')")
    # Pending and dead rows, and a changed one.
    db.execute("DELETE FROM public.scans WHERE id % 17 = 3")
    for number in range(ROWS, ROWS + 20):
        db.execute(
            "INSERT INTO public.scans VALUES (%s, %s, %s, 'left')",
            (number, images.files[number], _patient(number)),
        )
    db.execute(
        "UPDATE public.scans SET image = (SELECT image FROM scans WHERE id = 7) WHERE id = 9"
    )
    return db


def _patient(number: int) -> str | None:
    if number % 40 == 11:
        return None
    if number < 80:
        return f"one {number}"
    return f"five {number // 5}" if number < 160 else f"many {number % 3}"


EXACT = """
WITH near AS (
    SELECT s.id, s.patient, e.embedding <=> q.embedding AS distance
    FROM public.scans AS s JOIN siamese.{vectors} AS e ON e.key = s.id
    CROSS JOIN siamese.{vectors} AS q
    WHERE q.key = %(key)s AND s.id <> %(key)s AND {condition}
), ranked AS (
    SELECT *, row_number() OVER (PARTITION BY patient ORDER BY distance, id) AS place FROM near
)
SELECT id, distance::real FROM ranked WHERE place <= %(per_group)s
ORDER BY ranked.distance, id LIMIT %(k)s
"""


def exact(
    db: Connection, key: int, k: int, per_group: int, condition: str = "true"
) -> list[tuple[int, float]]:
    row = db.execute(
        "SELECT collection_id FROM siamese.collections WHERE name = 'scans'"
    ).fetchone()
    assert row is not None
    statement = EXACT.format(vectors=f"embedding_{row[0]}", condition=condition)
    return db.execute(statement.encode(), {"key": key, "k": k, "per_group": per_group}).fetchall()


def found(session: Connection, key: int, k: int, **arguments: Any) -> list[tuple[int, float]]:
    given = sql.SQL(", ").join(
        sql.SQL("{} => {}").format(sql.Identifier(name), sql.Literal(value))
        for name, value in arguments.items()
    )
    return session.execute(
        sql.SQL(
            "SELECT image_id, distance FROM siamese.similar_images(image_id => {}, k => {},"
            " collection => 'scans', {})"
        ).format(key, k, given)
    ).fetchall()


def same(one: list[tuple[int, float]], other: list[tuple[int, float]]) -> None:
    """Equal, but for rows that are equally far."""
    assert len(one) == len(other)
    for (key, distance), (other_key, other_distance) in zip(one, other, strict=True):
        assert distance == pytest.approx(other_distance, abs=2e-6), (key, other_key)


@pytest.mark.parametrize("engine", ["faiss", "pgvector"])
@pytest.mark.parametrize("per_group", [1, 3])
def test_best_of_each_group(patients: Connection, engine: str, per_group: int) -> None:
    for key in (0, 7, 100, 170, 245):
        for k in (1, 10, 60):
            answer = found(patients, key, k, group_by="patient", per_group=per_group, engine=engine)
            same(answer, exact(patients, key, k, per_group))


def test_all_groups_are_found_where_there_are_fewer(patients: Connection) -> None:
    row = patients.execute(
        "SELECT count(DISTINCT coalesce(patient, '')) FROM public.scans WHERE id <> 200"
    ).fetchone()
    assert row is not None
    assert len(found(patients, 200, 1000, group_by="patient")) == row[0]


def test_few_large_groups(patients: Connection) -> None:
    """Three groups hold nearly all rows: no round is enough, and one scan answers."""
    patients.execute("UPDATE public.scans SET patient = 'many ' || id % 3 WHERE id <> 100")
    patients.execute(
        "INSERT INTO public.scans SELECT 1000 + n, (SELECT image FROM scans WHERE id = 5)"
        ", 'many 0', NULL FROM generate_series(1, 300) AS n"
    )
    for key in (100, 170):
        same(found(patients, key, 10, group_by="patient"), exact(patients, key, 10, 1))
        answer = found(patients, key, 10, group_by="patient", own_group=False, engine="pgvector")
        condition = f"patient IS DISTINCT FROM (SELECT patient FROM scans WHERE id = {key})"
        same(answer, exact(patients, key, 10, 1, condition))


def test_values_are_compared_as_text(patients: Connection) -> None:
    """By both engines, whatever the column's own equality."""
    patients.execute(
        """
        CREATE COLLATION folded (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
        ALTER TABLE public.scans ALTER patient TYPE text COLLATE folded;
        UPDATE public.scans SET patient = upper(patient) WHERE id % 2 = 0
        """
    )
    for own_group in (True, False):
        one, other = (
            found(patients, 170, 30, group_by="patient", own_group=own_group, engine=engine)
            for engine in ("faiss", "pgvector")
        )
        same(one, other)


def test_with_filters_and_without_some(patients: Connection) -> None:
    for key in (5, 120, 200):
        answer = found(patients, key, 10, group_by="patient", filter='{"side": "left"}')
        same(answer, exact(patients, key, 10, 1, "side = 'left'"))
        for _ in range(4):  # the fast path comes with the third
            answer = found(patients, key, 10, exclude='{"side": "left"}')
            same(answer, exact(patients, key, 10, 1000, "side IS DISTINCT FROM 'left'"))
        answer = found(
            patients, key, 10, exclude='{"side": "right", "patient": ["many 0", "many 1"]}'
        )
        condition = "(side = 'right' AND patient IN ('many 0', 'many 1')) IS NOT TRUE"
        same(answer, exact(patients, key, 10, 1000, condition))


def test_without_the_own_group(patients: Connection) -> None:
    for key in (100, 170, 201):
        row = patients.execute("SELECT patient FROM public.scans WHERE id = %s", (key,)).fetchone()
        assert row is not None
        answer = found(patients, key, 10, group_by="patient", own_group=False)
        condition = f"patient IS DISTINCT FROM '{row[0]}'"
        same(answer, exact(patients, key, 10, 1, condition))
    # Nothing is known of a row without a patient: its group is that of nobody.
    answer = found(patients, 51, 10, group_by="patient", own_group=False)
    same(answer, exact(patients, 51, 10, 1))


def test_rows_of_the_table(patients: Connection) -> None:
    rows = patients.execute(
        "SELECT (item).id, distance FROM siamese.similar_rows(NULL::public.scans, key => 100,"
        " k => 10, group_by => 'patient', exclude => '{\"side\": \"left\"}')"
    ).fetchall()
    same(rows, exact(patients, 100, 10, 1, "side IS DISTINCT FROM 'left'"))


def test_by_image(patients: Connection, images: Gallery) -> None:
    rows = patients.execute(
        "SELECT image_id FROM siamese.similar_images(%s, 10, 'scans', group_by => 'patient')",
        (images.files[100],),
    ).fetchall()
    assert rows[0] == (100,)
    patient = {key: name for key, name in patients.execute("SELECT id, patient FROM public.scans")}
    groups = [patient[key] for (key,) in rows]
    assert len(set(groups)) == len(groups) == 10


def test_rows_that_the_caller_may_not_see(
    patients: Connection, connect: Callable[..., Connection]
) -> None:
    patients.execute(login_role("groups_ward"))
    patients.execute("SELECT siamese.grant_usage('groups_ward')")
    patients.execute("GRANT SELECT ON public.scans TO groups_ward")
    patients.execute("ALTER TABLE public.scans ENABLE ROW LEVEL SECURITY")
    patients.execute("CREATE POLICY seen ON public.scans TO groups_ward USING (id % 4 <> 1)")
    session = connect(user="groups_ward")
    for key in (6, 100, 200):
        answer = found(session, key, 10, group_by="patient")
        same(answer, exact(patients, key, 10, 1, "s.id %% 4 <> 1"))


def test_one_vote_per_patient(patients: Connection) -> None:
    for arguments, condition in (
        ("", "true"),
        (', exclude => \'{"side": "left"}\'', "side IS DISTINCT FROM 'left'"),
        (', filter => \'{"side": ["left", null]}\'', "(side = 'left' OR side IS NULL)"),
    ):
        rows = patients.execute(
            "SELECT label, votes FROM siamese.classify_image(image_id => '170', k => 12,"
            f" collection => 'scans', label_column => 'side', group_by => 'patient'{arguments})"
        ).fetchall()
        wanted = [
            key
            for key, _ in exact(
                patients, 170, 12, 1, f"{condition} AND {LABELLED} AND {OTHERS.format(170)}"
            )
        ]
        sides = patients.execute(
            "SELECT side, count(*) FROM scans WHERE id = ANY(%s) GROUP BY 1", (wanted,)
        ).fetchall()
        assert dict(rows) == dict(sides)


def test_the_documentation(patients: Connection, images: Gallery) -> None:
    text = (ROOT / "docs" / "dicom.md").read_text()
    blocks = re.findall(r"^```sql\n(.*?)^```", text, re.M | re.S)
    (block,) = [each for each in blocks if "per_group" in each]
    lines = re.sub(r"^--.*\n", "", block, flags=re.M).strip().rstrip(";")
    for statement in lines.split(";\n"):
        given = (images.files[5],) if "$1" in statement else ()
        found = patients.execute(statement.replace("$1", "%s").encode(), given).fetchall()
        assert len(found) == 10


def test_the_documentation_of_the_group_column(patients: Connection) -> None:
    text = (ROOT / "docs" / "dicom.md").read_text()
    blocks = re.findall(r"^```sql\n(.*?)^```", text, re.M | re.S)
    (block,) = [each for each in blocks if "group_column" in each]
    _, classification, search = block.strip().rstrip(";").split(";\n")
    patients.execute(block.encode())
    rows = patients.execute(classification.encode()).fetchall()
    assert {row[0]: row[1] for row in rows} == sides(
        patients, exact(patients, 100, 10, 1, f"{OTHERS.format(100)} AND {LABELLED}")
    )
    found = patients.execute(search.encode()).fetchall()
    same([(row[1], row[2]) for row in found], exact(patients, 100, 10, 1000, OTHERS.format(100)))


def test_refused(patients: Connection) -> None:
    for arguments, error in (
        ({"group_by": "nobody"}, ("42703", 'column "nobody" of table')),
        ({"group_by": "patient", "per_group": 0}, ("22023", "per_group must be positive")),
        ({"per_group": 2}, ("22023", "need a column in group_by")),
        ({"own_group": False}, ("22023", "need a column in group_by")),
        ({"group_by": None}, ("22004", "group_by is null")),
        ({"exclude": None}, ("22004", "exclude is null")),
        ({"exclude": '{"nobody": 1}'}, ("42703", 'column "nobody" of table')),
    ):
        with sql_error(*error):
            found(patients, 5, 10, **arguments)


# --- the group column of a collection ------------------------------------------------------------


@pytest.fixture
def grouped(patients: Connection) -> Connection:
    """The same table, whose collection names its group column."""
    patients.execute("SELECT siamese.alter_collection('scans', group_column => 'patient')")
    return patients


def votes(db: Connection, arguments: str, *values: object) -> dict[str, int]:
    rows = db.execute(
        "SELECT label, votes FROM siamese.classify_image(k => 12, collection => 'scans',"
        f" label_column => 'side', {arguments})",
        values,
    ).fetchall()
    return {label: count for label, count in rows}


def sides(db: Connection, found: list[Any]) -> dict[str, int]:
    rows = db.execute(
        "SELECT side, count(*) FROM public.scans WHERE id = ANY(%s) GROUP BY 1",
        ([key for key, _ in found],),
    ).fetchall()
    return {label: count for label, count in rows}


OTHERS = "patient IS DISTINCT FROM (SELECT patient FROM scans WHERE id = {})"
LABELLED = "side IS NOT NULL"


def test_votes_are_by_the_collections_groups(grouped: Connection, images: Gallery) -> None:
    """One vote per patient, and none of the stored image's own, whose label would leak."""
    for key in (100, 170, 51):
        others = f"{OTHERS.format(key)} AND {LABELLED}" if key != 51 else LABELLED
        wanted = sides(grouped, exact(grouped, key, 12, 1, others))
        assert votes(grouped, f"image_id => {key}") == wanted
        assert votes(grouped, f"image_id => {key}, group_by => 'patient'") == wanted
        with_own = sides(grouped, exact(grouped, key, 12, 1, LABELLED))
        assert votes(grouped, f"image_id => {key}, own_group => true") == with_own
        # Every row has a vote, but for those of the own group.
        ungrouped = sides(grouped, exact(grouped, key, 12, 1000, others))
        assert votes(grouped, f"image_id => {key}, group_by => ''") == ungrouped
    by_image = votes(grouped, "image => %s", images.files[100])
    assert sum(by_image.values()) == 12


def test_votes_without_a_group_column(patients: Connection) -> None:
    wanted = sides(patients, exact(patients, 170, 12, 1000, LABELLED))
    assert votes(patients, "image_id => 170") == wanted
    assert votes(patients, "image_id => 170, group_by => ''") == wanted
    with sql_error("22004", "group_by is null"):
        votes(patients, "image_id => 170, group_by => NULL")
    with sql_error("22004", "own_group is null"):
        votes(patients, "image_id => 170, own_group => NULL")


def test_searches_group_only_if_asked(grouped: Connection) -> None:
    """But the column says what the own group is."""
    same(found(grouped, 170, 10, own_group=True), exact(grouped, 170, 10, 1000))
    for engine in ("auto", "pgvector"):
        for key in (100, 170, 201):
            answer = found(grouped, key, 10, own_group=False, engine=engine)
            same(answer, exact(grouped, key, 10, 1000, OTHERS.format(key)))
    rows = grouped.execute(
        "SELECT (item).id, distance FROM siamese.similar_rows(NULL::public.scans, key => 170,"
        " k => 10, own_group => false)"
    ).fetchall()
    same(rows, exact(grouped, 170, 10, 1000, OTHERS.format(170)))
    with sql_error("22023", "need a column in group_by"):
        found(grouped, 170, 10, per_group=2, own_group=False)


def test_own_group_of_an_image_that_is_not_stored(grouped: Connection, images: Gallery) -> None:
    search = "SELECT image_id FROM siamese.similar_images(%s, 10, 'scans'"
    plain = grouped.execute(f"{search})", (images.files[100],)).fetchall()
    without = grouped.execute(f"{search}, own_group => false)", (images.files[100],)).fetchall()
    assert without == plain
    grouped.execute("SELECT siamese.alter_collection('scans', group_column => '')")
    with sql_error("22023", "need a column in group_by"):
        grouped.execute(f"{search}, own_group => false)", (images.files[100],))


def test_a_group_column_is_set_and_kept(patients: Connection) -> None:
    column = "SELECT group_column FROM siamese.collection_status WHERE collection = 'scans'"
    assert one(patients, column) is None
    patients.execute("SELECT siamese.alter_collection('scans', group_column => 'patient')")
    patients.execute("SELECT siamese.alter_collection('scans', max_bytes => 1000000)")
    assert one(patients, column) == "patient"
    patients.execute("SELECT siamese.alter_collection('scans', group_column => '')")
    assert one(patients, column) is None
    patients.execute("CREATE TABLE public.more (id bigint PRIMARY KEY, image bytea, who int)")
    patients.execute("SELECT siamese.create_collection('m', 'public.more', group_column => 'who')")
    assert one(patients, column.replace("scans", "m")) == "who"
    for call in (
        "alter_collection('m', group_column => 'nobody')",
        "create_collection('n', 'public.more', group_column => 'nobody')",
    ):
        with sql_error("42703", 'column "nobody" of table public.more does not exist'):
            patients.execute(f"SELECT siamese.{call}")


@pytest.mark.parametrize("has_searched", [False, True])
def test_a_group_column_that_is_gone(grouped: Connection, has_searched: bool) -> None:
    def by_label() -> object:
        return grouped.execute(
            "SELECT siamese.classify_image(image_id => 100, collection => 'scans',"
            " label_column => 'patient', group_by => 'id')"
        ).fetchall()

    if has_searched:  # and so remembers the column
        assert by_label()
    check = "SELECT ok, detail FROM siamese.self_check() WHERE subject LIKE '%scans%group column'"
    assert grouped.execute(check).fetchall() == [(True, "patient")]
    grouped.execute("ALTER TABLE public.scans RENAME patient TO person")
    for search in (
        lambda: votes(grouped, "image_id => 100"),
        by_label,
        lambda: found(grouped, 100, 10, own_group=False),
        lambda: found(grouped, 100, 10, own_group=False, engine="pgvector"),
    ):
        with sql_error("42703", 'column "patient" of table public.scans does not exist'):
            search()
    assert grouped.execute(check).fetchall() == [
        (False, "renamed or dropped: patient; set another with alter_collection")
    ]
    assert len(found(grouped, 100, 10, own_group=True)) == 10
    grouped.execute("SELECT siamese.alter_collection('scans', group_column => 'person')")
    assert len(found(grouped, 100, 10, own_group=False)) == 10
