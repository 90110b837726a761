"""What the decoders of all formats share: an opened picture, its limits and its errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from PIL import Image

from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import (
    INVALID_PARAMETER_VALUE,
    ImageError,
    ImageSizeError,
    counted,
)

# Resampling takes memory and time by the length of a side: 1.5 GB for 1 x 25,000,000 pixels.
MAX_SIDE = 65_535

Poll = Callable[[], None]
Box = tuple[float, float, float, float]


class Opened(NamedTuple):
    """A picture of 8 bits per channel, with the steps that remain.

    If it was decoded at a smaller size, its last row and column may stand for parts of pixels. The
    box is the part that is picture, and None is all.
    """

    image: Image.Image
    orientation: int
    profile: object
    box: Box | None = None


def check_size(width: int, height: int, spec: InputSpec) -> None:
    """Refuse a size of zero or over the limits. Raises ``ImageError``."""
    if width < 1 or height < 1:
        raise ImageError(f"image of {width} x {height} pixels has no content")
    if width * height > spec.max_pixels or max(width, height) > MAX_SIDE:
        raise ImageSizeError(
            f"image of {width} x {height} pixels is too large", spec.max_pixels, MAX_SIDE
        )


def check_frame(number: int, count: int) -> None:
    """Refuse the number of a frame that an image does not have. Raises ``ImageError``."""
    if not 0 <= number <= count:
        raise ImageError(
            f"frame {number} is out of range",
            sqlstate=INVALID_PARAMETER_VALUE,
            detail=f"The image has {counted(count, 'frame')}.",
            hint="Frames are counted from 1. 0 is the representative one.",
        )


def damaged(name: str, detail: str) -> ImageError:
    """Return the error of a file that is incomplete or changed."""
    return ImageError(
        f"{name} image cannot be decoded",
        detail=f"It is damaged or incomplete. {detail}",
        hint="Store the file anew from where it came.",
    )
