"""A DICOM file up to its pixels, read by pydicom behind guards of our own.

DICOM PS3.10 section 7 (file format), PS3.5 section 7 (data set), section A (transfer syntaxes).
"""

from __future__ import annotations

import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydicom import dcmread, uid
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from pg_siamese_server.encoding.opened import Poll, check_size, damaged
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import PROGRAM_LIMIT_EXCEEDED, ImageError

# Nobody's log wants what pydicom thinks of a file: what matters becomes an error.
logging.getLogger("pydicom").addHandler(logging.NullHandler())


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings of pydicom out of the log: they quote values, names of patients among them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


PREAMBLE = 128
MAGIC = b"DICM"
# Each element takes one read at least, and some hundred bytes of memory.
MAX_READS = 400_000
READS_PER_POLL = 1_000
INFLATED_AT_ONCE = 4 * 1024 * 1024
_LONG_VRS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT", b"SV")
_PIXELS = {
    0x7FE00010: "PixelData",
    0x7FE00008: "FloatPixelData",
    0x7FE00009: "DoubleFloatPixelData",
}
UNDEFINED = 0xFFFFFFFF

NATIVE = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
)
# JPEG progressive of 8 and 12 bits is retired, and has no name in pydicom.
JPEG = (
    uid.JPEGBaseline8Bit,
    uid.JPEGExtended12Bit,
    uid.UID("1.2.840.10008.1.2.4.53"),
    uid.UID("1.2.840.10008.1.2.4.55"),
    uid.JPEGLossless,
    uid.JPEGLosslessSV1,
)
JPEG_LS = (uid.JPEGLSLossless, uid.JPEGLSNearLossless)
JPEG_2000 = (
    uid.JPEG2000Lossless,
    uid.JPEG2000,
    uid.HTJ2KLossless,
    uid.HTJ2KLosslessRPCL,
    uid.HTJ2K,
)
RLE = (uid.RLELossless,)
DEFLATED_FRAME = (uid.UID("1.2.840.10008.1.2.8.1"),)
ENCAPSULATED = (uid.UID("1.2.840.10008.1.2.1.98"),)
SUPPORTED = frozenset((*NATIVE, *JPEG, *JPEG_LS, *JPEG_2000, *RLE, *DEFLATED_FRAME, *ENCAPSULATED))

# Later than pydicom's dictionary (PS3.6 table A-1).
_NEWER = {
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL JPEG Recompression",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
}

# SOP classes with pixels that are no picture (PS3.4 annex B.5), by what they are.
_NO_PICTURES = {
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "a label map segmentation",
    "1.2.840.10008.5.1.4.1.1.30": "a parametric map",
    "1.2.840.10008.5.1.4.1.1.481.2": "an RT dose grid",
}
_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"


class _Reader(io.BytesIO):
    """A file in memory that counts reads, and calls back: a hostile one has very many elements."""

    def __init__(self, data: bytes, poll: Poll, max_reads: int) -> None:
        super().__init__(data)
        self._poll = poll
        self._reads = 0
        self._max_reads = max_reads

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads % READS_PER_POLL == 0:
            self._poll()
            if self._reads > self._max_reads:
                raise ImageError(
                    "DICOM file has too many elements",
                    sqlstate=PROGRAM_LIMIT_EXCEEDED,
                    detail=f"The limit is about {self._max_reads // 2}.",
                    hint="Store the picture without its private elements.",
                )
        return super().read(size)


