"""The body of `pg_siamese evaluate`: figures of several seeds, results file, table, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import psycopg
from rich.markup import escape
from rich.table import Table

from pg_siamese.cli.terminal import output, progress_bar
from pg_siamese.client.connection import CommandError, connect
from pg_siamese.datasets import DataSplits
from pg_siamese.evaluation.database import ENGINES, database_retrieval, greatest_difference
from pg_siamese.evaluation.figures import Evaluation, evaluate_model, require_sklearn
from pg_siamese.evaluation.model import EvaluatedModel, data_specs, open_data, open_model
from pg_siamese.evaluation.results import (
    read_results,
    result,
    rounded,
    spread,
    summary,
    write_result,
    write_table,
)
from pg_siamese_server.encoding.specification import METRICS


def evaluate(
    files: Sequence[Path],
    *,
    data: Sequence[str] = (),
    split: str = "test",
    results: Path | None = None,
    table: Path | None = None,
    pictures: Path | None = None,
    in_database: bool = False,
    keep: bool = False,
    dsn: str | None = None,
    threads: int = 1,
) -> None:
    """Evaluate the model files of one experiment, one for each seed.

    Writes `results` (JSON; by default results/EXPERIMENT.json), the table in `table` from all
    results files beside it, and pictures of the first model. Raises CommandError.
    """
    require_sklearn()
    models = [open_model(path, threads) for path in files]
    for model in models[1:]:
        if model.experiment != models[0].experiment:
            raise CommandError(
                f"{model.path} is of experiment {model.experiment}, {models[0].path} of "
                f"{models[0].experiment}: evaluate one at a time"
            )
    target = results or Path("results") / f"{models[0].experiment}.json"
    evaluations: list[Evaluation] = []
    for model in models:
        evaluation = _evaluate(model, data or data_specs(model), split)
        if in_database:
            with connect(dsn) as connection:
                _add_database(connection, evaluation, keep)
        evaluations.append(evaluation)
    content = result(evaluations, command_line(files, data, split, in_database))
    write_result(content, target)
    console = output()
    console.print(figure_table(evaluations))
    console.print(f"results: {escape(str(target))}", soft_wrap=True)
    if table is not None:
        write_table(read_results(target.parent), table)
        console.print(f"table: {escape(str(table))}", soft_wrap=True)
    if pictures is not None:
        from pg_siamese.evaluation.pictures import write_pictures

        for picture in write_pictures(evaluations, pictures):
            console.print(f"picture: {escape(str(picture))}", soft_wrap=True)


def _evaluate(model: EvaluatedModel, specs: Sequence[str], split: str) -> Evaluation:
    found = open_data(model, specs, split)
    splits = dict.fromkeys(("train", "val", split))
    total = sum(len(getattr(part, name)) for part in found for name in splits)
    with progress_bar(f"embedding by {model.path}", total) as advance:
        return evaluate_model(model, found, split, advance)


def _add_database(
    connection: psycopg.Connection[tuple[object, ...]], evaluation: Evaluation, keep: bool
) -> None:
    model, data, split = evaluation.model, evaluation.data, evaluation.split
    with progress_bar(f"in the database: {model.path}", _steps(data, split)) as advance:
        there = database_retrieval(connection, model, data, split, keep=keep, advance=advance)
    for name, engines in there.figures.items():
        figures = evaluation.figures["sets"][name]
        figures["in_database"] = {
            engine: {
                **asdict(protocol),
                "greatest_difference": greatest_difference(figures["retrieval"], asdict(protocol)),
            }
            for engine, protocol in engines.items()
        }
    if keep:
        output().print(f"the collection stays: {there.collection}")


def _steps(data: Sequence[DataSplits], split: str) -> int:
    return sum(len(part.train) + len(ENGINES) * len(getattr(part, split)) for part in data)


def command_line(files: Sequence[Path], data: Sequence[str], split: str, in_database: bool) -> str:
    """The command that gives these figures again; paths outside the current folder lose theirs."""
    words = ["pg_siamese evaluate", *(_shown(path) for path in files)]
    words += [f"--data {_shown_spec(spec)}" for spec in data]
    words += [f"--split {split}"] if split != "test" else []
    words += ["--in-database"] if in_database else []
    return " ".join(words)


def _shown(path: Path) -> str:
    if not path.is_absolute():
        return path.as_posix()
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name


def _shown_spec(spec: str) -> str:
    kind, colon, rest = spec.partition(":")
    return f"{kind}:{_shown(Path(rest))}" if colon else spec


def figure_table(evaluations: Sequence[Evaluation]) -> Table:
    """The main figures for the terminal: mean, and the spread over the files."""
    figures = rounded(summary([e.figures for e in evaluations]))
    seeds = len(evaluations)
    title = f"{evaluations[0].model.experiment}, {seeds} model{'s' if seeds > 1 else ''}"
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("figure")
    table.add_column(evaluations[0].split, justify="right")
    for key, name in (("pairs", "pairs"), ("set_pairs", "pairs, which set")):
        if pairs := figures.get(key):
            table.add_row(f"{name}: accuracy, %", spread(pairs["accuracy"], 100, 2))
            table.add_row(f"{name}: area under the ROC curve", spread(pairs["auc"], 1, 4))
            table.add_row(f"{name}: contrastive loss", spread(pairs["contrastive_loss"], 1, 4))
            table.add_row(f"{name}: log loss", spread(pairs["log_loss"], 1, 4))
    if "triples" in figures:
        table.add_row("triples: accuracy, %", spread(figures["triples"]["accuracy"], 100, 2))
    if "right_set" in figures:
        table.add_row("nearest of the right set, %", spread(figures["right_set"], 1, 3))
        by_neighbour = figures["set_pairs"]["accuracy_by_neighbour"]
        table.add_row("pairs by their neighbours' sets, %", spread(by_neighbour, 100, 2))
    for name, values in figures["sets"].items():
        variants = {"": values}
        variants |= {f", by {m}": values[f"by_{m}"] for m in METRICS if f"by_{m}" in values}
        for note, own in variants.items():
            where = f"{escape(name)}{note}"
            for key, label in (("map5", "mAP@5"), ("mmv5", "mMV@5"), ("acc1", "ACC@1")):
                table.add_row(f"{where}: {label}, %", spread(own["retrieval"][key], 1, 2))
            table.add_row(f"{where}: P@10, %", spread(own["precision_at_10"], 100, 2))
            table.add_row(f"{where}: 5-NN, %", spread(own["knn_accuracy"]["5"], 100, 2))
        for engine, there in values.get("in_database", {}).items():
            label = f"{escape(name)}: greatest difference in the database, {engine}"
            table.add_row(label, f"{there['greatest_difference']['max']:.3f}")
    return table
