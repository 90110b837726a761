"""Parts of images, as PostgreSQL writes a ``box``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pg_siamese_server.errors import INVALID_PARAMETER_VALUE, ImageError, SiameseError

RULE = (
    "Give shares of width and height between 0 and 1, or whole numbers of pixels. They are counted"
    " from the top left corner."
)


@dataclass(frozen=True)
class Region:
    """A rectangle in an upright image, counted from its top left corner.

    Attributes:
        left, top, right, bottom: shares of the image's sides if all are between 0 and 1, else
            whole numbers of pixels.
    """

    left: float
    top: float
    right: float
    bottom: float

    @property
    def is_relative(self) -> bool:
        """Whether the coordinates are shares of the image's sides."""
        return _are_shares((self.left, self.top, self.right, self.bottom))

    def pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom in whole pixels of an image of this size.

        Raises:
            ImageError: 22023, the region is not inside the image, or holds no pixel.
        """
        size = f"The image has {width} x {height} pixels."
        if not self.is_relative:
            if min(self.left, self.top) < 0 or self.right > width or self.bottom > height:
                raise ImageError(
                    "region is not inside the image",
                    sqlstate=INVALID_PARAMETER_VALUE,
                    detail=size,
                    hint=RULE,
                )
            return int(self.left), int(self.top), int(self.right), int(self.bottom)
        left, right = (math.floor(share * width + 0.5) for share in (self.left, self.right))
        top, bottom = (math.floor(share * height + 0.5) for share in (self.top, self.bottom))
        if left == right or top == bottom:
            raise ImageError(
                "region is smaller than a pixel", sqlstate=INVALID_PARAMETER_VALUE, detail=size
            )
        return left, top, right, bottom


def parse(text: str) -> Region:
    """Read a ``box`` as PostgreSQL writes it: the larger coordinates come first.

    Raises:
        SiameseError: 22023, it is empty, or neither relative nor in pixels.
    """
    right, bottom, left, top = map(float, text.replace("(", "").replace(")", "").split(","))
    edges = left, top, right, bottom
    if not _are_shares(edges) and not all(map(float.is_integer, edges)):
        raise SiameseError(
            "region is neither relative nor in whole pixels", detail=f"It is {text}.", hint=RULE
        )
    if left == right or top == bottom:
        raise SiameseError("region is empty", detail=f"It is {text}.", hint=RULE)
    return Region(*edges)


def _are_shares(edges: tuple[float, ...]) -> bool:
    return all(0 <= edge <= 1 for edge in edges)
