"""The command that registers encoders."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pg_siamese.cli.options import Dsn
from pg_siamese.cli.terminal import output
from pg_siamese.client.connection import CommandError, connect


class Resize(StrEnum):
    """How an image comes to the encoder's size."""

    STRETCH = "stretch"
    CROP = "crop"
    PAD = "pad"


def register_model(
    file: Annotated[
        Path, typer.Argument(help="The ONNX file.", metavar="FILE", show_default=False)
    ],
    name: Annotated[
        str | None,
        typer.Option(help="Name of the model. Default: the name of FILE.", show_default=False),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Input size in pixels, 224 or WIDTHxHEIGHT, if the graph leaves it open.",
            show_default=False,
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            help="Mean of each channel from 0 to 1, e.g. 0.485,0.456,0.406.", show_default=False
        ),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(
            help="Standard deviation of each channel, e.g. 0.229,0.224,0.225.", show_default=False
        ),
    ] = None,
    resize: Annotated[
        Resize | None, typer.Option(help="How to resize images.", show_default=False)
    ] = None,
    interpolation: Annotated[
        str | None, typer.Option(help="Resampling filter, e.g. bilinear.", show_default=False)
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
            help="Values of black and white if image files leave them open, e.g. 0,4095 for "
            "12-bit values in 16-bit files.",
            show_default=False,
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
