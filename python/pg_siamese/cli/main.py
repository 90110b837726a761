"""The `pg_siamese` command: load images, search, look after collections, train and evaluate.

Every command takes `--dsn`, a libpq connection string; what it leaves out comes from the usual
`PG*` variables. Heavy modules are imported where they are used, so that the command starts at once.
"""

from __future__ import annotations

import json
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psycopg
import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from pg_siamese import caches
from pg_siamese.cli.terminal import (
    answer_table,
    errors,
    notice_bar,
    output,
    progress_bar,
    worker_line,
)
from pg_siamese.cli.training import calibrate_domain_command, export_command, train_command
from pg_siamese.client.connection import CommandError, connect, describe_error, one_line
from pg_siamese_server.errors import counted

if TYPE_CHECKING:
    from pg_siamese.client.queries import Answer, Collection
    from pg_siamese.datasets import LeftOut

INTERRUPTED = 130
SHEET_NEIGHBOURS = 64  # a sheet is for looking at


class Commands(TyperGroup):
    """Shows every failure that is not a bug as one line on stderr, with exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; expected errors end the process instead of showing a traceback."""
        caches.set_aside()
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            message = expected(error)
            if message is None:
                raise
            code = error.exit_code if isinstance(error, CommandError) else 1
            code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else code
        errors().print(f"[bold red]error:[/] {escape(one_line(message))}", soft_wrap=True)
        raise typer.Exit(code)


def expected(error: BaseException) -> str | None:
    """What to say of an error that a user can cause, None for one that is a bug."""
    from pg_siamese.datasets import DataFormatError

    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, CommandError | DataFormatError):
        return str(error)
    if isinstance(error, psycopg.Error):
        return describe_error(error)
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        named = error.filename is not None and error.strerror is not None
        return f"{error.filename}: {error.strerror}" if named else str(error)
    return None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Reflows the docstrings.
    rich_markup_mode="markdown",
    help="Similar-image search inside PostgreSQL: load images, search them, look after the index.",
)

Dsn = Annotated[
    str | None,
    typer.Option(help="libpq connection string; else the PG* variables.", show_default=False),
]
CollectionName = Annotated[str, typer.Option("--collection", "-c", help="The collection.")]


class Engine(StrEnum):
    """What answers a search."""

    AUTO = "auto"
    FAISS = "faiss"
    PGVECTOR = "pgvector"


class Resize(StrEnum):
    """How an image comes to the encoder's size."""

    STRETCH = "stretch"
    CROP = "crop"
    PAD = "pad"


class EvaluatedSplit(StrEnum):
    """What is evaluated."""

    TEST = "test"
    VAL = "val"


@app.command()
def load(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder of images (its sub-folders are the labels), an npz file in MedMNIST's "
            "layout, or an IDX file of images (with --labels).",
            show_default=False,
        ),
    ],
    collection: CollectionName = "images",
    table: Annotated[
        str | None,
        typer.Option(help="Insert into this table, whatever its collections.", show_default=False),
    ] = None,
    image_column: Annotated[
        str, typer.Option(help="The image column of --table; a collection knows its own.")
    ] = "image",
    split: Annotated[
        list[str] | None,
        typer.Option(help="Only this split: train, val, test; can be given again."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="The IDX file of labels.", show_default=False)
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Name of the data set, else that of SOURCE.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Where there is no such collection yet: create it, on the table siamese.images, "
            "with this model.",
            show_default=False,
        ),
    ] = None,
    skip_rejected: Annotated[
        bool,
        typer.Option("--skip-rejected", help="Go on after an image that the server rejects."),
    ] = False,
    dsn: Dsn = None,
) -> None:
    """Store images in a collection, through its triggers: they are embedded as they go in.

    Files keep their own bytes; pixels of npz and IDX files are stored as PNG. The columns dataset,
    split, label and source are filled where the table has them. Images whose source is stored
    already are left out: a second run goes on where the first one stopped.
    """
    from pg_siamese.client.loading import LoadReport, find_target, load_part
    from pg_siamese.client.queries import ensure_collection, find_collection
    from pg_siamese.client.sources import counted, printable, read_source

    if model is not None and table is not None:
        raise CommandError("--model goes with a collection, not with --table")
    left_out: list[LeftOut] = []
    parts = read_source(
        source, splits=split, labels=labels, dataset=dataset, leave_out=left_out.append
    )
    for file in left_out:
        if file.reason is not None:
            errors().print(
                f"[yellow]left out:[/] {escape(printable(file.path))}: {file.reason}",
                soft_wrap=True,
            )
    report = LoadReport()
    with connect(dsn) as connection:
        if table is None:
            if model is not None:
                ensure_collection(connection, collection, model)
            found = find_collection(connection, collection)
            target = find_target(connection, found.relation, found.image_name)
        else:
            target = find_target(connection, table, image_column)
        for part in parts:
            with progress_bar(str(part), len(part)) as advance:
                load_part(
                    connection,
                    target,
                    part,
                    report=report,
                    skip_rejected=skip_rejected,
                    advance=advance,
                )
    for rejection in report.rejected:
        errors().print(
            f"[yellow]rejected:[/] {escape(rejection.name)}: {escape(rejection.reason)}",
            soft_wrap=True,
        )
    images = "1 image" if report.stored == 1 else f"{report.stored:,} images"
    there = f" (there already: {report.stored_before:,})" if report.stored_before else ""
    output().print(f"{images} stored in {escape(target.relation)}{there}")
    if left_out:
        output().print(escape(counted(left_out)), soft_wrap=True)


