"""Answers of a search or listing, the values of a column, and the same as CSV and contact sheet."""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from pg_siamese.client.queries import DISPLAY_PIXELS, Answer, run_search
from pg_siamese.explore.failures import PageError
from pg_siamese.explore.pictures import Look, Size, blank, pixels_of, read_image, sizes
from pg_siamese.explore.query import FILE, STORED, Query
from pg_siamese.explore.sessions import Session
from pg_siamese.explore.tables import Column, Table
from pg_siamese_server.errors import SiameseError

# Values of a list that are shown with their counts, and of a number that is a code.
MOST_VALUES, FEW_VALUES = 30, 12
# What a spreadsheet would run as a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
# matplotlib is not made for threads.
_drawing = threading.Lock()


@dataclass(frozen=True)
class Card:
    """One picture of the grid.

    Attributes:
        key: of the row, as text.
        values: of the columns that are shown, by name.
        size: of the image, None if the row has gone meanwhile.
        answer: distance and the like, None if rows are listed.
    """

    key: str
    values: dict[str, str | None]
    size: Size | None = None
    answer: Answer | None = None


@dataclass(frozen=True)
class Facet:
    """What a column holds: its commonest values with their counts, or its ends."""

    column: Column
    values: Sequence[tuple[str | None, int]]
    ends: tuple[str, str] | None
    more: bool


def find(
    connection: psycopg.Connection[Any], table: Table, query: Query, session: Session
) -> list[Card]:
    """Run a search, or list rows."""
    if query.like:
        cards = [
            Card(answer.key, _named(query.columns, list(answer.values.values())), answer=answer)
            for answer in _search(connection, table, query, session)
        ]
    else:
        rows = connection.execute(query.listing(table, session)).fetchall()
        cards = [Card(str(key), _named(query.columns, values)) for key, *values in rows]
    found = sizes(connection, table, list({card.key for card in cards}))
    return [Card(card.key, card.values, found.get(card.key), card.answer) for card in cards]


def bytes_of_files(query: Query, session: Session) -> int:
    """Return how large the visitor's files are that a search has, in bytes."""
    names = [
        each.removeprefix(FILE) for each in (*query.like, *query.unlike) if each.startswith(FILE)
    ]
    return sum(len(session.files.get(name)) for name in names)


def statement(table: Table, query: Query, session: Session) -> str:
    """Return the SQL of an answer, with its values as literals, ready to run."""
    if query.like:
        return f"{query.statement(table, session, literals=True).sql};\n"
    return f"{query.listing(table, session).as_string()};\n"


def facet(connection: psycopg.Connection[Any], table: Table, column: Column) -> Facet:
    """Count the values of a column among the rows that the role sees."""
    name = sql.Identifier(column.name)
    rows = connection.execute(
        sql.SQL(
            "SELECT {name}::text, pg_catalog.count(*) FROM {relation} WHERE {image} IS NOT NULL"
            " GROUP BY {name} ORDER BY 2 DESC, 1 LIMIT {most}"
        ).format(
            name=name,
            relation=table.relation,
            image=table.image,
            most=sql.Literal(MOST_VALUES + 1),
        )
    ).fetchall()
    values, more = rows[:MOST_VALUES], len(rows) > MOST_VALUES
    if column.kind == "list" or len(rows) <= FEW_VALUES:
        return Facet(column, values, None, more)
    ends = connection.execute(
        sql.SQL("SELECT min({name})::text, max({name})::text FROM {relation}").format(
            name=name, relation=table.relation
        )
    ).fetchone()
    return Facet(column, [], ends, more)


def as_csv(table: Table, query: Query, cards: Sequence[Card]) -> str:
    """Return answers as CSV."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    measures = ["rank", "distance", "similarity"] if query.like else []
    frames = ["frame"] if query.like and table.collection.has_frames else []
    writer.writerow([*measures, *frames, table.collection.key_name, *query.columns])
    for card in cards:
        answer = card.answer
        given: list[object] = []
        if answer is not None:
            given = [answer.rank, answer.distance, answer.similarity]
            given += [answer.frame] if frames else []
        texts = [card.key, *(card.values[name] for name in query.columns)]
        writer.writerow([*given, *map(harmless, texts)])
    return file.getvalue()


def sheet(
    connection: psycopg.Connection[Any],
    table: Table,
    query: Query,
    session: Session,
    cards: Sequence[Card],
) -> bytes:
    """Return answers as a contact sheet, a PNG. Rows that are listed are without a query."""
    from pg_siamese.client.contact_sheet import Neighbour, SheetRow, draw_sheet

    neighbours = [
        Neighbour(
            _shown(connection, table, session, f"{STORED}{card.key}", card.answer),
            card.values.get("label"),
            measure=None if card.answer is not None else card.key,
            **_measures(card.answer),
        )
        for card in cards
    ]
    if query.like:
        first = _shown(connection, table, session, query.like[0], None)
        row = SheetRow(", ".join(map(_title, query.like)), first, None, neighbours)
    elif neighbours:
        one, *rest = neighbours
        row = SheetRow(table.name, one.pixels, one.label, rest, measure=one.measure or "")
    else:
        raise PageError(404, "There are no pictures to draw.")
    file = io.BytesIO()
    with _drawing:
        draw_sheet([row]).savefig(file, format="png", dpi=150)
    return file.getvalue()


def _measures(answer: Answer | None) -> dict[str, Any]:
    if answer is None:
        return {}
    return {name: getattr(answer, name) for name in ("distance", "similarity", "frame")}


def _title(example: str) -> str:
    return example.removeprefix(STORED) if example.startswith(STORED) else "file"


def _shown(
    connection: psycopg.Connection[Any],
    table: Table,
    session: Session,
    example: str,
    answer: Answer | None,
) -> NDArray[np.uint8]:
    look = Look(side=DISPLAY_PIXELS, frame=(answer.frame if answer is not None else None) or 0)
    try:
        return pixels_of(read_example(connection, table, session, example), table.spec, look)
    except (PageError, SiameseError):
        return blank(look.side)


def read_example(
    connection: psycopg.Connection[Any], table: Table, session: Session, example: str
) -> bytes:
    """Return the image of an example: a stored one, or a file of the visitor."""
    if example.startswith(FILE):
        return session.files.get(example.removeprefix(FILE))
    return read_image(connection, table, example.removeprefix(STORED))


def _search(
    connection: psycopg.Connection[Any], table: Table, query: Query, session: Session
) -> list[Answer]:
    search = query.statement(table, session)
    return run_search(connection, table.showing(query.columns), search)


def _named(names: Sequence[str], values: Sequence[Any]) -> dict[str, str | None]:
    texts = [None if value is None else str(value) for value in values]
    return dict(zip(names, texts, strict=True))


def harmless(text: str | None) -> str | None:
    """Return a text that no spreadsheet takes for a formula."""
    if text is None or not text.startswith(_FORMULA):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
