"""The command that evaluates encoders: figures of several seeds, results file, table, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import psycopg
import typer
from rich.markup import escape
from rich.table import Table

from pg_siamese.cli.options import Dsn, Threads
from pg_siamese.cli.terminal import output, progress_bar
from pg_siamese.client.connection import CommandError, connect

if TYPE_CHECKING:
    from pg_siamese.datasets import DataSplits
    from pg_siamese.evaluation.figures import Evaluation
    from pg_siamese.evaluation.model import EvaluatedModel

# Of each data set.
ROBUSTNESS_QUERIES = 500


def evaluate(
    models: Annotated[
        list[Path],
        typer.Argument(help="ONNX files of one experiment, one per seed.", metavar="MODEL.onnx..."),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Data set to evaluate on, e.g. medmnist:breastmnist or folder:photos. Repeatable. "
            "Default: those that the model was trained on."
        ),
    ] = None,
    split: Annotated[
        Literal["test", "val"], typer.Option(help="Split to take queries from.")
    ] = "test",
    results: Annotated[
        Path | None,
        typer.Option(
            "--output", help="Results file to write (JSON). Default: results/EXPERIMENT.json."
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(help="Markdown file for the table of all results files beside --output."),
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for pictures of the first model.")
    ] = None,
    in_database: Annotated[
        bool,
        typer.Option(
            "--in-database", help="Also retrieve in the database, in a temporary collection."
        ),
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep that collection.")] = False,
    robustness: Annotated[
        bool,
        typer.Option(
            "--robustness", help="Also change the queries in ten ways, e.g. brightness and blur."
        ),
    ] = False,
    robustness_queries: Annotated[
        int, typer.Option(min=1, help="Most queries of each data set to change.")
    ] = ROBUSTNESS_QUERIES,
    outside: Annotated[
        list[str] | None,
        typer.Option(
            help="Data of other kinds, e.g. imagenette, to count false matches. Repeatable. Pages "
            "of text, noise and plain colours are then tried, too."
        ),
    ] = None,
    threads: Threads = 1,
    dsn: Dsn = None,
) -> None:
    """Measure encoders by pairs, triples and neighbours.

    The figures go into a results file. Thresholds and calibrations are chosen on validation
    images. The gallery is the train split. Several files are seeds of one experiment. Their
    results have mean, spread and a confidence interval. A query's own group is no neighbour.
    """
    from pg_siamese.evaluation.figures import require_sklearn
    from pg_siamese.evaluation.model import data_specs, open_model
    from pg_siamese.evaluation.results import read_results, result, write_result, write_table

    require_sklearn()
    opened = [open_model(path, threads) for path in models]
    for model in opened[1:]:
        if model.experiment != opened[0].experiment:
            raise CommandError(
                f"{model.path} is of experiment {model.experiment}, {opened[0].path} of "
                f"{opened[0].experiment}: evaluate one at a time"
            )
    target = results or Path("results") / f"{opened[0].experiment}.json"
    evaluations: list[Evaluation] = []
    for model in opened:
        same_input = model.spec.input == opened[0].spec.input
        known = evaluations[0].data if evaluations and same_input else ()
        evaluation = _evaluate(model, data or data_specs(model), split, known)
        if in_database:
            with connect(dsn) as connection:
                _add_database(connection, evaluation, keep)
        if robustness:
            _add_robustness(evaluation, robustness_queries)
        if outside:
            _add_outside(evaluation, outside)
        evaluations.append(evaluation)
    command = command_line(
        models,
        data or (),
        split,
        in_database,
        robustness=robustness_queries if robustness else 0,
        outside=outside or (),
    )
    content = result(evaluations, command)
    write_result(content, target)
    console = output()
    console.print(figure_table(evaluations, content["summary"]))
    console.print(f"results: {escape(str(target))}", soft_wrap=True)
    if table is not None:
        write_table(read_results(target.parent), table)
        console.print(f"table: {escape(str(table))}", soft_wrap=True)
    if pictures is not None:
        from pg_siamese.evaluation.pictures import write_pictures

        for picture in write_pictures(evaluations, pictures):
            console.print(f"picture: {escape(str(picture))}", soft_wrap=True)


def _evaluate(
    model: EvaluatedModel, specs: Sequence[str], split: str, known: Sequence[DataSplits]
) -> Evaluation:
    from pg_siamese.evaluation.figures import evaluate_model
    from pg_siamese.evaluation.model import open_data

    found = open_data(model, specs, split, known)
    splits = dict.fromkeys(("train", "val", split))
    total = sum(len(getattr(part, name)) for part in found for name in splits)
    with progress_bar(f"embedding by {model.path}", total) as advance:
        return evaluate_model(model, found, split, advance)


def _add_database(
    connection: psycopg.Connection[tuple[object, ...]], evaluation: Evaluation, keep: bool
) -> None:
    from pg_siamese.evaluation.database import database_retrieval, greatest_difference

    model, data, split = evaluation.model, evaluation.data, evaluation.split
    with progress_bar(f"in the database: {model.path}", _steps(data, split)) as advance:
        stored = database_retrieval(connection, model, data, split, keep=keep, advance=advance)
    for name, engines in stored.figures.items():
        figures = evaluation.figures["sets"][name]
        figures["in_database"] = {
            engine: {
                **asdict(protocol),
                "greatest_difference": greatest_difference(figures["retrieval"], asdict(protocol)),
            }
            for engine, protocol in engines.items()
        }
    if keep:
        output().print(f"collection kept: {stored.collection}")


def _add_robustness(evaluation: Evaluation, most: int) -> None:
    from pg_siamese.evaluation.robustness import embedded_images, robustness

    total = embedded_images(evaluation.data, evaluation.split, most)
    with progress_bar(f"changed images: {evaluation.model.path}", total) as advance:
        evaluation.figures["robustness"] = robustness(evaluation, most, advance)


def _add_outside(evaluation: Evaluation, specs: Sequence[str]) -> None:
    from pg_siamese.evaluation.domain import false_matches, other_images
    from pg_siamese.evaluation.figures import joined_parts

    model = evaluation.model
    say = partial(output().print, markup=False, soft_wrap=True)
    found = {
        name: model.encoder.embed(pixels)
        for name, pixels in other_images(specs, model.spec.input, say)
    }
    joined = next(iter(joined_parts(evaluation.figures).values()))
    evaluation.figures["outside"] = false_matches(
        model.spec, joined["pairs"]["threshold"], evaluation.gallery.vectors, found
    )


def _steps(data: Sequence[DataSplits], split: str) -> int:
    from pg_siamese.evaluation.database import ENGINES

    return sum(len(part.train) + len(ENGINES) * len(getattr(part, split)) for part in data)


def command_line(
    files: Sequence[Path],
    data: Sequence[str],
    split: str,
    in_database: bool,
    *,
    robustness: int = 0,
    outside: Sequence[str] = (),
) -> str:
    """Return the command that gives these figures again.

    Of paths outside the current folder only the file's name is shown.
    """
    words = ["pg_siamese evaluate", *(_shown(path) for path in files)]
    words += [f"--data {_shown_spec(spec)}" for spec in data]
    words += [f"--split {split}"] if split != "test" else []
    words += ["--in-database"] if in_database else []
    if robustness:
        words += ["--robustness"]
        if robustness != ROBUSTNESS_QUERIES:
            words += [f"--robustness-queries {robustness}"]
    words += [f"--outside {_shown_spec(spec)}" for spec in outside]
    return " ".join(words)


def _shown(path: Path) -> str:
    if not path.is_absolute():
        return path.as_posix()
    folder = Path.cwd()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def _shown_spec(spec: str) -> str:
    kind, colon, rest = spec.partition(":")
    return f"{kind}:{_shown(Path(rest))}" if colon else spec


def figure_table(evaluations: Sequence[Evaluation], figures: dict[str, Any]) -> Table:
    """Return the main figures as a table for the terminal: mean, spread over the files, interval.

    ``figures`` are the summary of a results file.
    """
    from pg_siamese.evaluation.figures import joined_parts
    from pg_siamese.evaluation.results import spread, variants

    seeds = len(evaluations)
    title = f"{evaluations[0].model.experiment}, {seeds} model{'s' if seeds > 1 else ''}"
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("figure")
    table.add_column(evaluations[0].split, justify="right")
    for note, part in joined_parts(figures).items():
        for key, kind in (("pairs", "pairs"), ("set_pairs", "pairs, which set")):
            if pairs := part.get(key):
                name = f"{kind}{note}"
                table.add_row(f"{name}: accuracy, %", spread(pairs["accuracy"], 100, 2))
                table.add_row(f"{name}: area under the ROC curve", spread(pairs["auc"], 1, 4))
                table.add_row(f"{name}: contrastive loss", spread(pairs["contrastive_loss"], 1, 4))
                table.add_row(f"{name}: log loss", spread(pairs["log_loss"], 1, 4))
        if reliability := part.get("reliability"):
            error = spread(reliability["expected_calibration_error"], 100, 2)
            table.add_row(f"pairs{note}: expected calibration error, %", error)
        if "triples" in part:
            accuracy = spread(part["triples"]["accuracy"], 100, 2)
            table.add_row(f"triples{note}: accuracy, %", accuracy)
        if "right_set" in part:
            table.add_row(f"nearest of the right set{note}, %", spread(part["right_set"], 1, 3))
            by_neighbour = spread(part["set_pairs"]["accuracy_by_neighbour"], 100, 2)
            table.add_row(f"pairs by their neighbours' sets{note}, %", by_neighbour)
    for name, values in figures["sets"].items():
        for note, own in variants(values).items():
            subject = f"{escape(name)}{note}"
            for key, label in (("map5", "mAP@5"), ("mmv5", "mMV@5"), ("acc1", "ACC@1")):
                table.add_row(f"{subject}: {label}, %", spread(own["retrieval"][key], 1, 2, True))
            table.add_row(f"{subject}: P@10, %", spread(own["precision_at_10"], 100, 2, True))
            table.add_row(f"{subject}: 5-NN, %", spread(own["knn_accuracy"]["5"], 100, 2, True))
        for engine, stored in values.get("in_database", {}).items():
            label = f"{escape(name)}: greatest difference in the database, {engine}"
            table.add_row(label, f"{stored['greatest_difference']['max']:.3f}")
    for name, values in figures.get("robustness", {}).items():
        subject, mean = f"{escape(name)}, changed", values["mean"]
        table.add_row(f"{subject}: mAP@5, %", spread(mean["map5"], 1, 2))
        table.add_row(f"{subject}: cosine to the unchanged", spread(mean["cosine"], 1, 4))
        table.add_row(f"{subject}: nearest stays, %", spread(mean["same_neighbour"], 100, 2))
        table.add_row(f"{subject}: its class stays, %", spread(mean["same_class"], 100, 2))
    for name, values in figures.get("outside", {}).items():
        table.add_row(f"{escape(name)}: false matches, %", spread(values["false_match"], 1, 2))
    if apart := [part.name for part in evaluations[0].data if part.has_groups]:
        table.caption = (
            f"No group of {escape(', '.join(apart))} is among both queries and neighbours, "
            "and pairs that match are of two groups."
        )
        if any("as_published" in values for values in figures["sets"].values()):
            table.caption += " As published: a query's own group may be a neighbour."
        table.caption_justify = "left"
    return table
