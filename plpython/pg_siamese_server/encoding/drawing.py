"""Pictures for people to look at: in a size that shows them, and as PNG files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

from pg_siamese_server.encoding.images import render_image
from pg_siamese_server.encoding.opened import Poll
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import SiameseError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# Pixels of the longer side of a picture that is made smaller. Larger ones take long to encode.
LEAST_SIDE, MOST_SIDE = 16, 1_024
# Enlarged by this much or more, blocks are clearer than a blur.
BLOCKS = 3
# DejaVu Sans 2.37, reduced by fonttools to Latin, Greek and Cyrillic letters and some signs.
# Pillow's own font has no letters beyond ASCII.
FONT = Path(__file__).with_name("DejaVuSans.ttf")


class _PolledBuffer(io.BytesIO):
    """A file in memory that calls back at each write, so that long encoding can be interrupted."""

    def __init__(self, poll: Poll | None) -> None:
        super().__init__()
        self._poll = poll

    def write(self, data: ReadableBuffer, /) -> int:
        if self._poll:
            self._poll()
        return super().write(data)


def check_side(size: int) -> None:
    """Refuse a size of pictures that is out of range. Raises ``SiameseError``."""
    if not LEAST_SIDE <= size <= MOST_SIDE:
        raise SiameseError(f"size must be between {LEAST_SIDE} and {MOST_SIDE}")


def thumbnail(
    data: bytes | None,
    side: int,
    frame: int = 0,
    spec: InputSpec | None = None,
    poll: Poll | None = None,
) -> bytes:
    """Return an image file as a small PNG file, in its own proportions.

    Args:
        data: the bytes of the file.
        side: most pixels of the longer side.
        frame, spec, poll: as for ``render_image``.

    Raises:
        ImageError: as for ``decode_image``.
    """
    return png_file(Image.fromarray(render_image(data, side, frame, spec=spec, poll=poll)), poll)


def fitted(pixels: NDArray[np.uint8], side: int) -> Image.Image:
    """Return a picture with a longer side of ``side`` pixels. Much smaller ones become blocks.

    Args:
        pixels: uint8 (height, width, 3), as ``render_image`` returns them.
        side: pixels of the longer side.
    """
    share = side / max(pixels.shape[:2])
    height, width = (max(1, round(length * share)) for length in pixels.shape[:2])
    way = Image.Resampling.NEAREST if share >= BLOCKS else Image.Resampling.BICUBIC
    return Image.fromarray(pixels).resize((width, height), way)


def font(size: float) -> ImageFont.FreeTypeFont:
    """Return the font for texts on pictures, at a size in pixels."""
    return ImageFont.truetype(FONT, size, layout_engine=ImageFont.Layout.BASIC)


def png_file(picture: Image.Image, poll: Poll | None = None) -> bytes:
    """Return a picture as a PNG file. One without colours is stored as grey, which is smaller.

    Args:
        picture: of mode RGB.
        poll: called while it is written, may raise to stop.
    """
    pixels = np.asarray(picture)
    if (pixels == pixels[:, :, :1]).all():
        picture = picture.getchannel(0)
    file = _PolledBuffer(poll)
    picture.save(file, "PNG")
    return file.getvalue()
