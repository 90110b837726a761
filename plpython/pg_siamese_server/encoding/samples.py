"""Find black and white in samples of more than 8 bits, signed samples or fractions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server.errors import ImageError

Range = tuple[float, float]


def full_range(bits: int) -> Range:
    """Return the range of unsigned samples of ``bits`` bits."""
    return 0.0, float(2**bits - 1)


def scale(values: NDArray[Any], limits: Range) -> NDArray[np.uint8]:
    """Scale samples to 8 bits, rounded to the nearest and clipped to the limits.

    Args:
        values: any numbers.
        limits: values of black and white. The first may be the larger one.
    """
    low, high = limits
    if values.dtype == np.uint8 and limits == (0.0, 255.0):
        return values
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2 and limits == (0.0, 65535.0):
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise ImageError("image has samples that are not numbers")
    inside = np.clip(values, min(limits), max(limits)).astype(np.float64)
    scaled: NDArray[np.float64] = np.rint((inside - low) * (255.0 / (high - low)))
    return scaled.astype(np.uint8)
