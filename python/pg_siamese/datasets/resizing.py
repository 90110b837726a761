"""Bringing pixels to an encoder's input size, exactly as the server does."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pg_siamese.datasets.base import DataFormatError, Pixels

if TYPE_CHECKING:
    from pg_siamese_server.encoding.specification import InputSpec


def resized(images: Pixels, spec: InputSpec, name: str = "images") -> Pixels:
    """Bring images to the size and the channels of an encoder's input.

    Args:
        images: uint8 (N, H, W) or (N, H, W, 3).
        spec: the encoder's input.
        name: what the images are called in errors.

    Returns:
        uint8 (N, height, width, channels).

    Raises:
        DataFormatError: an image is over the limits of ``spec``.
    """
    from pg_siamese_server.encoding.images import decode_image
    from pg_siamese_server.errors import ImageError

    pixels = np.empty((len(images), spec.height, spec.width, spec.channels), np.uint8)
    for place, image in enumerate(images):
        # By way of a file, so that every step is the server's own.
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="BMP")
        try:
            pixels[place] = decode_image(file.getvalue(), spec).reshape(pixels.shape[1:])
        except ImageError as error:
            raise DataFormatError(f"{name}, image {place}: {error}") from None
    return pixels
