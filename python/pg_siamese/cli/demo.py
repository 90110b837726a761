"""The demo: it loads real images, builds the index, searches, and draws the answers."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psycopg
import typer
from psycopg import sql
from psycopg.conninfo import make_conninfo
from rich.markup import escape

from pg_siamese.cli.demo_data import DemoData, build_if_needed, find_data, short_path
from pg_siamese.cli.options import Dsn
from pg_siamese.cli.terminal import answer_table, output, progress_bar
from pg_siamese.client.connection import CommandError, connect, schema_prefix
from pg_siamese_server.errors import counted

if TYPE_CHECKING:
    from pg_siamese.client.queries import Collection
    from pg_siamese.datasets import LabelledImages

COLLECTION = "images"
NEIGHBOURS = 4
SHEET = Path("contact_sheet.png")
QUERIES = 4  # in all: one of each data set, or of different classes of the only one


def demo(
    sheet: Annotated[Path | None, typer.Option(help="PNG file for the contact sheet.")] = None,
    dicom: Annotated[
        bool, typer.Option("--dicom", help="Load DICOM files and search by patient.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the DICOM files. Default: those beside the project, or made ones.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    dsn: Dsn = None,
) -> None:
    """Load real images, build the index, search it, and draw the answers."""
    if folder is not None and not dicom:
        raise CommandError("--folder is of use with --dicom only")
    with connect(dsn) as connection:
        if dicom:
            from pg_siamese.cli.dicom_demo import run_dicom_demo

            run_dicom_demo(connection, folder, sheet)
        else:
            run_demo(connection, sheet)


def run_demo(connection: psycopg.Connection[Any], sheet: Path | None = None) -> None:
    """Run the whole demo. A second run stores nothing and only searches.

    Raises:
        CommandError: no data is available, or the collection "images" has another model.
    """
    from pg_siamese.client.contact_sheet import SheetRow, contact_sheet
    from pg_siamese.client.queries import run_search, search_statement, sheet_neighbours
    from pg_siamese.client.sources import labelled_part

    started = time.monotonic()
    console = output()
    data = find_data()
    collection = prepare_collection(connection, data.model)
    load_images(connection, collection, data)
    build_if_needed(connection, COLLECTION)
    prefix = schema_prefix(connection)
    rows: list[SheetRow] = []
    seconds = 0.0
    for splits in data.sets.values():
        test = splits["test"]
        part = labelled_part(test, data.origin)
        for place in query_places(test, QUERIES // len(data.sets)):
            query = part.row(place)
            search = search_statement(collection, image=query.image, k=NEIGHBOURS, prefix=prefix)
            if not rows:
                console.print("\n[bold]search[/] ($1: the bytes of an image file)")
                console.print(f"{search.sql};", markup=False, soft_wrap=True)
            before = time.monotonic()
            answers = run_search(connection, collection, search)
            seconds += time.monotonic() - before
            shows = f"test image {place} (not stored): {query.label}"
            console.print(f"\n[bold]{test.name}[/] {escape(shows)}")
            console.print(answer_table(collection, answers))
            neighbours = sheet_neighbours(connection, collection, answers)
            name = f"{test.name}, test image {place}"
            rows.append(SheetRow(name, test.images[place], query.label, neighbours))
    target = sheet or SHEET
    contact_sheet(
        rows, target, title=f"SELECT * FROM similar_images(image => $1, k => {NEIGHBOURS})"
    )
    console.print(f"\nanswered in {seconds * 1000:.0f} ms, including session start-up")
    console.print(f"[bold]contact sheet:[/] {escape(short_path(target))}", soft_wrap=True)
    console.print("\n[bold]try it:[/]")
    console.print(f"psql {shlex.quote(address(connection))}\n", markup=False, soft_wrap=True)
    for comment, statement in things_to_try(connection, prefix).items():
        console.print(f"-- {comment}\n{statement}\n", markup=False, soft_wrap=True)
    console.print(f"done in {time.monotonic() - started:.1f} s")


def query_places(test: LabelledImages, count: int) -> list[int]:
    """Return the positions of the queries: the first image, and the first ones of other classes.

    Nothing is chosen by hand, so the pictures show what the encoder really does.
    """
    first: dict[int, int] = {}
    for place, label in enumerate(test.labels.tolist()):
        first.setdefault(label, place)
    return list(first.values())[: max(1, count)]


def prepare_collection(connection: psycopg.Connection[Any], model: str) -> Collection:
    """Register the shipped encoders and create the collection "images", unless they exist.

    Raises:
        CommandError: the collection has another model, whose vectors say nothing of these images.
    """
    from pg_siamese.client.queries import find_collection

    found = connection.execute(
        "SELECT model FROM siamese.collection_status WHERE collection = %s", (COLLECTION,)
    ).fetchone()
    console = output()
    if found is None:
        connection.execute("SELECT FROM siamese.register_shipped_models()")
        connection.execute("SELECT siamese.create_collection(model => %s)", (model,))
        console.print(f'created the collection "{COLLECTION}" with model "{model}"')
    elif found[0] != model:
        raise CommandError(
            f'the collection "{COLLECTION}" has model "{found[0]}", the demo needs '
            f"\"{model}\": drop it (SELECT siamese.drop_collection('{COLLECTION}')) or "
            "run the demo in another database"
        )
    return find_collection(connection, COLLECTION)


def load_images(
    connection: psycopg.Connection[Any], collection: Collection, data: DemoData
) -> None:
    """Insert the train and validation images that are not stored yet, by plain INSERTs."""
    from pg_siamese.client.loading import LoadReport, find_target, load_part
    from pg_siamese.client.sources import labelled_part

    target = find_target(connection, collection.relation, collection.image_name)
    report = LoadReport()
    started = time.monotonic()
    for splits in data.sets.values():
        for split in ("train", "val"):
            if split not in splits:
                continue
            part = labelled_part(splits[split], data.origin)
            with progress_bar(f"{part!s:<20}", len(part)) as advance:
                load_part(connection, target, part, report=report, advance=advance)
    seconds = time.monotonic() - started
    console = output()
    if stored := report.stored:
        console.print(
            f"{counted(stored, 'image')} inserted and embedded in {seconds:.1f} s "
            f"({stored / seconds:,.0f} per second)"
        )
    if report.stored_before:
        console.print(f"{counted(report.stored_before, 'image')} already stored")


def things_to_try(connection: psycopg.Connection[Any], prefix: str) -> dict[str, str]:
    """Return what to ask next, by comment: statements that work in psql as they are."""
    row = connection.execute(
        "SELECT image_id, dataset, label FROM siamese.images ORDER BY image_id LIMIT 1"
    ).fetchone()
    if row is None:
        raise CommandError("the collection is empty")
    key, dataset, label = row
    condition = sql.quote(f'{{"dataset": "{dataset}", "label": "{label}"}}')
    image = f"(SELECT image FROM {prefix}images WHERE image_id = {key})"
    columns = "rank, image_id, distance, similarity, dataset, label"
    nearest = f"{prefix}similar_images(image_id => {key}, k => 5"
    rows = f"JOIN {prefix}images USING (image_id) ORDER BY rank"
    return {
        "the images most similar to a stored one": (f"SELECT {columns} FROM {nearest}) {rows};"),
        "the same, only among rows that match a filter": (
            f"SELECT {columns} FROM {nearest}, filter => {condition}) {rows};"
        ),
        "classify an image by a vote of its neighbours": (
            f"SELECT * FROM {prefix}classify_image({image}, k => 10);"
        ),
    }


def address(connection: psycopg.Connection[Any]) -> str:
    """Return the connection string of the database, without a password."""
    info = connection.info
    return make_conninfo(host=info.host, port=info.port, user=info.user, dbname=info.dbname)
