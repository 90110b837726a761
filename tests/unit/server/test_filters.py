"""Filters: from JSON to SQL text with parameters, without a server."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pg_siamese_server.catalog import Collection
from pg_siamese_server.errors import SiameseError
from pg_siamese_server.search import filters
from pg_siamese_server.search.filters import Conditions, parse
from tests.unit.server.common import COLLECTION


@pytest.fixture(autouse=True)
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of every name; of type text, but for some."""
    types = {"n": "integer", "flag": "boolean", "data": "bytea", "list": "integer[]"}

    def find(plpy: Any, collection: Collection, names: list[str]) -> dict[str, Any]:
        return {
            name: {
                "name": name,
                "type_oid": 0,
                "quoted": name if name.isalpha() else '"' + name.replace('"', '""') + '"',
                "type": types.get(name, "text"),
                "base": types.get(name, "text"),
                "is_opaque": name in ("list", "data"),
                "operator_schema": "pg_catalog",
            }
            for name in names
        }

    monkeypatch.setattr(filters, "columns", find)


def conditions(text: str | None) -> Conditions:
    return parse(None, COLLECTION, text)


@pytest.mark.parametrize("text", [None, "{}"])
def test_no_filter(text: str | None) -> None:
    assert conditions(text) == Conditions()


ANY = "b.n = ANY(CAST($1 AS integer[]))"


@pytest.mark.parametrize(
    ("text", "clause", "types", "values"),
    [
        ('{"label": "x"}', "b.label = CAST($1 AS text)", ["text"], ["x"]),
        ('{"n": 5}', "b.n = CAST($1 AS integer)", ["text"], ["5"]),
        ('{"flag": false}', "b.flag = CAST($1 AS boolean)", ["text"], ["false"]),
        ('{"label": null}', "b.label IS NULL", [], []),
        ('{"n": [1, "2", 3.50, 4.0]}', f"({ANY})", ["text[]"], [["1", "2", "4"]]),
        ('{"n": [1, null]}', f"({ANY} OR b.n IS NULL)", ["text[]"], [["1"]]),
        ('{"n": []}', "false", [], []),
        ('{"n": {">": 1.5}}', "b.n > CAST($1 AS numeric)", ["text"], ["1.5"]),
        ('{"n": {"<>": null}}', "b.n IS NOT NULL", [], []),
    ],
)
def test_condition(text: str, clause: str, types: list[str], values: list[Any]) -> None:
    clause = re.sub(" ([=>]) ", r" OPERATOR(pg_catalog.\1) ", clause)
    assert conditions(text) == Conditions([clause], types, values)


def test_all_columns_must_match() -> None:
    found = conditions('{"label": "x", "n": 1}')
    assert len(found.clauses) == 2
    assert "$1" in found.clauses[0] and "$2" in found.clauses[1]


@pytest.mark.law(7)
def test_values_never_become_sql() -> None:
    found = conditions('{"label": "\'; DROP TABLE t; --"}')
    assert found.values == ["'; DROP TABLE t; --"]
    assert "DROP" not in found.clauses[0]
    assert conditions('{"a\\"b": "x"}').clauses[0].startswith('b."a""b" ')


def test_numbers_keep_their_digits() -> None:
    number = "0.1000000000000000055511151231257827"
    assert conditions(f'{{"n": {number}}}').values == [number]
    assert conditions(f'{{"n": {"9" * 5000}}}').values == ["9" * 5000]


def test_copies_are_independent() -> None:
    one = conditions('{"n": 1}')
    other = one.copy()
    assert other.parameter("bigint", 7) == "$2"
    assert one == conditions('{"n": 1}')


NO_OBJECT = ("filter is not a JSON object", "22023")
NO_SCALAR = ('column "n" is not a scalar', "22023")


@pytest.mark.parametrize(
    ("text", "message", "sqlstate"),
    [
        *((text, *NO_OBJECT) for text in ("[]", "5", '"x"', "null", "true")),
        *((f'{{"n": {value}}}', *NO_SCALAR) for value in ('{"=": {"a": 1}}', "[[1]]", "[{}]")),
        ('{"data": "x"}', 'column "data" of type', "0A000"),
        ('{"list": "x"}', 'column "list" of type', "0A000"),
    ],
)
def test_what_is_no_filter(text: str, message: str, sqlstate: str) -> None:
    with pytest.raises(SiameseError, match=message) as caught:
        conditions(text)
    assert caught.value.sqlstate == sqlstate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, '{"side": {"<>": null}}'),
        ('{"n": 1.10}', '{"n": 1.10, "side": {"<>": null}}'),
        ('{"side": "left"}', '{"side": {"=": "left", "<>": null}}'),
        ('{"side": ["left", null]}', '{"side": {"in": ["left", null], "<>": null}}'),
        ('{"side": {">": 3}}', '{"side": {">": 3, "<>": null}}'),
    ],
)
def test_with_value(text: str | None, expected: str) -> None:
    """Numbers stay as they were written."""
    assert filters.with_value(text, "side") == expected
