"""Collections as a role sees them: the table, its columns, and how its images are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import psycopg
from psycopg import sql

from pg_siamese.client.queries import Collection, find_collection
from pg_siamese.explore.failures import PageError
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.limits import Limits

# How a column is filtered: by a range, by a list of values, or not at all.
Kind = Literal["range", "list", "none"]
SHOWN_AT_FIRST = ("label", "dataset", "split")
_COLUMNS = """
    SELECT a.attname, pg_catalog.quote_ident(a.attname),
        pg_catalog.format_type(a.atttypid, a.atttypmod),
        CASE
            WHEN b.typcategory IN ('N', 'D') AND b.typname NOT LIKE 'reg%%' THEN 'range'
            WHEN b.typcategory IN ('A', 'G') OR b.typname IN ('json', 'xml') THEN 'none'
            ELSE 'list'
        END
    FROM siamese.collections AS c
    INNER JOIN pg_catalog.pg_attribute AS a
        ON a.attrelid = c.relation AND a.attnum > 0 AND NOT a.attisdropped
    INNER JOIN pg_catalog.pg_type AS t ON t.oid = a.atttypid
    INNER JOIN pg_catalog.pg_type AS b
        ON b.oid = CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.oid END
    WHERE c.name = %s AND b.typname <> 'bytea'
        AND pg_catalog.has_column_privilege(c.relation, a.attnum, 'SELECT')
    ORDER BY a.attnum
"""
_SETTINGS = """
    SELECT c.group_column, m.specification -> 'input', c.max_bytes, c.max_pixels, c.dicom_window,
        pg_catalog.has_column_privilege(c.relation, c.key_column, 'SELECT')
        AND pg_catalog.has_column_privilege(c.relation, c.image_column, 'SELECT')
    FROM siamese.collections AS c
    INNER JOIN siamese.models AS m ON m.model_id = c.model_id
    WHERE c.name = %s
"""
_READABLE = """
    SELECT c.name FROM siamese.collections AS c
    WHERE pg_catalog.to_regclass(c.relation::text) IS NOT NULL
        AND pg_catalog.has_column_privilege(c.relation, c.key_column, 'SELECT')
        AND pg_catalog.has_column_privilege(c.relation, c.image_column, 'SELECT')
    ORDER BY c.name
"""


@dataclass(frozen=True)
class Column:
    """A column that the role may read. ``quoted`` is its name in SQL."""

    name: str
    quoted: str
    type: str
    kind: Kind


@dataclass(frozen=True)
class Table:
    """A collection and its table.

    Attributes:
        collection: with the names of table and key.
        columns: all that the role may read, without the images.
        group_column: name of the column of groups, such as patients, or None.
        spec: limits of the images, and how to show what they leave open.
    """

    collection: Collection
    columns: tuple[Column, ...]
    group_column: str | None
    spec: InputSpec

    @property
    def name(self) -> str:
        """Name of the collection."""
        return self.collection.name

    @property
    def relation(self) -> sql.SQL:
        """The table's name in SQL, as the server has quoted it."""
        return sql.SQL(self.collection.relation)

    @property
    def key(self) -> sql.Identifier:
        """The key column."""
        return sql.Identifier(self.collection.key_name)

    @property
    def image(self) -> sql.Identifier:
        """The image column."""
        return sql.Identifier(self.collection.image_name)

    @property
    def key_type(self) -> sql.SQL:
        """Type of the keys, as the server writes it."""
        return sql.SQL(self.collection.key_type)

    @property
    def filtered(self) -> tuple[Column, ...]:
        """Columns that can be filtered, without the key."""
        key = self.collection.key_name
        return tuple(each for each in self.columns if each.kind != "none" and each.name != key)

    def column(self, name: str) -> Column:
        """Return a column by its name. Raises ``PageError``."""
        for each in self.columns:
            if each.name == name:
                return each
        raise PageError(
            400, f'Table {self.collection.relation} has no column "{name}" that your role may read.'
        )

    def shown_first(self) -> tuple[str, ...]:
        """Return the names of the columns that are shown unless others are chosen."""
        wanted = [*SHOWN_AT_FIRST, self.group_column]
        return tuple(each.name for each in self.columns if each.name in wanted)

    def showing(self, names: tuple[str, ...]) -> Collection:
        """Return the collection with these columns shown."""
        quoted = tuple(self.column(name).quoted for name in names)
        return replace(self.collection, shown_columns=quoted)


def readable(connection: psycopg.Connection[Any]) -> list[str]:
    """Return the names of the collections whose images the role may read."""
    return [name for (name,) in connection.execute(_READABLE)]


def find_table(connection: psycopg.Connection[Any], name: str) -> Table:
    """Look up a collection and its table.

    Raises:
        CommandError: it does not exist.
        PageError: the role may not read its images.
    """
    collection = find_collection(connection, name)
    row = connection.execute(_SETTINGS, (name,)).fetchone()
    if row is None or not row[5]:
        raise PageError(403, f'Your role may not read the images of collection "{name}".')
    group_column, given, max_bytes, max_pixels, dicom_window, _ = row
    limits = Limits(max_bytes, max_pixels, dicom_window)
    columns = tuple(Column(*each) for each in connection.execute(_COLUMNS, (name,)))
    return Table(
        collection,
        columns,
        group_column if any(each.name == group_column for each in columns) else None,
        InputSpec.from_json(given).within(limits),
    )


def values_of(
    connection: psycopg.Connection[Any], table: Table, keys: Sequence[str], column: str | None
) -> dict[str, str | None]:
    """Return a column's values of the rows that the role sees now, by key, both as text."""
    statement = sql.SQL(
        "SELECT {key}::text, {value} FROM {relation} WHERE {key} = ANY ({keys}::text[]::{type}[])"
    ).format(
        key=table.key,
        value=sql.SQL("NULL")
        if column is None
        else sql.SQL("{}::text").format(sql.Identifier(column)),
        relation=table.relation,
        keys=sql.Literal(list(keys)),
        type=table.key_type,
    )
    return dict(connection.execute(statement).fetchall())