@dataclass(frozen=True)
class File:
    """A DICOM file.

    Attributes:
        data: the whole file, inflated if it was deflated.
        elements: what comes before the pixels.
        syntax: transfer syntax of the pixels.
        start: where the value of the pixels begins.
        length: bytes of that value, or ``UNDEFINED`` for encapsulated frames.
        keyword: ``PixelData``, ``FloatPixelData`` or ``DoubleFloatPixelData``.
        fragments: of encapsulated frames, once a frame was read.
    """

    data: bytes
    elements: Dataset
    syntax: uid.UID
    start: int
    length: int
    keyword: str
    fragments: list[tuple[int, int]] = field(default_factory=list)

    def value(self, keyword: str, source: Dataset | None = None) -> Any:
        """Return an element's value. None if it is absent, empty or not readable."""
        try:
            value = (self.elements if source is None else source).get(keyword)
        except (ValueError, TypeError, KeyError, NotImplementedError, struct.error):
            return None
        return None if value is None or value in ("", b"") or _is_empty(value) else value

    def numbers(self, keyword: str, source: Dataset | None = None) -> list[float]:
        """Return an element's numbers, none if it is absent or holds anything else."""
        value = self.value(keyword, source)
        values = value if isinstance(value, MultiValue | list | tuple) else [value]
        try:
            return [] if value is None else [float(each) for each in values]
        except (ValueError, TypeError):
            return []

    def texts(self, keyword: str, source: Dataset | None = None) -> list[str]:
        """Return an element's values as text, none if it is absent."""
        value = self.value(keyword, source)
        values = value if isinstance(value, MultiValue | list | tuple) else [value]
        return [] if value is None else [str(each).strip() for each in values]

    def integer(self, keyword: str, default: int | None = None) -> int:
        """Return a whole number. Raises ImageError if there is none and no default."""
        found = self.numbers(keyword)
        if found and found[0] == int(found[0]):
            return int(found[0])
        if default is None:
            raise damaged("DICOM", f"It has no {keyword}.")
        return default

    def item(self, keyword: str, source: Dataset | None = None, index: int = 0) -> Dataset | None:
        """Return an item of a sequence, or None."""
        value = self.value(keyword, source)
        try:
            found = value[index] if value is not None and len(value) > index else None
        except (TypeError, ValueError):
            return None
        return found if isinstance(found, Dataset) else None

    def group(self, keyword: str, frame: int) -> Dataset | None:
        """Return a functional group of a frame, else the shared one (PS3.3 C.7.6.16)."""
        for sequence, index in (
            ("PerFrameFunctionalGroupsSequence", frame),
            ("SharedFunctionalGroupsSequence", 0),
        ):
            groups = self.item(sequence, index=index)
            found = None if groups is None else self.item(keyword, groups)
            if found is not None:
                return found
        return None

    @property
    def byte_order(self) -> str:
        """Byte order of its numbers, as NumPy and struct write it."""
        return _byte_order(self.syntax)

    @property
    def rows(self) -> int:
        """Height in pixels."""
        return self.integer("Rows")

    @property
    def columns(self) -> int:
        """Width in pixels."""
        return self.integer("Columns")

    @property
    def samples(self) -> int:
        """Samples per pixel."""
        return self.integer("SamplesPerPixel", 1)

    @property
    def photometric(self) -> str:
        """Photometric interpretation, as a defined term (PS3.3 C.7.6.3.1.2)."""
        return str(self.value("PhotometricInterpretation") or "").strip().upper()

    @property
    def is_signed(self) -> bool:
        """Whether stored values are two's complement."""
        return self.integer("PixelRepresentation", 0) == 1

    @property
    def frame_count(self) -> int:
        """Number of frames."""
        return max(1, self.integer("NumberOfFrames", 1))


def _byte_order(syntax: uid.UID) -> str:
    """Return the byte order, also of syntaxes that are later than pydicom's dictionary."""
    return ">" if syntax == uid.ExplicitVRBigEndian else "<"


def _is_empty(value: Any) -> bool:
    return hasattr(value, "__len__") and len(value) == 0


@quiet()
def read(data: bytes, spec: InputSpec, poll: Poll) -> File:
    """Read all elements before the pixels, and check what a picture must have."""
    whole, elements, syntax, place = read_elements(data, spec, poll)
    _check_syntax(syntax)
    found = _pixels(whole, place, _byte_order(syntax))
    _check_class(elements, found is not None)
    assert found is not None
    result = File(whole, elements, syntax, *found)
    check_size(result.columns, result.rows, spec)
    if result.samples not in (1, 3):
        raise ImageError(f"DICOM image of {result.samples} samples per pixel is not supported")
    _check_tiles(result)
    return result


def read_elements(
    data: bytes, spec: InputSpec, poll: Poll, *, max_reads: int = MAX_READS
) -> tuple[bytes, Dataset, uid.UID, int]:
    """Read all elements before the pixels, whatever the object is.

    Args:
        data: the file.
        spec: its ``max_bytes`` is the limit of a deflated data set, inflated.
        poll: called while the file is read. May raise to leave.
        max_reads: about twice the number of elements that the file may have.

    Returns:
        The file, inflated if it was deflated, its elements, its transfer syntax, and where reading
        ended.
    """
    whole = data if data[PREAMBLE : PREAMBLE + 4] == MAGIC else _with_preamble(data)
    syntax, start = _transfer_syntax(whole)
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        whole = _header(uid.ExplicitVRLittleEndian) + _inflated(whole[start:], spec, poll)
    reader = _Reader(whole, poll, max_reads)
    try:
        with quiet():
            elements = dcmread(reader, stop_before_pixels=True)
    except RecursionError:
        raise ImageError(
            "DICOM file has sequences that are nested too deeply", sqlstate=PROGRAM_LIMIT_EXCEEDED
        ) from None
    return whole, elements, syntax, reader.tell()


def _with_preamble(data: bytes) -> bytes:
    """Put before a bare data set what a file has (PS3.10 section 7.1)."""
    if data[:2] == b"\2\0":
        return bytes(PREAMBLE) + MAGIC + data
    is_explicit = data[4:6].isalpha()
    return _header(uid.ExplicitVRLittleEndian if is_explicit else uid.ImplicitVRLittleEndian) + data


