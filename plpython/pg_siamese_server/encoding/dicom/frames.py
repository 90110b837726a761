"""One frame of a DICOM file: which, where it lies, and its stored values.

Streams are checked before a codec sees them: a codec allocates by its own header, and can be busy
for seconds with a damaged stream.
"""

from __future__ import annotations

import operator
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import uid

from pg_siamese_server.encoding.dicom.file import (
    DEFLATED_FRAME,
    ENCAPSULATED,
    JPEG,
    JPEG_2000,
    JPEG_LS,
    NATIVE,
    RLE,
    UNDEFINED,
    File,
)
from pg_siamese_server.encoding.opened import check_frame, damaged
from pg_siamese_server.errors import PROGRAM_LIMIT_EXCEEDED, ImageError

MAX_FRAGMENTS = 200_000
# After the end of a stream, in its last fragment. One byte is what the standard has.
MAX_PADDING = 16
_ITEM, _END = 0xE000FFFE, 0xE0DDFFFE  # as little-endian numbers
_CUT_SHORT = "Its pixels are cut short."


class Stream(NamedTuple):
    """What the header of a compressed frame says.

    Attributes:
        width, height, samples: of the picture.
        precision: bits per sample.
        is_rgb: whether its components are RGB or not, by markers; None if it does not say.
    """

    width: int
    height: int
    samples: int
    precision: int
    is_rgb: bool | None = None


class Pixels(NamedTuple):
    """Stored values of one frame.

    Attributes:
        values: (rows, columns) or (rows, columns, 3): unsigned numbers of ``bits`` bits, or floats.
        bits: how many of them count.
        photometric: what they are, after the codec.
    """

    values: NDArray[Any]
    bits: int
    photometric: str


def choose(file: File, frame: int = 0) -> int:
    """Return the index of a frame by its number, which counts from 1.

    For number 0 it is the representative frame (PS3.3 C.7.6.6), else the middle one.
    """
    count = file.frame_count
    if frame:
        check_frame(frame, count)
        return frame - 1
    number = file.integer("RepresentativeFrameNumber", 0)
    return number - 1 if 1 <= number <= count else count // 2


def decode(file: File, frame: int) -> Pixels:
    """Decode the stored values of one frame."""
    if file.syntax in NATIVE:
        return _native(file, frame)
    if file.length != UNDEFINED:
        raise damaged("DICOM", "Its compressed pixels are not encapsulated.")
    return _compressed(file, _encapsulated(file, frame))


