"""Filters are exact, on columns of any type, and no row that fails them ever answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import Connection, Pictures, insert_images
from tests.database.tables import make_collection
from tests.support import assert_exact, column_of, exact_distances, sql_error

COLUMNS = """
CREATE EXTENSION citext SCHEMA public;
CREATE TYPE mood AS ENUM ('calm', 'it''s odd');
CREATE DOMAIN flag AS boolean;
CREATE DOMAIN grade AS integer CHECK (VALUE < 100);
CREATE TABLE t (
    id integer PRIMARY KEY,
    image bytea,
    "text" text, "Odd ""name"" $1; --" text, "varchar" varchar(5), "char" char(5), "name" name,
    "integer" integer, "bigint" bigint, "numeric" numeric, "real" real, "boolean" boolean,
    "date" date, "timestamptz" timestamptz, "interval" interval, "uuid" uuid, "mood" mood,
    "flag" flag, "grade" grade, "bit" bit(3), "inet" inet, "jsonb" jsonb, "list" integer[],
    "json" json, "xml" xml, "point" point, "box" box, "range" int4range, "small" smallint,
    "citext" citext
)
"""
# For each column its value in row 1, the same in JSON, and one that no row has.
VALUES: dict[str, tuple[str, Any, Any]] = {
    "text": ("'it''s \"x\"'", 'it\'s "x"', "other"),
    'Odd "name" $1; --': ("'x'", "x", "y"),
    "varchar": ("'abc'", "abc", "abcdefgh"),
    "char": ("'abc'", "abc", "ab"),
    "name": ("'abc'", "abc", "ab"),
    "integer": ("42", 42, "43"),
    "bigint": ("9007199254740993", 9007199254740993, 9007199254740992),
    "numeric": ("0.10", 0.1, 0.11),
    "real": ("0.1", 0.1, 0.2),
    "boolean": ("false", False, True),
    "date": ("'2020-02-29'", "2020-02-29", "2020-02-28"),
    "timestamptz": ("'2020-01-01 12:00+00'", "2020-01-01T14:00:00+02:00", "2020-01-01T12:00:00+01"),
    "interval": ("'1 day'", "24:00:00", "25:00:00"),
    "uuid": ("'00000000-0000-0000-0000-00000000000a'", "0" * 31 + "A", "0" * 32),
    "mood": ("'it''s odd'", "it's odd", "calm"),
    "flag": ("false", False, True),
    "grade": ("7", 7, 8),
    "bit": ("B'101'", "101", "100"),
    "inet": ("'10.0.0.1'", "10.0.0.1/32", "10.0.0.2"),
    "jsonb": ("""'"it''s"'""", "it's", '"it\'s"'),
    "range": ("'[1,5)'", "[1,4]", "[1,6)"),
    "small": ("-7", -7.0, -8),
    "citext": ("'AbC'", "aBc", "ab"),
}


@pytest.fixture(scope="module")
def typed(shared: Connection, pictures: Pictures) -> Connection:
    """Collection ``t``: row 1 has the values above, row 2 has NULL everywhere."""
    shared.execute(COLUMNS)
    shared.execute("SELECT create_collection('t', 't')")
    names = ", ".join('"' + name.replace('"', '""') + '"' for name in VALUES)
    values = ", ".join(value[0].replace("%", "%%") for value in VALUES.values())
    shared.execute(
        f"INSERT INTO t (id, image, {names}) VALUES (1, %s, {values})", (pictures.files[0],)
    )
    shared.execute("INSERT INTO t (id, image) VALUES (2, %s)", (pictures.files[1],))
    shared.execute("SELECT build_index('t')")
    return shared


def found(db: Connection, image: bytes, filter_: Any, engine: str = "auto") -> set[int]:
    text = filter_ if isinstance(filter_, str) else json.dumps(filter_)
    call = "similar_images(%s, collection => 't', filter => %s::jsonb, engine => %s)"
    return set(column_of(db, f"SELECT image_id FROM {call}", image, text, engine))


@pytest.mark.parametrize("column", VALUES)
def test_types(typed: Connection, pictures: Pictures, column: str) -> None:
    _, same, other = VALUES[column]
    image = pictures.files[5]
    for engine in ("faiss", "pgvector"):

        def rows(wanted: Any, engine: str = engine) -> set[int]:
            return found(typed, image, {column: wanted}, engine)

        assert rows(same) == {1}
        assert rows(other) == set()
        assert rows([other, same]) == {1}
        assert rows([other]) == set()
        assert rows([]) == set()
        assert rows(None) == {2}
        assert rows([None, same]) == {1, 2}


def test_all_columns_must_match(typed: Connection, pictures: Pictures) -> None:
    image = pictures.files[5]
    assert found(typed, image, {"integer": 42, "boolean": False}) == {1}
    assert found(typed, image, {"integer": 42, "boolean": True}) == set()
    assert found(typed, image, {"integer": None, "boolean": None, "id": [1, 2, 3]}) == {2}
    assert found(typed, image, {}) == {1, 2}


def test_numbers_and_booleans_as_text(typed: Connection, pictures: Pictures) -> None:
    image = pictures.files[5]
    assert found(typed, image, {"integer": "42", "boolean": "false", "numeric": "0.1000"}) == {1}
    assert found(typed, image, '{"numeric": 1e5000, "id": 1}') == set()


# Of row 1; in row 2 all is NULL.
RANGES: list[tuple[dict[str, Any], set[int]]] = [
    ({"date": {">=": "2020-01-01", "<": "2021-01-01"}}, {1}),
    ({"date": {">=": "2020-02-29", "<=": "2020-02-29"}}, {1}),
    ({"date": {">": "2020-02-29"}}, set()),
    ({"date": {"<": "infinity"}}, {1}),
    ({"timestamptz": {">=": "2020-01-01T12:00:00Z"}}, {1}),
    ({"timestamptz": {"<>": "2020-01-01T14:00:00+02:00"}}, set()),
    ({"interval": {">": "23:59:59"}}, {1}),
    ({"integer": {">": 41.5, "<": 42.5}}, {1}),
    ({"integer": {">=": 42.5}}, set()),
    ({"integer": {"<": 2**40, ">": -(2**40)}}, {1}),
    ({"integer": {"<>": 42}}, set()),
    ({"integer": {"<>": 1}}, {1}),
    ({"integer": {"<>": None}}, {1}),
    ({"integer": {"=": None}}, {2}),
    ({"integer": {"in": [41, 42, 43.5], "<": 100}}, {1}),
    ({"integer": {"in": []}}, set()),
    ({"integer": 42.0}, {1}),
    ({"integer": 4.2e1}, {1}),
    ({"integer": 1.5}, set()),
    ({"integer": [1.5, 42, None, 2**70]}, {1, 2}),
    ({"integer": 2**40}, set()),
    ({"small": {">": -(2**15) - 1, "<": 2**15}}, {1}),
    ({"bigint": {">": 9007199254740992}}, {1}),
    ({"numeric": {">": 0.09, "<": 0.11}}, {1}),
    ({"text": {">=": "it", "<": "iu"}}, {1}),
    ({"mood": {">": "calm"}}, {1}),
    ({"grade": 100}, set()),
    ({"grade": {"<": 1000}}, {1}),
    ({"boolean": {"<": True}}, {1}),
    ({"citext": {">": "ABB"}}, {1}),
    ({"uuid": {">": "0" * 32}}, {1}),
    ({"inet": {"<": "10.0.0.2"}}, {1}),
    ({"range": {"<": "[2,3]"}}, {1}),
    ({"jsonb": {"<>": {"a": [1, "x", None]}}}, {1}),
    ({"jsonb": {"in": [{"a": 1}, "it's"]}}, {1}),
    *(({name: None}, {1, 2}) for name in ("list", "json", "xml", "point", "box")),
    *(({name: [None]}, {1, 2}) for name in ("list", "json", "xml")),
    *(({name: {"<>": None}}, set()) for name in ("list", "json", "xml")),
    ({"image": None}, set()),
    ({"image": {"<>": None}}, {1, 2}),
]


@pytest.mark.parametrize(("filter_", "expected"), RANGES, ids=[str(one) for one, _ in RANGES])
def test_operators(
    typed: Connection, pictures: Pictures, filter_: dict[str, Any], expected: set[int]
) -> None:
    for engine in ("faiss", "pgvector"):
        assert found(typed, pictures.files[5], filter_, engine) == expected


@pytest.mark.law(7)
def test_operators_are_those_of_pg_catalog(db: Connection, pictures: Pictures) -> None:
    """Whatever an operator of the same name in the search path does."""
    insert_images(db, pictures.files[:3], ["a", "b", "c"])
    db.execute(
        "CREATE FUNCTION public.always(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT true';"
        "CREATE OPERATOR public.>= (FUNCTION = public.always, LEFTARG = text, RIGHTARG = text);"
        "SET search_path = public, siamese, pg_catalog"
    )
    call = 'similar_images(image_id => 1, filter => \'{"label": {">=": "c"}}\')'
    assert db.execute(f"SELECT image_id FROM {call}").fetchall() == [(3,)]


@pytest.mark.parametrize(
    ("filter_", "sqlstate", "message"),
    [
        ("[]", "22023", "filter is not a JSON object"),
        ("null", "22023", "filter is not a JSON object"),
        ('"text"', "22023", "filter is not a JSON object"),
        ({"nothing": 1}, "42703", 'column "nothing" of table public.t does not exist'),
        ({"ID": 1}, "42703", 'column "ID"'),
        ({"ctid": "(0,1)"}, "42703", 'column "ctid"'),
        ({"text": {"a": 1}}, "22023", 'unknown operator "a" in filter of column "text"'),
        ({"text": {}}, "22023", 'filter of column "text" has no operator'),
        ({"text": {"=": {"a": 1}}}, "22023", 'column "text" is not a scalar'),
        ({"text": {"in": "a"}}, "22023", 'operator "in" of column "text" is not an array'),
        ({"integer": {">": None}}, "22004", 'operator ">" of column "integer" is null'),
        ({"integer": {"in": None}}, "22004", 'operator "in" of column "integer" is null'),
        ({"text": [["a"]]}, "22023", 'column "text" is not a scalar'),
        ({"integer": "x"}, "22P02", 'value of column "integer" of type integer is invalid: "x"'),
        ({"integer": [1, "x"]}, "22P02", 'column "integer" of type integer is invalid: "x"'),
        ({"integer": {"<": "x"}}, "22P02", 'column "integer" of type integer is invalid: "x"'),
        ({"integer": "1.5"}, "22P02", 'column "integer" of type integer is invalid: "1.5"'),
        ({"boolean": "maybe"}, "22P02", 'column "boolean" of type boolean is invalid: "maybe"'),
        ({"date": "yesterdays"}, "22007", 'column "date" of type date is invalid: "yesterdays"'),
        ({"date": {">=": "2024-13-01"}}, "22008", 'column "date" of type date is invalid'),
        ({"uuid": 5}, "22P02", 'column "uuid" of type uuid is invalid: "5"'),
        ({"mood": "wild"}, "22P02", 'column "mood" of type mood is invalid: "wild"'),
        ({"grade": "x"}, "22P02", 'column "grade" of type grade is invalid: "x"'),
        ({"range": "[2,1]"}, "22000", 'column "range" of type int4range is invalid: "[2,1]"'),
        ({"jsonb": "\0"}, "22P05", "unsupported Unicode escape sequence"),
        ({"image": "x"}, "0A000", 'column "image" of type bytea'),
        ({"list": [1, 2]}, "0A000", 'column "list" of type integer[]'),
        ({"json": "{}"}, "0A000", 'column "json" of type json'),
        ({"xml": "<a/>"}, "0A000", 'column "xml" of type xml'),
        ({"point": "(1,2)"}, "0A000", 'column "point" of type point'),
        ({"box": "(1,1),(2,2)"}, "0A000", 'column "box" of type box'),
        ({"image": {"=": "x"}}, "0A000", 'column "image" of type bytea'),
    ],
)
def test_errors(
    typed: Connection, pictures: Pictures, filter_: Any, sqlstate: str, message: str
) -> None:
    with sql_error(sqlstate, message):
        found(typed, pictures.files[5], filter_)


def test_dropped_and_added_columns(db: Connection, pictures: Pictures) -> None:
    """In one session, which has used them."""
    make_collection(db, more=", a text, b text")
    db.execute("INSERT INTO t VALUES (1, %s, 'x', 'y')", (pictures.files[0],))
    image = pictures.files[0]
    assert found(db, image, {"a": "x"}) == {1}
    db.execute("ALTER TABLE t DROP COLUMN a")
    with sql_error("42703", 'column "a"'):
        found(db, image, {"a": "x"})
    db.execute("ALTER TABLE t RENAME COLUMN b TO a")
    assert found(db, image, {"a": "y"}) == {1}
    db.execute("ALTER TABLE t ADD COLUMN b int DEFAULT 5")
    assert found(db, image, {"b": 5}) == {1}
    db.execute("ALTER TABLE t ALTER COLUMN b TYPE text")
    assert found(db, image, {"b": "5"}) == {1}


@pytest.mark.law(9)
@pytest.mark.parametrize("engine", ["faiss", "pgvector", "auto"])
def test_ladder(db: Connection, pictures: Pictures, queries: Pictures, engine: str) -> None:
    """Of 600 rows 100 %, 10 %, 1 % and one row qualify: always k rows where k qualify."""
    insert_images(db, pictures.files[:500])
    db.execute("SELECT build_index()")
    insert_images(db, pictures.files[500:600])
    for share in (1, 10, 100, 600):
        db.execute(f"UPDATE images SET label = image_id % {share}")
        for query in queries.files[:3]:
            truth = exact_distances(db, query, "label = '0'")
            assert len(truth) == 600 // share
            for k in (1, len(truth), len(truth) + 5):
                rows = db.execute(
                    "SELECT * FROM similar_images(%s, k => %s, engine => %s,"
                    """ filter => '{"label": "0"}')""",
                    (query, k, engine),
                ).fetchall()
                assert_exact(rows, truth, k)


def test_with_everything_else(db: Connection, pictures: Pictures, queries: Pictures) -> None:
    """Filter, candidates, distance and a query that is stored, together."""
    label = "a"
    ids = insert_images(db, pictures.files[:100], ["a", "b", "a", "c"] * 25)
    db.execute("SELECT build_index()")
    truth = exact_distances(db, pictures.files[0], f"label = '{label}' AND image_id <= 50")
    del truth[ids[0]]
    limit = sorted(truth.values())[5] + 1e-6
    rows = db.execute(
        "SELECT * FROM similar_images(image_id => %s, k => 20, filter => %s, max_distance => %s,"
        " candidates => %s)",
        (ids[0], json.dumps({"label": label}), limit, list(range(1, 51))),
    ).fetchall()
    assert_exact(rows, {key: one for key, one in truth.items() if one <= limit}, 20)
