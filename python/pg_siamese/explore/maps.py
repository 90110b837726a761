"""A collection's vectors in two dimensions, with a colour for each value of a column."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from psycopg import sql
from starlette.responses import JSONResponse, RedirectResponse, Response

from pg_siamese.explore import jobs
from pg_siamese.explore.failures import PageError
from pg_siamese.explore.query import parse
from pg_siamese.explore.sessions import Connection, Session
from pg_siamese.explore.tables import Table, values_of
from pg_siamese.explore.visits import Visit

METHODS = ("pca", "tsne")
# t-SNE takes seconds per 1,000 points.
MOST_POINTS = {"pca": 50_000, "tsne": 3_000}
MOST_MAPS = 4
# Colours of a legend. All other values share one.
MOST_COLOURS = 9
BINS = 8
NO_VALUE, OTHERS = "(none)", "(others)"
_PLACE = """
    SELECT c.collection_id, c.generation, c.epoch, m.dimension FROM siamese.collections AS c
    INNER JOIN siamese.models AS m ON m.model_id = c.model_id WHERE c.name = %s
"""


@dataclass(frozen=True)
class Map:
    """Points of a collection.

    Attributes:
        keys: of the rows, as text.
        places: float32 (N, 2), within -1 and 1.
        total: number of vectors, of which these are a sample if there are more.
    """

    keys: Sequence[str]
    places: NDArray[np.float32]
    total: int


@dataclass(frozen=True)
class _Source:
    """Vectors to draw: those of a generation, as one role sees them."""

    collection_id: int
    generation: int | None
    epoch: int
    dimension: int

    @property
    def vectors(self) -> sql.Identifier:
        """The table of the vectors."""
        return sql.Identifier("siamese", f"embedding_{self.collection_id}")


def show(visit: Visit) -> Response:
    """Show the map, or how far it is."""
    table = visit.table()
    method = _method(visit)
    source = _source(visit.connection, table)
    if (source, method) not in visit.session.maps:
        address = str(visit.request.url.replace(scheme="", netloc=""))
        started = jobs.start(
            visit.session,
            f"Drawing the map of {table.name}",
            address,
            lambda connection: _draw(visit.session, connection, source, method),
        )
        return RedirectResponse(f"/job?id={started.name}", 303)
    return visit.render(
        "map.html",
        collection=table.name,
        table=table,
        method=method,
        methods=METHODS,
        by=_coloured_by(visit, table),
        columns=[column.name for column in table.filtered],
        data=str(visit.request.url.replace(scheme="", netloc="", path="/map.json")),
    )


def points(visit: Visit) -> Response:
    """Give the points of the map that the role sees now."""
    table = visit.table()
    drawn = visit.session.maps.get((_source(visit.connection, table), _method(visit)))
    if drawn is None:
        raise PageError(410, "The map is out of date.", "Reload the page.")
    column = _coloured_by(visit, table)
    values = values_of(visit.connection, table, drawn.keys, column or None)
    seen = [place for place, key in enumerate(drawn.keys) if key in values]
    kept = [drawn.keys[place] for place in seen]
    is_range = bool(column) and table.column(column).kind == "range"
    legend, colours = _colours([values[key] for key in kept], is_range)
    return JSONResponse(
        {
            "keys": kept,
            "x": drawn.places[seen, 0].round(4).tolist(),
            "y": drawn.places[seen, 1].round(4).tolist(),
            "colours": colours,
            "legend": legend if column else [],
            "total": drawn.total,
        }
    )


def choose(visit: Visit) -> Response:
    """Keep the keys of chosen points, and say where their rows are."""
    table = visit.table()
    try:
        keys = json.loads(visit.body)
    except ValueError:
        keys = None
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise PageError(400, "The chosen points can't be read.")
    if not 0 < len(keys) <= MOST_POINTS["pca"]:
        raise PageError(400, f"Choose from 1 to {MOST_POINTS['pca']:,} points.")
    name = visit.session.sets.add(tuple(dict.fromkeys(keys)))
    asked = parse([("among", name)], table)
    return JSONResponse({"address": asked.address("/search", table.name)})


def _method(visit: Visit) -> str:
    method = visit.parameter("method") or METHODS[0]
    if method not in METHODS:
        raise PageError(400, f"method is not one of {', '.join(METHODS)}.")
    return method


def _coloured_by(visit: Visit, table: Table) -> str:
    name = visit.parameter("by")
    if not name and "by" not in visit.request.query_params:
        return next((each for each in table.shown_first()), "")
    return table.column(name).name if name else ""


def _source(connection: Connection, table: Table) -> _Source:
    row = connection.execute(_PLACE, (table.name,)).fetchone()
    if row is None:
        raise PageError(410, "This collection no longer exists.")
    return _Source(*row)


def _draw(session: Session, connection: Connection, source: _Source, method: str) -> None:
    """Read vectors as the role sees them, and place them."""
    count = connection.execute(
        sql.SQL("SELECT pg_catalog.count(*) FROM {}").format(source.vectors)
    ).fetchone()
    rows = connection.execute(
        sql.SQL(
            # Any order will do that is the same each time, and not that of insertion.
            "SELECT key::text, embedding FROM {vectors} ORDER BY"
            " pg_catalog.hashint8(embedding_id) LIMIT {most}"
        ).format(vectors=source.vectors, most=sql.Literal(MOST_POINTS[method])),
        binary=True,
    ).fetchall()
    if not rows:
        raise PageError(404, "There are no vectors to draw.")
    keys = [key for key, _ in rows]
    # pgvector's binary format: two short numbers, then the elements.
    matrix = np.stack([np.frombuffer(vector, ">f4", offset=4) for _, vector in rows])
    places = _placed(matrix.astype(np.float32), method)
    session.maps[source, method] = Map(keys, places, int(count[0]) if count else len(keys))
    while len(session.maps) > MOST_MAPS:
        session.maps.popitem(last=False)


def _placed(matrix: NDArray[np.float32], method: str) -> NDArray[np.float32]:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count = len(matrix)
    if method == "tsne" and count > 3:
        # Many directions of a vector are noise, and this is quicker with few.
        few = PCA(min(50, *matrix.shape), random_state=0).fit_transform(matrix)
        perplexity = min(30.0, (count - 1) / 3)
        places = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(few)
    elif min(matrix.shape) >= 2:
        places = PCA(2, random_state=0).fit_transform(matrix)
    else:
        places = np.zeros((count, 2))
    places = places - (places.max(axis=0) + places.min(axis=0)) / 2
    extent = float(np.abs(places).max()) or 1.0
    return np.asarray(places / extent, np.float32)


def _colours(values: Sequence[str | None], is_range: bool) -> tuple[list[str], list[int]]:
    """Return the legend, and the number of each value in it."""
    counts = Counter(values)
    if is_range and len(counts) > MOST_COLOURS:
        return _bins(values)
    common = [value for value, _ in counts.most_common(MOST_COLOURS)]
    common.sort(key=lambda value: (value is None, value))
    numbers = {value: number for number, value in enumerate(common)}
    colours = [numbers.get(value, len(common)) for value in values]
    legend = [NO_VALUE if value is None else value[:80] for value in common]
    return legend + ([OTHERS] if len(counts) > len(common) else []), colours


def _bins(values: Sequence[str | None]) -> tuple[list[str], list[int]]:
    """Return as many rows for each colour, in the order of their values."""
    known = sorted({value for value in values if value is not None}, key=_sortable)
    edges = np.array_split(np.arange(len(known)), min(BINS, len(known)))
    numbers = {known[place]: number for number, part in enumerate(edges) for place in part}
    legend = [f"{known[part[0]]} to {known[part[-1]]}" for part in edges]
    colours = [len(legend) if value is None else numbers[value] for value in values]
    return legend + ([NO_VALUE] if len(legend) in colours else []), colours


def _sortable(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:  # a date, whose text is in its own order
        return 0.0, text
