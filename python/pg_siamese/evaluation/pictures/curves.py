"""Curves: loss and accuracy over the epochs, ROC and reliability of pairs, changed pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pg_siamese.client.connection import CommandError
from pg_siamese.client.contact_sheet import NEUTRAL_COLOUR
from pg_siamese.evaluation.pairs import Flags
from pg_siamese.evaluation.pictures.style import (
    PALETTE,
    TRAIN_COLOUR,
    VAL_COLOUR,
    new_figure,
    plain_axes,
)
from pg_siamese.evaluation.retrieval import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Epochs = Sequence[dict[str, Any]]
METRICS_FILE = "metrics.json"
# What is drawn beside the losses: of each group, the first whose figures were logged.
QUALITY = (
    (("train_accuracy", "val_accuracy"), "accuracy", 100.0),
    (("val_map5",), "mAP@5", 1.0),
)


def read_epochs(folder: Path) -> Epochs | None:
    """Return the epochs of a run, None if the folder has none.

    Each is a dictionary with "epoch" and figures such as "train_loss", "val_loss", "val_accuracy".

    Raises:
        CommandError: the file is broken.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        return None
    try:
        epochs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"{path}: not JSON: {error}") from None
    if not isinstance(epochs, list) or not all(
        isinstance(item, dict) and "epoch" in item for item in epochs
    ):
        raise CommandError(f"{path}: not a list of epochs")
    return epochs or None


def curves(runs: Sequence[Epochs], title: str) -> Figure | None:
    """Draw loss (left) and accuracy (right) over the epochs, a line for each run.

    Returns:
        The figure, None if nothing was logged.
    """
    have = {key for epochs in runs for item in epochs for key in item}
    losses = [key for key in ("train_loss", "val_loss") if key in have]
    quality = next((group for group in QUALITY if have.intersection(group[0])), None)
    panels = bool(losses) + (quality is not None)
    if not panels:
        return None
    figure = new_figure(4.6 * panels, 3.5, title)
    places = figure.subplots(1, panels, squeeze=False)[0]
    if losses:
        _lines(places[0], runs, losses, 1.0)
        places[0].set_ylabel("loss")
        places[0].set_ylim(bottom=0)
    if quality is not None:
        keys, name, scale = quality
        _lines(places[-1], runs, [key for key in keys if key in have], scale)
        places[-1].set_ylabel(f"{name}, %")
    for axes in places:
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        plain_axes(axes)
        axes.legend(frameon=False, fontsize=9)
    return figure


def _lines(axes: Axes, runs: Sequence[Epochs], keys: Sequence[str], scale: float) -> None:
    for key in keys:
        train = key.startswith("train")
        for number, epochs in enumerate(runs):
            points = [(item["epoch"], item[key] * scale) for item in epochs if _number(item, key)]
            axes.plot(
                *zip(*points, strict=True) if points else ((), ()),
                color=TRAIN_COLOUR if train else VAL_COLOUR,
                # Told apart without colour, too.
                linestyle="--" if train else "-",
                marker="." if len(points) < 25 else None,
                linewidth=1.6 if len(runs) == 1 else 1.1,
                label=("training" if train else "validation") if not number else None,
            )


def _number(item: dict[str, Any], key: str) -> bool:
    return isinstance(item.get(key), int | float)


def roc(pairs: tuple[Floats, Flags], threshold: float, title: str) -> Figure:
    """Draw the ROC curve of pairs, judged by their distance, with the model's threshold on it."""
    from sklearn.metrics import auc, roc_curve

    apart, match = pairs
    false, true, _ = roc_curve(match, -apart)
    area = float(auc(false, true))
    said = apart <= threshold
    point = (100 * float(said[~match].mean()), 100 * float(said[match].mean()))
    figure = new_figure(4.8, 4.6, title)
    axes = figure.subplots()
    plain_axes(axes)
    axes.plot([0, 100], [0, 100], color=NEUTRAL_COLOUR, linestyle=":", linewidth=1, label="chance")
    _roc_lines(axes, false, true, point, f"area {area:.4f}", f"threshold {threshold:.3g}")
    _square(axes, "other pairs taken for a match, %", "matching pairs found, %", "lower right")
    if area > 0.99:
        # All of it happens in a corner.
        inset = axes.inset_axes((0.36, 0.4, 0.5, 0.42))
        plain_axes(inset)
        _roc_lines(inset, false, true, point, "", "")
        far = max(1.0, min(10.0, 2 * point[0], 100.0))
        inset.set_xlim(-0.05 * far, far)
        inset.set_ylim(min(100 - far, 2 * point[1] - 100), 100 + 0.05 * far)
        inset.tick_params(labelsize=7)
        inset.set_title("the corner", size=8)
    return figure


