"""Turn filters on a collection's own table from JSON into SQL with parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pg_siamese_server.catalog import Collection, prepare
from pg_siamese_server.errors import (
    FEATURE_NOT_SUPPORTED,
    NULL_VALUE_NOT_ALLOWED,
    UNDEFINED_COLUMN,
    UNDEFINED_FUNCTION,
    SiameseError,
)

# Operators of a type from an extension are in the type's schema, all others in pg_catalog. Their
# full names keep search_path from deciding what "=" means. A domain's values are compared as its
# base type. What the domain does not allow never matches. For geometric types, "=" compares areas.
# Types json, xml and bytea are not compared.
COLUMNS_QUERY = """
SELECT a.attname AS name, quote_ident(a.attname::text) AS quoted, a.atttypid::int8 AS type_oid,
    pg_catalog.format_type(a.atttypid, -1) AS type, pg_catalog.format_type(b.oid, -1) AS base,
    b.typcategory IN ('A', 'G')
        OR b.oid::int8 IN (
            'pg_catalog.bytea'::regtype::oid::int8, 'pg_catalog.json'::regtype::oid::int8,
            'pg_catalog.xml'::regtype::oid::int8
        ) AS is_opaque,
    CASE WHEN b.typtype = 'b' THEN quote_ident(n.nspname::text) ELSE 'pg_catalog' END
        AS operator_schema
FROM pg_catalog.pg_attribute AS a
INNER JOIN pg_catalog.pg_type AS t ON t.oid = a.atttypid
INNER JOIN pg_catalog.pg_type AS b
    ON b.oid = CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.oid END
INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = b.typnamespace
WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped AND a.attname = ANY($2)
"""
OPERATORS = ("=", "<>", "<", "<=", ">", ">=")
INTEGER_BITS = {"smallint": 15, "integer": 31, "bigint": 63}
# Any integer with fewer digits is a smallint.
SURE_DIGITS = 5
# An integer with more digits is compared as numeric.
MAX_DIGITS = 20
MAX_REMEMBERED = 1000
# SQLSTATE classes that PostgreSQL reports for a value that a type does not accept.
VALUE_ERRORS = ("22", "23")


class Number(str):
    """A JSON number as it was written, so that PostgreSQL interprets it."""

    __slots__ = ()


_decoder = json.JSONDecoder(parse_int=Number, parse_float=Number)


@dataclass
class Conditions:
    """Conditions on table alias ``b``, with the types and values of their parameters.

    ``columns`` are those that they name, each with the OID of its type.
    """

    clauses: list[str] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    columns: dict[str, int] = field(default_factory=dict, compare=False)

    def parameter(self, type_name: str, value: Any) -> str:
        """Add a parameter and return its placeholder."""
        self.types.append(type_name)
        self.values.append(value)
        return f"${len(self.types)}"

    def copy(self) -> Conditions:
        """Return an independent copy, to add to."""
        return Conditions(
            list(self.clauses), list(self.types), list(self.values), dict(self.columns)
        )


def columns(plpy: Any, collection: Collection, names: list[str]) -> dict[str, Any]:
    """Look up columns of the collection's table, and remember them.

    Raises:
        SiameseError: 42703, a column that does not exist.
    """
    plan = prepare(plpy, COLUMNS_QUERY, ("oid", "text[]"))
    found = {row["name"]: row for row in plan.execute([collection.relation_oid, names])}
    if len(collection.columns) > MAX_REMEMBERED:
        collection.columns.clear()
    collection.columns.update(found)
    for name in names:
        if name not in found:
            raise SiameseError(
                f'column "{name}" of table {collection.relation} does not exist',
                sqlstate=UNDEFINED_COLUMN,
            )
    return found


def qualifying(
    plpy: Any, collection: Collection, conditions: Conditions, keys: list[Any]
) -> list[Any] | None:
    """Ask the collection's own table, as the invoker, which rows exist and qualify."""
    plan = None if conditions.clauses else collection.plans.get("check")
    values = [keys]
    if plan is None:
        where = conditions.copy()
        key = f"b.{collection.key_column}"
        shown = key if collection.has_integer_keys else f"{key}::text"
        clauses = [
            f"{key} = ANY({where.parameter(collection.candidate_array, keys)})",
            *where.clauses,
        ]
        plan = prepare(
            plpy,
            f"SELECT pg_catalog.array_agg({shown}) AS keys FROM {collection.relation} AS b"
            f" WHERE {' AND '.join(clauses)}",
            tuple(where.types),
        )
        values = where.values
        if not conditions.clauses:
            collection.plans["check"] = plan
    found: list[Any] | None = plan.execute(values)[0]["keys"]
    return found


