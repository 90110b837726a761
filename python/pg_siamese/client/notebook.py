"""Pictures and searches in a notebook: rows with thumbnails, neighbours as a data frame."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
from collections import namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import psycopg
from psycopg import RawCursor, sql
from psycopg.rows import tuple_row

from pg_siamese.client.queries import DEFAULT_COLLECTION, find_collection, search_statement
from pg_siamese_server.encoding import drawing, windows
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import ImageError, counted

MAX_ROWS = 1_000
# PNG files of all thumbnails together. A notebook keeps them in its file.
MAX_PICTURE_BYTES = 32 * 1024 * 1024
# Characters that are shown of a value.
MAX_TEXT = 200
TERMINAL_WIDTH = 160


@dataclass(frozen=True)
class Binary:
    """A value of type ``bytea``, of which only a thumbnail is kept.

    Attributes:
        size: bytes of the value.
        png: a PNG file if the value is an image, or None.
    """

    size: int
    png: bytes | None = None

    def __str__(self) -> str:
        return f"{'' if self.png is None else 'image, '}{counted(self.size, 'byte')}"

    def _repr_png_(self) -> bytes | None:
        return self.png


@dataclass(frozen=True, repr=False)
class Shown:
    """Rows of a query, as a notebook or a terminal shows them.

    Attributes:
        columns: their names.
        rows: their values. Those of type ``bytea`` are ``Binary``.
        is_complete: whether there are no more rows.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    is_complete: bool

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{_html(name)}</th>" for name in self.columns)
        lines = ("".join(f"<td>{_html(value)}</td>" for value in row) for row in self.rows)
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        # Dollar signs would become formulas.
        table = '<table class="tex2jax_ignore mathjax_ignore">'
        return f"{table}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{self._note()}"

    def __repr__(self) -> str:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in self.columns:
            table.add_column(Text(_plain(name)), overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(_plain(value)) for value in row))
        page = io.StringIO()
        console = Console(file=page, width=TERMINAL_WIDTH, highlight=False, color_system=None)
        console.print(table)
        lines = [line.rstrip() for line in page.getvalue().splitlines()]
        return "\n".join([*lines, self._note()]).rstrip()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def _note(self) -> str:
        return "" if self.is_complete else f"first {counted(len(self.rows), 'row')}"


def show(
    connection: psycopg.Connection[Any],
    query: str,
    parameters: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    size: int = 128,
    rows: int = 50,
    dicom_window: str = "",
) -> Shown:
    """Run a query, and return its rows for display, with thumbnails of the images in them.

    Values of type ``bytea`` that the server could decode are shown as images, DICOM files as well.
    The rest is text.

    Args:
        connection: to the database, as psycopg opens it.
        query: a SELECT, with psycopg's placeholders for ``parameters``.
        parameters: their values.
        size: most pixels of the longer side of a thumbnail, 16 to 1,024.
        rows: most rows, 1 to 1,000.
        dicom_window: window of DICOM images, as in ``embed_image``.

    Returns:
        An object that Jupyter shows as a table with pictures, and a terminal as text.

    Raises:
        SiameseError: size or window are out of range.
        ValueError: rows are out of range.
        psycopg.Error: the query fails.
    """
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"rows must be between 1 and {MAX_ROWS}")
    drawing.check_side(size)
    if dicom_window:
        windows.parse(dicom_window)
    reducer = _Reducer(InputSpec(size, size, dicom_window=dicom_window or None))
    found: list[tuple[object, ...]] = []
    with (
        connection.transaction(),
        # Of the server, which sends no more rows than are asked for.
        connection.cursor("pg_siamese_show", row_factory=tuple_row) as cursor,
    ):
        cursor.execute(query, parameters)
        names = tuple(column.name for column in cursor.description or ())
        while len(found) < rows and (row := cursor.fetchone()) is not None:
            found.append(tuple(map(reducer.reduce, row)))
        is_complete = len(found) < rows or cursor.fetchone() is None
    return Shown(names, tuple(found), is_complete)


def similar(
    connection: psycopg.Connection[Any],
    image: bytes | str | os.PathLike[str] | None = None,
    k: int = 10,
    *,
    key: object = None,
    collection: str = DEFAULT_COLLECTION,
    columns: Sequence[str] | None = None,
    filter: dict[str, object] | None = None,
    engine: str = "auto",
    frame: int = 0,
) -> Any:
    """Search for the ``k`` rows most similar to an image, or to a stored one.

    Args:
        connection: to the database, as psycopg opens it.
        image: the bytes of an image file, or the path of one.
        k: number of rows.
        key: of a stored row, instead of ``image``.
        collection: to search.
        columns: of the collection's table, to return as well. By default these are ``dataset``,
            ``split`` and ``label``, if it has them.
        filter: values of columns that the rows must have.
        engine: auto, faiss or pgvector.
        frame: which frame of the image to search for, from 1, or 0 for the representative one.

    Returns:
        A pandas ``DataFrame`` if pandas is installed, and else a list of named tuples. Columns are
        ``rank``, the key, ``distance``, ``similarity``, those asked for, and ``frame`` if the
        collection has frames.

    Raises:
        CommandError: there is no such collection.
        ValueError: neither or both of ``image`` and ``key`` are given.
        OSError: the file can't be read.
        psycopg.Error: the search fails.
    """
    found = find_collection(connection, collection)
    shown = found.shown_columns
    if columns is not None:
        shown = tuple(sql.Identifier(name).as_string(connection) for name in columns)
        found = dataclasses.replace(found, shown_columns=shown)
    search = search_statement(
        found,
        image=Path(image).read_bytes() if isinstance(image, str | os.PathLike) else image,
        key=None if key is None else str(key),
        k=k,
        filter=filter,
        engine=engine,
        frame=frame,
    )
    with RawCursor(connection, row_factory=tuple_row) as cursor:
        rows = cursor.execute(search.sql.encode(), search.parameters).fetchall()
    names = ["rank", found.key_name, "distance", "similarity", *(columns or shown)]
    names += ["frame"] if found.has_frames else []
    try:
        import pandas
    except ImportError:
        row_type = namedtuple("Row", names, rename=True)  # type: ignore[misc]
        return [row_type(*row) for row in rows]
    return pandas.DataFrame(rows, columns=names)


class _Reducer:
    """Makes thumbnails of the images among values, as long as there is room for them."""

    def __init__(self, spec: InputSpec) -> None:
        self._spec, self._left = spec, MAX_PICTURE_BYTES

    def reduce(self, value: object) -> object:
        """Return what is kept of a value."""
        if not isinstance(value, bytes):
            return value
        if self._left <= 0:
            return Binary(len(value))
        try:
            png = drawing.thumbnail(value, self._spec.width, spec=self._spec)
        except ImageError:
            return Binary(len(value))
        self._left -= len(png)
        return Binary(len(value), png)


def _plain(value: object) -> str:
    """Return one line of printable text, since a terminal obeys what is not printable."""
    if value is None:
        return ""
    text = str(value)
    if len(text) > MAX_TEXT:
        text = f"{text[:MAX_TEXT]}…"
    return "".join(character if character.isprintable() else " " for character in text)


def _html(value: object) -> str:
    text = escape(_plain(value))
    if not isinstance(value, Binary) or value.png is None:
        return text
    data = base64.b64encode(value.png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{text}" title="{text}">'
