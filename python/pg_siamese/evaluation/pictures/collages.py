"""Collages of images: triplets with their distances, and the ten nearest of some queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pg_siamese.client.contact_sheet import OTHER_COLOUR, QUERY_COLOUR, SAME_COLOUR
from pg_siamese.evaluation.pictures.style import image_cell, new_figure, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pixels = npt.NDArray[np.uint8]
TRIPLETS_BESIDE = 2
CELL_INCHES = 1.35


@dataclass(frozen=True)
class Shown:
    """An image to show: pixels uint8 (H, W) or (H, W, 3), its label, its distance to the first."""

    pixels: Pixels
    label: str
    distance: float = 0.0


def brief(distance: float) -> str:
    """Return a distance to three decimals, or its order of magnitude if these would say 0."""
    return f"{distance:.3f}" if distance == 0 or distance >= 0.0005 else f"{distance:.0e}"


@dataclass(frozen=True)
class Triplet:
    """An anchor, an image that matches it, and one that doesn't."""

    anchor: Shown
    positive: Shown
    negative: Shown


def triplet_collage(triplets: Sequence[Triplet], threshold: float, title: str) -> Figure:
    """Draw triplets, two in a line.

    A distance on the wrong side of the threshold is dashed orange.
    """
    lines = -(-len(triplets) // TRIPLETS_BESIDE)
    figure = new_figure(
        TRIPLETS_BESIDE * 3 * (CELL_INCHES + 0.12) + 0.5, lines * (CELL_INCHES + 0.75) + 0.7, title
    )
    # An empty column between the two triplets of a line.
    widths = [1, 1, 1, 0.12, 1, 1, 1]
    grid = figure.subplots(lines, len(widths), squeeze=False, width_ratios=widths)
    for axes in grid.ravel():
        axes.set_axis_off()
    for number, triplet in enumerate(triplets):
        line, beside = divmod(number, TRIPLETS_BESIDE)
        parts = (triplet.anchor, triplet.positive, triplet.negative)
        roles = ("anchor", "positive", "negative")
        for place, (shown, role) in enumerate(zip(parts, roles, strict=True)):
            axes = grid[line, 4 * beside + place]
            axes.set_axis_on()
            right = (shown.distance <= threshold) == (role == "positive")
            colour = SAME_COLOUR if right else OTHER_COLOUR
            below = wrapped(shown.label, 20)
            if role == "anchor":
                colour, right = QUERY_COLOUR, True
            else:
                below = f"{below}\ndistance {shown.distance:.3f}"
            image_cell(axes, shown.pixels, colour, below, dashed=not right)
            axes.set_title(role, size=8.5, pad=4)
    figure.supxlabel(
        f"green: on the right side of the threshold {threshold:.3g}, dashed: on the wrong one",
        size=8.5,
    )
    return figure


def neighbour_collage(rows: Sequence[tuple[Shown, Sequence[Shown]]], title: str) -> Figure:
    """Draw a line for each query: the query, then its neighbours, nearest first, with distances."""
    columns = 1 + max(len(neighbours) for _, neighbours in rows)
    cell = 0.95
    figure = new_figure(columns * cell + 1.3, len(rows) * (cell + 0.22) + 0.7, title)
    widths = [1.0, 0.15, *([1.0] * (columns - 1))]
    grid = figure.subplots(len(rows), columns + 1, squeeze=False, width_ratios=widths)
    for axes in grid.ravel():
        axes.set_axis_off()
    for line, (query, neighbours) in enumerate(rows):
        axes = grid[line, 0]
        axes.set_axis_on()
        image_cell(axes, query.pixels, QUERY_COLOUR)
        axes.set_ylabel(
            "\n".join(wrapped(part, 17) for part in query.label.split(": ")),
            size=8.5,
            weight="bold",
            rotation=0,
            ha="right",
            va="center",
            labelpad=6,
        )
        for place, shown in enumerate(neighbours):
            axes = grid[line, 2 + place]
            axes.set_axis_on()
            same = shown.label == query.label
            colour = SAME_COLOUR if same else OTHER_COLOUR
            image_cell(axes, shown.pixels, colour, brief(shown.distance), dashed=not same)
    figure.supxlabel(
        "left: the query, then its nearest with their distance (green: the same label, "
        "dashed orange: another one)",
        size=8.5,
    )
    return figure
