"""Pages to search: the collections, answers with their pictures, and downloads of them."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from psycopg.rows import dict_row
from starlette.responses import JSONResponse, Response

from pg_siamese.explore import answers, query
from pg_siamese.explore.failures import PageError
from pg_siamese.explore.pictures import Look, pixels_of
from pg_siamese.explore.query import FILE, STORED, Query
from pg_siamese.explore.tables import Table, readable
from pg_siamese.explore.visits import Visit

# A longer statement is no help to read. There is a file to download.
MOST_SQL = 10_000
THUMBNAIL = Look(side=160)


def home(visit: Visit) -> Response:
    """List the collections."""
    with visit.connection.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(
            "SELECT collection, relation::text, model, rows_embedded, rows_indexed, waiting"
            " FROM siamese.collection_status ORDER BY collection"
        ).fetchall()
    return visit.render("home.html", rows=rows, readable=readable(visit.connection))


def search(visit: Visit) -> Response:
    """Show the answers of a search, or rows of the table."""
    table = visit.table()
    asked = _asked(visit, table)
    cards = answers.find(visit.connection, table, asked, visit.session)
    is_long = answers.bytes_of_files(asked, visit.session) > MOST_SQL
    text = "" if is_long else answers.statement(table, asked, visit.session)
    return visit.render(
        "search.html",
        collection=table.name,
        table=table,
        query=asked,
        cards=cards,
        sql=text if len(text) <= MOST_SQL else "",
        links=_Links(table, asked),
        shown=query,
    )


def as_csv(visit: Visit) -> Response:
    """Give the answers of a search as CSV."""
    table = visit.table()
    asked = _asked(visit, table)
    cards = answers.find(visit.connection, table, asked, visit.session)
    text = answers.as_csv(table, asked, cards)
    return _download(text.encode(), "text/csv; charset=utf-8", "answers.csv")


def as_sheet(visit: Visit) -> Response:
    """Give the answers of a search as contact sheet."""
    table = visit.table()
    asked = _asked(visit, table)
    cards = answers.find(visit.connection, table, asked, visit.session)
    picture = answers.sheet(visit.connection, table, asked, visit.session, cards)
    return _download(picture, "image/png", "answers.png")


def as_sql(visit: Visit) -> Response:
    """Give the statement of a search, with its values."""
    table = visit.table()
    text = answers.statement(table, _asked(visit, table), visit.session)
    return _download(text.encode(), "text/plain; charset=utf-8", "search.sql")


def facet(visit: Visit) -> Response:
    """Show what values a column has."""
    table = visit.table()
    column = table.column(visit.parameter("of"))
    condition = _asked(visit, table).conditions.get(column.name, query.Condition())
    found = answers.facet(visit.connection, table, column)
    return visit.render("_facet.html", facet=found, condition=condition, shown=query)


def take_file(visit: Visit) -> Response:
    """Keep a file to search with, and say where its answers are."""
    table = visit.table()
    if len(visit.body) > table.spec.max_bytes:
        raise PageError(
            413, f"This collection takes files of up to {table.spec.max_bytes:,} bytes."
        )
    # Refused now if it is no image, as the server would.
    pixels_of(visit.body, table.spec, THUMBNAIL)
    name = visit.session.files.add(visit.body)
    asked = _asked(visit, table)
    changes = {"like": (f"{FILE}{name}",), "unlike": (), "frame": 0, "region": None}
    return JSONResponse({"address": asked.address("/search", table.name, **changes)})


class _Links:
    """Addresses of the page that continue from a search."""

    def __init__(self, table: Table, asked: Query) -> None:
        self._name = table.name
        self._asked = asked

    def search_from(self, example: str, frame: int | None = None) -> str:
        """Return the address of a search from one picture alone."""
        changes: dict[str, Any] = {"like": (example,), "unlike": (), "region": None}
        return self._at("/search", **changes, frame=frame or 0, after="")

    def also(self, key: str, *, unlike: bool = False) -> str:
        """Return the address of a search with one more example."""
        kind = "unlike" if unlike else "like"
        given = {name: getattr(self._asked, name) for name in ("like", "unlike")}
        example = f"{STORED}{key}"
        changed = {
            name: tuple(each for each in examples if each != example)
            for name, examples in given.items()
        }
        changed[kind] = (*changed[kind], example)
        return self._at("/search", **changed, frame=0, region=None, after="")

    def without(self, example: str) -> str:
        """Return the address of the search without an example."""
        like, unlike = (
            tuple(each for each in getattr(self._asked, name) if each != example)
            for name in ("like", "unlike")
        )
        return self._at("/search", like=like, unlike=unlike if like else (), frame=0, region=None)

    def everywhere(self) -> str:
        """Return the address of the same search among all rows."""
        return self._at("/search", among="")

    def look(self, key: str, frame: int | None = None) -> str:
        """Return the address where one picture is shown large."""
        beside = self._asked.like[:1]
        pairs = [("c", self._name), ("key", key)]
        pairs += [("frame", str(frame))] if frame else []
        return f"/look?{urlencode([*pairs, *(('beside', each) for each in beside)])}"

    def picture(self, example: str, side: int = THUMBNAIL.side, frame: int | None = None) -> str:
        """Return the address of a picture."""
        pairs = [("c", self._name), ("of", example), ("side", str(side))]
        pairs += [("frame", str(frame))] if frame else []
        return f"/picture?{urlencode(pairs)}"

    def download(self, kind: str) -> str:
        """Return the address of the answers as csv, png or sql."""
        return self._at(f"/search.{kind}")

    def facet(self, column: str) -> str:
        """Return the address of a column's values."""
        return f"{self._at('/facet')}&{urlencode([('of', column)])}"

    def after(self, key: str) -> str:
        """Return the address of the next rows."""
        return self._at("/search", after=key)

    def _at(self, path: str, **changes: Any) -> str:
        return self._asked.address(path, self._name, **changes)


def _asked(visit: Visit, table: Table) -> Query:
    return query.parse(visit.request.query_params.multi_items(), table)


def _download(content: bytes, kind: str, name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type=kind, headers=headers)
