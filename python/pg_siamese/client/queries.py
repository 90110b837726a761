"""Collections and searches of the command line. Every search is one SQL statement."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psycopg
from psycopg import RawCursor, sql
from psycopg.rows import tuple_row

from pg_siamese.client.connection import CommandError

if TYPE_CHECKING:
    from pg_siamese.client.contact_sheet import Neighbour

DEFAULT_COLLECTION = "images"
# Largest side in pixels of an image that is shown. Larger images are reduced.
DISPLAY_PIXELS = 512
INTEGER_TYPES = frozenset({"smallint", "integer", "bigint"})


@dataclass(frozen=True)
class Collection:
    """A collection's table, as the catalogue has it, in the order of ``find_collection``'s query.

    ``relation``, ``key_column``, ``image_column`` and ``shown_columns`` are quoted for SQL if
    necessary. ``key_name`` and ``image_name`` are the plain names. With ``has_frames``, each frame
    of an image has a vector.
    """

    name: str
    model: str
    relation: str
    key_column: str
    key_name: str
    key_type: str
    image_column: str
    image_name: str
    shown_columns: tuple[str, ...]
    has_frames: bool = False


@dataclass(frozen=True)
class Answer:
    """One neighbour. ``key`` is the row's key as text, ``values`` its columns that are shown.

    ``distance`` is in the model's metric (cosine distance for the models that ship).
    ``similarity`` is the calibrated match probability, None if the model has none. ``frame`` is
    the number of the frame, from 1, None if the collection has one vector per image.
    """

    rank: int
    key: str
    distance: float
    similarity: float | None
    values: dict[str, str | None]
    frame: int | None = None

    @property
    def label(self) -> str | None:
        """The row's label, None if the table has no such column."""
        return self.values.get("label")


@dataclass(frozen=True)
class Search:
    """A statement with ``$1``-style parameters, as an analyst would write it, and their values."""

    sql: str
    parameters: tuple[object, ...]


@dataclass(frozen=True)
class Examples:
    """What a search is to find more of, and less of: image files, and keys as text."""

    like: Sequence[bytes | str]
    unlike: Sequence[bytes | str] = ()
    strategy: str = "mean"
    penalty: float = 1.0

    def arguments(self, integer: bool) -> dict[str, list[object]]:
        """Return the arguments of a search that are not empty, by name."""
        found: dict[str, list[object]] = {}
        for name, items in (("like", self.like), ("unlike", self.unlike)):
            keys = [item for item in items if isinstance(item, str)]
            found[name] = [_integer(key) if integer else key for key in keys]
            found[f"{name}_images"] = [item for item in items if isinstance(item, bytes)]
        return {name: values for name, values in found.items() if values}


@dataclass(frozen=True)
class Groups:
    """How a search treats groups, such as patients.

    Attributes:
        column: of the collection's table.
        per_group: most rows of each group.
        own: whether rows of the query's own group count.
    """

    column: str
    per_group: int = 1
    own: bool = True


def collection_names(connection: psycopg.Connection[Any]) -> list[str]:
    """Return the names of all collections, sorted."""
    cursor = connection.cursor(row_factory=tuple_row)
    rows = cursor.execute("SELECT name FROM siamese.collections ORDER BY 1")
    return [str(name) for (name,) in rows]


def find_collection(connection: psycopg.Connection[Any], name: str) -> Collection:
    """Look up a collection.

    Raises:
        CommandError: it does not exist. The message names those that do.
    """
    row = (
        connection.cursor(row_factory=tuple_row)
        .execute(
            """
        SELECT m.name, c.relation::text, quote_ident(c.key_column), c.key_column,
               format_type(a.atttypid, NULL), quote_ident(c.image_column), c.image_column,
               ARRAY(SELECT quote_ident(d.attname)
                       FROM unnest(ARRAY['dataset', 'split', 'label']) WITH ORDINALITY AS w (n, o)
                       JOIN pg_catalog.pg_attribute AS d
                         ON d.attname = w.n AND d.attrelid = c.relation AND NOT d.attisdropped
                      ORDER BY w.o),
               c.frames = 'all'
          FROM siamese.collections AS c
          JOIN siamese.models AS m ON m.model_id = c.model_id
          JOIN pg_catalog.pg_attribute AS a
            ON a.attrelid = c.relation AND a.attname = c.key_column AND NOT a.attisdropped
         WHERE c.name = %s
        """,
            (name,),
        )
        .fetchone()
    )
    if row is None:
        known = ", ".join(collection_names(connection)) or "none yet"
        raise CommandError(f'collection "{name}" does not exist; available: {known}')
    *names, columns, has_frames = row
    values = [*names, tuple(columns), has_frames]
    return Collection(name, *values)


