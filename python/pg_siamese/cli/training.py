"""The commands `train`, `export` and `calibrate-domain`.

Torch is imported when they run, not when they are shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pg_siamese.client.connection import CommandError
from pg_siamese.training.experiments import ExperimentError, experiment_names, load_experiment

app = typer.Typer(help="Train encoders and export them to ONNX.", no_args_is_help=True)

RUNS = Path("build/training")
Threads = Annotated[int, typer.Option(min=1, help="Threads of the CPU to use.")]


@contextmanager
def _failures() -> Iterator[None]:
    """Turn what a user can cause into one line."""
    try:
        import lightning  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise CommandError(
            f"training needs the extra packages of pg_siamese[train]: {error}"
        ) from error
    from pg_siamese.training.loop import ExportError

    try:
        yield
    except ExportError as error:
        raise CommandError(str(error)) from error


@app.command("train")
def train_command(
    experiment: Annotated[
        str,
        typer.Argument(
            help=f"What to train: {', '.join(experiment_names())}, or the path of a TOML file.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Data to train on instead, as folder:PATH, zip:PATH, npz:PATH, idx:FOLDER or "
            "medmnist:FLAG; can be given again.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Epochs, instead of the experiment's own number.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="ONNX file to write, with its card beside it, besides the run's own model.onnx.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of everything random.", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")
    ] = False,
    threads: Threads = 2,
    runs: Annotated[
        Path, typer.Option(help="Folder of the runs: RUNS/EXPERIMENT/seed-SEED.")
    ] = RUNS,
) -> None:
    """Train an encoder, export it to ONNX, and write its model card beside it."""
    chosen = load_experiment(experiment)
    command = f"pg_siamese train {experiment}"
    if data:
        chosen = chosen.changed(data=tuple(data))
        command += "".join(f" --data {text}" for text in data)
    if epochs is not None:
        chosen, command = chosen.changed(epochs=epochs), f"{command} --epochs {epochs}"
    if seed is not None:
        chosen, command = chosen.changed(seed=seed), f"{command} --seed {seed}"
    if not chosen.data:
        raise ExperimentError(f"{chosen.name} needs data: --data folder:PATH, for example")
    with _failures():
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


@app.command("export")
def export_command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint, or the folder of a run (then the one that it keeps).",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="ONNX file to write, with its card; else model.onnx beside the checkpoint.",
            show_default=False,
        ),
    ] = None,
    threads: Threads = 2,
) -> None:
    """Export a checkpoint to ONNX: calibrated and evaluated on the data it was trained on."""
    if not checkpoint.exists():
        raise CommandError(f"{checkpoint}: no such file or folder")
    with _failures():
        from pg_siamese.training.loop import export_checkpoint

        export_checkpoint(checkpoint, output, threads=threads, say=typer.echo)


@app.command("calibrate-domain")
def calibrate_domain_command(
    model: Annotated[
        Path, typer.Argument(help="ONNX file of an encoder; it is changed.", show_default=False)
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Data that it was trained on, as medmnist:breastmnist or folder:photos; can be "
            "given again. Else what the file names.",
            show_default=False,
        ),
    ] = None,
    outside: Annotated[
        list[str] | None,
        typer.Option(
            help="Data of other kinds, to count errors by; can be given again. Pages of text, "
            "noise and plain colours are tried in any case.",
            show_default=False,
        ),
    ] = None,
    threads: Threads = 2,
) -> None:
    """Store in an encoder's file which images its match probability holds for.

    Exported encoders have that already. The graph, and so every embedding, stays the same.
    """
    try:
        from pg_siamese.training.domain import calibrate_domain
    except ImportError as error:
        raise CommandError(
            f"this needs the extra packages of pg_siamese[train]: {error}"
        ) from error
    calibrate_domain(model, data=data or (), outside=outside or (), threads=threads, say=typer.echo)


if __name__ == "__main__":
    app()
