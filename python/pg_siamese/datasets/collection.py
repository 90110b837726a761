"""A collection of the database as a data set: its images, a column of labels, and its groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg
from psycopg import sql

from pg_siamese.datasets.base import DataFormatError, DataNotFoundError, LabelledImages

if TYPE_CHECKING:
    from pg_siamese_server.encoding.specification import InputSpec

# Images per round trip. Each may have some megabytes.
FETCHED_ROWS = 50
# Of an image of unknown group: a group by itself. No value of a column begins so.
ALONE = "\x01row "


@dataclass(frozen=True)
class _Table:
    relation: str
    key: str
    image: str
    group: str | None
    limits: tuple[int | None, int | None, str | None]


def read_collection(
    name: str, label_column: str, group_column: str | None, spec: InputSpec
) -> LabelledImages:
    """Read all images of a collection that have a label, as one part.

    The server is the one that the ``PG*`` variables name. Images are decoded as the server does it,
    with the limits and the window of the collection. They come in the order of their keys.

    Args:
        name: of the collection.
        label_column: column of the classes. Rows where it is NULL are left out.
        group_column: column of the groups. By default that of the collection, if it has one.
        spec: the encoder's input.

    Raises:
        DataNotFoundError: there is no server, or no such collection or column.
        DataFormatError: an image can't be decoded, or there are fewer than two classes.
    """
    try:
        with psycopg.connect() as connection:
            table = _table(connection, name, label_column, group_column)
            return _read(connection, table, name, label_column, spec)
    except psycopg.Error as error:
        reason = " ".join((error.diag.message_primary or str(error)).split())
        raise DataNotFoundError(f"collection:{name}: {reason}") from error


def _table(
    connection: psycopg.Connection[Any], name: str, label_column: str, group_column: str | None
) -> _Table:
    row = connection.execute(
        "SELECT c.relation::text, c.key_column::text, c.image_column::text, g.name,"
        " c.max_bytes, c.max_pixels, c.dicom_window,"
        " (SELECT pg_catalog.count(*) FROM pg_catalog.pg_attribute AS a"
        "  WHERE a.attrelid = c.relation AND NOT a.attisdropped"
        "   AND a.attname::text IN (%s, g.name)) AS columns"
        " FROM siamese.collections AS c"
        " CROSS JOIN LATERAL (SELECT coalesce(%s, c.group_column::text)) AS g(name)"
        " WHERE c.name = %s",
        (label_column, group_column, name),
    ).fetchone()
    if row is None:
        raise DataNotFoundError(f"collection:{name}: there is no such collection")
    relation, key, image, group, *limits, columns = row
    if columns != len({label_column, group} - {None}):
        wanted = " or ".join(f'"{each}"' for each in (label_column, group) if each)
        raise DataNotFoundError(f"collection:{name}: table {relation} has no column {wanted}")
    return _Table(relation, key, image, group, tuple(limits))


def _read(
    connection: psycopg.Connection[Any],
    table: _Table,
    name: str,
    label_column: str,
    spec: InputSpec,
) -> LabelledImages:
    from pg_siamese_server.encoding.images import decode_image
    from pg_siamese_server.errors import ImageError
    from pg_siamese_server.limits import Limits

    key, image, label = (
        sql.SQL("t.{}").format(sql.Identifier(each))
        for each in (table.key, table.image, label_column)
    )
    group: sql.Composable = sql.SQL("NULL")
    if table.group is not None:
        group = sql.SQL("t.{}").format(sql.Identifier(table.group))
    query = sql.SQL(
        "SELECT {key}::text, {label}::text, {group}::text, {image} FROM {table} AS t"
        " WHERE {label} IS NOT NULL AND {image} IS NOT NULL ORDER BY {key}"
    ).format(key=key, label=label, group=group, image=image, table=sql.SQL(table.relation))
    spec = spec.within(Limits(*table.limits))
    pixels, labels, groups = [], [], []
    with connection.cursor("images", binary=True) as cursor:
        cursor.itersize = FETCHED_ROWS
        for row_key, class_name, group_name, data in cursor.execute(query):
            try:
                pixels.append(decode_image(data, spec))
            except ImageError as error:
                where = f"row {table.key} = {row_key} of table {table.relation}"
                raise DataFormatError(f"{where}: {error}") from error
            labels.append(class_name)
            groups.append(ALONE + row_key if group_name is None else group_name)
    classes, numbers = np.unique(np.array(labels, np.str_), return_inverse=True)
    if len(classes) < 2:
        raise DataFormatError(
            f'collection:{name}: column "{label_column}" has {len(classes)} classes, not two'
        )
    images = np.stack(pixels)
    return LabelledImages(
        name=name,
        split="train",
        images=images[..., 0] if spec.channels == 1 else images,
        labels=numbers.astype(np.int64),
        classes=tuple(str(each) for each in classes),
        groups=None if table.group is None else np.array(groups, np.str_),
    )
