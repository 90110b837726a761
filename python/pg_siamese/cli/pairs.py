"""Commands on whole collections, as CSV: neighbours, near pairs, duplicates, and leaks."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from psycopg import sql

from pg_siamese.cli.options import CollectionName, Dsn, Engine, Filter, json_object
from pg_siamese.cli.terminal import errors, progress_bar
from pg_siamese.client.connection import connect

if TYPE_CHECKING:
    import psycopg

    from pg_siamese.client.queries import Collection

# A sheet is for looking at: lines, and pictures beside the first one of each.
SHEET_LINES, SHEET_PICTURES = 8, 8

MaxDistance = Annotated[float, typer.Option(help="Largest distance of two images' vectors.")]
MaxDifference = Annotated[
    float, typer.Option(help="Largest difference of two images' pixels, in grey levels.")
]
Threads = Annotated[int, typer.Option(min=1, help="Most threads of the server's FAISS.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="CSV file to write. Default: stdout.")
]
Sheet = Annotated[
    Path | None, typer.Option(help="Draw the first pairs or groups into this PNG file.")
]
# A key, the text under its picture, and the label of its frame.
Picture = tuple[str, str, str | None]


def nearest(
    keys: Annotated[
        list[str] | None,
        typer.Argument(help="Keys of stored images. Default: all.", metavar="[KEY]..."),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Number of neighbours of each.")] = 10,
    collection: CollectionName = "images",
    filter: Filter = None,
    group_by: Annotated[
        str | None,
        typer.Option(help="Column of the group, such as the patient: one neighbour of each."),
    ] = None,
    own_group: Annotated[
        bool, typer.Option(help="Whether neighbours may be of the image's own group.")
    ] = True,
    engine: Engine = "auto",
    threads: Threads = 1,
    output: Output = None,
    sheet: Sheet = None,
    dsn: Dsn = None,
) -> None:
    """List the nearest neighbours of each of many stored images, as CSV."""
    arguments = {
        "collection": collection,
        "keys": keys or None,
        "k": k,
        "filter": json_object(filter),
        "group_by": group_by,
        "own_group": own_group,
        "engine": engine,
        "threads": threads,
    }

    def pictures(row: Mapping[str, Any]) -> tuple[Picture, Picture]:
        text = f"distance {row['distance']:.4f}"
        return (row["key"], "", None), (row["neighbour"], text, None)

    _list("nearest", arguments, output, sheet, dsn, pictures)


def pairs(
    max_distance: Annotated[float, typer.Argument(help="Largest distance of two images' vectors.")],
    collection: CollectionName = "images",
    filter: Filter = None,
    engine: Engine = "auto",
    threads: Threads = 1,
    output: Output = None,
    sheet: Sheet = None,
    dsn: Dsn = None,
) -> None:
    """List all pairs of stored images within a distance, as CSV."""
    arguments = {
        "collection": collection,
        "max_distance": max_distance,
        "filter": json_object(filter),
        "engine": engine,
        "threads": threads,
    }

    def pictures(row: Mapping[str, Any]) -> tuple[Picture, Picture]:
        return (row["a"], "", None), (row["b"], f"distance {row['distance']:.4f}", None)

    _list("similar_pairs", arguments, output, sheet, dsn, pictures)


def duplicates(
    max_distance: MaxDistance = 0.25,
    max_difference: MaxDifference = 3.6,
    mirrored: Annotated[
        bool, typer.Option("--mirrored", help="Count mirrored pictures as the same.")
    ] = False,
    collection: CollectionName = "images",
    filter: Filter = None,
    engine: Engine = "auto",
    threads: Threads = 1,
    output: Output = None,
    sheet: Sheet = None,
    dsn: Dsn = None,
) -> None:
    """List groups of stored images that are the same picture, as CSV."""
    arguments = {
        "collection": collection,
        "max_distance": max_distance,
        "max_difference": max_difference,
        "mirrored": mirrored,
        "filter": json_object(filter),
        "engine": engine,
        "threads": threads,
    }

    def pictures(row: Mapping[str, Any]) -> tuple[Picture, Picture] | None:
        if row["key"] == row["representative"]:
            return None
        text = f"difference {row['difference']:.1f}{', mirrored' if row['is_mirrored'] else ''}"
        return (row["representative"], "", None), (row["key"], text, None)

    _list("near_duplicates", arguments, output, sheet, dsn, pictures)


def leaks(
    split_column: Annotated[str, typer.Option(help="Column of the split.")] = "split",
    group_column: Annotated[
        str,
        typer.Option(help="Column of the group, such as the patient. Default: the collection's."),
    ] = "-",
    max_distance: MaxDistance = 0.25,
    max_difference: MaxDifference = 3.6,
    collection: CollectionName = "images",
    filter: Filter = None,
    engine: Engine = "auto",
    threads: Threads = 1,
    output: Output = None,
    sheet: Sheet = None,
    dsn: Dsn = None,
) -> None:
    """List images and groups that are in several splits, as CSV."""
    arguments = {
        "collection": collection,
        "split_column": split_column,
        "group_column": group_column,
        "max_distance": max_distance,
        "max_difference": max_difference,
        "filter": json_object(filter),
        "engine": engine,
        "threads": threads,
    }

    def pictures(row: Mapping[str, Any]) -> tuple[Picture, Picture]:
        text = row["kind"]
        if row["difference"] is not None:
            text += f", difference {row['difference']:.1f}"
        return (row["a"], "", row["split_a"]), (row["b"], text, row["split_b"])

    _list("leaks", arguments, output, sheet, dsn, pictures, label=split_column)


def _list(
    function: str,
    arguments: Mapping[str, Any],
    output: Path | None,
    sheet: Path | None,
    dsn: str | None,
    pictures: Callable[[Mapping[str, Any]], tuple[Picture, Picture] | None],
    label: str = "label",
) -> None:
    """Write a function's rows as CSV while they come, and draw the first of them."""
    from psycopg.rows import dict_row

    from pg_siamese.client.queries import find_collection

    lines: dict[str, list[Picture]] = {}
    count = 0
    with connect(dsn) as connection:
        found = find_collection(connection, arguments["collection"])
        statement = call(function, arguments)
        with (
            _csv_file(output) as file,
            progress_bar(f"searching {found.name}", None) as advance,
            connection.transaction(),
            # On the server, so that rows come as they are found.
            connection.cursor("rows", row_factory=dict_row) as cursor,
        ):
            cursor.execute(statement)
            names = [column.name for column in cursor.description or ()]
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(names)
            for row in cursor:
                writer.writerow(row[name] for name in names)
                count += 1
                advance(1)
                if sheet is not None and (pair := pictures(row)) is not None:
                    _note(lines, *pair)
        errors().print(f"{count:,} rows")
        if sheet is not None and lines:
            _draw(connection, found, lines, sheet, label)
            errors().print(f"contact sheet: {sheet}", markup=False, soft_wrap=True)


