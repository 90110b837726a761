"""Confusion matrices of the vote of the nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pg_siamese.evaluation.pictures.style import new_figure, wrapped
from pg_siamese.evaluation.retrieval import Integers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 2


@dataclass(frozen=True)
class Confusion:
    """Counts (true class, voted class) of one data set."""

    name: str
    classes: tuple[str, ...]
    counts: Integers


def confusion(name: str, classes: Sequence[str], wanted: Integers, given: Integers) -> Confusion:
    """Count how often each class (rows) is taken for each (columns)."""
    counts = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts, (wanted, given), 1)
    return Confusion(name, tuple(classes), counts)


def confusion_matrices(parts: Sequence[Confusion], title: str) -> Figure:
    """Draw one matrix per data set.

    Colours and numbers are per cent of the true class.
    """
    columns = min(COLUMNS, len(parts))
    rows = -(-len(parts) // columns)
    side = 5.4 if len(parts) == 1 else 4.4
    figure = new_figure(columns * side + 0.4, rows * (side - 0.4) + 0.4, title)
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, part in zip(places, parts, strict=False):
        _matrix(axes, part, len(parts) > 1)
    for axes in places[len(parts) :]:
        axes.set_axis_off()
    return figure


def _matrix(axes: Axes, part: Confusion, named: bool) -> None:
    totals = part.counts.sum(axis=1, keepdims=True)
    shares = 100 * part.counts / np.maximum(totals, 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    size = 9 if len(part.classes) <= 5 else 7.5
    for (row, column), share in np.ndenumerate(shares):
        if part.counts[row, column]:
            axes.text(
                column,
                row,
                f"{share:.0f}" if share >= 1 else "<1",
                ha="center",
                va="center",
                size=size,
                color="white" if share > 55 else "#222222",
            )
    # As many letters as fit beside each other lie flat.
    flat = max(map(len, part.classes)) * len(part.classes) <= 40
    places = range(len(part.classes))
    axes.set_xticks(
        places,
        [wrapped(name, 16) for name in part.classes],
        rotation=0 if flat else 55,
        ha="center" if flat else "right",
        rotation_mode="default" if flat else "anchor",
        size=size,
    )
    labels = [
        f"{wrapped(name, 20)} ({int(total)})"
        for name, total in zip(part.classes, totals[:, 0], strict=True)
    ]
    axes.set_yticks(places, labels, size=size)
    axes.set_xlabel("vote of the five nearest", size=9)
    axes.set_ylabel("true class (images)", size=9)
    if named:
        axes.set_title(part.name, size=10, weight="bold")
