"""The demo: real images go in, are embedded by triggers, indexed, searched, and drawn."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from rich.markup import escape

from pg_siamese import datasets
from pg_siamese.cli.terminal import answer_table, notice_bar, output, progress_bar
from pg_siamese.client.connection import CommandError, schema_prefix
from pg_siamese.client.contact_sheet import SheetRow, contact_sheet
from pg_siamese.client.loading import LoadReport, find_target, load_part
from pg_siamese.client.queries import (
    DEFAULT_COLLECTION,
    Answer,
    Collection,
    find_collection,
    run_search,
    search_statement,
    sheet_neighbours,
)
from pg_siamese.client.sources import ImageRow, labelled_part
from pg_siamese.datasets import DataNotFoundError, LabelledImages

NEIGHBOURS = 4
SHEET = Path("contact_sheet.png")
QUERIES = 4  # in all: one of each data set, or of different classes of the only one


@dataclass(frozen=True)
class DemoData:
    """What the demo works with: the encoder's name, and the splits of each data set."""

    model: str
    origin: str
    sets: dict[str, dict[str, LabelledImages]]


def run_demo(connection: psycopg.Connection[Any], sheet: Path | None = None) -> None:
    """Run the whole demo; a second run stores nothing and only searches.

    Raises CommandError where no data or no model can be had, or where the collection "images" is
    another's.
    """
    started = time.monotonic()
    console = output()
    data = find_data()
    collection = prepare_collection(connection, data.model)
    load_images(connection, collection, data)
    build_if_needed(connection)
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
            shows = f"test image {place}, which is not stored: {query.label}"
            console.print(f"\n[bold]{test.name}[/] {escape(shows)}")
            console.print(answer_table(collection, answers))
            rows.append(_sheet_row(connection, collection, test, place, query, answers))
    target = sheet or SHEET
    contact_sheet(
        rows, target, title=f"SELECT * FROM similar_images(image => $1, k => {NEIGHBOURS})"
    )
    console.print(f"\nanswered in {seconds * 1000:.0f} ms, the start-up of the session included")
    console.print(f"[bold]contact sheet:[/] {escape(_short(target))}", soft_wrap=True)
    console.print("\n[bold]try it:[/] make psql, or")
    console.print(f"psql {shlex.quote(address(connection))}\n", markup=False, soft_wrap=True)
    for comment, statement in things_to_try(connection, prefix).items():
        console.print(f"-- {comment}\n{statement}\n", markup=False, soft_wrap=True)
    console.print(f"done in {time.monotonic() - started:.1f} s")


def query_places(test: LabelledImages, count: int) -> list[int]:
    """Return where the queries are: the first image, and the first ones of further classes.

    Nothing is chosen by hand, so the pictures show what the encoder really does.
    """
    first: dict[int, int] = {}
    for place, label in enumerate(test.labels.tolist()):
        first.setdefault(label, place)
    return list(first.values())[: max(1, count)]


def find_data() -> DemoData:
    """MedMNIST from this machine, else downloaded, else Fashion-MNIST; says which it is.

    Raises CommandError, saying what to install, where none can be had.
    """
    console = output()
    here = any(datasets.find_medmnist(name) for name in datasets.MEDICAL_SETS)
    if not here:
        console.print("MedMNIST is not on this machine: downloading it")
    try:
        # What is here is enough: no waiting for the network because of one set that is not.
        sets = datasets.load_medical(datasets.SPLITS, download=not here)
    except DataNotFoundError as error:
        reason = str(error).split("; ")[0]  # of the first set: the others were not tried
        console.print(f"MedMNIST can't be had: {reason}", markup=False, soft_wrap=True)
    else:
        folders = sorted({str(s["train"].files[0].parent) for s in sets.values()})
        console.print(
            f"[bold]data:[/] MedMNIST from {escape(', '.join(folders))}: {', '.join(sets)}",
            soft_wrap=True,
        )
        missing = [
            name
            for name in datasets.MEDICAL_SETS
            if name not in sets and datasets.STAND_INS.get(name) not in sets
        ]
        if missing:
            console.print(f"not found, and left out: {', '.join(missing)}")
        for name, stand_in in datasets.STAND_INS.items():
            if stand_in in sets:
                console.print(f"{stand_in} stands in for {name}, which is not here")
        return DemoData("medical", "medmnist", sets)
    try:
        fashion = {split: datasets.load_fashion_mnist(split) for split in ("train", "test")}
    except DataNotFoundError as error:
        raise CommandError(f"no data for the demo: MedMNIST can't be had; {error}") from error
    console.print("[bold]data:[/] Fashion-MNIST, from Debian's package, in place of MedMNIST")
    return DemoData("fashion_mnist", "idx", {"fashion_mnist": fashion})


