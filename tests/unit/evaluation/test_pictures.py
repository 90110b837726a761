"""The pictures of an evaluation: what is in them, and that they are files of a fit size."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from pg_siamese.client.connection import CommandError
from pg_siamese.datasets import LabelledImages
from pg_siamese.evaluation.figures import Evaluation
from pg_siamese.evaluation.pictures import style, write_pictures
from pg_siamese.evaluation.pictures.collages import (
    Shown,
    Triplet,
    brief,
    neighbour_collage,
    triplet_collage,
)
from pg_siamese.evaluation.pictures.curves import (
    change_curves,
    curves,
    read_epochs,
    reliability_curve,
    roc,
)
from pg_siamese.evaluation.pictures.matrices import confusion, confusion_matrices
from pg_siamese.evaluation.pictures.scatter import Snapshots, animate, read_snapshots, scatter
from pg_siamese.evaluation.pictures.style import PALETTE, new_figure, save
from pg_siamese.evaluation.retrieval import Embedded, nearest
from pg_siamese_server.encoding.specification import InputSpec, ModelSpec

NAMES = ("neighbours", "triplets", "ten-nearest", "confusion", "roc")


def grey(seed: int = 0, size: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size), np.uint8)


def texts(figure: Any) -> list[str]:
    return [item.get_text() for item in figure.findobj(Text) if item.get_text()]


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def epochs(count: int = 5) -> list[dict[str, Any]]:
    return [
        {"epoch": n, "train_loss": 1 / n, "val_loss": 1.2 / n, "val_accuracy": 1 - 0.5 / n}
        for n in range(1, count + 1)
    ]


# --- single pictures --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distance", "text"), [(0.0, "0.000"), (0.0123, "0.012"), (0.0005, "0.001"), (3.2e-6, "3e-06")]
)
def test_small_distances_are_not_shown_as_none(distance: float, text: str) -> None:
    assert brief(distance) == text


def test_curves_have_a_line_for_each_figure_of_each_run() -> None:
    figure = curves([epochs(), epochs(4)], "title")
    assert figure is not None
    loss, accuracy = figure.axes
    assert len(loss.lines) == 4
    named = [str(line.get_label()) for line in loss.lines]
    assert [name for name in named if name[0] != "_"] == ["training", "validation"]
    assert np.allclose(accuracy.lines[0].get_ydata(), [50, 75, 100 - 50 / 3, 87.5, 90])
    assert (loss.get_xlabel(), accuracy.get_ylabel()) == ("epoch", "accuracy, %")


def test_curves_of_what_was_logged() -> None:
    figure = curves([[{"epoch": 1, "train_loss": 1.0}, {"epoch": 2, "val_map5": 80.0}]], "")
    assert figure is not None
    loss, quality = figure.axes
    assert (len(loss.lines), len(quality.lines)) == (1, 1)
    assert np.asarray(quality.lines[0].get_xdata()).tolist() == [2]
    assert curves([[{"epoch": 1}]], "") is None


@pytest.mark.parametrize("text", ["{", '{"epoch": 1}', "[1]"])
def test_a_broken_metrics_file_is_named(tmp_path: Path, text: str) -> None:
    assert read_epochs(tmp_path) is None
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(CommandError, match=r"metrics\.json"):
        read_epochs(tmp_path)


def test_roc_curve_has_area_and_threshold() -> None:
    pairs = (np.array([0.1, 0.4, 0.3, 0.9]), np.array([True, True, False, False]))
    figure = roc(pairs, 0.35, "title")
    # Of four couples of a matching and another pair, three are in the right order.
    assert {"area 0.7500", "threshold 0.35", "chance"} <= set(texts(figure))
    point = figure.axes[0].lines[-1]
    assert np.asarray(point.get_xydata()).tolist() == [[50, 50]]
    assert len(figure.axes[0].child_axes) == 0
    near = roc((np.arange(400.0), np.arange(400) < 200), 199.5, "title")
    assert len(near.axes[0].child_axes) == 1  # all happens in a corner


def test_reliability_has_a_point_and_an_interval_for_each_bin() -> None:
    ends = {"low": 0.1, "high": 0.9, "share": 0.5}
    bins = {"1": {"predicted": 0.2, "observed": 0.3}, "2": {"predicted": 0.8, "observed": 0.6}}
    figures = {
        "expected_calibration_error": 0.15,
        "bins": {number: {**each, **ends} for number, each in bins.items()},
    }
    figure = reliability_curve(figures, "title")
    assert {"expected calibration error 15.0 %", "perfect", "95 %"} <= set(texts(figure))
    line = figure.axes[0].lines[-1]
    assert np.allclose(line.get_xydata(), [[20, 30], [80, 60]])
    (intervals,) = figure.axes[0].collections
    segments = [np.asarray(path.vertices) for path in intervals.get_paths()]
    assert np.allclose(segments, [[[20, 10], [20, 90]], [[80, 10], [80, 90]]])


def changes(kinds: int) -> dict[str, Any]:
    """Figures of changed images, as ``robustness`` gives them."""
    one = {
        str(n): {"cosine": 1 - n / 10, "same_neighbour": 1 - n / 5, "map5": 80 - n}
        for n in range(1, 6)
    }
    kind_names = [f"kind_{number}" for number in range(kinds)]
    return {"unchanged": {"map5": 80}, "changes": dict.fromkeys(kind_names, one)}


def test_changes_have_a_panel_for_each_figure_and_set() -> None:
    figure = change_curves({"first": changes(10), "second": changes(10)}, "title")
    assert len(figure.axes) == 6
    panels = {axes.get_ylabel(): axes for axes in figure.axes[::2]}
    lines = panels["nearest stays, %"].lines
    assert len(lines) == 10
    assert np.allclose(lines[0].get_ydata(), [100, 80, 60, 40, 20, 0])
    assert np.allclose(panels["mAP@5, %"].lines[0].get_ydata(), [80, 79, 78, 77, 76, 75])
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == len({look[1:] for look in looks}) == 10
    assert {"first", "second", "kind 3"} <= set(texts(figure))


def test_confusion_counts_by_hand() -> None:
    part = confusion("set", ("a", "b", "c"), np.array([0, 0, 0, 1, 2]), np.array([0, 0, 1, 1, 0]))
    assert part.counts.tolist() == [[2, 1, 0], [0, 1, 0], [1, 0, 0]]
    written = texts(confusion_matrices([part], "title"))
    assert {"67", "33", "100", "a (3)", "b (1)", "title"} <= set(written)
    figure = confusion_matrices([part, part, part], "")
    assert sum(bool(axes.images) for axes in figure.axes) == 3


def test_scatter_names_every_class() -> None:
    points = np.random.default_rng(0).normal(size=(40, 2))
    figure = scatter(points, np.repeat([0, 1], 20), ("cats", "dogs", "none here"), "title")
    assert {"cats", "dogs"} <= set(texts(figure))
    assert "none here" not in texts(figure)
    assert len(set(PALETTE)) == 10


def test_animation_has_a_frame_for_each_snapshot(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    growing = random.normal(size=(4, 30, 2)) * np.arange(1, 5)[:, None, None]
    snapshots = Snapshots(growing, np.repeat([0, 1, 2], 10), np.array([0, 1, 2, 5]))
    path = animate(snapshots, ("a", "b", "c"), "title", tmp_path / "forming.gif")
    with Image.open(path) as picture:
        assert getattr(picture, "n_frames", 1) == 4
        assert picture.info["loop"] == 0
        picture.seek(3)
        assert picture.info["duration"] == 3000
    assert [file.name for file in tmp_path.iterdir()] == ["forming.gif"]


def test_a_broken_snapshots_file_is_named(tmp_path: Path) -> None:
    assert read_snapshots(tmp_path) is None
    path = tmp_path / "snapshots.npz"
    path.write_bytes(b"nothing")
    with pytest.raises(CommandError, match=r"snapshots\.npz"):
        read_snapshots(tmp_path)
    np.savez(path, points=np.zeros((2, 3, 2)), labels=np.zeros(4), epochs=np.arange(2))
    with pytest.raises(CommandError, match="points have shape"):
        read_snapshots(tmp_path)
    np.savez(path, points=np.zeros((2, 3, 2), "f2"), labels=np.zeros(3, int), epochs=np.arange(2))
    assert read_snapshots(tmp_path) is not None


def test_triplets_say_their_distances() -> None:
    good = Triplet(Shown(grey(), "a"), Shown(grey(1), "a", 0.1), Shown(grey(2), "b", 0.9))
    bad = Triplet(Shown(grey(), "a"), Shown(grey(1), "a", 0.7), Shown(grey(2), "b", 0.2))
    written = texts(triplet_collage([good, bad, good], 0.5, "title"))
    assert {"a\ndistance 0.100", "b\ndistance 0.900", "a\ndistance 0.700"} <= set(written)
    assert written.count("anchor") == written.count("negative") == 3


def test_ten_nearest_of_each_query() -> None:
    row = (Shown(grey(), "a"), [Shown(grey(n), "a", n / 10) for n in range(10)])
    figure = neighbour_collage([row, row], "title")
    assert sum(bool(axes.images) for axes in figure.axes) == 22
    assert "0.900" in texts(figure)


def test_a_picture_that_would_be_large_is_reduced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style, "MOST_BYTES", 20_000)
    figure = new_figure(3, 3)
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    figure.subplots().imshow(noise, interpolation="nearest")
    path = save(figure, tmp_path / "new" / "noise.png")
    with Image.open(path) as picture:
        assert picture.mode == "P"
    # Noise can't be packed, so it ends with the least size.
    assert size_of(path)[0] < 3 * 120 * 0.6


# --- all that apply ---------------------------------------------------------------------------


def evaluation(
    folder: Path, sets: int = 1, dimension: int = 3, labels: str = "class"
) -> Evaluation:
    """What an evaluation of a model with nearly perfect embeddings gives."""
    random = np.random.default_rng(0)
    classes = ("first class", "second class", "third class")
    data: list[Any] = []
    joined: dict[str, list[Any]] = {"train": [], "test": []}
    for number in range(sets):
        parts = {}
        for split, count in (("train", 30), ("val", 15), ("test", 15)):
            own = np.arange(count) % 3
            shape = (count, 14, 14, 3) if number else (count, 14, 14)
            pixels = random.integers(0, 256, shape, np.uint8)
            parts[split] = LabelledImages(f"set {number}", split, pixels, own, classes)
            if split in joined:
                middle = np.eye(max(dimension, 3 * sets))[own + 3 * number][:, :dimension]
                noise = random.normal(0, 0.1, (count, dimension))
                joined[split].append((middle + noise, own + 3 * number, np.full(count, number)))
        data.append(SimpleNamespace(name=f"set {number}", **parts))
    gallery, queries = (
        Embedded(*(np.concatenate(column) for column in zip(*joined[split], strict=True)))
        for split in ("train", "test")
    )
    found = {
        part.name: nearest(queries.of_set(n).vectors, gallery.of_set(n).vectors, 10)
        for n, part in enumerate(data)
    }
    model: Any = SimpleNamespace(path=folder / "model.onnx", labels=labels, experiment="tried")
    model.metric, model.spec = "cosine", ModelSpec(InputSpec(14, 14), weight=-8.0, bias=4.0)
    pairs = (np.array([0.1, 0.2, 0.8, 0.9]), np.array([True, True, False, False]))
    figures = {"pairs": {"threshold": 0.5}}
    return Evaluation(model, data, "test", gallery, queries, found, pairs, figures, {})


@pytest.mark.parametrize(("sets", "labels"), [(1, "class"), (2, "class"), (2, "set")])
def test_the_pictures_that_apply_to_any_model(tmp_path: Path, sets: int, labels: str) -> None:
    target = tmp_path / "pictures"
    paths = list(write_pictures([evaluation(tmp_path, sets, 6, labels)], target))
    assert [path.name for path in paths] == [f"tried-{name}.png" for name in NAMES]
    for path in paths:
        width, height = size_of(path)
        assert width > 400 and height > 200
        assert path.stat().st_size < 300_000
    assert len(list(target.iterdir())) == len(paths)


def test_a_run_gives_curves_and_two_dimensions_a_scatter(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(epochs()))
    points = np.random.default_rng(0).normal(size=(3, 20, 2)).astype(np.float16)
    snapshots = {"points": points, "labels": np.arange(20) % 3, "epochs": np.arange(3)}
    np.savez(tmp_path / "snapshots.npz", **snapshots)  # type: ignore[arg-type]
    paths = list(write_pictures([evaluation(tmp_path, dimension=2)], tmp_path / "out"))
    names = {f"tried-{name}.png" for name in (*NAMES, "curves", "scatter")}
    assert {path.name for path in paths} == names | {"tried-forming.gif"}
