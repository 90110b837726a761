"""Exact filters on a collection's own table, from JSON to SQL with parameters."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from pg_siamese_server.catalog import Collection, prepare
from pg_siamese_server.errors import FEATURE_NOT_SUPPORTED, UNDEFINED_COLUMN, SiameseError

# Equality of a type from an extension lives beside the type; for all others in pg_catalog. Named in
# full, so that nobody's search_path decides what "=" means.
COLUMNS_QUERY = """
SELECT a.attname AS name, quote_ident(a.attname::text) AS quoted,
    pg_catalog.format_type(a.atttypid, -1) AS type, b.typcategory = 'A' AS is_array,
    b.oid = 'pg_catalog.bytea'::regtype::oid AS is_binary,
    CASE WHEN b.typtype = 'b' THEN quote_ident(n.nspname::text) ELSE 'pg_catalog' END
        AS operator_schema
FROM pg_catalog.pg_attribute AS a
INNER JOIN pg_catalog.pg_type AS t ON t.oid = a.atttypid
INNER JOIN pg_catalog.pg_type AS b
    ON b.oid = CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.oid END
INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = b.typnamespace
WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped AND a.attname = ANY($2)
"""


@dataclass
class Conditions:
    """Conditions on table alias ``b``, with the types and values of their parameters."""

    clauses: list[str] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def parameter(self, type_name: str, value: Any) -> str:
        """Add a parameter and return its placeholder."""
        self.types.append(type_name)
        self.values.append(value)
        return f"${len(self.types)}"

    def copy(self) -> Conditions:
        """Return an independent copy, to add to."""
        return Conditions(list(self.clauses), list(self.types), list(self.values))


def columns(plpy: Any, collection: Collection, names: list[str]) -> dict[str, Any]:
    """Look columns of the collection's table up; raises SiameseError 42703 for an unknown one."""
    plan = prepare(plpy, COLUMNS_QUERY, ("oid", "text[]"))
    found = {row["name"]: row for row in plan.execute([collection.relation_oid, names])}
    for name in names:
        if name not in found:
            raise SiameseError(
                f'column "{name}" of table {collection.relation} does not exist',
                sqlstate=UNDEFINED_COLUMN,
            )
    return found


def parse(plpy: Any, collection: Collection, text: str | None) -> Conditions:
    """Turn a filter into conditions.

    Args:
        plpy: PL/Python's module.
        collection: whose table the columns belong to.
        text: a JSON object: column to value (equal), array (one of) or null (is null); or None.
    """
    conditions = Conditions()
    if text is None:
        return conditions
    value = json.loads(text, parse_int=str, parse_float=str)  # whatever PostgreSQL makes of them
    if not isinstance(value, dict):
        raise SiameseError(
            "filter is not a JSON object",
            hint='Write {"column": value} or {"column": [value, value]}.',
        )
    if not value:
        return conditions
    known = columns(plpy, collection, list(value))
    for name, wanted in value.items():
        conditions.clauses.append(_condition(conditions, known[name], wanted))
    return conditions


def _condition(conditions: Conditions, column: Any, wanted: Any) -> str:
    name = f"b.{column['quoted']}"
    operator = f"OPERATOR({column['operator_schema']}.=)"
    if column["is_binary"] or column["is_array"]:
        raise SiameseError(
            f'filter on column "{column["name"]}" of type {column["type"]} is not supported',
            sqlstate=FEATURE_NOT_SUPPORTED,
        )
    if wanted is None:
        return f"{name} IS NULL"
    # Sent as text and cast in SQL: PL/Python's own conversions take any string for a true boolean.
    if not isinstance(wanted, list):
        place = conditions.parameter("text", _scalar(column, wanted))
        return f"{name} {operator} CAST({place} AS {column['type']})"
    values = [_scalar(column, item) for item in wanted if item is not None]
    place = conditions.parameter("text[]", values)
    clause = f"{name} {operator} ANY(CAST({place} AS {column['type']}[]))"
    return f"({clause} OR {name} IS NULL)" if None in wanted else clause


def _scalar(column: Any, value: Any) -> str:
    """Return a JSON scalar as text."""
    if isinstance(value, list | dict):
        raise SiameseError(
            f'filter value of column "{column["name"]}" is not a scalar',
            hint="Values are strings, numbers, booleans or null, or an array of these.",
        )
    return value if isinstance(value, str) else json.dumps(value)
