"""What several of these files need: polls, damaged files, small indexes, a collection."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import faiss
import numpy as np
import pytest
from PIL import Image, ImageOps

from pg_siamese_server.catalog import Collection
from pg_siamese_server.encoding.images import decode_image
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import ImageError
from tests.support import Array

COLLECTION = Collection(
    *(1, "c", 1, "public.t", "id", "bigint", "image", "reject", "sync", 1, 4, "", "cosine"),
    *("public", 1),
)


class CancelledError(Exception):
    sqlstate = "57014"


def no_poll() -> None:
    pass


def cancel_at(number: int, error: type[BaseException] = CancelledError) -> Callable[[], None]:
    """Return a poll that raises an error at this call, counted from one."""
    calls = itertools.count(1)

    def poll() -> None:
        if next(calls) == number:
            raise error

    return poll


def flat(matrix: Array) -> faiss.Index:
    index = faiss.IndexFlatL2(matrix.shape[1])
    index.add(matrix)
    return index


def damaged(data: bytes, count: int, changes: int, end: int = 0) -> Iterator[bytes]:
    """Give files with so many random bytes changed; two of them among the last ``end``, if any."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        mutated = np.frombuffer(data, np.uint8).copy()
        places = generator.integers(0, len(mutated), changes)
        if end:
            places[:2] = len(mutated) - generator.integers(1, end, 2)
        mutated[places] = generator.integers(0, 256, changes)
        yield mutated.tobytes()


def check_is_image_or_refused(data: bytes, spec: InputSpec) -> None:
    try:
        assert decode_image(data, spec).shape == (spec.height, spec.width, 3)
    except ImageError as error:
        assert error.sqlstate in ("22P03", "54000")


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Turn an image as the orientation in its EXIF asks for."""
    image, exif = image.copy(), Image.Exif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(image)


def whole(data: bytes, spec: InputSpec) -> Array:
    """Decode an image at its whole size before it is reduced: int (height, width, channels)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pg_siamese_server.encoding.images.DRAFT_MARGIN", 10**6)
        return decode_image(data, spec).astype(int)
