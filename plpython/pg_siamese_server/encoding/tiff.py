"""Read TIFF by the TIFF 6.0 standard: which page is the picture, and what its samples mean.

Pillow's libtiff undoes the compression. The tags decide here what the bytes mean. Pillow reads
several sample formats in other ways than the standard: signed, planar, packed, white is zero. What
is not listed here is refused by name.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pg_siamese_server.encoding.opened import MAX_SIDE, Opened, Poll, check_size, damaged
from pg_siamese_server.encoding.samples import Range, full_range, scale
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import PROGRAM_LIMIT_EXCEEDED, ImageError, ImageSizeError

MAX_PAGES = 1000
MAX_SAMPLES = 8
# Most bytes of an unpacked file per allowed pixel. No meaningful image has more.
MAX_BYTES_PER_PIXEL = 8
CHUNK_SAMPLES = 1_000_000
BLOCK_BYTES = 8 * 1024 * 1024
# Most bytes to unpack in one call, which no cancel can end: at most about 0.3 s.
MAX_PART_BYTES = 64 * 1024 * 1024

SUBFILE_TYPE, OLD_SUBFILE_TYPE, WIDTH, LENGTH, BITS, COMPRESSION = 254, 255, 256, 257, 258, 259
PHOTOMETRIC, FILL_ORDER, STRIP_OFFSETS, ORIENTATION, SAMPLES = 262, 266, 273, 274, 277
ROWS_PER_STRIP, STRIP_COUNTS, PLANAR, PREDICTOR, COLOUR_MAP = 278, 279, 284, 317, 320
TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_COUNTS, SUB_IFDS = 322, 323, 324, 325, 330
T4_OPTIONS, T6_OPTIONS, JPEG_TABLES = 292, 293, 347
YCBCR_SUBSAMPLING, YCBCR_POSITIONING = 530, 531
INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, PROFILE = 332, 338, 339, 34675
OLD_JPEG_TAGS = (512, 513, 514, 515, 517, 518, 519, 520, 521)
# Tags that libtiff needs to decode a page whose compression knows about pixels.
DECODER_TAGS = (
    *(WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, STRIP_OFFSETS, SAMPLES),
    *(ROWS_PER_STRIP, STRIP_COUNTS, PLANAR, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_COUNTS),
    *(T4_OPTIONS, T6_OPTIONS, YCBCR_SUBSAMPLING, YCBCR_POSITIONING),
    *OLD_JPEG_TAGS,
)
READ_TAGS = frozenset(
    (
        *DECODER_TAGS,
        *(SUBFILE_TYPE, OLD_SUBFILE_TYPE, ORIENTATION, PREDICTOR, COLOUR_MAP, SUB_IFDS, INK_SET),
        *(EXTRA_SAMPLES, SAMPLE_FORMAT, JPEG_TABLES, PROFILE),
    )
)
SHORT, LONG, UNDEFINED = 3, 4, 7

REDUCED, MASK = 1, 4
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, TRANSPARENCY_MASK, CMYK, YCBCR = range(7)
PHOTOMETRICS = {
    TRANSPARENCY_MASK: "transparency mask",
    8: "CIELab",
    9: "ICCLab",
    10: "ITULab",
    32803: "colour filter array (camera raw)",
    32844: "LogL",
    32845: "LogLuv",
    34892: "linear raw (camera raw)",
}
COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}
# These pack bytes, whatever they mean.
BYTE_CODECS = {1, 5, 8, 32773, 32946, 34925, 50000}
JPEG, OLD_JPEG = 7, 6
CCITT = (2, 3, 4)
COMPRESSIONS = {
    32766: "NeXT",
    32809: "ThunderScan",
    34661: "JBIG",
    34887: "LERC",
    34892: "lossy JPEG (DNG)",
    50001: "WebP",
    **dict.fromkeys((33003, 33004, 33005, 34712), "JPEG 2000"),
    **dict.fromkeys((50002, 52546), "JPEG XL"),
}
UNSIGNED, SIGNED, FLOAT, VOID = 1, 2, 3, 4
FORMAT_NAMES = {UNSIGNED: "unsigned", SIGNED: "signed", FLOAT: "floating-point"}
ASSOCIATED_ALPHA, ALPHA = 1, 2

Tags = dict[int, tuple[int, ...] | bytes]


class _Layout(NamedTuple):
    """Letters of ``struct`` for entry counts and offsets, and the place of the first offset."""

    entries: str
    offset: str
    first: int


BIG_TIFF = 43
_CLASSIC, _BIG = _Layout("H", "I", 4), _Layout("Q", "Q", 8)
# BYTE, ASCII, SHORT, LONG, UNDEFINED, IFD, LONG8, IFD8
TYPES = {1: "B", 2: "B", 3: "H", 4: "I", 7: "B", 13: "I", 16: "Q", 18: "Q"}


@dataclass(frozen=True)
class Page:
    """One page's tags, checked."""

    tags: Tags
    order: str
    width: int
    height: int
    bits: int
    kind: int
    samples: int
    photometric: int
    compression: int
    planar: bool
    predictor: int
    fill_order: int
    extra: tuple[int, ...]

    @property
    def samples_together(self) -> int:
        """Samples that lie side by side: all, or one if each has a plane of its own."""
        return 1 if self.planar else self.samples

    @property
    def name(self) -> str:
        """Name of the samples, for messages."""
        return f"{self.bits}-bit {FORMAT_NAMES[self.kind]} samples"

    @property
    def alpha(self) -> int | None:
        """The kind of alpha of the first extra sample, or None."""
        colours = COLOURS[self.photometric]
        if self.samples == colours:
            return None
        if self.extra:
            return self.extra[0] if self.extra[0] in (ASSOCIATED_ALPHA, ALPHA) else None
        # RGBA without the tag is common, and four colours without their names can't exist.
        return ALPHA if self.photometric == RGB and self.samples == 4 else None


