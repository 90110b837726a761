"""Embeddings of two dimensions as points, and how they come to lie there during training."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pg_siamese.client.connection import CommandError
from pg_siamese.evaluation.pictures.style import PALETTE, new_figure, plain_axes, rendered
from pg_siamese.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

SNAPSHOTS_FILE = "snapshots.npz"
MOST_FRAMES = 40
FRAME_MILLISECONDS = 250
LAST_MILLISECONDS = 3000
GIF_DPI = 80

Points = npt.NDArray[Any]


def scatter(points: Points, labels: npt.NDArray[Any], classes: Sequence[str], title: str) -> Figure:
    """Draw points (N, 2) in the colours of their classes, each class named at its middle."""
    figure = new_figure(6.4, 6.4, title)
    axes = figure.subplots()
    _draw(axes, points, labels, classes, size=3)
    return figure


def _draw(
    axes: Axes, points: Points, labels: npt.NDArray[Any], classes: Sequence[str], size: float
) -> None:
    import matplotlib.patheffects as effects

    plain_axes(axes)
    for number, name in enumerate(classes):
        mine = points[labels == number]
        if not len(mine):
            continue
        colour = PALETTE[number % len(PALETTE)]
        axes.scatter(mine[:, 0], mine[:, 1], s=size, color=colour, alpha=0.7, linewidths=0)
        axes.annotate(
            name,
            np.median(mine, axis=0),
            ha="center",
            va="center",
            size=13,
            weight="bold",
            color=colour,
            path_effects=[effects.withStroke(linewidth=3, foreground="white")],
        )
    axes.plot(0, 0, "+", color="#222222", markersize=9)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel("embedding, dimension 1")
    axes.set_ylabel("embedding, dimension 2")


@dataclass(frozen=True)
class Snapshots:
    """Points (S, N, 2) of the same images at S moments, their labels (N,), and epochs (S,).

    Moments may be within an epoch.
    """

    points: Points
    labels: npt.NDArray[Any]
    epochs: npt.NDArray[Any]


def read_snapshots(folder: Path) -> Snapshots | None:
    """Return the snapshots of a run, None if it has none.

    Raises:
        CommandError: the file is broken.
    """
    path = folder / SNAPSHOTS_FILE
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            found = Snapshots(file["points"].astype(np.float32), file["labels"], file["epochs"])
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CommandError(f"{path}: no snapshots: {error}") from None
    shape = (len(found.epochs), len(found.labels), 2)
    if found.points.shape != shape or not len(found.epochs):
        raise CommandError(f"{path}: points have shape {found.points.shape}, not {shape}")
    return found


def animate(snapshots: Snapshots, classes: Sequence[str], title: str, path: Path) -> Path:
    """Write a GIF with one frame per snapshot, the last one longer.

    Of many snapshots, 40 at even distances are taken. The axes stay the same throughout, so that
    growing apart is seen as such.
    """
    count = len(snapshots.epochs)
    chosen = np.unique(np.linspace(0, count - 1, min(count, MOST_FRAMES)).round().astype(int))
    reach = 1.05 * float(np.quantile(np.abs(snapshots.points), 0.999))
    figure = new_figure(5.2, 5.4, "")
    frames = []
    for place in chosen:
        figure.clear()
        figure.suptitle(title, x=0.02, ha="left", size=11, weight="bold")
        axes = figure.subplots()
        _draw(axes, snapshots.points[place], snapshots.labels, classes, size=4)
        axes.set_aspect("equal", adjustable="box")
        axes.set_xlim(-reach, reach)
        axes.set_ylim(-reach, reach)
        axes.set_title(f"epoch {float(snapshots.epochs[place]):.1f}", size=10, loc="right")
        frames.append(rendered(figure, GIF_DPI))
    palette = _gif_palette()
    frames = [frame.quantize(palette=palette, dither=0) for frame in frames]
    file = io.BytesIO()
    frames[0].save(
        file,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=[FRAME_MILLISECONDS] * (len(frames) - 1) + [LAST_MILLISECONDS],
        loop=0,
        optimize=False,
    )
    write_whole(path, file.getvalue())
    return path


def _gif_palette() -> Image.Image:
    """Return one palette for all frames: the colours of the classes and greys, in tints.

    With a palette per frame colours would flicker. A palette made from a frame would merge classes,
    since most of a frame is white.
    """
    from matplotlib.colors import to_rgb
    from PIL import Image

    tints = [
        tuple(round(255 * (1 - share * (1 - value))) for value in to_rgb(colour))
        for colour in (*PALETTE, "#000000")
        for share in (1.0, 0.85, 0.7, 0.5, 0.3, 0.15)
    ]
    numbers = [number for colour in ((255, 255, 255), *tints) for number in colour]
    palette = Image.new("P", (1, 1))
    palette.putpalette(numbers)
    return palette
