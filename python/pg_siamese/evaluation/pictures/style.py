"""How all pictures look, and how they are written. No pyplot: no display, no global state."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pg_siamese.client.contact_sheet import square
from pg_siamese.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any kind of colour vision, in an order of good contrast.
# Two greys make it ten. Classes are named in the picture too, so colour is never all there is.
PALETTE = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"),
    *("#D55E00", "#222222", "#B8A900", "#8A8A8A", "#6A3D9A"),
)
TRAIN_COLOUR, VAL_COLOUR = PALETTE[0], PALETTE[5]
DPI, LEAST_DPI = 120, 60
MOST_BYTES = 300_000
FRAME_POINTS = 3.0


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """Return a white figure of so many inches, with a title at the top left and a tight layout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left", size=12, weight="bold")
    return figure


def plain_axes(axes: Axes) -> None:
    """Give axes no more lines than needed: left and bottom, and a faint grid."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def image_cell(
    axes: Axes, pixels: npt.NDArray[np.uint8], colour: str, below: str = "", dashed: bool = False
) -> None:
    """Draw an image with a coloured frame and a text below. Small images are sharp blocks."""
    image = square(pixels)
    smooth = "nearest" if max(image.shape[:2]) < 160 else "antialiased"
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation=smooth)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_edgecolor(colour)
        spine.set_linewidth(FRAME_POINTS)
        spine.set_capstyle("butt" if dashed else "projecting")  # caps would fill the gaps
        spine.set_linestyle((0, (2, 1)) if dashed else "solid")
    if below:
        axes.set_xlabel(below, size=8, labelpad=4)


def wrapped(text: str, width: int, lines: int = 2) -> str:
    """Return ``text`` in lines of at most ``width`` characters."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …") or [""])


def rendered(figure: Figure, dpi: int = DPI) -> Any:
    """Return the figure as a Pillow image, RGB."""
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return Image.open(file).convert("RGB")


def save(figure: Figure, path: Path, dpi: int = DPI) -> Path:
    """Write a figure as PNG and return the path.

    One over 300 kB is reduced to 256 colours, and then in size, down to 60 dots per inch.
    """
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, pil_kwargs={"optimize": True})
    while file.tell() > MOST_BYTES and dpi >= LEAST_DPI:
        file = io.BytesIO()
        rendered(figure, dpi).quantize(256).save(file, format="png", optimize=True)
        dpi = int(dpi * 0.85)
    write_whole(path, file.getvalue())
    return path