def _header(syntax: str) -> bytes:
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    element = struct.pack("<HH2sH", 2, 0x10, b"UI", len(value)) + value
    length = struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(element))
    return bytes(PREAMBLE) + MAGIC + length + element


def _transfer_syntax(data: bytes) -> tuple[uid.UID, int]:
    """Return the transfer syntax that group 2 names, and where the data set begins."""
    syntax, place = "", PREAMBLE + 4
    while place + 8 <= len(data):
        group, element, vr, length = struct.unpack_from("<HH2sH", data, place)
        if group != 2:
            break
        place += 8
        if not vr.isalpha():  # implicit, against the standard
            length = struct.unpack_from("<I", data, place - 4)[0]
        elif vr in _LONG_VRS:
            if place + 4 > len(data):
                break
            length = struct.unpack_from("<I", data, place)[0]
            place += 4
        if element == 0x10:
            syntax = data[place : place + length].rstrip(b"\0 ").decode("ascii", "replace")
        place += length
    if not syntax:
        raise damaged("DICOM", "It does not say its transfer syntax.")
    return uid.UID(syntax), place


def _check_syntax(syntax: uid.UID) -> None:
    if syntax in SUPPORTED:
        return
    name = _NEWER.get(syntax, syntax.name)
    name = re.sub(r" \(.*", "", name) if name != syntax else "unknown"
    is_video = re.search("MPEG|HEVC|Video", name) is not None
    raise ImageError(
        f"DICOM transfer syntax {syntax} ({name}) is not supported"
        if re.fullmatch(r"[0-9.]{1,64}", syntax)
        else "DICOM file names no valid transfer syntax",
        detail="It is a video." if is_video else None,
        hint="Store single frames of it."
        if is_video
        else "Convert it to an uncompressed or lossless transfer syntax first, for example with"
        " dcmconv or gdcmconv.",
    )


def _inflated(data: bytes, spec: InputSpec, poll: Poll) -> bytes:
    """Inflate a deflated data set (PS3.5 A.5), no further than a file may be large."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    parts, left = [], spec.max_bytes
    while not inflater.eof:
        poll()
        try:
            part = inflater.decompress(data, INFLATED_AT_ONCE)
        except zlib.error:
            raise damaged("DICOM", "Its deflated data cannot be inflated.") from None
        if not part:  # cut short
            break
        data = inflater.unconsumed_tail
        left -= len(part)
        if left < 0:
            raise ImageError(
                "deflated DICOM file is too large",
                sqlstate=PROGRAM_LIMIT_EXCEEDED,
                detail=f"The limit is {spec.max_bytes} bytes, inflated.",
                hint="Raise max_bytes with alter_collection, or reduce the image.",
            )
        parts.append(part)
    return b"".join(parts)


def _pixels(data: bytes, place: int, order: str) -> tuple[int, int, str] | None:
    """Return where the value of the pixels begins, its length, and the element's keyword.

    Whether the element has a value representation, only itself says. Some files have none although
    their transfer syntax is explicit, and the reverse.
    """
    if place + 8 > len(data):
        return None
    group, element = struct.unpack_from(f"{order}HH", data, place)
    keyword = _PIXELS.get(group << 16 | element)
    if keyword is None:
        return None
    if data[place + 4 : place + 6] in _LONG_VRS and data[place + 6 : place + 8] == b"\0\0":
        if place + 12 > len(data):
            return None
        return place + 12, struct.unpack_from(f"{order}I", data, place + 8)[0], keyword
    return place + 8, struct.unpack_from(f"{order}I", data, place + 4)[0], keyword


def _check_class(elements: Dataset, has_pixels: bool) -> None:
    """Refuse what is no picture, by its SOP class."""
    # A DICOMDIR says what it is in its file meta information only.
    meta = getattr(elements, "file_meta", Dataset()).get("MediaStorageSOPClassUID")
    number = str(elements.get("SOPClassUID") or meta or "").strip("\0 ")
    name = uid.UID(number).name
    name = "" if name == number else name
    kind = _NO_PICTURES.get(number)
    if kind is not None:
        raise ImageError(
            f"image cannot be decoded because it is {kind} in DICOM",
            hint="Store the image that it was made of.",
        )
    if has_pixels:
        return
    if "Image Storage" in name or not name:
        raise damaged("DICOM", "It ends before its pixels.")
    raise ImageError(
        f"image cannot be decoded because it is a DICOM object without pixels: {name}",
        hint="Leave it out, or store NULL.",
    )


def _check_tiles(file: File) -> None:
    """Refuse a whole slide: none of its tiles is the picture (PS3.3 C.8.12.4)."""
    if str(file.value("SOPClassUID") or "").startswith(_SLIDE) and file.frame_count > 1:
        raise ImageError(
            f"image cannot be decoded because it is a slide of {file.frame_count} tiles in DICOM",
            hint="Store the slide's thumbnail or overview image.",
        )