def ensure_collection(connection: psycopg.Connection[Any], name: str, model: str) -> bool:
    """Create a collection of the ready-made table if there is none. Return whether it is new.

    Raises:
        CommandError: it exists with another model.
    """
    row = connection.execute(
        "SELECT m.name FROM siamese.collections AS c JOIN siamese.models AS m USING (model_id)"
        " WHERE c.name = %s",
        (name,),
    ).fetchone()
    if row is None:
        connection.execute(
            "SELECT siamese.create_collection(name => %s, model => %s)", (name, model)
        )
        return True
    if row[0] != model:
        raise CommandError(f'collection "{name}" has model "{row[0]}", not "{model}"')
    return False


def search_statement(
    collection: Collection,
    *,
    image: bytes | None = None,
    key: str | None = None,
    k: int = 10,
    filter: dict[str, object] | None = None,
    engine: str = "auto",
    frame: int = 0,
    region: tuple[float, ...] | None = None,
    examples: Examples | None = None,
    groups: Groups | None = None,
    candidates: Sequence[str] | None = None,
    prefix: str = "siamese.",
    literals: bool = False,
) -> Search:
    """Return the statement that finds the ``k`` rows nearest to an image, or to a stored row.

    Several examples can take the place of the image.

    Keys of any type work: integers by similar_images, others by similar_rows, which gives no
    calibrated similarity.

    Args:
        collection: to search.
        image: an image file.
        key: of the stored row, instead of ``image``.
        k: number of rows.
        filter: values of columns that the rows must have.
        engine: auto, faiss or pgvector.
        frame: which frame of the image to search for, from 1, or 0 for the representative one.
        region: which part of it: left, top, right and bottom, or None for all.
        examples: instead of ``image`` and ``key``.
        groups: how groups such as patients are treated.
        candidates: keys of the rows to search among, or None for all.
        prefix: qualifies the extension's functions.
        literals: write the values into the statement, instead of parameters.

    Returns:
        A statement with the columns rank, key, distance, similarity, ``shown_columns``, and the
        frame if the collection has frames.
    """
    if [image is None, key is None, examples is None].count(False) != 1:
        raise ValueError("give an image, a key or examples, and not both")
    integer = collection.key_type in INTEGER_TYPES
    parameters: list[object] = []

    def written(value: object) -> str:
        if literals:
            return sql.Literal(value).as_string()
        parameters.append(value)
        return f"${len(parameters)}"

    if examples is not None:
        given = examples.arguments(integer)
        names = [f"{name} => {written(values)}" for name, values in given.items()]
        query = ", ".join([*names, f"strategy => {sql.quote(examples.strategy)}"])
        if examples.penalty != 1:
            query += f", penalty => {examples.penalty!r}"
    elif image is not None:
        query = f"image => {written(image)}"
    elif integer:
        query = f"image_id => {written(_integer(str(key)))}"
    else:
        query = f"key => {written(key)}"
    options = f", k => {k}"
    # A table can be in several collections, so similar_rows is told which one.
    if collection.name != DEFAULT_COLLECTION or not integer:
        options += f", collection => {sql.quote(collection.name)}"
    if filter is not None:
        options += f", filter => {sql.quote(json.dumps(filter, ensure_ascii=False))}"
    if groups is not None:
        options += f", group_by => {sql.quote(groups.column)}"
        options += f", per_group => {groups.per_group}" if groups.per_group != 1 else ""
        options += "" if groups.own else ", own_group => false"
    if candidates is not None:
        keys = [_integer(item) if integer else item for item in candidates]
        options += f", candidates => {written(keys)}"
    if engine != "auto":
        options += f", engine => {sql.quote(engine)}"
    if frame:
        options += f", query_frame => {frame}"
    if region is not None:
        options += f", region => '{','.join(map(str, region))}'"
    frames = ["s.frame"] if collection.has_frames else []
    key_column = collection.key_column
    if integer:
        is_usual = key_column == "image_id"
        join = "USING (image_id)" if is_usual else f"ON i.{key_column} = s.image_id"
        columns = ["s.rank", f"i.{key_column}", "s.distance", "s.similarity"]
        columns += [f"i.{column}" for column in collection.shown_columns] + frames
        text = (
            f"SELECT {', '.join(columns)}\n"
            f"  FROM {prefix}similar_images({query}{options}) AS s\n"
            f"  JOIN {collection.relation} AS i {join}\n"
            " ORDER BY s.rank"
        )
    else:
        columns = ["row_number() OVER (ORDER BY s.distance)", f"(s.item).{key_column}"]
        columns += ["s.distance", "NULL::real"]
        columns += [f"(s.item).{column}" for column in collection.shown_columns] + frames
        order = ", ".join(["s.distance", f"(s.item).{key_column}", *frames])
        text = (
            f"SELECT {', '.join(columns)}\n"
            f"  FROM {prefix}similar_rows(NULL::{collection.relation}, {query}{options}) AS s\n"
            f" ORDER BY {order}"
        )
    return Search(text, tuple(parameters))