def prepare_collection(connection: psycopg.Connection[Any], model: str) -> Collection:
    """Register the shipped encoders and create the collection "images", unless they are there.

    A collection that is there keeps its model. Raises CommandError if that is another one than the
    data needs: its vectors would say nothing about these images.
    """
    there = connection.execute(
        "SELECT model FROM siamese.collection_status WHERE collection = %s", (DEFAULT_COLLECTION,)
    ).fetchone()
    console = output()
    if there is None:
        connection.execute("SELECT FROM siamese.register_shipped_models()")
        connection.execute("SELECT siamese.create_collection(model => %s)", (model,))
        console.print(f'created the collection "{DEFAULT_COLLECTION}" with model "{model}"')
    elif there[0] != model:
        raise CommandError(
            f'the collection "{DEFAULT_COLLECTION}" has model "{there[0]}", the demo needs '
            f"\"{model}\": drop it (SELECT siamese.drop_collection('{DEFAULT_COLLECTION}')) or "
            "run the demo in another database"
        )
    return find_collection(connection, DEFAULT_COLLECTION)


def load_images(
    connection: psycopg.Connection[Any], collection: Collection, data: DemoData
) -> None:
    """Insert the train and validation images that are not stored yet, by plain INSERTs."""
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
            f"{stored:,} images inserted and embedded in {seconds:.1f} s "
            f"({stored / seconds:,.0f} a second)"
        )
    if report.stored_before:
        console.print(f"{report.stored_before:,} images were stored already")


def build_if_needed(connection: psycopg.Connection[Any]) -> None:
    """Build the index where it isn't there, or where it lacks some vectors."""
    row = connection.execute(
        "SELECT pending, generation, generation_file FROM siamese.collection_status"
        " WHERE collection = %s",
        (DEFAULT_COLLECTION,),
    ).fetchone()
    if row is not None and row[0] == 0 and row[2] == "present":
        output().print(f"the index is up to date (generation {row[1]})")
        return
    with notice_bar(connection, "building the index  "):
        built = connection.execute("SELECT siamese.build_index()").fetchone()
    output().print(f"the index is built (generation {built[0] if built else '?'})")


def things_to_try(connection: psycopg.Connection[Any], prefix: str) -> dict[str, str]:
    """What to ask next and how: statements that work in psql as they are."""
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
        "the same, only among the rows that qualify": (
            f"SELECT {columns} FROM {nearest}, filter => {condition}) {rows};"
        ),
        "what an image shows, by the vote of its nearest neighbours": (
            f"SELECT * FROM {prefix}classify_image({image}, k => 10);"
        ),
    }


def address(connection: psycopg.Connection[Any]) -> str:
    """The connection string of the database, without a password."""
    info = connection.info
    return make_conninfo(host=info.host, port=info.port, user=info.user, dbname=info.dbname)


def _sheet_row(
    connection: psycopg.Connection[Any],
    collection: Collection,
    test: LabelledImages,
    place: int,
    query: ImageRow,
    answers: Sequence[Answer],
) -> SheetRow:
    return SheetRow(
        name=f"{test.name}, test image {place}",
        pixels=test.images[place],
        label=query.label,
        neighbours=sheet_neighbours(connection, collection, answers),
    )


def _short(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