def refusal(what: str, hint: str | None = None) -> ImageError:
    """Return the error of a feature that has no standard meaning for this reader."""
    return ImageError(
        f"TIFF image with {what} is not supported",
        hint=hint or "Store it as PNG, or as TIFF in grey or RGB with 8 or 16 bits per channel.",
    )


def decode(data: bytes, spec: InputSpec, poll: Poll) -> Opened:
    """Read the first full-size page of a TIFF file.

    Raises:
        ImageError: over a limit, damaged, or of a kind that has no settled meaning.
    """
    order = "<" if data[:2] == b"II" else ">"
    page = _page(_full_size_page(data, poll), order, spec)
    if page.compression in BYTE_CODECS:
        image = _read_samples(page, data, spec, poll)
    else:
        image = _decode_with_pillow(page, data, poll)
    orientation = _numbers(page.tags, ORIENTATION)
    return Opened(image, orientation[0] if orientation else 1, page.tags.get(PROFILE))


def _full_size_page(data: bytes, poll: Poll) -> Tags:
    first: Tags = {}
    for tags in _pages(data, poll):
        first = first or tags
        if not _is_reduced(tags):
            return tags
    if not first:
        raise damaged("TIFF", "It has no page.")
    if SUB_IFDS in first:
        raise refusal("its full picture below another one (SubIFDs)")
    return first


def _pages(data: bytes, poll: Poll) -> Iterator[Tags]:
    order = "<" if data[:2] == b"II" else ">"
    seen: set[int] = set()
    try:
        (version,) = struct.unpack_from(f"{order}H", data, 2)
        layout = _BIG if version == BIG_TIFF else _CLASSIC
        (place,) = struct.unpack_from(order + layout.offset, data, layout.first)
        while place and place not in seen and len(seen) < MAX_PAGES:
            poll()
            seen.add(place)
            tags, place = _read_directory(data, place, order, layout)
            yield tags
    except struct.error:
        raise damaged("TIFF", "Its tags lead out of the file.") from None