def parse(
    plpy: Any, collection: Collection, text: str | None, excluded: str | None = None
) -> Conditions:
    """Turn a filter, and its mirror, into conditions.

    Args:
        plpy: PL/Python's module.
        collection: whose table the columns belong to.
        text: a JSON object: column to value (equal), array (one of), null (is null) or object
            (operator to value, all of them); or None.
        excluded: the same: rows that meet all of it are left out.
    """
    wanted, unwanted = _load_object(text), _load_object(excluded)
    names = list(wanted | unwanted)
    return _to_conditions(wanted, unwanted, columns(plpy, collection, names) if names else {})


def parse_remembered(
    collection: Collection, text: str | None, excluded: str | None
) -> Conditions | None:
    """Do the same with columns as they were when last looked up; None if one never was."""
    wanted, unwanted = _load_object(text), _load_object(excluded)
    if not wanted.keys() | unwanted.keys() <= collection.columns.keys():
        return None
    return _to_conditions(wanted, unwanted, collection.columns)


def _to_conditions(
    wanted: dict[str, Any], unwanted: dict[str, Any], known: Mapping[str, Any]
) -> Conditions:
    conditions = Conditions()
    for name, value in wanted.items():
        _add_condition(conditions, known[name], value)
    if unwanted:
        # A row is left out if all is true of it, so that unknown values leave it in.
        kept = len(conditions.clauses)
        for name, value in unwanted.items():
            _add_condition(conditions, known[name], value)
        mirror = " AND ".join(conditions.clauses[kept:])
        conditions.clauses[kept:] = [f"({mirror}) IS NOT TRUE"]
    for name in (*wanted, *unwanted):
        conditions.columns[name] = known[name]["type_oid"]
    return conditions


def with_value(text: str | None, column: str) -> str:
    """Return a filter, as JSON, with the condition added that a column has a value."""
    wanted = _load_object(text)
    given = wanted.get(column, {})
    if not isinstance(given, dict):
        given = {"in" if isinstance(given, list) else "=": given}
    return _json(wanted | {column: given | {"<>": None}})


def explain(plpy: Any, collection: Collection, text: str) -> None:
    """Raise an error that names column, type and value, if a value of a filter is to blame.

    It is called after a search has failed, so that others pay nothing.
    """
    conditions = _load_object(text)
    known = columns(plpy, collection, list(conditions))
    for name, wanted in conditions.items():
        for operator, value in _comparisons(known[name], wanted):
            for item in value if operator == "in" else [value]:
                _explain(plpy, known[name], "=" if operator == "in" else operator, item)


def _explain(plpy: Any, column: Any, operator: str, value: Any) -> None:
    if value is None:
        return
    written, type_name = _typed_text(column, value)
    try:
        # Exactly as in the search: the value's cast, and the operator of its type.
        plpy.prepare(
            f"SELECT CAST($1 AS {type_name}) OPERATOR({column['operator_schema']}.{operator})"
            f" CAST($1 AS {type_name})",
            ["text"],
        ).execute([written])
    except plpy.SPIError as error:
        if error.sqlstate == UNDEFINED_FUNCTION:
            raise _unsupported(column) from None
        if error.sqlstate[:2] not in VALUE_ERRORS:
            raise
        raise SiameseError(
            f'filter value of column "{column["name"]}" of type {column["type"]}'
            f" is invalid: {json.dumps(value, ensure_ascii=False)}",
            sqlstate=error.sqlstate,
            detail=f"{str(error)[:1].upper()}{str(error)[1:]}.",
        ) from None


def _load_object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    value = _decoder.decode(text)
    if not isinstance(value, dict):
        raise SiameseError(
            "filter is not a JSON object",
            hint='Write {"column": value}, {"column": [value, value]} or'
            ' {"column": {">=": value}}.',
        )
    return value


