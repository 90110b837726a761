"""Commands that tell how a search is answered, and how well searches find what they should."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from pg_siamese.cli.options import CollectionName, Dsn, Engine, Filter, json_object
from pg_siamese.cli.pairs import call
from pg_siamese.cli.terminal import output
from pg_siamese.client.connection import CommandError, connect

Seed = Annotated[int, typer.Option(help="Seed of the sample.")]


def explain(
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
    dsn: Dsn = None,
) -> None:
    """Search, and show how it was answered: engine, candidates, rounds and times."""
    if (image is None) == (id is None):
        raise CommandError("specify an image file, or --id with the key of a stored image")
    arguments = {
        "image": None if image is None else image.read_bytes(),
        "image_id": id,
        "k": k,
        "collection": collection,
        "filter": json_object(filter),
        "engine": engine,
    }
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("fact")
    table.add_column("value", justify="right")
    table.add_column("detail", overflow="fold")
    for row in _rows("explain_search", arguments, dsn):
        table.add_row(*(escape(value or "") for value in row.values()))
    output().print(table)


def recall(
    queries: Annotated[int, typer.Option(min=1, help="Stored images to search with.")] = 100,
    k: Annotated[int, typer.Option("-k", help="Number of neighbours.")] = 10,
    collection: CollectionName = "images",
    filter: Filter = None,
    seed: Seed = 0,
    dsn: Dsn = None,
) -> None:
    """Compare a sample of searches with exact ones."""
    arguments = {
        "collection": collection,
        "queries": queries,
        "k": k,
        "filter": json_object(filter),
        "seed": seed,
    }
    (row,) = _rows("measure_recall", arguments, dsn)
    output().print(
        f"{row['sampled']:,} searches for {k} neighbours\n"
        f"recall          {row['recall']:.4f}, at least {row['minimum']:.4f}\n"
        f"time            {row['milliseconds']:.3g} ms, exact {row['exact_milliseconds']:.3g} ms"
    )


def quality(
    label_column: Annotated[str, typer.Option(help="Column of the class.")] = "label",
    queries: Annotated[
        str | None,
        typer.Option(help='Search with rows of these values, as JSON: \'{"split": "test"}\'.'),
    ] = None,
    gallery: Annotated[
        str | None,
        typer.Option(help='Find only rows of these values, as JSON: \'{"split": "train"}\'.'),
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Most queries.")] = 1000,
    own_group: Annotated[
        bool, typer.Option(help="Whether neighbours may be of the query's own group.")
    ] = False,
    collection: CollectionName = "images",
    seed: Seed = 0,
    dsn: Dsn = None,
) -> None:
    """Measure how well neighbours agree with labels, in per cent."""
    arguments = {
        "collection": collection,
        "label_column": label_column,
        "queries": json_object(queries, "--queries"),
        "gallery": json_object(gallery, "--gallery"),
        "sample": sample,
        "seed": seed,
        "own_group": own_group,
    }
    (row,) = _rows("retrieval_quality", arguments, dsn)
    names = {"map5": "mAP@5", "mmv5": "mMV@5", "acc1": "ACC@1", "acc3": "ACC@3", "acc5": "ACC@5"}
    figures = (
        f"{title}  {'-' if row[name] is None else f'{row[name]:.2f}'}"
        for name, title in names.items()
    )
    output().print("\n".join([f"{row['sampled']:,} queries", *figures]))


def _rows(
    function: Literal["explain_search", "measure_recall", "retrieval_quality"],
    arguments: Mapping[str, Any],
    dsn: str | None,
) -> list[dict[str, Any]]:
    from psycopg.rows import dict_row

    from pg_siamese.client.queries import find_collection

    with connect(dsn) as connection:
        find_collection(connection, arguments["collection"])
        with connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(call(function, arguments)).fetchall()
