"""Damaged image files, made from real ones, and small files that would unpack to huge pictures."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from tests.support import saved

NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def samples(pixels: npt.NDArray[np.uint8]) -> dict[str, bytes]:
    """Return one picture, uint8 (H, W, 3), as files of all formats and many of their kinds."""
    colour = Image.fromarray(pixels)
    grey = colour.convert("L")
    alpha = colour.copy()
    alpha.putalpha(grey)
    palette = colour.quantize(64)
    deep = Image.fromarray((np.asarray(grey).astype(np.uint16) * 257).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    exif[0x010E] = "a picture"
    larger = colour.resize((150, 90))
    return {
        "png": saved(colour, "PNG"),
        "png grey": saved(grey, "PNG"),
        "png alpha": saved(alpha, "PNG"),
        "png palette": saved(palette, "PNG", transparency=3),
        "png 16 bits": saved(deep, "PNG"),
        "png bilevel": saved(grey.convert("1"), "PNG"),
        "png exif": saved(colour, "PNG", exif=exif),
        "jpeg": saved(colour, "JPEG"),
        "jpeg grey": saved(grey, "JPEG"),
        "jpeg progressive": saved(larger, "JPEG", progressive=True, quality=80),
        "jpeg cmyk": saved(colour.convert("CMYK"), "JPEG"),
        "jpeg exif": saved(larger, "JPEG", exif=exif, comment=b"a comment"),
        "gif": saved(palette, "GIF"),
        "gif animated": saved(
            palette,
            "GIF",
            save_all=True,
            append_images=[palette.rotate(90)],
            disposal=2,
            transparency=0,
        ),
        "tiff": saved(colour, "TIFF"),
        "tiff lzw": saved(colour, "TIFF", compression="tiff_lzw"),
        "tiff deflate": saved(larger, "TIFF", compression="tiff_adobe_deflate"),
        "tiff packbits": saved(grey, "TIFF", compression="packbits"),
        "tiff jpeg": saved(larger, "TIFF", compression="jpeg"),
        "tiff 16 bits": saved(deep, "TIFF"),
        "tiff fax": saved(grey.convert("1"), "TIFF", compression="group4"),
        "bmp": saved(colour, "BMP"),
        "bmp palette": saved(palette, "BMP"),
        "webp": saved(larger, "WEBP"),
        "webp lossless": saved(alpha, "WEBP", lossless=True),
        "webp exif": saved(colour, "WEBP", exif=exif),
        "webp animated": saved(
            colour, "WEBP", save_all=True, append_images=[colour.rotate(90)], duration=50
        ),
    }


def mutated(pictures: npt.NDArray[np.uint8], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield damaged files, with a name each.

    Args:
        pictures: real images, uint8 (N, H, W, 3).
        count: how many files.
        seed: of all that is random.
    """
    random = np.random.default_rng(seed)
    files = [file for picture in pictures for file in samples(picture).items()]
    damages: list[Callable[[bytes, np.random.Generator], bytes]] = [
        _truncate,
        _flip,
        _flip,
        _edit_header,
        _edit_header,
        _edit_anywhere,
        _cut_out,
        _repeat,
        _zero,
    ]
    for number in range(count):
        name, data = files[number % len(files)]
        damage = damages[random.integers(len(damages))]
        if data[:4] == b"\x89PNG" and random.random() < 0.6:
            damage = _edit_chunk
        elif random.random() < 0.05:
            other = files[random.integers(len(files))][1]
            cut = int(random.integers(len(data)))
            yield f"{number} {name}, spliced", data[:cut] + other[cut:]
            continue
        for _ in range(int(random.choice([1, 1, 1, 2, 4]))):
            data = damage(data, random)
        yield f"{number} {name}, {damage.__name__.strip('_')}", data


def _truncate(data: bytes, random: np.random.Generator) -> bytes:
    return data[: int(random.integers(len(data) + 1))]


def _flip(data: bytes, random: np.random.Generator) -> bytes:
    result = bytearray(data)
    for place in random.integers(len(data), size=int(random.choice([1, 2, 8, 32]))) if data else ():
        result[place] ^= 1 << int(random.integers(8))
    return bytes(result)


def _number_at(data: bytes, place: int, random: np.random.Generator) -> bytes:
    size = int(random.choice([1, 2, 4]))
    number = (int(random.choice(NUMBERS)) & (256**size - 1)).to_bytes(size, "little")
    if random.random() < 0.5:
        number = number[::-1]
    result: bytes = data[:place] + number + data[place + size :]
    return result


def _edit_header(data: bytes, random: np.random.Generator) -> bytes:
    return _number_at(data, int(random.integers(4, 64)), random)


def _edit_anywhere(data: bytes, random: np.random.Generator) -> bytes:
    return _number_at(data, int(random.integers(len(data) + 1)), random)


def _cut_out(data: bytes, random: np.random.Generator) -> bytes:
    start, length = int(random.integers(len(data) + 1)), int(random.integers(1, 64))
    return data[:start] + data[start + length :]


def _repeat(data: bytes, random: np.random.Generator) -> bytes:
    start, length = int(random.integers(len(data) + 1)), int(random.integers(1, 256))
    return data[:start] + data[start : start + length] * int(random.integers(2, 6)) + data[start:]


def _zero(data: bytes, random: np.random.Generator) -> bytes:
    start, length = int(random.integers(len(data) + 1)), int(random.integers(1, 64))
    return data[:start] + bytes(len(data[start : start + length])) + data[start + length :]