def _square(axes: Axes, across: str, up: str, legend: Literal["lower right", "upper left"]) -> None:
    """Finish a square of per cent against per cent."""
    axes.set_xlim(-1, 101)
    axes.set_ylim(-1, 101)
    axes.set_aspect("equal")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.legend(loc=legend, frameon=False, fontsize=9)


def _roc_lines(
    axes: Axes, false: Floats, true: Floats, point: tuple[float, float], area: str, at: str
) -> None:
    axes.plot(100 * false, 100 * true, color=TRAIN_COLOUR, linewidth=2, label=area or None)
    axes.plot(*point, "o", color=VAL_COLOUR, markersize=7, label=at or None)


def reliability_curve(figures: Mapping[str, Any], title: str) -> Figure:
    """Draw observed against predicted shares of matches, with their intervals."""
    bins = figures["bins"].values()
    predicted, observed, low, high = (
        100 * np.array([each[key] for each in bins])
        for key in ("predicted", "observed", "low", "high")
    )
    figure = new_figure(4.8, 4.6, title)
    axes = figure.subplots()
    plain_axes(axes)
    axes.plot([0, 100], [0, 100], color=NEUTRAL_COLOUR, linestyle=":", linewidth=1, label="perfect")
    axes.vlines(predicted, low, high, color=TRAIN_COLOUR, linewidth=2, alpha=0.5, label="95 %")
    error = 100 * figures["expected_calibration_error"]
    label = f"expected calibration error {error:.1f} %"
    axes.plot(predicted, observed, "o-", color=TRAIN_COLOUR, linewidth=1.6, label=label)
    _square(axes, "predicted match probability, %", "pairs that match, %", "upper left")
    return figure


# Of changed queries: key, name and scale of a row of panels.
CHANGED = (
    ("cosine", "cosine to\nthe unchanged", 1.0),
    ("same_neighbour", "nearest stays, %", 100.0),
    ("map5", "mAP@5, %", 1.0),
)
MARKERS = "os^Dv"


def change_curves(figures: Mapping[str, Any], title: str) -> Figure:
    """Draw how changed queries do over severity: a column for each data set, a line for each kind.

    Severity 0 is no change.
    """
    figure = new_figure(2.1 + 2.7 * len(figures), 7.2, title)
    panels = figure.subplots(len(CHANGED), len(figures), squeeze=False, sharex=True, sharey="row")
    for column, (name, values) in enumerate(figures.items()):
        unchanged = {"cosine": 1.0, "same_neighbour": 1.0, **values["unchanged"]}
        for row, (key, label, scale) in enumerate(CHANGED):
            axes = panels[row, column]
            plain_axes(axes)
            for place, (kind, by_severity) in enumerate(values["changes"].items()):
                points = [unchanged[key], *(each[key] for each in by_severity.values())]
                axes.plot(
                    range(len(points)),
                    scale * np.array(points),
                    color=PALETTE[place % len(PALETTE)],
                    # Told apart without colour, too.
                    marker=MARKERS[place % len(MARKERS)],
                    linestyle="-" if place < len(MARKERS) else "--",
                    markersize=3.5,
                    linewidth=1.2,
                    label=kind.replace("_", " "),
                )
            if not column:
                axes.set_ylabel(label)
        panels[0, column].set_title(name, size=10)
        panels[-1, column].set_xlabel("severity")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    return figure