def _read_directory(data: bytes, place: int, order: str, layout: _Layout) -> tuple[Tags, int]:
    """Read the tags that matter here, and the place of the next directory.

    Pillow's reader knows no BigTIFF in big-endian order, and fails on tags that don't matter.
    """
    (count,) = struct.unpack_from(order + layout.entries, data, place)
    start = place + struct.calcsize(layout.entries)
    size = struct.calcsize(f"<HH{layout.offset}{layout.offset}")
    inline = struct.calcsize(layout.offset)
    tags: Tags = {}
    for entry in range(start, min(start + count * size, len(data)), size):
        tag, kind = struct.unpack_from(f"{order}HH", data, entry)
        if tag not in READ_TAGS or kind not in TYPES:
            continue
        letter = TYPES[kind]
        (values,) = struct.unpack_from(order + layout.offset, data, entry + 4)
        length = values * struct.calcsize(letter)
        where = entry + size - inline
        if length > inline:
            (where,) = struct.unpack_from(order + layout.offset, data, where)
        if where + length > len(data):
            if tag == PROFILE:
                continue
            raise damaged("TIFF", f"Tag {tag} leads out of the file.")
        content = data[where : where + length]
        if tag in (JPEG_TABLES, PROFILE):
            tags[tag] = content
        else:
            tags[tag] = struct.unpack(f"{order}{values}{letter}", content)
    (following,) = struct.unpack_from(order + layout.offset, data, start + count * size)
    return tags, following


def _is_reduced(tags: Tags) -> bool:
    kind = _number(tags, SUBFILE_TYPE, 0)
    return bool(kind & (REDUCED | MASK)) or _number(tags, OLD_SUBFILE_TYPE, 1) == 2


def _number(tags: Tags, tag: int, default: int) -> int:
    value = _numbers(tags, tag)
    return value[0] if value else default


def _numbers(tags: Tags, tag: int) -> tuple[int, ...]:
    value = tags.get(tag, ())
    return value if isinstance(value, tuple) else ()


def _uniform(tags: Tags, tag: int, default: int, what: str) -> int:
    values = set(_numbers(tags, tag)) or {default}
    if len(values) > 1:
        raise refusal(f"channels of different {what}")
    return values.pop()


def _page(tags: Tags, order: str, spec: InputSpec) -> Page:
    if WIDTH not in tags or LENGTH not in tags:
        raise damaged("TIFF", "It does not say its size.")
    compression = _number(tags, COMPRESSION, 1)
    bits = _uniform(tags, BITS, 1, "bits")
    kind = _uniform(tags, SAMPLE_FORMAT, UNSIGNED, "sample formats")
    colours = 3 if compression == OLD_JPEG else 1
    page = Page(
        tags,
        order,
        _number(tags, WIDTH, 0),
        _number(tags, LENGTH, 0),
        bits,
        UNSIGNED if kind == VOID else kind,
        _number(tags, SAMPLES, colours),
        # A file without the tag is not a TIFF by the standard. Readers take white as zero.
        _number(tags, PHOTOMETRIC, WHITE_IS_ZERO),
        compression,
        _number(tags, PLANAR, 1) == 2,
        _number(tags, PREDICTOR, 1),
        _number(tags, FILL_ORDER, 1),
        _numbers(tags, EXTRA_SAMPLES),
    )
    check_size(page.width, page.height, spec)
    tile = _number(tags, TILE_WIDTH, 1) * _number(tags, TILE_LENGTH, 1)
    if tile > spec.max_pixels:
        raise ImageSizeError("image has tiles that are too large", spec.max_pixels, MAX_SIDE)
    _check_meaning(page)
    return page


