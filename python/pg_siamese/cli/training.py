"""The commands that train encoders, export them and calibrate them.

They import torch when they run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pg_siamese.cli.failures import extra_packages
from pg_siamese.cli.options import Threads
from pg_siamese.cli.terminal import output as console
from pg_siamese.client.connection import CommandError
from pg_siamese.training.experiments import ExperimentError, experiment_names, load_experiment

RUNS = Path("build/training")


@contextmanager
def _export_failures() -> Iterator[None]:
    """Turn what a user can cause into one line."""
    with extra_packages("train"):
        import lightning  # noqa: F401
        import torch  # noqa: F401
    from pg_siamese.training.loop import ExportError

    try:
        yield
    except ExportError as error:
        raise CommandError(str(error)) from error


def train(
    experiment: Annotated[
        str,
        typer.Argument(
            help=f"Experiment: {', '.join(experiment_names())}, or the path of a TOML file.",
            metavar="EXPERIMENT",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Data to train on instead: folder:PATH, zip:PATH, npz:PATH, idx:FOLDER or "
            "medmnist:FLAG. Repeatable."
        ),
    ] = None,
    from_collection: Annotated[
        str | None,
        typer.Option(
            help="Collection to train on instead. The PG* variables name the server.",
            metavar="NAME",
        ),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(help="With --from-collection: column of the classes.", metavar="COLUMN"),
    ] = None,
    group_column: Annotated[
        str | None,
        typer.Option(
            help="With --from-collection: column of the groups, such as patients. Default: the "
            "collection's own, if it has one.",
            metavar="COLUMN",
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(help="ONNX file of the same network to start from.", metavar="MODEL.onnx"),
    ] = None,
    head_only: Annotated[
        bool,
        typer.Option("--head-only", help="Train the last layer alone, in minutes."),
    ] = False,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Number of epochs instead of the experiment's.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Additional ONNX file to write, with its card beside it.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the run's last checkpoint.")
    ] = False,
    threads: Threads = 2,
    runs: Annotated[Path, typer.Option(help="Parent folder of EXPERIMENT/seed-SEED.")] = RUNS,
) -> None:
    """Train an encoder, export it to ONNX, and write its model card beside it."""
    chosen = load_experiment(experiment)
    command = f"pg_siamese train {experiment}"
    if from_collection is not None:
        data = [*(data or ()), _collection(from_collection, label_column, group_column)]
    elif label_column is not None or group_column is not None:
        raise CommandError("--label-column and --group-column need --from-collection")
    if data:
        chosen = chosen.changed(data=tuple(data))
        command += "".join(f" --data {text}" for text in data)
    if start is not None:
        chosen, command = chosen.started_from(str(start)), f"{command} --start {start.name}"
    if head_only:
        chosen, command = chosen.head_only(), f"{command} --head-only"
    if epochs is not None:
        chosen, command = chosen.changed(epochs=epochs), f"{command} --epochs {epochs}"
    if seed is not None:
        chosen, command = chosen.changed(seed=seed), f"{command} --seed {seed}"
    if not chosen.data:
        raise ExperimentError(f"{chosen.name} needs data: --data folder:PATH, for example")
    with _export_failures():
        from pg_siamese.training.loop import run

        run(
            chosen,
            command=command,
            runs=runs,
            output=output,
            resume=resume,
            threads=threads,
            say=typer.echo,
        )


def _collection(name: str, label_column: str | None, group_column: str | None) -> str:
    """Return the text that names a collection as data."""
    if label_column is None:
        raise CommandError("--from-collection needs --label-column: the column of the classes")
    return "/".join([f"collection:{name}", label_column, *filter(None, [group_column])])


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint, or the folder of a run (its best checkpoint, or else its last).",
            metavar="CHECKPOINT",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="ONNX file to write, with its card. Default: model.onnx beside the checkpoint."
        ),
    ] = None,
    threads: Threads = 2,
) -> None:
    """Export a checkpoint to ONNX, calibrated and evaluated on its training's data."""
    if not checkpoint.exists():
        raise CommandError(f"{checkpoint}: no such file or folder")
    with _export_failures():
        from pg_siamese.training.loop import export_checkpoint

        export_checkpoint(checkpoint, output, threads=threads, say=typer.echo)


def calibrate_domain(
    model: Annotated[
        Path, typer.Argument(help="ONNX file of an encoder, changed in place.", metavar="MODEL")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Data that it was trained on, e.g. medmnist:breastmnist or folder:photos. "
            "Repeatable. Default: what the file names."
        ),
    ] = None,
    outside: Annotated[
        list[str] | None,
        typer.Option(
            help="Data of other kinds, to count errors. Repeatable. Pages of text, noise and plain "
            "colours are always tried."
        ),
    ] = None,
    threads: Threads = 2,
) -> None:
    """Store in an encoder's file which images its match probability holds for.

    Exported encoders already have that. The graph and the embeddings stay the same.
    """
    with extra_packages("train"):
        from pg_siamese.training import domain
    domain.calibrate_domain(
        model, data=data or (), outside=outside or (), threads=threads, say=typer.echo
    )


def baseline(
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Data set to evaluate it on, e.g. medmnist:breastmnist. Repeatable. Default: the "
            "four medical sets."
        ),
    ] = None,
    target: Annotated[Path, typer.Option("--output", help="ONNX file to write.")] = (
        RUNS / "efficientnet_lite0" / "model.onnx"
    ),
) -> None:
    """Export the pretrained EfficientNet-lite0, to compare encoders with it.

    Run `pg_siamese evaluate` on the file for its figures under the same protocol.
    """
    with extra_packages("train"):
        from pg_siamese.training.baseline import export_baseline
    from pg_siamese.datasets import MEDICAL_SETS

    export_baseline(target, data or [f"medmnist:{name}" for name in MEDICAL_SETS])
    console().print(f"written: {escape(str(target))}", soft_wrap=True)
