"""Contact sheets: a query image and its neighbours, with labels and distances, as one PNG."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pg_siamese.files import open_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinct with any kind of colour vision. The frames also differ in line
# style, for prints without colour.
SAME_COLOUR = "#009E73"
OTHER_COLOUR = "#D55E00"
NEUTRAL_COLOUR = "#8A8A8A"
QUERY_COLOUR = "#222222"

CELL_INCHES = 1.65
TEXT_INCHES = 0.6
GAP_INCHES = 0.25
MARGIN_INCHES = 0.25
ROW_NAME_INCHES = 0.32
FRAME_POINTS = 4
QUERY_GAP_INCHES = 0.3
TITLE_INCHES = 0.5
LEGEND_INCHES = 0.15
LABEL_WIDTH = 22
# Neighbours per line.
COLUMNS = 8
# Below this many pixels per side, blocks are clearer than a blur.
SMALL_IMAGE = 160


@dataclass(frozen=True)
class Neighbour:
    """One answer: pixels uint8 (H, W), (H, W, 1) or (H, W, 3), its label and cosine distance.

    ``similarity`` is the calibrated match probability from 0 to 1, None if the model has none.
    ``frame`` is the number of the frame shown, None if the image has one vector. ``measure`` is
    shown in place of all of these.
    """

    pixels: npt.NDArray[np.uint8]
    label: str | None
    distance: float = 0.0
    similarity: float | None = None
    frame: int | None = None
    measure: str | None = None

    def text(self) -> str:
        """Return what is written below the label."""
        if self.measure is not None:
            return self.measure
        text = f"distance {self.distance:.4f}"
        if self.frame is not None:
            text += f"  ·  frame {self.frame}"
        if self.similarity is not None:
            text += f"  ·  match {self.similarity:.0%}"
        return text


@dataclass(frozen=True)
class SheetRow:
    """A query image, its label (None if unknown) and its neighbours, nearest first.

    ``measure`` is written below the label.
    """

    name: str
    pixels: npt.NDArray[np.uint8]
    label: str | None
    neighbours: Sequence[Neighbour]
    measure: str = "query"


def contact_sheet(
    rows: Sequence[SheetRow],
    path: str | os.PathLike[str],
    title: str = "",
    dpi: int = 150,
    label: str = "label",
) -> Path:
    """Draw one line of images per row, and write it to ``path`` as PNG. Return the path.

    Neighbours with the query's label have a solid green frame, those with another label a dashed
    orange one. If either label is unknown, the frame is grey.

    Args:
        rows: from top to bottom.
        path: of the PNG file.
        title: above all.
        dpi: pixels per inch.
        label: what the labels are, for the legend.

    Raises:
        ValueError: there are no rows, or an array is not an image.
        OSError: the file can't be written.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    figure = draw_sheet(rows, title, label)
    with open_whole(path) as file:  # so that a viewer never shows half a picture
        figure.savefig(file, format="png", dpi=dpi)
    return Path(path)