@app.command()
def query(
    image: Annotated[
        Path | None, typer.Argument(help="The image file to search with.", show_default=False)
    ] = None,
    id: Annotated[
        str | None,
        typer.Option("--id", help="Search with this stored image instead.", show_default=False),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many neighbours.")] = 10,
    collection: CollectionName = "images",
    filter: Annotated[
        str | None,
        typer.Option(
            help='Only rows with these column values, as JSON: \'{"label": "pneumonia"}\'.',
            show_default=False,
        ),
    ] = None,
    engine: Annotated[Engine, typer.Option(help="What answers.")] = Engine.AUTO,
    sheet: Annotated[
        Path | None,
        typer.Option(help="Draw query and neighbours (at most 64) as PNG.", show_default=False),
    ] = None,
    dsn: Dsn = None,
) -> None:
    """Find the stored images most similar to an image file, or to a stored one (--id)."""
    from pg_siamese.client.queries import (
        find_collection,
        run_search,
        search_statement,
        stored_image,
    )

    if (image is None) == (id is None):
        raise CommandError("give an image file, or --id with the key of a stored image")
    condition = _json_object(filter)
    data, label = None if image is None else image.read_bytes(), None
    with connect(dsn) as connection:
        found = find_collection(connection, collection)
        search = search_statement(
            found, image=data, key=id, k=k, filter=condition, engine=engine.value
        )
        if id is not None:
            data, label = stored_image(connection, found, id)
        try:
            answers = run_search(connection, found, search)
        except Exception as error:
            # The server can't know the file's name.
            if image is None or (reason := expected(error)) is None:
                raise
            raise CommandError(f"{image}: {reason}") from error
        output().print(answer_table(found, answers))
        if sheet is not None and data is not None:
            name = image.name if image is not None else f"{found.key_name} {id}"
            _write_sheet(connection, found, answers, name, data, label, sheet)
            output().print(f"contact sheet: {escape(str(sheet))}", soft_wrap=True)


def _write_sheet(
    connection: psycopg.Connection[Any],
    collection: Collection,
    answers: list[Answer],
    name: str,
    data: bytes,
    label: str | None,
    sheet: Path,
) -> None:
    from pg_siamese.client.contact_sheet import SheetRow, contact_sheet
    from pg_siamese.client.queries import display_pixels, sheet_neighbours

    neighbours = sheet_neighbours(connection, collection, answers[:SHEET_NEIGHBOURS])
    contact_sheet([SheetRow(name, display_pixels(data), label, neighbours)], sheet)


def _json_object(text: str | None) -> dict[str, object] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CommandError(f"--filter is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CommandError('--filter is not a JSON object, like {"label": "pneumonia"}')
    return value


@app.command()
def status(dsn: Dsn = None) -> None:
    """Show every collection: its table, model, vectors, and the state of its index."""
    from psycopg.rows import dict_row

    with connect(dsn) as connection, connection.cursor(row_factory=dict_row) as cursor:
        version = cursor.execute(
            "SELECT extversion AS version FROM pg_catalog.pg_extension WHERE extname = 'pg_siamese'"
        ).fetchone()
        rows = cursor.execute(
            "SELECT * FROM siamese.collection_status ORDER BY collection"
        ).fetchall()
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
            grid.add_row(f"  {name}", escape(_readable(value)))
        console.print(grid)


def _readable(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, datetime):
        return value.astimezone().isoformat(" ", "seconds")
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@app.command("build-index")
def build_index(collection: CollectionName = "images", dsn: Dsn = None) -> None:
    """Build a new generation of a collection's FAISS index; searches go on meanwhile."""
    from pg_siamese.client.queries import find_collection

    with connect(dsn) as connection:
        find_collection(connection, collection)
        try:
            with notice_bar(connection, f"building the index of {collection}"):
                row = connection.execute("SELECT siamese.build_index(%s)", (collection,)).fetchone()
        except KeyboardInterrupt:
            raise CommandError(
                "interrupted: the build was cancelled; searches go on with what there was",
                INTERRUPTED,
            ) from None
    output().print(f"generation {row[0] if row else '?'} of {escape(collection)} is current")


@app.command("rebuild-file")
def rebuild_file(
    collection: Annotated[
        str | None,
        typer.Option(
            "--collection", "-c", help="Only this collection; else all.", show_default=False
        ),
    ] = None,
    dsn: Dsn = None,
) -> None:
    """Make a standby's own files of the current generations, where it has no whole ones."""
    from pg_siamese.client.queries import collection_names, find_collection

    with connect(dsn) as connection:
        if collection is not None:
            find_collection(connection, collection)
        for name in [collection] if collection is not None else collection_names(connection):
            with notice_bar(connection, f"making the index file of {name}"):
                row = connection.execute("SELECT siamese.rebuild_file(%s)", (name,)).fetchone()
            generation = row[0] if row else None
            output().print(
                f"{escape(name)}: no generation yet"
                if generation is None
                else f"{escape(name)}: generation {generation} is here"
            )


@app.command()
def worker(
    collection: Annotated[
        list[str] | None,
        typer.Option(
            "--collection",
            "-c",
            help="Only this collection; can be given again. Else all deferred ones.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Rows taken at once.")] = 256,
    once: Annotated[bool, typer.Option("--once", help="End when nothing waits.")] = False,
    idle_timeout: Annotated[
        float | None,
        typer.Option(min=0, help="End after so many seconds without work.", show_default=False),
    ] = None,
    poll: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds after which to look where no notification comes."),
    ] = 2.0,
    rebuild_pending: Annotated[
        int, typer.Option(min=1, help="Build the index when so many vectors are pending.")
    ] = 20_000,
    rebuild_dead: Annotated[
        float, typer.Option(min=0, help="Build the index when such a share of it is dead.")
    ] = 0.2,
    rebuild: Annotated[
        bool, typer.Option("--rebuild/--no-rebuild", help="Whether to build indexes at all.")
    ] = True,
    dsn: Dsn = None,
) -> None:
    """Embed the rows of deferred collections, as they come; ends on SIGTERM or Ctrl-C.

    Any number of workers may run, on any machines that reach the server: each embeds in its own
    process, on one core, what no other has taken. The role needs siamese.grant_worker.
    """
    from pg_siamese.worker import Options, Worker

    options = Options(
        dsn=dsn,
        collections=tuple(collection or ()),
        batch=batch,
        once=once,
        idle_timeout=idle_timeout,
        poll=poll,
        rebuild_pending=rebuild_pending if rebuild else None,
        rebuild_dead=rebuild_dead,
    )
    with worker_line() as line:
        running = Worker(options, say=line.say, progress=line.show)
        with running.signals.handled():
            totals = running.run()
    failed = f", {totals.failed:,} failed" if totals.failed else ""
    output().print(f"{counted(totals.stored, 'row')} embedded{failed}")
    if once and running.failures:
        name, reason = next(iter(running.failures.items()))
        raise CommandError(f'collection "{name}" could not be embedded: {reason}')


@app.command("register-model")
def register_model(
    file: Annotated[Path, typer.Argument(help="The ONNX file.", show_default=False)],
    name: Annotated[
        str | None,
        typer.Option(help="The model's name, else that of the file.", show_default=False),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Input size in pixels, 224 or WIDTHxHEIGHT (where the graph leaves it open).",
            show_default=False,
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            help="Mean of each channel from 0 to 1, as 0.485,0.456,0.406.", show_default=False
        ),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(
            help="Standard deviation of each channel, as 0.229,0.224,0.225.", show_default=False
        ),
    ] = None,
    resize: Annotated[
        Resize | None,
        typer.Option(help="How an image comes to the input size.", show_default=False),
    ] = None,
    interpolation: Annotated[
        str | None, typer.Option(help="As bilinear or bicubic.", show_default=False)
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Distance between embeddings.", show_default=False)
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Distance below which two images match.", show_default=False),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help='Match probability as JSON: \'{"weight": -8, "bias": 4}\'.', show_default=False
        ),
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="Largest image file, in bytes.", show_default=False)
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Largest image, in pixels.", show_default=False)
    ] = None,
    input_range: Annotated[
        str | None,
        typer.Option(
            help="Values of black and white where image files leave them open, as 0,4095 for "
            "12-bit values in 16-bit files.",
            show_default=False,
        ),
    ] = None,
    dsn: Dsn = None,
) -> None:
    """Register an ONNX encoder; the same name and file again changes nothing.

    Encoders of this project say all about their input themselves. For any other one (float32,
    batch x channels x height x width) the options say what its training used. Weights that the
    exporter wrote into a file beside it (FILE.data) are taken in.
    """
    from pg_siamese.client.models import read_model, register

    width, height = _size(size)
    settings: dict[str, object | None] = {
        "image_width": width,
        "image_height": height,
        "mean": _reals("--mean", mean),
        "std": _reals("--std", std),
        "resize": resize.value if resize else None,
        "interpolation": interpolation,
        "metric": metric,
        "calibration": calibration,
        "threshold": threshold,
        "max_bytes": max_bytes,
        "max_pixels": max_pixels,
        "input_range": _reals("--input-range", input_range),
    }
    data = read_model(file)
    chosen = name or file.stem
    with connect(dsn) as connection:
        model_id = register(connection, chosen, data, settings)
    output().print(f'model "{escape(chosen)}" is registered as number {model_id}')


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise CommandError(f'--size "{text}" is neither a number like 224 nor WIDTHxHEIGHT')
    return int(sides[0]), int(sides[-1])


