"""Parts that make an image similar to another: what is hidden, and how it is drawn."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pg_siamese_server.encoding import heat_map, occlusion
from pg_siamese_server.encoding.encoder import Encoder
from pg_siamese_server.encoding.specification import InputSpec, ModelSpec
from pg_siamese_server.errors import ImageError
from tests.support import Array

SPEC = InputSpec(40, 20)


@dataclass
class Eye(Encoder):
    """An encoder that sees one block of pixels."""

    block: tuple[slice, slice] = (slice(4, 9), slice(24, 32))
    gives: float = 1.0

    def __post_init__(self) -> None:
        self.max_batch, self.embedded, self.largest = 7, 0, 0

    def embed(self, pixels: Array, poll: Any = None) -> Array:
        self.embedded += len(pixels)
        self.largest = max(self.largest, len(pixels))
        if poll:
            poll()
        seen = pixels[:, *self.block].std(axis=(1, 2, 3), dtype=np.float32)
        found: Array = self.gives * seen[:, None]
        return found


def noise(height: int = 20, width: int = 40, channels: int = 3) -> Array:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture
def eye() -> Eye:
    return Eye(b"", ModelSpec(SPEC, "l2"))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_part_that_is_seen_is_hot(eye: Eye, channels: int) -> None:
    pixels = noise(channels=channels)
    found = occlusion.effects(eye, pixels, eye.embed(pixels[None]), 125)
    assert found.shape == (20, 40)
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert 4 <= row < 9 and 24 <= column < 32
    assert found[:, :12].max() < 0.01 * found.max() and found[17:].max() < 0.1 * found.max()


def test_parts_that_keep_images_apart_are_negative(eye: Eye) -> None:
    pixels = noise()
    flat = np.full_like(pixels, 128)
    found = occlusion.effects(eye, pixels, eye.embed(flat[None]), 125)
    assert found.min() < -1 and found.max() < 1e-3


@pytest.mark.parametrize(("count", "runs"), [(5, 5), (20, 20), (124, 80), (125, 125), (5000, 500)])
def test_runs_are_bounded(eye: Eye, count: int, runs: int) -> None:
    """One for the image itself. No window is smaller than a pixel."""
    polls: list[int] = []
    occlusion.effects(eye, noise(), np.ones((1, 1), np.float32), count, lambda: polls.append(1))
    assert eye.embedded == 1 + runs and eye.largest <= eye.max_batch
    assert len(polls) >= runs / eye.max_batch


def test_windows_hide_each_pixel_once() -> None:
    for side in occlusion.grids(40, 20, 125):
        found = occlusion.windows(40, 20, side, 0, side * side)
        total = found.sum(axis=0)
        edge = 40 // side
        assert np.allclose(total[edge:-edge, edge:-edge], 1, atol=1e-5)
        assert total.min() > 0.2 and found.max() <= 1
        some = occlusion.windows(40, 20, side, 3, 9)
        assert np.array_equal(some, found[3:9])


def test_an_encoder_that_fails(eye: Eye) -> None:
    eye.gives = np.nan
    with pytest.raises(ImageError, match="not finite"):
        occlusion.effects(eye, noise(), np.ones((1, 1), np.float32), 20)


# How it is drawn.


def drawn(heat: Array, size: tuple[int, int] = (40, 20), side: int = 160, **options: Any) -> Array:
    spec = replace(SPEC, **{name: options.pop(name) for name in ("resize",) if name in options})
    picture = noise(size[1], size[0])
    file = heat_map.draw(picture, heat, spec, side, legend=options.get("legend", False))
    image = Image.open(io.BytesIO(file))
    assert image.format == "PNG"
    return np.asarray(image).astype(int)


def saturation(found: Array) -> Array:
    spread: Array = found.max(axis=2) - found.min(axis=2)
    return spread


def test_heat_is_in_its_place() -> None:
    heat = np.full((20, 40), -1.0)
    heat[5:10, 30:35] = 2
    found = drawn(heat)
    assert found.shape == (80, 160, 3)
    colour = saturation(found)
    assert colour[24:36, 124:136].mean() > 3 * colour[:, :100].mean()


def test_without_heat_nothing_stands_out() -> None:
    for heat in (np.zeros((20, 40)), np.full((20, 40), -3.0)):
        assert saturation(drawn(heat, legend=True)[:80]).max() < 30


@pytest.mark.parametrize("side", [64, 512])
@pytest.mark.parametrize("size", [(400, 30), (30, 400), (1, 1), (3000, 2999)])
def test_sizes(size: tuple[int, int], side: int) -> None:
    """The picture's proportions, with the legend below them."""
    found = drawn(np.ones((20, 40)), size, side)
    wanted = [max(1, round(length * side / max(size))) for length in size]
    assert found.shape == (wanted[1], wanted[0], 3)
    below = drawn(np.ones((20, 40)), size, side, legend=True)
    assert below.shape[0] > found.shape[0] and below.shape[1] == found.shape[1]
    assert np.array_equal(below[: wanted[1]], found)


@pytest.mark.parametrize(
    ("resize", "size", "covered"),
    [
        ("stretch", (90, 90), (slice(None), slice(None))),
        ("crop", (90, 90), (slice(24, 66), slice(None))),
        ("crop", (100, 20), (slice(None), slice(32, 68))),
        ("pad", (90, 90), (slice(None), slice(None))),
        ("pad", (100, 20), (slice(None), slice(None))),
    ],
)
def test_what_the_encoder_sees(
    resize: str, size: tuple[int, int], covered: tuple[slice, slice]
) -> None:
    """Of a cropped picture the middle, of a padded one all but what was added."""
    spec = replace(SPEC, resize=resize)
    heat = np.ones((20, 40))
    if resize == "pad":  # black borders have no heat
        heat[:] = 0
        heat[:, 10:30] = 1
        if size == (100, 20):
            heat[:] = 0
            heat[6:14] = 1
    found = heat_map.on_picture(heat, spec, *size)
    assert found.shape == (size[1], size[0])
    assert found[covered].mean() > 0.95
    found[covered] = 0
    assert found.mean() < 0.05
