"""Draw many pictures on one, line by line, each with its caption: a contact sheet."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pg_siamese_server.encoding.drawing import fitted, font, png_file
from pg_siamese_server.encoding.opened import Poll
from pg_siamese_server.errors import PROGRAM_LIMIT_EXCEEDED, SiameseError

MAX_PIXELS = 12_000_000
# Pixels between cells, and of a line of text.
GAP, LINE = 8, 15
FONT_SIZE = 11
# Lines of a caption, and what is read of each.
MAX_LINES, MAX_CHARACTERS = 3, 200
# Of a cell without a picture. The cross shows that without colours, too.
EMPTY, CROSS = "#EEEEEE", "#C8C8C8"


class Sheet:
    """A contact sheet with empty cells, to draw pictures on.

    Args:
        captions: of each picture, with up to three lines.
        columns: pictures per line, at most.
        side: pixels of a picture's longer side.

    Raises:
        SiameseError: 54000, it would be too large.
    """

    def __init__(self, captions: Sequence[str], columns: int, side: int) -> None:
        self._captions = [_lines(caption) for caption in captions]
        self._side, self._columns = side, min(columns, len(captions))
        text = LINE * max(map(len, self._captions))
        self._height = side + text + GAP
        width = GAP + self._columns * (side + GAP)
        height = GAP - (-len(captions) // self._columns) * self._height
        if width * height > MAX_PIXELS:
            raise SiameseError(
                f"contact sheet of {width} x {height} pixels is too large",
                sqlstate=PROGRAM_LIMIT_EXCEEDED,
                detail=f"The limit is {MAX_PIXELS} pixels.",
                hint="Give fewer keys, or a smaller size.",
            )
        self._canvas = Image.new("RGB", (width, height), "white")
        self._pen = ImageDraw.Draw(self._canvas)
        self._font = font(FONT_SIZE)

    def draw(self, place: int, pixels: NDArray[np.uint8]) -> None:
        """Draw a picture, uint8 (height, width, 3), in the middle of a cell, with its caption."""
        picture = fitted(pixels, self._side)
        left, top = self._corner(place)
        across, down = (self._side - length for length in picture.size)
        self._canvas.paste(picture, (left + across // 2, top + down // 2))
        self._write_caption(place)

    def mark(self, place: int, reason: str) -> None:
        """Mark a cell whose picture can't be shown, with the reason in a few words."""
        left, top = self._corner(place)
        right, bottom = left + self._side - 1, top + self._side - 1
        self._pen.rectangle((left, top, right, bottom), EMPTY)
        for line in ((left, top, right, bottom), (left, bottom, right, top)):
            self._pen.line(line, CROSS)
        self._write(reason, left, top + (self._side - LINE) // 2)
        self._write_caption(place)

    def file(self, poll: Poll | None = None) -> bytes:
        """Return the sheet as a PNG file. ``poll`` is called meanwhile, and may raise to stop."""
        return png_file(self._canvas, poll)

    def _corner(self, place: int) -> tuple[int, int]:
        line, column = divmod(place, self._columns)
        return GAP + column * (self._side + GAP), GAP + line * self._height

    def _write_caption(self, place: int) -> None:
        left, top = self._corner(place)
        for number, line in enumerate(self._captions[place]):
            self._write(line, left, top + self._side + number * LINE)

    def _write(self, text: str, left: int, top: int) -> None:
        """Write a line of text in the middle of a cell, with an ellipsis if it is too long."""
        if self._font.getlength(text) > self._side:
            ends = range(1, len(text) + 1)
            fits = bisect_right(
                ends, self._side, key=lambda end: ceil(self._font.getlength(f"{text[:end]}…"))
            )
            text = f"{text[:fits]}…"
        middle = left + self._side / 2, top + LINE / 2
        self._pen.text(middle, text, "black", self._font, "mm")


def _lines(caption: str) -> list[str]:
    lines = caption.splitlines()[:MAX_LINES]
    return ["".join(c if c.isprintable() else " " for c in line[:MAX_CHARACTERS]) for line in lines]