def _check_meaning(page: Page) -> None:
    if page.photometric not in COLOURS:
        name = PHOTOMETRICS.get(page.photometric, "unknown")
        raise refusal(f"photometric interpretation {page.photometric} ({name})")
    if page.kind not in FORMAT_NAMES:
        raise refusal(f"sample format {page.kind}")
    colours = COLOURS[page.photometric]
    if not colours <= page.samples <= MAX_SAMPLES:
        raise refusal(f"{page.samples} samples per pixel")
    if page.photometric == CMYK and _number(page.tags, INK_SET, 1) != 1:
        raise refusal("inks that are not CMYK")
    if page.photometric == YCBCR and page.compression not in (JPEG, OLD_JPEG):
        raise refusal("photometric interpretation 6 (YCbCr) outside JPEG")
    if page.photometric == PALETTE and (page.kind != UNSIGNED or page.bits > 8):
        raise refusal(f"a palette and {page.name}")
    sizes = {UNSIGNED: range(1, 33), SIGNED: (8, 16, 32), FLOAT: (16, 32, 64)}[page.kind]
    if page.bits not in sizes:
        raise refusal(page.name)
    if page.alpha is not None and (page.kind != UNSIGNED or page.bits > 16):
        raise refusal(f"alpha and {page.name}")


def _decode_with_pillow(page: Page, data: bytes, poll: Poll) -> Image.Image:
    """Let Pillow decode JPEG and fax, whose compression fixes their meaning."""
    is_jpeg = page.compression in (JPEG, OLD_JPEG)
    if not is_jpeg and page.compression not in CCITT:
        name = COMPRESSIONS.get(page.compression, "unknown")
        raise refusal(f"compression {page.compression} ({name})")
    if (page.bits, page.kind) != (8 if is_jpeg else 1, UNSIGNED):
        raise refusal(f"{page.name} in compression {page.compression}")
    if page.samples != COLOURS[page.photometric] or page.photometric == PALETTE:
        raise refusal(f"{page.samples} samples per pixel in compression {page.compression}")
    kept: Tags = {tag: _numbers(page.tags, tag) for tag in DECODER_TAGS if tag in page.tags}
    tables = page.tags.get(JPEG_TABLES)
    if isinstance(tables, bytes):
        kept[JPEG_TABLES] = tables
    kept[PHOTOMETRIC] = (page.photometric,)
    kept[SAMPLES] = (page.samples,)
    kept[BITS] = (page.bits,) * page.samples
    image = _load(page.order, data, kept, poll)
    # libtiff turns old JPEG and its own YCbCr into RGB. Grey in JPEG keeps its polarity.
    if is_jpeg and page.photometric == WHITE_IS_ZERO and image.mode == "L":
        raise refusal("white as zero in JPEG")
    return image


def _load(order: str, data: bytes, tags: Tags, poll: Poll) -> Image.Image:
    """Decode with Pillow a page with these tags only, so that no others can do harm.

    The first eight bytes of the data are those of a header.
    """
    place = len(data) + len(data) % 2
    header = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, place)
    padding = b"\0" * (len(data) % 2)
    file = b"".join((header, data[8:], padding, _directory(order, tags, place)))
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # checked here, in bytes too
    try:
        with Image.open(io.BytesIO(file), formats=("TIFF",)) as image:
            poll()
            image.load()
            poll()
            return image.copy() if image.readonly else image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _directory(order: str, tags: Tags, place: int) -> bytes:
    """Write tags as a directory at ``place`` of a file."""
    entries, values = [struct.pack(f"{order}H", len(tags))], [struct.pack(f"{order}I", 0)]
    after = place + 2 + 12 * len(tags) + 4
    for tag, value in sorted(tags.items()):
        if isinstance(value, bytes):
            kind, content = UNDEFINED, value
        else:
            kind = SHORT if max(value) < 2**16 else LONG
            content = struct.pack(f"{order}{len(value)}{'H' if kind == SHORT else 'I'}", *value)
        entries.append(struct.pack(f"{order}HHI", tag, kind, len(value)))
        if len(content) > 4:
            entries.append(struct.pack(f"{order}I", after))
            content += b"\0" * (len(content) % 2)
            values.append(content)
            after += len(content)
        else:
            entries.append(content.ljust(4, b"\0"))
    return b"".join(entries + values)


