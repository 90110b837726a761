"""How much farther two images are without the parts that a similarity map shows as hot.

If the map tells the truth, to delete its hottest tenth costs more than to delete as much anywhere
else. Deletion: Petsiuk, Das and Saenko, arXiv 1806.07421, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pg_siamese.datasets.base import Labels, Pixels
from pg_siamese_server.encoding import occlusion
from pg_siamese_server.encoding.encoder import Encoder

SHARE = 0.1


class Deletion(NamedTuple):
    """How much farther the other image is, with parts blurred or replaced by the mean colour.

    Each is a pair: without the hottest tenth, and without the same shape in a random place.
    """

    blurred: tuple[float, float]
    mean: tuple[float, float]


def delete(
    encoder: Encoder, pixels: Pixels, other: Pixels, masks: int, random: np.random.Generator
) -> Deletion:
    """Delete the hottest tenth of an image, and a random tenth of the same shape.

    Args:
        encoder: of both images.
        pixels: uint8 (height, width, channels), of the encoder's size.
        other: the same.
        masks: as for ``occlusion.effects``.
        random: for the place of the random tenth.
    """
    target = encoder.embed(other[None])
    hot = hottest(occlusion.effects(encoder, pixels, target, masks))
    moved = np.roll(hot, [int(random.integers(1, side)) for side in hot.shape], (0, 1))
    parts = np.stack([hot, moved]).astype(np.float32)
    mean = np.rint(pixels.mean(axis=(0, 1), keepdims=True)).astype(np.uint8)
    without = [
        occlusion.hide(pixels, filled, parts)
        for filled in (occlusion.blur(pixels), np.broadcast_to(mean, pixels.shape))
    ]
    found = occlusion.distances(encoder, np.concatenate([pixels[None], *without]), target)
    farther = (found[1:] - found[0]).tolist()
    return Deletion((farther[0], farther[1]), (farther[2], farther[3]))


def hottest(heat: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return which tenth of the pixels (height, width) is the hottest."""
    chosen = np.zeros(heat.size, dtype=bool)
    chosen[np.argsort(-heat, axis=None, kind="stable")[: max(1, round(SHARE * heat.size))]] = True
    return chosen.reshape(heat.shape)


def same_class_pairs(
    pixels: Pixels, labels: Labels, count: int, random: np.random.Generator
) -> Iterator[tuple[Pixels, Pixels]]:
    """Draw pairs of different images of one class. Each class has several images."""
    for first in random.integers(0, len(pixels), count).tolist():
        others = np.flatnonzero(labels == labels[first])
        yield pixels[first], pixels[random.choice(others[others != first])]
