"""Changed pictures: that each kind does what it says, and what is counted of them."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from pg_siamese.datasets import LabelledImages, open_dataset
from pg_siamese.evaluation import robustness as module
from pg_siamese.evaluation.retrieval import Embedded
from pg_siamese.evaluation.robustness import (
    KINDS,
    SEVERITIES,
    Kind,
    changed,
    embedded_images,
    robustness,
)
from pg_siamese_server.encoding.specification import InputSpec

MOVES = ("turn", "shift", "zoom")


def texture(*shape: int) -> np.ndarray:
    """An image of long waves and short ones."""
    places = np.indices(shape).astype(float)
    waves = np.sin(places[0] / 7) + np.cos(places[1] / 5) + 0.3 * np.cos(places[1] / 1.2)
    waves += 0.3 * places[2:].sum(axis=0)
    return np.asarray(np.rint(120 + 40 * waves), np.uint8)


def blob(place: tuple[float, float], side: int = 200) -> np.ndarray:
    """A bright spot, ``place`` (x, y) from the centre."""
    y, x = np.indices((side, side)) + 0.5 - side / 2
    spot = np.exp(-((x - place[0]) ** 2 + (y - place[1]) ** 2) / (2 * 3.0**2))
    return np.asarray(np.rint(255 * spot), np.uint8)


def centre(image: np.ndarray) -> tuple[float, float]:
    """The place (x, y) of the only spot, from the image's centre."""
    y, x = np.indices(image.shape) + 0.5 - image.shape[0] / 2
    return float((x * image).sum() / image.sum()), float((y * image).sum() / image.sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(224, 180), (180, 224, 3)])
def test_each_severity_changes_more(kind: str, shape: tuple[int, ...]) -> None:
    image = texture(*shape)
    difference = 0.0
    for severity in SEVERITIES:
        (found,) = changed(image[None], kind, severity)
        assert (found.shape, found.dtype) == (image.shape, np.uint8)
        more = float(np.abs(found.astype(int) - image).mean())
        assert more > difference
        difference = more


def test_the_same_image_is_changed_in_the_same_way() -> None:
    images = np.stack([texture(40, 40)] * 6)
    for kind in KINDS:
        assert np.array_equal(changed(images, kind, 3), changed(images, kind, 3))
    # Each image has a direction and a noise of its own.
    for kind in (*MOVES, "gaussian_noise"):
        assert len(np.unique(changed(images, kind, 3), axis=0)) > 1


def test_brightness_and_contrast_by_hand() -> None:
    halves = np.repeat(np.array([[80, 120]], np.uint8), 40, axis=1).reshape(1, 2, 40)
    values = {
        kind: sorted(set(changed(halves, kind, 5).ravel().tolist()))
        for kind in ("brightness_up", "brightness_down", "contrast_up", "contrast_down")
    }
    assert values == {
        "brightness_up": [120, 180],
        "brightness_down": [40, 60],
        "contrast_up": [68, 132],  # 1.6 times as far from the mean, 100
        "contrast_down": [92, 108],
    }


def test_jpeg_compression_has_the_stated_quality() -> None:
    image = texture(40, 40, 3)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=30)
    expected = np.asarray(Image.open(file))
    assert np.array_equal(changed(image[None], "jpeg_compression", 2)[0], expected)