def _read_samples(page: Page, data: bytes, spec: InputSpec, poll: Poll) -> Image.Image:
    """Read the samples as they are stored, and render them in 8 bits per channel."""
    limits = _range(page, spec)
    colours = COLOURS[page.photometric]
    kept = colours + (page.alpha is not None)
    planes = page.samples if page.planar else 1
    if page.width * page.height * page.samples * page.bits > (
        8 * MAX_BYTES_PER_PIXEL * spec.max_pixels
    ):
        raise ImageSizeError(
            f"image of {page.width} x {page.height} pixels with {page.samples} samples of"
            f" {page.bits} bits is too large",
            spec.max_pixels,
            MAX_SIDE,
        )
    result = np.empty((page.height, page.width, kept), dtype=np.uint8)
    for plane in range(min(planes, kept)):
        top = 0
        for rows in _blocks(page, data, plane, poll):
            step = max(1, CHUNK_SAMPLES // (page.width * page.samples_together))
            for start in range(0, len(rows), step):
                poll()
                part = result[top : top + len(rows)][start : start + step]
                values = _values(page, rows[start : start + step][: len(part)])
                if page.planar:
                    part[..., plane] = _render(page, values[..., 0], limits, plane >= colours)
                else:
                    part[..., :colours] = _render(page, values[..., :colours], limits, False)
                    if kept > colours:
                        part[..., colours] = _render(page, values[..., colours], limits, True)
            top += len(rows)
    return _image(page, result)


def _range(page: Page, spec: InputSpec) -> Range:
    if page.kind == UNSIGNED and page.bits < 16:
        return full_range(page.bits)
    if spec.input_range is not None:
        return spec.input_range
    if page.kind == UNSIGNED and page.bits == 16:
        return full_range(16)
    raise ImageError(
        f"TIFF image with {page.name} has no defined range",
        hint="Store it with 8 or 16 bits per channel, unsigned, or use a model that is registered"
        " with input_range.",
    )


class _Part(NamedTuple):
    """A strip, or a row of tiles side by side: its rows, and its places and sizes in the file."""

    rows: int
    offsets: tuple[int, ...]
    counts: tuple[int, ...]


def _blocks(page: Page, data: bytes, plane: int, poll: Poll) -> Iterator[NDArray[np.uint8]]:
    """Undo the compression block by block, and yield bytes in the file's order, (rows, bytes)."""
    across = -(-page.width * page.samples_together * page.bits // 8)
    width, parts = _parts(page, plane, across)
    block: list[_Part] = []
    for number, part in enumerate(parts):
        poll()
        block.append(part)
        following = parts[number + 1].rows if number + 1 < len(parts) else 0
        rows = sum(item.rows for item in block)
        if not following or (rows + following) * across > BLOCK_BYTES or part.rows != following:
            yield _decompress(page, data, block, across, width, poll)
            block = []


def _parts(page: Page, plane: int, across: int) -> tuple[int | None, list[_Part]]:
    """Return the width of a tile in bytes, None for strips, and the parts from top to bottom."""
    tags = page.tags
    if TILE_OFFSETS in tags:
        tile, length = _number(tags, TILE_WIDTH, 0), _number(tags, TILE_LENGTH, 0)
        bits = tile * page.samples_together * page.bits
        if tile < 1 or length < 1 or bits % 8:
            raise damaged("TIFF", "Its tiles have no valid size.")
        width, columns = bits // 8, -(-page.width // tile)
        offset_tag, count_tag = TILE_OFFSETS, TILE_COUNTS
    else:
        length = min(_number(tags, ROWS_PER_STRIP, page.height), page.height)
        if length < 1:
            raise damaged("TIFF", "Its strips have no rows.")
        width, columns, offset_tag, count_tag = None, 1, STRIP_OFFSETS, STRIP_COUNTS
    number = -(-page.height // length) * columns
    offsets = _numbers(tags, offset_tag)[plane * number : (plane + 1) * number]
    counts = _numbers(tags, count_tag)[plane * number : (plane + 1) * number]
    if len(offsets) != number or (len(counts) != number and page.compression != 1):
        raise damaged("TIFF", "It lacks parts of its picture.")
    parts = []
    for first in range(0, number, columns):
        # Strips end with the picture, tiles beyond it.
        rows = min(length, page.height - first * length) if width is None else length
        size = (width or across) * rows
        places, sizes = offsets[first : first + columns], counts[first : first + columns]
        if page.compression != 1:
            if size > MAX_PART_BYTES:
                raise ImageError(
                    f"TIFF image with a strip of {rows} rows is too large",
                    sqlstate=PROGRAM_LIMIT_EXCEEDED,
                    detail=f"The limit of a strip is {MAX_PART_BYTES} bytes when unpacked.",
                    hint="Save it in more strips, or without compression.",
                )
            parts.append(_Part(rows, places, sizes))
            continue
        if any(count < size for count in sizes):
            raise damaged("TIFF", "A part of its picture is missing.")
        # Without compression, any pieces can be read.
        step = rows if width is not None else max(1, BLOCK_BYTES // across)
        for top in range(0, rows, step):
            piece = min(step, rows - top)
            start = tuple(place + top * across for place in places)
            parts.append(_Part(piece, start, (piece * (width or across),) * columns))
    return width, parts


def _decompress(
    page: Page,
    data: bytes,
    parts: list[_Part],
    across: int,
    width: int | None,
    poll: Poll,
) -> NDArray[np.uint8]:
    """Undo the compression of parts of equal length, except for the last."""
    body, places, sizes = [bytes(8)], [], []
    at = 8
    for part in parts:
        for offset, count in zip(part.offsets, part.counts, strict=True):
            if offset + count > len(data):
                raise damaged("TIFF", "A part of its picture is missing.")
            body.append(data[offset : offset + count])
            places.append(at)
            sizes.append(count)
            at += count
    tags: Tags = {
        WIDTH: (across,),
        LENGTH: (sum(part.rows for part in parts),),
        BITS: (8,),
        COMPRESSION: (page.compression,),
        PHOTOMETRIC: (BLACK_IS_ZERO,),
        FILL_ORDER: (page.fill_order,),
        SAMPLES: (1,),
        PLANAR: (1,),
    }
    if width is None:
        tags |= {ROWS_PER_STRIP: (parts[0].rows,), STRIP_OFFSETS: tuple(places)}
        tags[STRIP_COUNTS] = tuple(sizes)
    else:
        tags |= {TILE_WIDTH: (width,), TILE_LENGTH: (parts[0].rows,)}
        tags |= {TILE_OFFSETS: tuple(places), TILE_COUNTS: tuple(sizes)}
    return np.asarray(_load(page.order, b"".join(body), tags, poll))


def _values(page: Page, rows: NDArray[np.uint8]) -> NDArray[Any]:
    """Convert bytes to samples, (rows, width, samples)."""
    samples = page.samples_together
    shape = (len(rows), page.width, samples)
    if page.bits in (8, 16, 32, 64):
        values = _undo_predictor(page, rows, samples)
    elif page.predictor != 1:
        raise refusal(f"a predictor and {page.name}")
    else:
        values = _unpack_bits(rows, page.width * samples, page.bits)
    return values.reshape(shape)


def _undo_predictor(page: Page, rows: NDArray[np.uint8], samples: int) -> NDArray[Any]:
    code = {UNSIGNED: "u", SIGNED: "i", FLOAT: "f"}[page.kind]
    order = page.order
    dtype = np.dtype(f"{order}{code}{page.bits // 8}")
    if page.predictor == 1:
        return np.ascontiguousarray(rows).view(dtype)
    if page.predictor == 3 and page.kind == FLOAT:
        return _undo_float_predictor(page, rows, samples, dtype)
    if page.predictor == 2 and page.kind != FLOAT:
        words = np.ascontiguousarray(rows).view(f"{order}u{page.bits // 8}")
        words = words.astype(words.dtype.newbyteorder("="))
        for start, end in _tile_columns(page):
            part = words[:, start * samples : end * samples].reshape(len(rows), -1, samples)
            summed = np.add.accumulate(part, axis=1, dtype=words.dtype)
            words[:, start * samples : end * samples] = summed.reshape(len(rows), -1)
        return words.view(dtype.newbyteorder("="))
    raise refusal(f"predictor {page.predictor} and {page.name}")


def _undo_float_predictor(
    page: Page, rows: NDArray[np.uint8], samples: int, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Undo predictor 3: byte planes, most significant first, as differences along the row."""
    size = page.bits // 8
    if len(list(_tile_columns(page))) > 1:  # an edge tile's planes are as wide as the tile
        raise refusal(f"predictor 3 in tiles and {page.name}")
    words = rows.reshape(len(rows), -1, samples)
    planes = np.add.accumulate(words, axis=1, dtype=np.uint8).reshape(len(rows), size, -1)
    values = np.ascontiguousarray(planes.transpose(0, 2, 1)).reshape(len(rows), -1)
    return values.view(f">f{size}").astype(dtype.newbyteorder("="))


def _tile_columns(page: Page) -> Iterator[tuple[int, int]]:
    """Yield the columns of each tile, since differences start again with each."""
    width = _number(page.tags, TILE_WIDTH, page.width) if TILE_OFFSETS in page.tags else page.width
    for start in range(0, page.width, width):
        yield start, min(start + width, page.width)


def _unpack_bits(rows: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.uint32]:
    """Unpack samples of any number of bits, most significant first. Rows start at a byte."""
    single = np.unpackbits(rows, axis=1, count=count * bits).reshape(len(rows), count, bits)
    values = np.zeros((len(rows), count), dtype=np.uint32)
    for bit in range(bits):
        values <<= 1
        values |= single[..., bit]
    return values


def _render(page: Page, values: NDArray[Any], limits: Range, is_alpha: bool) -> NDArray[np.uint8]:
    if page.photometric == PALETTE:
        return values.astype(np.uint8)
    if is_alpha:
        return scale(values, full_range(page.bits))  # its own range, whatever the range of colours
    result = scale(values, limits)
    return ~result if page.photometric == WHITE_IS_ZERO else result


def _image(page: Page, pixels: NDArray[np.uint8]) -> Image.Image:
    if page.photometric == PALETTE:
        pixels = _palette(page)[pixels[..., 0]]
        return Image.fromarray(pixels)
    modes = {
        (WHITE_IS_ZERO, None): "L",
        (WHITE_IS_ZERO, ASSOCIATED_ALPHA): "La",
        (WHITE_IS_ZERO, ALPHA): "LA",
        (RGB, None): "RGB",
        (RGB, ASSOCIATED_ALPHA): "RGBa",
        (RGB, ALPHA): "RGBA",
        (CMYK, None): "CMYK",
    }
    photometric = WHITE_IS_ZERO if page.photometric == BLACK_IS_ZERO else page.photometric
    mode = modes.get((photometric, page.alpha))
    if mode is None or (page.photometric == WHITE_IS_ZERO and page.alpha == ASSOCIATED_ALPHA):
        raise refusal("alpha in this photometric interpretation")
    return Image.frombuffer(mode, (page.width, page.height), pixels, "raw", mode, 0, 1)


def _palette(page: Page) -> NDArray[np.uint8]:
    entries = _numbers(page.tags, COLOUR_MAP)
    size = 2**page.bits
    if len(entries) < 3 * size or page.alpha is not None:
        raise refusal("a palette that is not whole" if page.alpha is None else "palette and alpha")
    # Writers multiply 8 bits by 256 or 257. The upper byte is the original of both.
    return (np.array(entries[: 3 * size]).reshape(3, size).T >> 8).astype(np.uint8)