def _comparisons(column: Any, wanted: Any) -> list[tuple[str, Any]]:
    """Return the conditions on a column as pairs of an operator, or ``in``, and a value."""
    if isinstance(wanted, list):
        return [("in", wanted)]
    if not isinstance(wanted, dict):
        return [("=", wanted)]
    name = column["name"]
    if not wanted or not set(wanted) <= {*OPERATORS, "in"}:
        unknown = next((one for one in wanted if one not in {*OPERATORS, "in"}), None)
        raise SiameseError(
            f'filter of column "{name}" has no operator'
            if unknown is None
            else f'unknown operator "{unknown}" in filter of column "{name}"',
            hint=f"Operators are {', '.join(OPERATORS)} and in.",
        )
    for operator, value in wanted.items():
        if value is None and operator not in ("=", "<>"):
            raise SiameseError(
                f'filter value of operator "{operator}" of column "{name}" is null',
                sqlstate=NULL_VALUE_NOT_ALLOWED,
                hint="Only = and <> compare with null.",
            )
        if operator == "in" and not isinstance(value, list):
            raise SiameseError(f'filter value of operator "in" of column "{name}" is not an array')
    return list(wanted.items())


def _add_condition(conditions: Conditions, column: Any, wanted: Any) -> None:
    for operator, value in _comparisons(column, wanted):
        if operator == "in":
            conditions.clauses.append(_any_of(conditions, column, value))
        else:
            conditions.clauses.append(_compare(conditions, column, operator, value))


def _compare(conditions: Conditions, column: Any, operator: str, value: Any) -> str:
    name = f"b.{column['quoted']}"
    if value is None:
        return f"{name} IS {'' if operator == '=' else 'NOT '}NULL"
    written, type_name = _typed_text(column, value)
    # Sent as text and cast in SQL. PL/Python's own conversions take any string for a true boolean.
    place = conditions.parameter("text", written)
    return f"{name} OPERATOR({column['operator_schema']}.{operator}) CAST({place} AS {type_name})"


def _any_of(conditions: Conditions, column: Any, values: list[Any]) -> str:
    name = f"b.{column['quoted']}"
    typed = [_typed_text(column, value) for value in values if value is not None]
    # A number that can't be an integer, such as 1.5, is not among the column's values.
    items = [written for written, type_name in typed if type_name == column["base"]]
    clauses = []
    if items:
        place = conditions.parameter("text[]", items)
        clauses.append(
            f"{name} OPERATOR({column['operator_schema']}.=)"
            f" ANY(CAST({place} AS {column['base']}[]))"
        )
    if None in values:
        clauses.append(f"{name} IS NULL")
    return f"({' OR '.join(clauses)})" if clauses else "false"


def _typed_text(column: Any, value: Any) -> tuple[str, str]:
    """Return a value as text, and the type to compare it as."""
    if column["is_opaque"]:
        raise _unsupported(column)
    base = column["base"]
    if base.strip('"') == "jsonb":  # quoted if all identifiers are
        return _json(value), base
    if isinstance(value, list | dict):
        raise SiameseError(
            f'filter value of column "{column["name"]}" is not a scalar',
            hint="Values are strings, numbers, booleans or null, or an array of these.",
        )
    if isinstance(value, Number):
        return _number(base, value)
    return value if isinstance(value, str) else json.dumps(value), base


def _number(base: str, value: Number) -> tuple[str, str]:
    """Return a number as text with its type: an integer if column and size allow, else numeric."""
    bits = INTEGER_BITS.get(base)
    if bits is None or (len(value) < SURE_DIGITS and value.isdecimal()):
        return str(value), base
    import decimal  # for odd numbers only

    number = decimal.Decimal(str(value))
    if number.adjusted() < MAX_DIGITS and number == number.to_integral_value():
        whole = int(number)
        if -(2**bits) <= whole < 2**bits:
            return str(whole), base
    return str(value), "numeric"


def _json(value: Any) -> str:
    """Return JSON with its numbers as they were written."""
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_json, value))}]"
    if isinstance(value, dict):
        pairs = (f"{json.dumps(name)}: {_json(item)}" for name, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    return json.dumps(value)


def _unsupported(column: Any) -> SiameseError:
    return SiameseError(
        f'filter on column "{column["name"]}" of type {column["type"]} is not supported',
        sqlstate=FEATURE_NOT_SUPPORTED,
        detail="Values of this type have no such comparison; only null can be asked for.",
    )
