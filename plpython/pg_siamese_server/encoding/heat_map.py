"""Draw which parts of a picture matter: colours over the picture in grey, as a PNG file."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pg_siamese_server.encoding.drawing import fitted, font, png_file
from pg_siamese_server.encoding.specification import InputSpec

# Viridis, at equal steps: even to the eye, also without colour vision, and in the public domain.
# Source: van der Walt and Smith, https://bids.github.io/colormap.
_STEPS = np.frombuffer(
    bytes.fromhex(
        "44015448186a472d7b4240863b528b33638d2c728e26828e21918c1f9f8827ad813dbc745cc86381d34daadc32"
        "d5e21afde725"
    ),
    np.uint8,
).reshape(-1, 3)
COLOURS = np.column_stack(
    [np.interp(np.linspace(0, len(_STEPS) - 1, 256), range(len(_STEPS)), part) for part in _STEPS.T]
).astype(np.float32)
# How much of a colour covers the picture, where nothing matters and where most does.
FAINT, STRONG = 0.1, 0.7
# The legend, in shares of the picture's longer side, and its least height in pixels.
LEGEND, LEAST_LEGEND = 0.07, 18
LABEL = "distance without this part"


def draw(
    picture: NDArray[np.uint8],
    heat: NDArray[np.float64],
    spec: InputSpec,
    side: int,
    *,
    legend: bool,
) -> bytes:
    """Return a PNG file of a picture with a heat map over it.

    Args:
        picture: uint8 (height, width, 3), as ``render_image`` makes it.
        heat: (rows, columns) of the encoder's input. What is not positive has no heat.
        spec: how the picture became the encoder's input.
        side: pixels of the longer side.
        legend: whether a strip below says what colours mean.
    """
    grey = fitted(picture, side).convert("L")
    most = max(0.0, float(heat.max()))
    shares = np.clip(heat, 0, None) / (most or 1.0)
    parts = on_picture(shares, spec, *grey.size)
    cover = (FAINT + (STRONG - FAINT) * parts)[..., None]
    mixed = np.asarray(grey, np.float32)[..., None] * (1 - cover) + _colours(parts) * cover
    drawn = Image.fromarray(np.rint(mixed).astype(np.uint8))
    if legend:
        drawn = _with_legend(drawn, most)
    return png_file(drawn)


def on_picture(
    heat: NDArray[np.float64], spec: InputSpec, width: int, height: int
) -> NDArray[np.float32]:
    """Return heat (rows, columns) of the encoder's input at the places of a picture's pixels.

    What the input leaves out of the picture has none.

    Returns:
        float32 (height, width), from 0 to 1.
    """
    image = Image.fromarray(heat.astype(np.float32))
    size, left, top = (width, height), 0.0, 0.0
    if spec.resize == "crop":
        wide = spec.width / spec.height
        kept = min(width, height * wide), min(height, width / wide)
        size = max(1, round(kept[0])), max(1, round(kept[1]))
    elif spec.resize == "pad":
        share = min(spec.width / width, spec.height / height)
        left, top = (spec.width - width * share) / 2, (spec.height - height * share) / 2
    box = left, top, spec.width - left, spec.height - top
    found = np.zeros((height, width), dtype=np.float32)
    row, column = (height - size[1]) // 2, (width - size[0]) // 2
    resized = np.asarray(image.resize(size, Image.Resampling.BICUBIC, box))
    found[row : row + size[1], column : column + size[0]] = resized
    return np.clip(found, 0, 1)


def _colours(parts: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return the colours (..., 3) of values from 0 to 1."""
    found: NDArray[np.float32] = COLOURS[np.rint(parts * 255).astype(np.uint8)]
    return found


def _with_legend(drawn: Image.Image, most: float) -> Image.Image:
    height = max(LEAST_LEGEND, round(LEGEND * max(drawn.size)))
    canvas = Image.new("RGB", (drawn.width, drawn.height + height), "white")
    canvas.paste(drawn)
    pen, letters = ImageDraw.Draw(canvas), font(height * 0.5)
    gap, middle = height // 4, drawn.height + height / 2
    pen.text((gap, middle), "0", "black", letters, "lm")
    left, length = 2 * gap + round(pen.textlength("0", letters)), min(4 * height, drawn.width // 3)
    bar = np.tile(_colours(np.linspace(0, 1, length)), (height // 2, 1, 1))
    canvas.paste(Image.fromarray(np.rint(bar).astype(np.uint8)), (left, drawn.height + gap))
    text, right = f"+{most:.2g}", left + length + gap
    if right + pen.textlength(f"{text} {LABEL}", letters) <= drawn.width:
        text = f"{text} {LABEL}"
    pen.text((right, middle), text, "black", letters, "lm")
    return canvas
