"""Turn images into embeddings, for triggers and workers, and report the bad ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server.errors import ImageError
from pg_siamese_server.limits import MODELS_OWN, Limits

if TYPE_CHECKING:  # self_check needs this module to say what is missing
    from pg_siamese_server.encoding.encoder import Encoder

MAX_ROWS_AT_ONCE = 256
MAX_BYTES_AT_ONCE = 4 * 1024 * 1024
FIRST_ROWS = 8
# Batches of the encoder whose pixels are decoded together. It has 256 rows of 28 x 28 pixels.
BATCHES_AT_ONCE = 4

Fail = Callable[[Any, ImageError], None]
# Copied, since OpenSSL looks up algorithms by name for each new one.
_NOTHING_HASHED = hashlib.sha256()


def embed(
    encoder: Encoder,
    rows: Iterable[tuple[Any, bytes | None]],
    fail: Fail,
    poll: Callable[[], None],
    limits: Limits = MODELS_OWN,
) -> tuple[list[Any], NDArray[np.float32]]:
    """Decode and embed the images of some rows.

    Args:
        encoder: of the collection's model.
        rows: key and image file of each.
        fail: called with the key and the error of each bad image, may raise to stop.
        poll: called often, may raise to stop.
        limits: of the collection.

    Returns:
        Keys of the good ones and their embeddings, float32 (keys, dimension).

    Raises:
        ModelError: the graph failed.
    """
    from pg_siamese_server.encoding.encoder import MAX_BATCH, return_freed_memory

    keys: list[Any] = []
    parts: list[NDArray[np.float32]] = []
    left = iter(rows)
    while portion := list(islice(left, BATCHES_AT_ONCE * encoder.max_batch)):
        good, embeddings = _embed_portion(encoder, portion, fail, poll, limits)
        if good:
            keys += good
            parts.append(embeddings)
    if len(keys) > encoder.max_batch < MAX_BATCH:
        # Tensors of large images leave the heap full of holes.
        return_freed_memory()
    return keys, np.concatenate(parts) if parts else np.empty((0, 0), dtype=np.float32)


def _embed_portion(
    encoder: Encoder,
    rows: list[tuple[Any, bytes | None]],
    fail: Fail,
    poll: Callable[[], None],
    limits: Limits,
) -> tuple[list[Any], NDArray[np.float32]]:
    from pg_siamese_server.encoding.encoder import check_embedding, have_distances
    from pg_siamese_server.encoding.images import decode_image

    keys: list[Any] = []
    pixels: list[NDArray[np.uint8]] = []
    spec = encoder.spec.input.within(limits)
    for key, image in rows:
        poll()
        try:
            pixels.append(decode_image(image, spec, poll))
            keys.append(key)
        except ImageError as error:
            fail(key, error)
    if not pixels:
        return [], np.empty((0, 0), dtype=np.float32)
    stacked = np.array(pixels)
    pixels.clear()
    embeddings = encoder.embed(stacked, poll)
    if have_distances(embeddings, encoder.spec.metric):
        return keys, embeddings
    kept = []
    for place, key in enumerate(keys):
        try:
            check_embedding(embeddings[place], encoder.spec.metric)
            kept.append(place)
        except ImageError as error:
            fail(key, error)
    return [keys[place] for place in kept], embeddings[kept]


def embed_frames(
    encoder: Encoder,
    rows: Iterable[tuple[Any, bytes | None]],
    fail: Fail,
    poll: Callable[[], None],
    limits: Limits = MODELS_OWN,
) -> Iterator[tuple[Any, int, NDArray[np.float32]]]:
    """Decode and embed all frames of some rows' images, a batch of frames at a time.

    An image with a bad frame fails as a whole.

    Args:
        encoder, rows, fail, poll, limits: as for ``embed``.

    Yields:
        Of each good image its key, the number of its representative frame, and the embeddings of
        its frames in order, float32 (frames, dimension).

    Raises:
        ModelError: the graph failed.
    """
    for key, image in rows:
        poll()
        try:
            representative, embeddings = _embed_image(encoder, image, poll, limits)
        except ImageError as error:
            fail(key, error)
            continue
        yield key, representative, embeddings


def _embed_image(
    encoder: Encoder, image: bytes | None, poll: Callable[[], None], limits: Limits
) -> tuple[int, NDArray[np.float32]]:
    from pg_siamese_server.encoding.encoder import check_embedding
    from pg_siamese_server.encoding.images import decode_frames

    frames = decode_frames(image, encoder.spec.input.within(limits), poll)
    parts: list[NDArray[np.float32]] = []
    for first in range(1, frames.count + 1, encoder.max_batch):
        numbers = range(first, min(first + encoder.max_batch, frames.count + 1))
        pixels: list[NDArray[np.uint8]] = []
        for number in numbers:
            poll()
            with _named(number, frames.count):
                pixels.append(next(frames.pixels))
        embeddings = encoder.embed(np.stack(pixels), poll)
        for number, embedding in zip(numbers, embeddings, strict=True):
            with _named(number, frames.count):
                check_embedding(embedding, encoder.spec.metric)
        parts.append(embeddings)
    return frames.representative, np.concatenate(parts)


@contextmanager
def _named(number: int, count: int) -> Iterator[None]:
    """Name the frame in errors of an image that has several."""
    try:
        yield
    except ImageError as error:
        if count == 1:
            raise
        raise ImageError(
            f"frame {number} of {count}: {error.message}",
            sqlstate=error.sqlstate,
            detail=error.detail,
            hint=error.hint,
        ) from None


def image_hash(image: bytes) -> bytes:
    """Return the hash that is stored beside the vector of an image."""
    digest = _NOTHING_HASHED.copy()
    digest.update(image)
    return digest.digest()[:16]


def next_portion(rows: int, size: int) -> int:
    """Return how many rows to read next, after ``rows`` rows of ``size`` bytes together."""
    each = size // rows + 1
    return max(1, min(MAX_ROWS_AT_ONCE, MAX_BYTES_AT_ONCE // each, 8 * rows))
