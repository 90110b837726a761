"""The command `train`. Torch is imported when it runs, not when the command line starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from pg_siamese.training.experiments import EXPERIMENTS

app = typer.Typer(help="Train encoders and export them to ONNX.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    # A callback keeps `train` a sub-command although it is the only one.
    """Train encoders and export them to ONNX."""


@app.command("train")
def train_command(
    experiment: Annotated[str, typer.Argument(help=f"What to train: {' or '.join(EXPERIMENTS)}.")],
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs, instead of the experiment's own number.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="ONNX file to write. [default: models/EXPERIMENT.onnx]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU to use.")] = 2,
    log_folder: Annotated[Path, typer.Option(help="Folder of the TensorBoard logs.")] = Path(
        "build/training"
    ),
) -> None:
    """Train an encoder, export it to ONNX, and write its model card beside it."""
    if experiment not in EXPERIMENTS:
        raise typer.BadParameter(
            f'no experiment "{experiment}"; there are: {", ".join(EXPERIMENTS)}',
            param_hint="EXPERIMENT",
        )
    try:
        from pg_siamese.training.loop import ExportError, run
    except ImportError as error:
        typer.echo(f"training needs the extra packages of pg_siamese[train]: {error}", err=True)
        raise typer.Exit(1) from error
    from pg_siamese.datasets import DataFormatError, DataNotFoundError

    chosen = EXPERIMENTS[experiment]
    command = f"pg_siamese train {experiment}"
    if epochs is not None:
        chosen, command = dataclasses.replace(chosen, epochs=epochs), f"{command} --epochs {epochs}"
    if seed is not None:
        chosen, command = dataclasses.replace(chosen, seed=seed), f"{command} --seed {seed}"
    output = output or Path("models") / f"{experiment}.onnx"
    try:
        run(chosen, output, command=command, log_folder=log_folder, threads=threads, say=typer.echo)
    except (DataNotFoundError, DataFormatError, ExportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