def test_noise_has_the_stated_deviation_and_one_pattern() -> None:
    grey = np.full((1, 200, 200), 128, np.uint8)
    little, more = (changed(grey, "gaussian_noise", severity) - 128.0 for severity in (1, 2))
    assert little.std() == pytest.approx(0.04 * 255, rel=0.02)
    assert more.std() == pytest.approx(0.08 * 255, rel=0.02)
    assert np.corrcoef(little.ravel(), more.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("side", [224, 448])
def test_blur_grows_with_the_picture(side: int) -> None:
    line = np.zeros((1, side, side), np.uint8)
    line[:, :, side // 2] = 255
    row = changed(line, "gaussian_blur", 5)[0, 0].astype(float)
    places = np.arange(side) - side // 2
    deviation = math.sqrt((row * places**2).sum() / row.sum())
    assert deviation == pytest.approx(2.0 * side / 224, rel=0.1)


def test_moves_by_hand() -> None:
    spot = blob((50, 0))[None]
    x, y = centre(changed(spot, "turn", 5)[0])
    assert math.hypot(x, y) == pytest.approx(50, abs=0.2)
    assert abs(math.degrees(math.atan2(y, x))) == pytest.approx(10, abs=0.2)
    x, y = centre(changed(spot, "shift", 5)[0])
    assert math.hypot(x - 50, y) == pytest.approx(0.1 * 200, abs=0.2)
    places = [centre(image) for image in changed(np.repeat(spot, 8, axis=0), "zoom", 5)]
    assert {round(x) for x, _ in places} == {round(50 * 1.2), round(50 / 1.2)}
    assert all(abs(y) < 0.2 for _, y in places)


@pytest.mark.parametrize("kind", MOVES)
@pytest.mark.parametrize("shape", [(28, 28), (30, 200), (200, 30, 3)])
def test_no_move_shows_what_is_beyond_the_edge(kind: str, shape: tuple[int, ...]) -> None:
    bright = np.full((8, *shape), 200, np.uint8)
    for severity in SEVERITIES:
        assert changed(bright, kind, severity).min() == 200


# --- what is counted --------------------------------------------------------------------------


def mirrored(image: Image.Image, amount: float, random: np.random.Generator) -> Image.Image:
    return ImageOps.mirror(image) if amount else image


@pytest.fixture
def evaluation(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An encoder whose vectors are the two pixels of an image, and one kind of change."""

    def embed(model: Any, images: LabelledImages, advance: Any) -> np.ndarray:
        advance(len(images))
        return images.images.reshape(len(images), -1).astype(np.float32)

    monkeypatch.setattr(module, "embed_images", embed)
    monkeypatch.setattr(module, "KINDS", {"mirrored": Kind(mirrored, (0, 0, 1, 1, 1))})
    known = [(200, 10), (190, 10), (210, 10), (10, 200), (10, 190), (10, 210)]
    asked = np.array([(200, 12), (12, 200), (150, 150)], np.uint8)
    labels = np.array([0, 1, 0])
    queries = LabelledImages("set", "test", asked[:, None], labels, ("a", "b"))
    sets = np.zeros(6, np.int64)
    spec = SimpleNamespace(input=InputSpec(2, 1))
    return SimpleNamespace(
        model=SimpleNamespace(metric="l2", spec=spec, seed=0),
        split="test",
        data=[SimpleNamespace(name="set", spec="npz:set.npz", test=queries)],
        gallery=Embedded(np.array(known, np.float32), np.array([0, 0, 0, 1, 1, 1]), sets),
        queries=Embedded(asked.astype(np.float32), labels, sets[:3]),
    )


def test_figures_by_hand(evaluation: Any) -> None:
    steps: list[int] = []
    figures = robustness(evaluation, 10, steps.append)["set"]
    assert sum(steps) == embedded_images(evaluation.data, "test", 10) == 3 * 6
    # The nearest of the grey image are 1, 4, 0, 3, 2, mirrored or not.
    grey = (1 + 2 / 3 + 3 / 5) / 3
    unchanged = 100 * (1 + 1 + grey) / 3
    assert figures["queries"] == 3
    assert figures["unchanged"] == {"map5": pytest.approx(unchanged)}
    none = {"cosine": 1, "same_neighbour": 1, "same_class": 1, "map5": unchanged}
    # The others find three images of the other class first.
    both = {
        "cosine": (1 + 2 * (2 * 200 * 12) / (200**2 + 12**2)) / 3,
        "same_neighbour": 1 / 3,
        "same_class": 1 / 3,
        "map5": 100 * (2 * (1 / 4 + 2 / 5) / 2 + grey) / 3,
    }
    by_severity = figures["changes"]["mirrored"]
    assert by_severity["2"] == pytest.approx(none)
    assert by_severity["5"] == pytest.approx(both)
    assert figures["mean"] == pytest.approx(
        {key: (2 * none[key] + 3 * both[key]) / 5 for key in both}
    )


def test_of_many_queries_some_are_drawn(evaluation: Any) -> None:
    assert robustness(evaluation, 2)["set"]["queries"] == 2
    assert robustness(evaluation, 2) == robustness(evaluation, 2)


def test_a_query_s_own_group_is_no_neighbour(evaluation: Any) -> None:
    evaluation.gallery = replace(evaluation.gallery, groups=np.array([7, 1, 2, 3, 4, 5]))
    evaluation.queries = replace(evaluation.queries, groups=np.array([6, 7, 8]))
    mirrored = robustness(evaluation, 10)["set"]["changes"]["mirrored"]["5"]
    # Of the second query, two of the other class are left, and then three of its own.
    second = (1 / 3 + 2 / 4 + 3 / 5) / 3
    grey = (1 + 2 / 3 + 3 / 5) / 3
    assert mirrored["map5"] == pytest.approx(100 * ((1 / 4 + 2 / 5) / 2 + second + grey) / 3)


def test_another_image_of_the_same_class_is_another_neighbour(evaluation: Any) -> None:
    # In a gallery of one class.
    evaluation.gallery = Embedded(evaluation.gallery.vectors, *np.zeros((2, 6), np.int64))
    strongest = robustness(evaluation, 10)["set"]["changes"]["mirrored"]["5"]
    assert strongest["same_neighbour"] == pytest.approx(1 / 3)
    assert strongest["same_class"] == 1


@pytest.mark.parametrize(
    ("size", "expected"), [((8, 8), (224, 224)), ((16, 8), (224, 448)), ((256, 256), (256, 256))]
)
def test_files_are_changed_at_224_pixels_or_more(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    evaluation: Any,
    size: tuple[int, int],
    expected: tuple[int, int],
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(20):
            colour = (number * 10, 0, 200 if name == "a" else 0)
            Image.new("RGB", (300, 280), colour).save(tmp_path / name / f"{number}.png")
    spec = InputSpec(*size)
    data = open_dataset(f"folder:{tmp_path}", seed=3, input_spec=spec)
    wanted = data.test
    found: list[LabelledImages] = []

    def embed(model: Any, images: LabelledImages, advance: Any) -> np.ndarray:
        found.append(images)
        return images.images[:, 0, 0].astype(np.float32)

    monkeypatch.setattr(module, "embed_images", embed)
    evaluation.data = [data]
    evaluation.model = SimpleNamespace(metric="l2", spec=SimpleNamespace(input=spec), seed=3)
    sets = np.zeros(40, np.int64)
    train = data.train
    evaluation.gallery = Embedded(embed(None, train, None), train.labels, sets[: len(train)])
    evaluation.queries = Embedded(embed(None, wanted, None), wanted.labels, sets[: len(wanted)])
    found.clear()
    robustness(evaluation, 100)
    assert {images.images.shape[1:3] for images in found} == {expected}
    # The same images as those that were evaluated, in their order.
    assert np.array_equal(found[0].images[:, 0, 0], wanted.images[:, 0, 0])