def _reals(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise CommandError(
            f'{option} "{text}" is no list of numbers like 0.485,0.456,0.406'
        ) from None


@app.command()
def demo(
    sheet: Annotated[
        Path | None,
        typer.Option(help="Where to write the contact sheet.", show_default=False),
    ] = None,
    dsn: Dsn = None,
) -> None:
    """Load real images, build the index, search it, and draw the answers."""
    from pg_siamese.cli.demo import run_demo

    with connect(dsn) as connection:
        run_demo(connection, sheet)


@app.command()
def evaluate(
    models: Annotated[
        list[Path],
        typer.Argument(
            help="ONNX files of one experiment, one for each seed.",
            metavar="MODEL.onnx...",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A data set, as medmnist:breastmnist or folder:photos; can be given again. Else "
            "those that the model was trained on.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[EvaluatedSplit, typer.Option(help="The split that the queries are of.")] = (
        EvaluatedSplit.TEST
    ),
    results: Annotated[
        Path | None,
        typer.Option(
            "--output", help="The results file, else results/EXPERIMENT.json.", show_default=False
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            help="Write the table of all results files beside --output into this Markdown file.",
            show_default=False,
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(help="Draw pictures of the first model into a folder.", show_default=False),
    ] = None,
    in_database: Annotated[
        bool,
        typer.Option(
            "--in-database",
            help="Retrieve in the database too, in a collection of its own that goes again.",
        ),
    ] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the collection of --in-database there.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU to use.")] = 1,
    dsn: Dsn = None,
) -> None:
    """Measure encoders: pairs, triples, neighbours; write the figures, and draw pictures.

    What is chosen (thresholds, calibrations) is chosen on validation images. The gallery is the
    train split. Several files are seeds of one experiment: the results have mean and spread.
    """
    from pg_siamese.cli.evaluation import evaluate as run

    run(
        models,
        data=data or (),
        split=split.value,
        results=results,
        table=table,
        pictures=pictures,
        in_database=in_database,
        keep=keep,
        threads=threads,
        dsn=dsn,
    )


@app.command()
def baseline(
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A data set to evaluate it on, as medmnist:breastmnist; can be given again. Else "
            "the four medical sets.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[Path, typer.Option("--output", help="The ONNX file to write.")] = Path(
        "build/training/efficientnet_lite0/model.onnx"
    ),
) -> None:
    """Export the pretrained EfficientNet-lite0 as it is, to compare encoders with.

    `pg_siamese evaluate` on the file gives its figures under the same protocol.
    """
    try:
        from pg_siamese.training.baseline import export_baseline
    except ImportError as error:
        raise CommandError(
            f"the baseline needs the extra packages of pg_siamese[train]: {error}"
        ) from error
    from pg_siamese.datasets import MEDICAL_SETS

    export_baseline(target, data or [f"medmnist:{name}" for name in MEDICAL_SETS])
    output().print(f"written: {escape(str(target))}", soft_wrap=True)


# These import nothing heavy themselves: torch comes when they run.
app.command("train")(train_command)
app.command("export")(export_command)
app.command("calibrate-domain")(calibrate_domain_command)


if __name__ == "__main__":
    app()
