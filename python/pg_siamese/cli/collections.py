"""Commands on collections: search them, maintain the index."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from pg_siamese.cli.failures import INTERRUPTED, describe_failure
from pg_siamese.cli.options import CollectionName, Dsn, Engine, Filter, json_object
from pg_siamese.cli.terminal import answer_table, notice_bar, output
from pg_siamese.client.connection import CommandError, connect

if TYPE_CHECKING:
    from datetime import datetime

    from psycopg import Cursor

WATCH_SECONDS = 1.0
SHEET_NEIGHBOURS = 64  # a sheet is for looking at


def query(
    image: Annotated[
        Path | None, typer.Argument(help="Image file to search with.", metavar="IMAGE")
    ] = None,
    id: Annotated[
        str | None, typer.Option("--id", help="Search with the stored image that has this key.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Number of neighbours.")] = 10,
    collection: CollectionName = "images",
    filter: Filter = None,
    engine: Engine = "auto",
    frame: Annotated[
        int, typer.Option(help="Frame of the image to search for. 0: the representative one.")
    ] = 0,
    region: Annotated[
        str | None,
        typer.Option(
            help="Part of the image to search for, as left,top,right,bottom: between 0 and 1, or"
            " whole pixels."
        ),
    ] = None,
    like: Annotated[
        list[str] | None,
        typer.Option(
            help="Search by examples: an image file, or the key of a stored image. Repeat it.",
            metavar="FILE_OR_KEY",
        ),
    ] = None,
    unlike: Annotated[
        list[str] | None,
        typer.Option(help="Find less of this. Repeat it.", metavar="FILE_OR_KEY"),
    ] = None,
    strategy: Annotated[
        Literal["mean", "best"],
        typer.Option(help="Search for the mean of the examples, or for the best match of any."),
    ] = "mean",
    penalty: Annotated[
        float, typer.Option(help="How much --unlike counts for one of --like.")
    ] = 1.0,
    sheet: Annotated[
        Path | None, typer.Option(help="Draw the query and up to 64 neighbours into this PNG file.")
    ] = None,
    dsn: Dsn = None,
) -> None:
    """Find the stored images most similar to an image file, to a stored image, or to examples."""
    from pg_siamese.client.contact_sheet import SheetRow, contact_sheet
    from pg_siamese.client.queries import (
        Examples,
        display_pixels,
        find_collection,
        run_search,
        search_statement,
        sheet_neighbours,
        stored_image,
    )

    if [image is None, id is None, not like].count(False) != 1:
        raise CommandError(
            "specify an image file, --id with the key of a stored image, or --like with examples"
        )
    if unlike and not like:
        raise CommandError("--unlike needs --like")
    condition, part = json_object(filter), _region(region)
    data, label = None if image is None else image.read_bytes(), None
    examples = None
    if like:
        examples = Examples(_examples(like), _examples(unlike or ()), strategy, penalty)
    with connect(dsn) as connection:
        found = find_collection(connection, collection)
        search = search_statement(
            found,
            image=data,
            key=id,
            k=k,
            filter=condition,
            engine=engine,
            frame=frame,
            region=part,
            examples=examples,
        )
        # Of several examples, the first is shown.
        shown = id if examples is None else examples.like[0]
        if isinstance(shown, str):
            data, label = stored_image(connection, found, shown)
        elif shown is not None:
            data = shown
        try:
            answers = run_search(connection, found, search)
        except Exception as error:
            # The server can't know the file's name.
            if image is None or (reason := describe_failure(error)) is None:
                raise
            raise CommandError(f"{image}: {reason}") from error
        output().print(answer_table(found, answers))
        if sheet is not None and data is not None:
            name = image.name if image is not None else f"{found.key_name} {id}"
            if like:
                name = f"like {', '.join(Path(item).name for item in like)}"
            neighbours = sheet_neighbours(connection, found, answers[:SHEET_NEIGHBOURS])
            pixels = display_pixels(data, frame, part)
            contact_sheet([SheetRow(name, pixels, label, neighbours)], sheet)
            output().print(f"contact sheet: {escape(str(sheet))}", soft_wrap=True)


def _examples(items: Sequence[str]) -> list[bytes | str]:
    """Read those that are files. All others are keys."""
    return [Path(item).read_bytes() if Path(item).is_file() else item for item in items]


def _region(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        left, top, right, bottom = map(float, text.split(","))
    except ValueError:
        raise CommandError("--region is not four numbers such as 0.25,0.25,0.75,0.75") from None
    return min(left, right), min(top, bottom), max(left, right), max(top, bottom)


def similarity_map(
    output_file: Annotated[Path, typer.Argument(help="PNG file to write.", metavar="PNG")],
    image: Annotated[
        Path | None, typer.Option(help="Image file whose parts are shown.", metavar="FILE")
    ] = None,
    id: Annotated[str | None, typer.Option("--id", help="Key of a stored image instead.")] = None,
    neighbour: Annotated[
        Path | None, typer.Option(help="Image file to compare it with.", metavar="FILE")
    ] = None,
    neighbour_id: Annotated[
        str | None, typer.Option("--neighbour-id", help="Key of a stored image instead.")
    ] = None,
    collection: CollectionName = "images",
    masks: Annotated[int, typer.Option(help="Runs of the encoder. More show finer parts.")] = 125,
    side: Annotated[int, typer.Option(help="Pixels of the picture's longer side.")] = 512,
    dsn: Dsn = None,
) -> None:
    """Draw which parts of an image make it similar to another one."""
    from pg_siamese.client.queries import find_collection
    from pg_siamese.files import write_whole

    for name, file, key in (("", image, id), ("neighbour-", neighbour, neighbour_id)):
        if (file is None) == (key is None):
            raise CommandError(f"specify --{name[:-1] or 'image'} or --{name}id")
    files = [None if file is None else file.read_bytes() for file in (image, neighbour)]
    with connect(dsn) as connection:
        find_collection(connection, collection)
        row = connection.execute(
            "SELECT siamese.similarity_map("
            "%s, %s, %s, %s::text, %s::text, masks => %s, side => %s)",
            (*files, collection, id, neighbour_id, masks, side),
        ).fetchone()
    assert row is not None and isinstance(row[0], bytes)
    written = write_whole(output_file, row[0])
    output().print(f"similarity map: {escape(str(written))}", soft_wrap=True)


def status(
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Show only the work under way, every second until Ctrl-C."),
    ] = False,
    dsn: Dsn = None,
) -> None:
    """Show each collection with its table, model, vectors and index, and the work under way."""
    from psycopg.rows import dict_row

    from pg_siamese.client.queries import in_words

    with connect(dsn) as connection, connection.cursor(row_factory=dict_row) as cursor:
        if watch:
            with suppress(KeyboardInterrupt):
                _watch(cursor)
            return
        version = cursor.execute(
            "SELECT extversion AS version FROM pg_catalog.pg_extension WHERE extname = 'pg_siamese'"
        ).fetchone()
        rows = cursor.execute(
            "SELECT * FROM siamese.collection_status ORDER BY collection"
        ).fetchall()
        work = _work(cursor)
    console = output()
    console.print(f"pg_siamese {version['version'] if version else '?'}")
    if not rows:
        console.print("no collections yet: SELECT siamese.create_collection(), or pg_siamese demo")
    for row in rows:
        console.print(f"\n[bold]{escape(str(row.pop('collection')))}[/]")
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column(overflow="fold")
        for name, value in row.items():
            grid.add_row(f"  {name}", escape(in_words(value)))
        console.print(grid)
    if work:
        console.print("\n[bold]under way[/]")
        console.print("\n".join(f"  {line}" for line in work), markup=False, soft_wrap=True)


def _work(cursor: Cursor[dict[str, Any]]) -> list[str]:
    """Return a line for each piece of work that the server does."""
    rows = cursor.execute("SELECT * FROM siamese.progress ORDER BY collection, started_at, pid")
    return [_described(**row) for row in rows]


def _described(
    *,
    collection: str,
    kind: str,
    phase: str,
    done: int | None,
    total: int | None,
    started_at: datetime,
    ends_at: datetime | None,
    pid: int | None,
) -> str:
    from pg_siamese.client.queries import in_words

    parts = [f"{kind} of {collection}: {phase}"]
    if total:
        parts.append(f"{100 * (done or 0) // total}% ({done:,} of {total:,})")
    elif done:
        parts.append(f"{done:,}")
    parts.append(f"since {in_words(started_at)}")
    if ends_at is not None:
        parts.append(f"until about {ends_at.astimezone():%H:%M:%S}")
    if pid is not None:
        parts.append(f"pid {pid}")
    return ", ".join(parts)


def _watch(cursor: Cursor[dict[str, Any]]) -> None:
    """Show the work under way for ever: in place, or as a log if the output is no terminal."""
    from rich.live import Live
    from rich.text import Text

    console = output()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            lines = "\n".join(_work(cursor) or ["nothing is under way"])
            if console.is_terminal:
                live.update(Text(lines), refresh=True)
            else:
                console.print(lines, markup=False, soft_wrap=True)
            time.sleep(WATCH_SECONDS)


def build_index(collection: CollectionName = "images", dsn: Dsn = None) -> None:
    """Build a new generation of a collection's FAISS index.

    Searches continue during the build.
    """
    from pg_siamese.client.queries import find_collection

    with connect(dsn) as connection:
        find_collection(connection, collection)
        try:
            with notice_bar(connection, f"building the index of {collection}"):
                row = connection.execute("SELECT siamese.build_index(%s)", (collection,)).fetchone()
        except KeyboardInterrupt:
            raise CommandError(
                "interrupted: the build was cancelled, and the previous index stays in use",
                INTERRUPTED,
            ) from None
    output().print(f"generation {row[0] if row else '?'} of {escape(collection)} is current")


def rebuild_file(
    collection: Annotated[
        str | None, typer.Option("--collection", "-c", help="Only this collection. Default: all.")
    ] = None,
    dsn: Dsn = None,
) -> None:
    """Rebuild a standby's own index files of the current generations.

    Files that are intact stay.
    """
    from pg_siamese.client.queries import collection_names, find_collection

    with connect(dsn) as connection:
        if collection is not None:
            find_collection(connection, collection)
        for name in [collection] if collection is not None else collection_names(connection):
            with notice_bar(connection, f"rebuilding the index file of {name}"):
                row = connection.execute("SELECT siamese.rebuild_file(%s)", (name,)).fetchone()
            generation = row[0] if row else None
            output().print(
                f"{escape(name)}: no generation yet"
                if generation is None
                else f"{escape(name)}: generation {generation} is present"
            )
