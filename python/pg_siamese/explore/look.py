"""One image: as a picture of any size and window, and a page with all that is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from psycopg import sql
from starlette.responses import Response

from pg_siamese.client.sources import png
from pg_siamese.explore import pictures
from pg_siamese.explore.answers import read_example
from pg_siamese.explore.failures import PageError, whole_number
from pg_siamese.explore.pictures import MOST_FRAMES, MOST_SIDE, Facts, Look
from pg_siamese.explore.query import FILE, STORED
from pg_siamese.explore.tables import Table
from pg_siamese.explore.visits import Visit
from pg_siamese_server.encoding.kinds import supported
from pg_siamese_server.encoding.windows import PRESETS
from pg_siamese_server.errors import SiameseError

LARGE = 1024
NEIGHBOURS = 8


def picture(visit: Visit) -> Response:
    """Give an image as PNG. What can't be shown is grey."""
    table = visit.table()
    look = _look(visit, Look())
    try:
        data = read_example(visit.connection, table, visit.session, visit.parameter("of"))
        return Response(pictures.picture(data, table.spec, look), media_type="image/png")
    except PageError as error:
        status = error.status
    except SiameseError:
        status = 415
    return Response(png(pictures.blank(look.side)), status, media_type="image/png")


def look(visit: Visit) -> Response:
    """Show one image large, beside the query, with its row."""
    table = visit.table()
    key = visit.parameter("key")
    data = pictures.read_image(visit.connection, table, key)
    tags = _tags(visit, table, key, data)
    known = pictures.facts(data, tags)
    look = _look(visit, Look(side=LARGE))
    address = {"c": table.name, "key": key, "beside": visit.parameter("beside")}
    return visit.render(
        "look.html",
        collection=table.name,
        table=table,
        key=key,
        facts=known,
        look=look,
        tags=tags,
        row=_row(visit, table, key),
        problem=_problem(data, table, look),
        pictures=_addresses(visit, table, key, look),
        presets=[
            (name, f"/look?{urlencode({**address, 'frame': look.frame, 'window': name})}")
            for name in (sorted(PRESETS) if known.kind == "DICOM" and known.is_deep else ())
        ],
        window=_window(look, known),
        beside=address["beside"],
        plain=f"/look?{urlencode(address)}",
        search=f"/search?{urlencode({'c': table.name, 'like': f'{STORED}{key}'})}",
        few=f"/search?{urlencode({'c': table.name, 'like': f'{STORED}{key}', 'k': NEIGHBOURS})}",
    )


def _look(visit: Visit, default: Look) -> Look:
    window = visit.parameter("window")
    centre, width = visit.parameter("centre"), visit.parameter("width")
    if not window and centre and width:
        window = f"{centre}/{width}"
    return Look(
        side=whole_number("side", visit.parameter("side") or str(default.side), 16, MOST_SIDE),
        frame=whole_number("frame", visit.parameter("frame") or "0", 0, MOST_FRAMES),
        window=window,
    )


def _tags(visit: Visit, table: Table, key: str, data: bytes) -> Mapping[str, Any] | None:
    """Read the DICOM tags that the database allows to be seen, or None of another format."""
    if supported(data) != "DICOM":
        return None
    statement = sql.SQL("SELECT siamese.dicom_tags({}) FROM {} WHERE {} = {}::text::{}").format(
        table.image, table.relation, table.key, sql.Literal(key), table.key_type
    )
    row = visit.connection.execute(statement).fetchone()
    return None if row is None else row[0]


def _row(visit: Visit, table: Table, key: str) -> list[tuple[str, str | None]]:
    if not table.columns:
        return []
    names = [column.name for column in table.columns]
    statement = sql.SQL("SELECT {} FROM {} WHERE {} = {}::text::{}").format(
        sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(name)) for name in names),
        table.relation,
        table.key,
        sql.Literal(key),
        table.key_type,
    )
    row = visit.connection.execute(statement).fetchone()
    return [] if row is None else list(zip(names, row, strict=True))


def _problem(data: bytes, table: Table, look: Look) -> str:
    """Return why an image can't be shown, or nothing."""
    try:
        pictures.pixels_of(data, table.spec, Look(16, look.frame, look.window))
    except SiameseError as error:
        return error.message
    return ""


def _addresses(visit: Visit, table: Table, key: str, look: Look) -> list[tuple[str, str]]:
    """Return the large pictures, each with what it is."""
    shown = {"side": str(LARGE), "frame": str(look.frame), "window": look.window}
    found = [(f"{table.collection.key_name} {key}", f"{STORED}{key}", shown)]
    beside = visit.parameter("beside")
    if beside.startswith((STORED, FILE)) and beside != f"{STORED}{key}":
        title = beside.removeprefix(STORED) if beside.startswith(STORED) else "your file"
        found.insert(0, (f"Query: {title}", beside, {"side": str(LARGE)}))
    return [
        (title, f"/picture?{urlencode({'c': table.name, 'of': example, **given})}")
        for title, example, given in found
    ]


def _window(look: Look, known: Facts) -> tuple[str, str]:
    """Return centre and width for the form."""
    centre, _, width = look.window.partition("/")
    if width:
        return centre, width
    return f"{known.window[0]:g}", f"{known.window[1]:g}"
