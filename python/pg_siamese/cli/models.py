"""The command that registers encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from pg_siamese.cli.options import Dsn
from pg_siamese.cli.terminal import output
from pg_siamese.client.connection import CommandError, connect


def register_model(
    file: Annotated[Path, typer.Argument(help="The ONNX file.", metavar="FILE")],
    name: Annotated[
        str | None, typer.Option(help="Name of the model. Default: the name of FILE.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Input size in pixels, 224 or WIDTHxHEIGHT, if the graph leaves it open."
        ),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean of each channel from 0 to 1, e.g. 0.485,0.456,0.406.")
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="Standard deviation of each channel, e.g. 0.229,0.224,0.225.")
    ] = None,
    resize: Annotated[
        Literal["stretch", "crop", "pad"] | None, typer.Option(help="How to resize images.")
    ] = None,
    interpolation: Annotated[
        str | None, typer.Option(help="Resampling filter, e.g. bilinear.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Distance between embeddings.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Distance below which two images match.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help='Match probability as JSON: \'{"weight": -8, "bias": 4}\'.')
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Largest image file, in bytes.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Largest image, in pixels.")] = None,
    input_range: Annotated[
        str | None,
        typer.Option(
            help="Values of black and white if image files leave them open, e.g. 0,4095 for "
            "12-bit values in 16-bit files."
        ),
    ] = None,
    dsn: Dsn = None,
) -> None:
    """Register an ONNX encoder.

    Encoders of this project describe their own input. For any other encoder (float32,
    batch x channels x height x width), give the settings of its training. Weights in a file beside
    the model (FILE.data) are included. Registering the same file again changes nothing.
    """
    from pg_siamese.client.models import read_model, register

    width, height = _size(size)
    settings: dict[str, object | None] = {
        "image_width": width,
        "image_height": height,
        "mean": _reals("--mean", mean),
        "std": _reals("--std", std),
        "resize": resize,
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
        raise CommandError(f'--size "{text}" is neither a number such as 224 nor WIDTHxHEIGHT')
    return int(sides[0]), int(sides[-1])


def _reals(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise CommandError(
            f'{option} "{text}" is not a list of numbers such as 0.485,0.456,0.406'
        ) from None
