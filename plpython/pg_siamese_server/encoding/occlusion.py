"""Find which parts of an image make it similar to another one: hide parts, and embed the rest.

It needs no more than the encoder. A part is hidden by a blur, since an encoder takes a flat patch
for an object of its own. Occlusion: Zeiler and Fergus, arXiv 1311.2901, section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from pg_siamese_server import vectors
from pg_siamese_server.encoding.encoder import Encoder, check_embedding

# Deviation of the blur, as a share of the longer side.
BLUR = 0.125


def grids(width: int, height: int, count: int) -> list[int]:
    """Return the windows per side of a coarse and a fine grid, at most ``count`` in all."""
    side = max(1, min(math.isqrt(count // 5), min(width, height) // 2))
    return [side, 2 * side]


def windows(width: int, height: int, side: int, start: int, end: int) -> NDArray[np.float32]:
    """Return some windows of a grid: how much each hides of each pixel, from 0 to 1.

    A window fades into its neighbours. Those of a grid add up to one, except at the borders.

    Args:
        width: pixels of the image.
        height: the same.
        side: windows per side.
        start: number of the first window, row by row.
        end: number after the last one.

    Returns:
        float32 (windows, height, width).
    """

    def fade(length: int) -> NDArray[np.float32]:
        places = (np.arange(length, dtype=np.float32) + 0.5) * side / length
        centres = np.arange(side, dtype=np.float32)[:, None] + 0.5
        found: NDArray[np.float32] = np.clip(1 - np.abs(places - centres), 0, 1)
        return found

    rows, columns = np.divmod(np.arange(start, end), side)
    found: NDArray[np.float32] = fade(height)[rows][:, :, None] * fade(width)[columns][:, None, :]
    return found


def hide(
    pixels: NDArray[np.uint8], blurred: NDArray[np.uint8], hidden: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Return an image once per window, blurred there: uint8 (windows, height, width, channels)."""
    mixed = pixels + hidden[..., None] * (blurred.astype(np.float32) - pixels)
    return np.rint(mixed).astype(np.uint8)


def blur(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return pixels (height, width, channels) without their details."""
    is_grey = pixels.shape[2] == 1
    image = Image.fromarray(pixels[:, :, 0] if is_grey else pixels)
    found = np.asarray(image.filter(ImageFilter.GaussianBlur(BLUR * max(image.size))))
    return found.reshape(pixels.shape)


def effects(
    encoder: Encoder,
    pixels: NDArray[np.uint8],
    other: NDArray[np.float32],
    count: int,
    poll: Callable[[], None] | None = None,
) -> NDArray[np.float64]:
    """Return how much farther from another image this one is without each of its parts.

    Args:
        encoder: of both images.
        pixels: uint8 (height, width, channels), as ``decode_image`` makes them.
        other: embedding of the other image, float32 (1, dimension).
        count: most versions of the image to embed, at least 5.
        poll: called between batches, may raise to stop.

    Returns:
        float64 (height, width), in the distance of the encoder's metric. Negative if the distance
        is smaller without the part.

    Raises:
        ImageError: the encoder fails on an image.
    """
    height, width = pixels.shape[:2]
    blurred = blur(pixels)
    whole = distances(encoder, pixels[None], other, poll)
    result = np.zeros((height, width))
    for side in grids(width, height, count):
        total, weight = np.zeros((height, width)), np.zeros((height, width))
        for start in range(0, side * side, encoder.max_batch):
            end = min(side * side, start + encoder.max_batch)
            hidden = windows(width, height, side, start, end)
            found = distances(encoder, hide(pixels, blurred, hidden), other, poll)
            total += np.tensordot(found - whole, hidden, 1)
            weight += hidden.sum(axis=0)
        result += total / weight / 2
    return result


def distances(
    encoder: Encoder,
    images: NDArray[np.uint8],
    other: NDArray[np.float32],
    poll: Callable[[], None] | None = None,
) -> NDArray[np.float64]:
    """Return the distances (images,) to another image in the encoder's metric.

    Arguments and errors are those of ``effects``.
    """
    metric = encoder.spec.metric
    found = encoder.embed(images, poll)
    for embedding in found:
        check_embedding(embedding, metric)
    squared = vectors.squared_distances(
        vectors.prepare(found, metric), vectors.prepare(other, metric)
    )
    return np.array(vectors.to_distances(squared.tolist(), metric))