def run_search(
    connection: psycopg.Connection[Any], collection: Collection, search: Search
) -> list[Answer]:
    """Run a statement of :func:`search_statement`."""
    with RawCursor(connection) as cursor:
        cursor.execute(search.sql.encode(), search.parameters)
        return [
            Answer(
                rank=int(rank),
                key=str(key),
                distance=float(distance),
                similarity=None if similarity is None else float(similarity),
                values={
                    name: None if value is None else str(value)
                    for name, value in zip(collection.shown_columns, values, strict=False)
                },
                frame=values[-1] if collection.has_frames else None,
            )
            for rank, key, distance, similarity, *values in cursor.fetchall()
        ]


def stored_images(
    connection: psycopg.Connection[Any], collection: Collection, keys: Sequence[str]
) -> dict[str, bytes]:
    """Return the image bytes of the rows with these keys (as text), by key."""
    with RawCursor(connection) as cursor:
        cursor.execute(
            f"SELECT {collection.key_column}::text, {collection.image_column}"
            f" FROM {collection.relation}"
            f" WHERE {collection.key_column} = ANY ($1::text[]::{collection.key_type}[])".encode(),
            (list(keys),),
        )
        return {key: bytes(image) for key, image in cursor.fetchall() if image is not None}


def sheet_neighbours(
    connection: psycopg.Connection[Any], collection: Collection, answers: Sequence[Answer]
) -> list[Neighbour]:
    """Return the answers with their pixels, for a contact sheet, without rows deleted meanwhile."""
    from pg_siamese.client.contact_sheet import Neighbour

    images = stored_images(connection, collection, [answer.key for answer in answers])
    return [
        Neighbour(
            pixels=display_pixels(images[answer.key], answer.frame or 0),
            label=answer.label,
            distance=answer.distance,
            similarity=answer.similarity,
            frame=answer.frame,
        )
        for answer in answers
        if answer.key in images
    ]


def stored_image(
    connection: psycopg.Connection[Any], collection: Collection, key: str
) -> tuple[bytes, str | None]:
    """Return the image and the label (None if the table has none) of the row with this key.

    Raises:
        CommandError: there is no such row, or no image in it.
    """
    label = "label::text" if "label" in collection.shown_columns else "NULL"
    with RawCursor(connection) as cursor:
        cursor.execute(
            f"SELECT {collection.image_column}, {label} FROM {collection.relation}"
            f" WHERE {collection.key_column} = $1::text::{collection.key_type}".encode(),
            (key,),
        )
        row = cursor.fetchone()
    if row is None or row[0] is None:
        raise CommandError(f'collection "{collection.name}" has no image "{key}"')
    return bytes(row[0]), row[1]


def display_pixels(
    data: bytes, frame: int = 0, region: tuple[float, ...] | None = None
) -> npt.NDArray[np.uint8]:
    """Decode an image file for showing: uint8 (H, W, 3), with up to 512 pixels per side.

    This is the server's decoder, so what is shown is what the encoder sees. ``frame`` counts from
    1. 0 is the representative one. ``region`` is as for ``search_statement``.

    Raises:
        CommandError: the server would reject the file.
    """
    from pg_siamese_server.encoding.images import render_image
    from pg_siamese_server.encoding.regions import Region
    from pg_siamese_server.errors import ImageError

    part = None if region is None else Region(*region)
    try:
        return render_image(data, DISPLAY_PIXELS, frame, part)
    except ImageError as error:
        raise CommandError(f"not an image that can be shown: {error}") from None


def in_words(value: object) -> str:
    """Return a value of a status view as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, datetime):
        return value.astimezone().isoformat(" ", "seconds")
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise CommandError(f'"{text}" is not a valid key: keys are integers') from None
