"""Check that a JPEG is complete, and name codings that libjpeg can't decode."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageChops

END = b"\xff\xd9"
# In coded data 0xFF is followed by 0 or a restart marker. Anything else ends the scan.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_SCAN, _END = 0xDA, 0xD9
_FRAMES = frozenset(
    (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
)
_JPEG_LS = 0xF7
# By component, for each coefficient: the lowest bit that scans have brought.
Coefficients = dict[int, list[int | None]]
_CODINGS = {0xC3: "lossless coding", 0xCB: "lossless arithmetic coding", _JPEG_LS: "JPEG-LS coding"}
_CODINGS |= dict.fromkeys((0xC5, 0xC6, 0xC7), "differential coding")
_CODINGS |= dict.fromkeys((0xCD, 0xCE, 0xCF), "differential arithmetic coding")
# Bits in place of missing ones. If the pixels depend on them, the picture is not complete.
_FILLERS = (b"", b"\x55\x2a" * 512, b"\xaa\x55" * 512)
# The value that libjpeg leaves in every channel if it finds no more data.
_NO_DATA = 128


def layout(data: bytes) -> tuple[bool, bool]:
    """Return whether a JPEG ends properly, and whether its scans hold all bits."""
    complete: Coefficients = {}
    marker = 0
    try:
        for marker, segment in _segments(data):
            if marker in _FRAMES:
                complete = {segment[6 + 3 * number]: [None] * 64 for number in range(segment[5])}
            elif marker == _SCAN:
                _note_bits(segment, complete)
    except (struct.error, IndexError):
        return False, False
    return marker == _END, _has_all_bits(complete)


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield markers with what follows their length, up to the end marker if there is one."""
    place = 2
    while (found := _MARKER.search(data, place)) is not None:
        marker, place = data[found.start() + 1], found.end()
        if marker == _END:
            yield marker, b""
            return
        if marker not in (0x01, 0xD8):
            (length,) = struct.unpack_from(">H", data, place)
            yield marker, data[place + 2 : place + length]
            place += length


def unsupported_coding(data: bytes) -> str | None:
    """Name the coding of a JPEG if libjpeg has no decoder for it, else return None."""
    with contextlib.suppress(struct.error, IndexError):
        for marker, segment in _segments(data):
            if marker in _FRAMES or marker == _JPEG_LS:
                return f"{segment[0]} bits per channel" if segment[0] != 8 else _CODINGS.get(marker)
    return None


def _note_bits(segment: bytes, complete: Coefficients) -> None:
    count = segment[0]
    first, last, low = segment[1 + 2 * count], segment[2 + 2 * count], segment[3 + 2 * count] & 15
    for number in range(count):
        coefficients = complete.get(segment[1 + 2 * number])
        if coefficients is not None:
            coefficients[first : last + 1] = [low] * (min(last, 63) + 1 - first)


def _has_all_bits(complete: Coefficients) -> bool:
    return bool(complete) and all(set(bits) == {0} for bits in complete.values())


def with_end_marker(data: bytes, load: Callable[[bytes], Image.Image]) -> bytes | None:
    """Add a missing end marker to a file. Return None if part of the picture is missing.

    Zeros after the data come from a broken download and are no data. The picture is complete if
    what follows the data has no influence on it.

    Args:
        data: the file.
        load: decodes a file.
    """
    ended, is_complete = layout(data)
    if ended:
        return data
    if not is_complete:
        return None
    bare = data.rstrip(b"\0")
    if bare.endswith(b"\xff"):  # in data a zero follows it, else it is half an end marker
        bare = bare + b"\0" if len(bare) < len(data) else bare.rstrip(b"\xff")
    # One zero may be data, of a picture of one colour.
    candidates = [bare] if len(data) - len(bare) != 1 else [bare, data]
    return next((each + END for each in candidates if _is_whole(each, load)), None)


def is_cut_off(image: Image.Image, data: bytes, load: Callable[[bytes], Image.Image]) -> bool:
    """Return whether an image that ends properly lacks its lower part, which libjpeg leaves grey.

    This reads one corner. The file is decoded again only if that corner has this grey.
    """
    last = image.getpixel((image.width - 1, image.height - 1))
    if isinstance(last, tuple):
        red, green, blue = (*last, *last)[:3]
        last = 0.299 * red + 0.587 * green + 0.114 * blue
    # This includes CMYK, whose missing data is all 127.
    if last is None or abs(last - _NO_DATA) > 1:
        return False
    if any(abs(value - _NO_DATA) > 1 for value in _last_block(image)):
        return False
    end = data.rfind(END)
    return not _is_whole(data[:end], load)


def _last_block(image: Image.Image) -> list[float]:
    """Return the extremes of the last coded block, as far as it is visible.

    Its first row and column are smoothed with neighbouring colours. If no more of it is visible,
    its brightness is.
    """
    layers = getattr(image, "layer", None) or [("", 1, 1)]
    scale = getattr(image, "decoderconfig", None) or (1,)
    sides = []
    for size, place in zip(image.size, (1, 2), strict=True):
        block = max(1, 8 * max(layer[place] for layer in layers) // scale[0])
        sides.append((size - 1) % block)
    width, height = image.size
    if not all(sides):
        pixel = image.crop((width - 1, height - 1, width, height))
        return [float(value) for value in np.ravel(pixel.convert("L").getextrema())]
    corner = image.crop((width - sides[0], height - sides[1], width, height))
    extremes = corner.getextrema()
    return [float(value) for value in np.ravel(extremes)]


def _is_whole(bare: bytes, load: Callable[[bytes], Image.Image]) -> bool:
    first: Image.Image | None = None
    for filler in _FILLERS:
        image = load(bare + filler + END)
        if first is not None and ImageChops.difference(first, image).getbbox() is not None:
            return False
        first = first or image
    return True