def _native(file: File, frame: int) -> Pixels:
    """Read a frame that is not compressed (PS3.5 section 8)."""
    rows, columns, samples = file.rows, file.columns, file.samples
    order = file.byte_order
    photometric = file.photometric
    pixels = rows * columns * samples
    if file.keyword != "PixelData":
        size = 4 if file.keyword == "FloatPixelData" else 8
        data = _slice(file, frame * pixels * size, pixels * size)
        values = np.frombuffer(data, f"{order}f{size}").reshape(rows, columns)
        return Pixels(values, 8 * size, photometric)
    allocated, bits = _bits(file)
    if allocated == 1:
        first = frame * pixels
        data = _slice(file, first // 8, (first % 8 + pixels + 7) // 8)
        unpacked = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        return Pixels(unpacked[first % 8 :][:pixels].reshape(rows, columns), 1, photometric)
    size = allocated // 8
    length = _stored_samples(file) * size
    start = frame * length
    is_swapped = order == ">" and size == 1 and file.data[file.start - 8 : file.start - 6] == b"OW"
    if is_swapped:  # bytes of words (PS3.5 section 8.1.2)
        words = _slice(file, start - start % 2, length + start % 2 + (start + length) % 2)
        data = np.frombuffer(words, np.uint16).byteswap().tobytes()[start % 2 :][:length]
    else:
        data = _slice(file, start, length)
    values = np.frombuffer(data, f"{order}u{size}").astype(f"u{size}", copy=False)
    return Pixels(_arranged(file, values), bits, photometric)


def _shares_chroma(file: File) -> bool:
    """Return whether two pixels have one chroma (PS3.3 C.7.6.3.1.2). Some say so in vain."""
    if file.samples != 3 or file.photometric != "YBR_FULL_422":
        return False
    whole = 3 * file.rows * file.columns * file.frame_count * _bits(file)[0] // 8
    return file.length == UNDEFINED or file.length < whole


def _stored_samples(file: File) -> int:
    """Return how many numbers a frame that is not compressed has."""
    return file.rows * file.columns * (2 if _shares_chroma(file) else file.samples)


def _arranged(file: File, values: NDArray[Any]) -> NDArray[Any]:
    """Return the numbers of a frame that is not compressed as rows, columns and samples."""
    rows, columns = file.rows, file.columns
    if file.samples == 1:
        return values.reshape(rows, columns)
    if _shares_chroma(file):
        return _full(values).reshape(rows, columns, 3)
    if file.integer("PlanarConfiguration", 0) == 1:
        return values.reshape(3, rows, columns).transpose(1, 2, 0)
    return values.reshape(rows, columns, 3)


def _slice(file: File, start: int, length: int) -> bytes:
    end = len(file.data) if file.length == UNDEFINED else file.start + file.length
    place = file.start + start
    if place + length > min(end, len(file.data)):
        raise damaged("DICOM", _CUT_SHORT)
    return file.data[place : place + length]


def _bits(file: File) -> tuple[int, int]:
    """Return bits allocated and stored; refuse what the standard no longer allows (PS3.5 8.1.1)."""
    allocated = file.integer("BitsAllocated")
    bits = file.integer("BitsStored", allocated)
    if allocated not in (1, 8, 16, 32) or not 1 <= bits <= allocated:
        raise ImageError(f"DICOM image of {bits} bits in {allocated} is not supported")
    if file.integer("HighBit", bits - 1) != bits - 1:
        raise ImageError(
            "DICOM image whose high bit is not its last stored one is not supported",
            detail="DICOM retired such images.",
        )
    return allocated, bits


def _full(values: NDArray[Any]) -> NDArray[Any]:
    """Give each of two pixels the chroma that they share: Y1 Y2 B R (PS3.3 C.7.6.3.1.2)."""
    pairs = values.reshape(-1, 4)
    result = np.empty((len(pairs), 2, 3), values.dtype)
    result[:, :, 0] = pairs[:, :2]
    result[:, :, 1:] = pairs[:, None, 2:]
    return result


def _encapsulated(file: File, frame: int) -> bytes:
    """Return the bytes of a frame out of its fragments (PS3.5 A.4)."""
    if not file.fragments:
        file.fragments.extend(_all_fragments(file))
    (table, size), *fragments = file.fragments
    chosen = _fragments(file, frame, file.data[table : table + size], fragments)
    if not chosen:
        raise damaged("DICOM", f"It has no frame {frame + 1}.")
    return b"".join(file.data[start : start + length] for start, length in chosen)


def _all_fragments(file: File) -> list[tuple[int, int]]:
    """Return where each fragment begins and how long it is; the offset table comes first."""
    data, place = file.data, file.start
    items: list[tuple[int, int]] = []
    while True:
        if place + 8 > len(data):
            raise damaged("DICOM", _CUT_SHORT)
        tag, length = struct.unpack_from("<II", data, place)
        if tag == _END:
            break
        if tag != _ITEM or place + 8 + length > len(data):
            raise damaged("DICOM", _CUT_SHORT)
        items.append((place + 8, length))
        if len(items) > MAX_FRAGMENTS:
            raise ImageError(
                "DICOM image has too many fragments",
                sqlstate=PROGRAM_LIMIT_EXCEEDED,
                detail=f"The limit is {MAX_FRAGMENTS}.",
            )
        place += 8 + length
    if len(items) < 2:
        raise damaged("DICOM", "It has no frame.")
    return items


def _fragments(
    file: File, frame: int, table: bytes, fragments: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    count = file.frame_count
    if count == 1:
        return fragments
    if len(fragments) == count:  # then no table has to say which is which
        return fragments[frame : frame + 1]
    offsets: list[int] = []
    extended = file.value("ExtendedOffsetTable")
    if isinstance(extended, bytes) and len(extended) >= 8 * count:
        offsets = list(struct.unpack_from(f"<{count}Q", extended))
    elif len(table) >= 4 * count:
        offsets = list(struct.unpack_from(f"<{count}I", table))
    first = fragments[0][0] - 8
    is_table = offsets[:1] == [0] and all(map(operator.lt, offsets, offsets[1:]))
    if is_table and {start - 8 - first for start, _ in fragments}.issuperset(offsets):
        begin = offsets[frame]
        end = offsets[frame + 1] if frame + 1 < count else UNDEFINED << 32
        return [each for each in fragments if begin <= each[0] - 8 - first < end]
    if file.syntax == uid.RLELossless:
        return fragments[frame : frame + 1]
    # Without a table, or with one that is wrong, a frame ends where its stream does.
    found: list[list[tuple[int, int]]] = [[]]
    for start, length in fragments:
        found[-1].append((start, length))
        tail = file.data[max(start, start + length - MAX_PADDING - 2) : start + length]
        if _ended(tail).endswith(b"\xff\xd9"):
            found.append([])
    return found[frame] if frame < len(found) else []


def _compressed(file: File, data: bytes) -> Pixels:
    stream, decoded = _CODECS[file.syntax](file, data)
    shape = (file.rows, file.columns, 3)[: 2 if file.samples == 1 else 3]
    if decoded.shape != shape or decoded.dtype.kind not in "ui":
        raise damaged("DICOM", "Its compressed frame is of another size than it says.")
    values = decoded.view(f"u{decoded.dtype.itemsize}")
    photometric = file.photometric
    if stream is not None and file.syntax in JPEG_2000 + JPEG_LS:
        bits = stream.precision  # some say fewer or more bits than their stream has
        stored = file.integer("BitsStored", bits)
        if 1 <= stored < bits and not (values >> stored).any():
            bits = stored  # the stream has room for more
    else:
        bits = _bits(file)[1]
    if file.syntax in JPEG_2000 and photometric in ("YBR_ICT", "YBR_RCT"):
        photometric = "RGB"  # the codec undoes the transform that the stream names
    if file.samples == 3 and stream is not None and stream.is_rgb is not None:
        photometric = "RGB" if stream.is_rgb else "YBR_FULL"
    return Pixels(values, min(bits, 8 * values.dtype.itemsize), photometric)


def _check_stream(file: File, data: bytes, found: Stream | None) -> Stream:
    """Refuse a stream that lacks its end, or that is of another size than the file says."""
    if found is None:
        raise damaged("DICOM", "Its compressed frame has no valid header.")
    if (found.height, found.width, found.samples) != (file.rows, file.columns, file.samples):
        raise damaged(
            "DICOM",
            f"Its compressed frame is of {found.width} x {found.height} pixels and"
            f" {found.samples} samples, not {file.columns} x {file.rows} and {file.samples}.",
        )
    if found.precision > 16 or found.precision > max(8, file.integer("BitsAllocated")):
        raise damaged("DICOM", f"Its compressed frame has {found.precision} bits per sample.")
    if not data.endswith(b"\xff\xd9"):
        raise damaged("DICOM", _CUT_SHORT)
    return found


def _jpeg_header(data: bytes) -> Stream | None:
    """Read a JPEG or JPEG-LS header up to its frame (ITU-T T.81 annex B, T.87 annex C)."""
    place, is_rgb = 2, None
    if data[:2] != b"\xff\xd8":
        return None
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            return None
        marker = data[place + 1]
        if marker == 0xFF:
            place += 1
            continue
        length = struct.unpack_from(">H", data, place + 2)[0]
        segment = data[place + 4 : place + 2 + length]
        if marker == 0xE0 and segment.startswith(b"JFIF"):
            is_rgb = False
        if marker == 0xEE and segment.startswith(b"Adobe") and len(segment) > 11 and is_rgb is None:
            is_rgb = segment[11] == 0  # its transform (ITU-T T.872 section 6.5.3)
        if marker in (0xC0, 0xC1, 0xC2, 0xC3, 0xF7):
            if len(segment) < 6:
                return None
            precision, height, width, samples = struct.unpack_from(">BHHB", segment)
            if segment[6::3][:3] in (b"RGB", b"rgb"):
                is_rgb = True
            return Stream(width, height, samples, precision, is_rgb)
        if marker == 0xDA:
            return None
        place += 2 + length
    return None


def _jpeg2000_header(data: bytes) -> Stream | None:
    """Read the SIZ marker of a JPEG 2000 code stream (ITU-T T.800 annex A.5.1)."""
    start = data.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start < 0 or start + 43 > len(data):
        return None
    right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
    samples, depth = struct.unpack_from(">HB", data, start + 40)
    return Stream(right - left, bottom - top, samples, (depth & 0x7F) + 1)


def _ended(data: bytes) -> bytes:
    """Strip the byte, whichever it is, that makes a fragment's length even (PS3.5 A.4).

    Some write more than one, all of them zero.
    """
    plain = data.rstrip(b"\0")
    if plain.endswith(b"\xff\xd9"):
        return plain
    return data[:-1] if data[-3:-1] == b"\xff\xd9" else data


def _decode(file: File, data: bytes, codec: Callable[..., Any], **options: Any) -> NDArray[Any]:
    try:
        return np.ascontiguousarray(codec(data, **options))
    except MemoryError:
        raise
    except Exception as error:  # codecs have errors of their own, and raise others
        text = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise damaged("DICOM", f"Its compressed frame: {text[0][:200].rstrip('.')}.") from None


def _jpeg(file: File, data: bytes) -> tuple[Stream, NDArray[Any]]:
    data = _ended(data)
    stream = _check_stream(file, data, _jpeg_header(data))
    # The same space in and out: no conversion in the codec.
    options = {"colorspace": "YCBCR", "outcolorspace": "YCBCR"} if stream.samples == 3 else {}
    return stream, _decode(file, data, imagecodecs.jpeg8_decode, **options)


def _jpegls(file: File, data: bytes) -> tuple[Stream, NDArray[Any]]:
    data = _ended(data)
    stream = _check_stream(file, data, _jpeg_header(data))
    return stream, _decode(file, data, imagecodecs.jpegls_decode)


def _jpeg2000(file: File, data: bytes) -> tuple[Stream, NDArray[Any]]:
    # Not htj2k_decode: in lossy files it turns white into black.
    data = _ended(data)
    stream = _check_stream(file, data, _jpeg2000_header(data))
    return stream, _decode(file, data, imagecodecs.jpeg2k_decode)


def _rle(file: File, data: bytes) -> tuple[None, NDArray[Any]]:
    """Decode RLE (PS3.5 annex G): one segment per byte of a sample, the highest first."""
    rows, columns, samples = file.rows, file.columns, file.samples
    allocated, _ = _bits(file)
    size, pixels = allocated // 8, rows * columns
    if allocated == 1 or len(data) < 64:
        raise damaged("DICOM", "Its RLE frame has no valid header.")
    count, *offsets = struct.unpack_from("<16I", data)
    if count != size * samples:
        raise damaged("DICOM", f"Its RLE frame has {count} segments, not {size * samples}.")
    planes = np.empty((samples, size, pixels), np.uint8)
    ends = [*offsets[1:count], len(data)]
    for number, (start, end) in enumerate(zip(offsets[:count], ends, strict=True)):
        part = _decode(file, data[start:end], _unpack_bits, most=pixels)
        if len(part) < pixels:
            raise damaged("DICOM", _CUT_SHORT)
        planes[number // size, size - 1 - number % size] = part[:pixels]
    values = np.ascontiguousarray(planes.transpose(0, 2, 1)).view(f"<u{size}")
    values = values.reshape(samples, rows, columns)
    return None, np.ascontiguousarray(values[0] if samples == 1 else values.transpose(1, 2, 0))


def _unpack_bits(data: bytes, most: int) -> NDArray[np.uint8]:
    # Each byte of a segment gives 64 at most, so that this is bounded by the file's size.
    return np.frombuffer(imagecodecs.packbits_decode(data, out=most + 1024), np.uint8)


def _uncompressed(file: File, data: bytes) -> tuple[None, NDArray[Any]]:
    """Read a frame that is not compressed, but in fragments (PS3.5 A.4)."""
    allocated, _ = _bits(file)
    pixels = _stored_samples(file)
    if len(data) < (pixels * allocated + 7) // 8:
        raise damaged("DICOM", _CUT_SHORT)
    if allocated == 1:
        bits = np.unpackbits(np.frombuffer(data, np.uint8), count=pixels, bitorder="little")
        return None, bits.reshape(file.rows, file.columns)
    return None, _arranged(file, np.frombuffer(data, f"<u{allocated // 8}", pixels))


def _deflated(file: File, data: bytes) -> tuple[None, NDArray[Any]]:
    """Inflate a frame (PS3.5 A.4)."""
    allocated, _ = _bits(file)
    length = (file.rows * file.columns * file.samples * allocated + 7) // 8
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        plain = inflater.decompress(data, length)
    except zlib.error:
        raise damaged("DICOM", "Its deflated frame cannot be inflated.") from None
    return _uncompressed(file, plain)


_CODECS: dict[str, Callable[[File, bytes], tuple[Stream | None, NDArray[Any]]]] = {
    **dict.fromkeys(JPEG, _jpeg),
    **dict.fromkeys(JPEG_LS, _jpegls),
    **dict.fromkeys(JPEG_2000, _jpeg2000),
    **dict.fromkeys(RLE, _rle),
    **dict.fromkeys(DEFLATED_FRAME, _deflated),
    **dict.fromkeys(ENCAPSULATED, _uncompressed),
}
