"""Read PNG by its standard: samples of 16 bits, significant bits, and transparent colours."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pg_siamese_server.encoding.opened import damaged
from pg_siamese_server.encoding.samples import Range, full_range, scale
from pg_siamese_server.encoding.specification import InputSpec

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
_CHANNELS = {GREY: 1, RGB: 3, GREY_ALPHA: 2, RGB_ALPHA: 4}
_MODES = {GREY: "L", RGB: "RGB", GREY_ALPHA: "LA", RGB_ALPHA: "RGBA"}
MAX_PIECE = 1024 * 1024
_CHUNK = struct.Struct(">I4s")
_HEADER_END = 33  # signature, and the chunk IHDR

Load = Callable[[bytes, str | None], Image.Image]


@dataclass(frozen=True)
class Header:
    """What IHDR says of the samples, and the chunks before the picture that explain them."""

    depth: int
    colour: int
    significant: bytes
    transparent: bytes


def inspect(data: bytes) -> Header | None:
    """Check the chunks of a file that Pillow has opened.

    Pillow checks neither the picture's checksum nor the end of its data. It returns what it finds,
    such as zeros from a broken download. Its decoder notices a picture that ends early.

    Returns:
        The meaning of the samples, if that needs more than Pillow.

    Raises:
        ImageError: a checksum of the picture is wrong, and its packed data, too.
    """
    unpack, crc32 = _CHUNK.unpack_from, zlib.crc32
    view = memoryview(data)
    end_of_file = len(data) - 12
    place, is_wrong = len(SIGNATURE), False
    parts: list[memoryview] = []
    significant = transparent = b""
    while place <= end_of_file:
        size, kind = unpack(data, place)
        end = place + 8 + size
        if kind == b"IDAT":
            if end + 4 > len(data):
                break
            parts.append(view[place + 8 : end])
            if crc32(view[place + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
                is_wrong = True
        elif kind == b"tRNS" and not transparent:
            transparent = data[place + 8 : end]
        elif kind == b"sBIT" and not significant:
            significant = data[place + 8 : end]
        place = end + 4
    if is_wrong and not _is_whole(parts):
        raise damaged("PNG", "The checksum of its picture is wrong.")
    depth, colour = data[24], data[25]
    if colour not in (GREY, RGB):
        transparent = b""
    if depth != 16 and not transparent:
        return None
    return Header(depth, colour, significant, transparent)


def _is_whole(parts: list[memoryview]) -> bool:
    """Return whether compressed data ends properly, with its own checksum."""
    stream = zlib.decompressobj()
    try:
        for part in parts:
            left: bytes | memoryview = part
            while left and not stream.eof:
                stream.decompress(left, MAX_PIECE)
                left = stream.unconsumed_tail
    except zlib.error:
        return False
    return stream.eof


def needs_samples(header: Header, spec: InputSpec) -> bool:
    """Return whether 16-bit samples are needed. Pillow returns only the upper 8 bits of colours."""
    return header.depth == 16 and bool(
        header.colour == GREY
        or header.transparent
        or spec.input_range is not None
        or (header.significant and min(header.significant) < 16)
    )


def convert_transparency(image: Image.Image, header: Header) -> None:
    """Convert the transparent colour to the 8 bits per channel of Pillow's samples."""
    if header.colour not in (GREY, RGB):
        return
    count = _CHANNELS[header.colour]
    if len(header.transparent) < 2 * count:
        image.info.pop("transparency", None)
        return
    # By the standard, only the low bits count if there are fewer than 16.
    top = 2**header.depth - 1
    values = [
        (value & top) * 255 // top for value in struct.unpack_from(f">{count}H", header.transparent)
    ]
    image.info["transparency"] = values[0] if count == 1 else tuple(values)


def deep_image(data: bytes, header: Header, spec: InputSpec, load: Load) -> Image.Image:
    """Render samples of 16 bits in 8.

    Args:
        data: the file.
        header: of the file.
        spec: of the encoder, for its input range.
        load: decodes a file, its tile in another raw mode if one is given.
    """
    samples = _samples(data, header, load)
    colours = 3 if header.colour in (RGB, RGB_ALPHA) else 1
    pixels = np.empty(samples.shape, dtype=np.uint8)
    for channel in range(samples.shape[2]):
        values = samples[..., channel]
        limits = full_range(16)
        if channel < colours:
            limits = _range(values, header.significant[channel : channel + 1], spec)
        pixels[..., channel] = scale(values, limits)
    mode = _MODES[header.colour]
    if len(header.transparent) >= 2 * colours and header.colour in (GREY, RGB):
        key = struct.unpack_from(f">{colours}H", header.transparent)
        alpha = np.where((samples == np.array(key, np.uint16)).all(axis=2), 0, 255)
        pixels = np.dstack([pixels, alpha.astype(np.uint8)])
        mode += "A"
    return Image.frombytes(mode, (samples.shape[1], samples.shape[0]), pixels.tobytes())


def _samples(data: bytes, header: Header, load: Load) -> NDArray[np.uint16]:
    """Return the samples as they are stored, uint16 (height, width, channels)."""
    if header.colour == GREY:
        image = load(data, None)
        return np.asarray(image).astype(np.uint16)[..., None]
    if header.colour == GREY_ALPHA:
        # It has as many bytes per pixel as 8-bit RGBA, so it can be read as that.
        found = np.asarray(load(_as_rgba(data), None))
        samples: NDArray[np.uint16] = np.ascontiguousarray(found).view(">u2").astype(np.uint16)
        return samples
    mode = _MODES[header.colour]
    high, low = (np.asarray(load(data, f"{mode};16{end}")).astype(np.uint16) for end in "BL")
    return np.bitwise_or(np.left_shift(high, 8), low, dtype=np.uint16)


def _as_rgba(data: bytes) -> bytes:
    header = data[12:24] + bytes((8, RGB_ALPHA)) + data[26:29]
    return b"".join((data[:12], header, struct.pack(">I", zlib.crc32(header)), data[_HEADER_END:]))


def _range(values: NDArray[np.uint16], significant: bytes, spec: InputSpec) -> Range:
    """Return the samples of a channel that are black and white.

    By the standard, samples are scaled to all 16 bits, whatever bits chunk sBIT says they had
    before. Files of scanners and microscopes break it, and hold 0 to 4095 unscaled. Samples that
    scaling can't give identify them.
    """
    bits = significant[0] if significant else 16
    if not 0 < bits < 16:
        return spec.input_range or full_range(16)
    rest = 2 ** (16 - bits)
    if values.size and values.max() < 2**bits and (values % rest > 1).any():
        return full_range(bits)
    return full_range(16)