def _edit_chunk(data: bytes, random: np.random.Generator) -> bytes:
    """Damage the inside of a PNG's chunk and mend its checksum, so that it is read on."""
    chunks, place = [], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append((place, length))
        place += 12 + length
    if not chunks:
        return _flip(data, random)
    place, length = chunks[int(random.integers(len(chunks)))]
    kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
    body = (_flip if random.random() < 0.5 else _edit_anywhere)(body, random) if body else body
    return data[:place] + chunk(kind, body) + data[place + 12 + length :]


# --- bombs --------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return a PNG chunk."""
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum


def png_file(
    width: int, height: int, depth: int, colour: int, packed: bytes, before: bytes = b""
) -> bytes:
    """Return a PNG file of packed scan lines; ``before`` are chunks that go before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before
    return start + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def tiff_file(entries: dict[int, list[int]], data: bytes) -> bytes:
    """Return a little-endian TIFF file; data lies at its end, at offset ``tiff_data(entries)``."""
    count = len(entries)
    directory, values = struct.pack("<H", count), b""
    start = 8 + 2 + 12 * count + 4
    for tag, numbers in sorted(entries.items()):
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(packed) > 4:
            packed, values = struct.pack("<I", start + len(values)), values + packed
        directory += struct.pack("<HHI", tag, 4, len(numbers)) + packed
    return b"II*\0" + struct.pack("<I", 8) + directory + b"\0\0\0\0" + values + data


def gif_file(screen: int, frame: int, disposal: int) -> bytes:
    """Return a GIF file of two colours whose data ends at once."""
    return b"".join(
        (
            b"GIF89a",
            struct.pack("<HHBBB", screen, screen, 0x80, 0, 0),
            b"\0\0\0\xff\xff\xff",
            b"\x21\xf9\x04",
            bytes([disposal << 2, 0, 0, 0]),
            b"\0\x2c",
            struct.pack("<HHHHB", 0, 0, frame, frame, 0),
            b"\x02\x02\x44\x01\x00\x3b",
        )
    )


def bombs(picture: npt.NDArray[np.uint8]) -> dict[str, bytes]:
    """Return small files that would unpack to hundreds of megabytes, or take minutes."""
    small = zlib.compress(bytes(29 * 28), 9)
    zeros = zlib.compress(bytes(300_000_000), 9)
    one_megabyte = zlib.compress(bytes(1 << 20), 9)
    colour = Image.fromarray(picture)
    jpeg = saved(colour, "JPEG")
    frame = jpeg.index(b"\xff\xc0") + 5
    progressive = saved(Image.new("RGB", (4800, 4800), (10, 200, 30)), "JPEG", progressive=True)
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    webp = saved(colour, "WEBP", lossless=True)
    extended = saved(colour, "WEBP", save_all=True, append_images=[colour.rotate(90)])
    bmp = saved(colour, "BMP")
    square = {256: [28], 257: [28], 258: [8], 262: [1], 277: [1]}

    def text(kind: bytes, between: bytes, packed: bytes, times: int = 1) -> bytes:
        chunks = (chunk(kind, b"a%d" % n + between + packed) for n in range(times))
        return png_file(28, 28, 8, 0, small, b"".join(chunks))

    def tiled(size: int, compression: int) -> bytes:
        entries = {322: [size], 323: [size], 324: [134], 325: [len(zeros)], 259: [compression]}
        return tiff_file(square | entries, zeros)

    return {
        "png 50,000 x 50,000": png_file(50_000, 50_000, 8, 2, small),
        "png 2^31 x 2^31": png_file(2**31 - 1, 2**31 - 1, 16, 6, small),
        "png 1 x 25,000,000": png_file(1, 25_000_000, 1, 0, zlib.compress(bytes(50_000_000), 9)),
        "png 25,000,000 x 1": png_file(25_000_000, 1, 1, 0, zlib.compress(bytes(3_125_001), 9)),
        "png iCCP": text(b"iCCP", b"\0\0", zeros),
        "png zTXt": text(b"zTXt", b"\0\0", zeros),
        "png iTXt": text(b"iTXt", b"\0\1\0\0\0", zeros),
        "png 63 x zTXt": text(b"zTXt", b"\0\0", one_megabyte, 63),
        "png too much data": png_file(28, 28, 8, 0, zeros),
        "jpeg 65,500 x 65,500": jpeg[:frame]
        + struct.pack(">HH", 65_500, 65_500)
        + jpeg[frame + 4 :],
        "jpeg 5,000 scans": progressive[:-2] + last_scan * 5000 + progressive[-2:],
        "gif screen": gif_file(65_535, 10, 0),
        "gif frame": gif_file(10, 65_535, 0),
        "gif frame, disposed": gif_file(10, 65_535, 2),
        "webp lossless 16,384 x 16,384": webp[:21] + b"\xff\xff\xff\x0f" + webp[25:],
        "webp canvas 16,384 x 16,384": extended[:24] + b"\xff\x3f\x00\xff\x3f\x00" + extended[30:],
        "webp canvas 2^24 x 2^24": extended[:24] + b"\xff" * 6 + extended[30:],
        "bmp 30,000 x 30,000": bmp[:18] + struct.pack("<ii", 30_000, 30_000) + bmp[26:],
        "bmp 2^31 x 2^31": bmp[:18] + struct.pack("<ii", 2**31 - 1, -(2**31) + 1) + bmp[26:],
        "tiff 50,000 x 50,000": tiff_file(
            square | {256: [50_000], 257: [50_000], 259: [8], 273: [122], 279: [len(zeros)]}, zeros
        ),
        "tiff tiles 16,384 x 16,384": tiled(16_384, 8),
        "tiff tiles 46,336 x 46,336": tiled(46_336, 5),
        "tiff tiles 2^20 x 2^20": tiled(1 << 20, 8),
        "tiff 65,535 samples": tiff_file(square | {277: [65_535], 259: [8], 273: [122]}, zeros),
    }