def call(function: str, arguments: Mapping[str, Any]) -> sql.Composed:
    """Return the statement that calls a function, without the arguments that are None."""
    given = {
        name: json.dumps(value) if isinstance(value, dict) else value
        for name, value in arguments.items()
        if value is not None
    }
    return sql.SQL("SELECT * FROM siamese.{}({})").format(
        sql.Identifier(function),
        sql.SQL(", ").join(
            sql.SQL("{} => {}").format(sql.Identifier(name), sql.Literal(value))
            for name, value in given.items()
        ),
    )


@contextmanager
def _csv_file(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    from pg_siamese.files import open_whole

    with open_whole(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        yield text
        text.flush()
        text.detach()


def _note(lines: dict[str, list[Picture]], first: Picture, second: Picture) -> None:
    """Put a pair onto the sheet, if there is room."""
    if first[0] not in lines:
        if len(lines) == SHEET_LINES:
            return
        lines[first[0]] = [first]
    if len(lines[first[0]]) <= SHEET_PICTURES:
        lines[first[0]].append(second)


def _draw(
    connection: psycopg.Connection[Any],
    collection: Collection,
    lines: dict[str, list[Picture]],
    sheet: Path,
    label: str,
) -> None:
    from pg_siamese.client.contact_sheet import Neighbour, SheetRow, contact_sheet
    from pg_siamese.client.queries import display_pixels, stored_images

    keys = {key for pictures in lines.values() for key, _, _ in pictures}
    images = stored_images(connection, collection, sorted(keys))
    rows = [
        SheetRow(
            f"{collection.key_name} {first}",
            display_pixels(images[first]),
            first_label,
            [
                Neighbour(display_pixels(images[key]), own, measure=f"{key}\n{text}")
                for key, text, own in pictures
                if key in images
            ],
            measure="",
        )
        for first, [(_, _, first_label), *pictures] in lines.items()
        if first in images
    ]
    contact_sheet(rows, sheet, label=label)