def draw_sheet(rows: Sequence[SheetRow], title: str = "", label: str = "label") -> Figure:
    """Return the figure that :func:`contact_sheet` writes, without pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, max(len(row.neighbours) for row in rows))
    line_height = CELL_INCHES + TEXT_INCHES
    lines = [max(1, math.ceil(len(row.neighbours) / COLUMNS)) for row in rows]
    head = TITLE_INCHES if title else 0.1
    width = 2 * MARGIN_INCHES + CELL_INCHES
    width += columns * (CELL_INCHES + GAP_INCHES) + (QUERY_GAP_INCHES if columns else 0)
    height = head + len(rows) * ROW_NAME_INCHES + sum(lines) * line_height
    height += LEGEND_INCHES + MARGIN_INCHES
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)

    def cell(left: float, top: float) -> Axes:
        box = (left / width, 1 - (top + CELL_INCHES) / height)
        return figure.add_axes((*box, CELL_INCHES / width, CELL_INCHES / height))

    if title:
        figure.text(
            MARGIN_INCHES / width, 1 - 0.3 / height, title, size=13, weight="bold", va="center"
        )
    top = head
    for row, row_lines in zip(rows, lines, strict=True):
        figure.text(
            MARGIN_INCHES / width,
            1 - (top + ROW_NAME_INCHES * 0.45) / height,
            row.name,
            size=10,
            weight="bold",
            color="#444444",
            va="center",
        )
        top += ROW_NAME_INCHES
        _draw_cell(
            cell(MARGIN_INCHES, top),
            row.pixels,
            QUERY_COLOUR,
            "solid",
            row.label or "",
            row.measure,
        )
        for number, neighbour in enumerate(row.neighbours):
            line, column = divmod(number, COLUMNS)
            left = MARGIN_INCHES + QUERY_GAP_INCHES + (column + 1) * (CELL_INCHES + GAP_INCHES)
            colour, style = _frame(row.label, neighbour.label)
            _draw_cell(
                cell(left, top + line * line_height),
                neighbour.pixels,
                colour,
                style,
                neighbour.label or "",
                neighbour.text(),
            )
        top += row_lines * line_height
    _draw_legend(figure, rows, height, label)
    return figure


def _frame(query: str | None, neighbour: str | None) -> tuple[str, str]:
    if query is None or neighbour is None:
        return NEUTRAL_COLOUR, "solid"
    return (SAME_COLOUR, "solid") if query == neighbour else (OTHER_COLOUR, "dashed")


def _draw_cell(
    axes: Axes,
    pixels: npt.NDArray[np.uint8],
    colour: str,
    style: str,
    label: str,
    measure: str,
) -> None:
    from matplotlib.patches import Rectangle

    image = square(pixels)
    small = max(image.shape[:2]) < SMALL_IMAGE
    axes.imshow(
        image,
        cmap="gray",
        vmin=0,
        vmax=255,
        interpolation="nearest" if small else "antialiased",
        aspect="equal",
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_frame_on(False)
    border = FRAME_POINTS / 72 / CELL_INCHES
    axes.add_patch(
        Rectangle(
            (-border, -border),
            1 + 2 * border,
            1 + 2 * border,
            transform=axes.transAxes,
            clip_on=False,
            fill=False,
            edgecolor=colour,
            linewidth=FRAME_POINTS,
            linestyle=(0, (2.0, 0.9)) if style == "dashed" else style,
            joinstyle="miter",
            capstyle="butt",
        )
    )

    def write(text: str, below: float, **style: Any) -> None:
        style |= {"xycoords": "axes fraction", "textcoords": "offset points"}
        axes.annotate(text, (0.5, 0), xytext=(0, -below), ha="center", va="top", **style)

    lines = textwrap.wrap(label, LABEL_WIDTH, max_lines=2, placeholder=" …") or [""]
    write("\n".join(lines), 9, size=8.5, weight="bold", color=colour, linespacing=1.1)
    write(measure, 10 + 10.5 * len(lines), size=7.5, color="#333333")


def _draw_legend(figure: Figure, rows: Sequence[SheetRow], height: float, label: str) -> None:
    from matplotlib.lines import Line2D

    frames = {_frame(row.label, each.label) for row in rows for each in row.neighbours}
    texts = {
        SAME_COLOUR: f"same {label} as the query",
        OTHER_COLOUR: f"another {label}",
        NEUTRAL_COLOUR: f"unknown {label}",
    }
    if frames <= {(NEUTRAL_COLOUR, "solid")}:
        return
    shown = sorted(frames, key=lambda frame: list(texts).index(frame[0]))
    handles = [
        Line2D([], [], color=colour, lw=3.5, linestyle="-" if style == "solid" else (0, (1.6, 0.8)))
        for colour, style in shown
    ]
    figure.legend(
        handles,
        [texts[colour] for colour, _ in shown],
        loc="lower center",
        bbox_to_anchor=(0.5, 0.04 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
        handlelength=2.6,
    )


def square(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return pixels centred on a white square: uint8 (S, S) for grey, (S, S, 3) for RGB.

    Args:
        pixels: uint8 (H, W), (H, W, 1) or (H, W, 3).

    Raises:
        ValueError: they have another shape or type.
    """
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    grey = pixels.ndim == 2
    if pixels.dtype != np.uint8 or not (grey or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ValueError(
            f"not an image: {pixels.dtype} {pixels.shape}, wanted uint8 (H, W), (H, W, 1) or "
            "(H, W, 3)"
        )
    height, width = pixels.shape[:2]
    if not height or not width:
        raise ValueError("not an image: it has no pixels")
    side = max(height, width)
    if height == width:
        return pixels
    canvas = np.full((side, side, *pixels.shape[2:]), 255, dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = pixels
    return canvas
