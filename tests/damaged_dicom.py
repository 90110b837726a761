"""Damaged DICOM files, made from good ones, and small files that would take much memory or time."""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable

import numpy as np
from pydicom import uid

from tests import dicom_files
from tests.dicom_files import SYNTAXES, with_syntax


def mutated(data: bytes, generator: random.Random) -> bytes:
    """Return a file with something wrong."""
    result = bytearray(data)
    while result == data:  # a file may have no fragments, for example
        generator.choice(_MUTATIONS)(result, generator)
    return bytes(result)


def _change_bytes(data: bytearray, generator: random.Random) -> None:
    for _ in range(generator.randrange(1, 40)):
        data[generator.randrange(len(data))] = generator.randrange(256)


def _change_header(data: bytearray, generator: random.Random) -> None:
    for _ in range(generator.randrange(1, 12)):
        data[generator.randrange(_header(data))] = generator.randrange(256)


def _cut(data: bytearray, generator: random.Random) -> None:
    del data[generator.randrange(len(data)) :]


def _write_length_anywhere(data: bytearray, generator: random.Random) -> None:
    place = generator.randrange(132, _header(data) - 4)
    struct.pack_into("<I", data, place, generator.choice([*_NUMBERS, len(data)]))


def _change_length(data: bytearray, generator: random.Random) -> None:
    if elements := _elements(data):
        length = generator.choice(_NUMBERS) & 0xFFFF
        struct.pack_into("<H", data, generator.choice(elements) + 6, length)


def _change_tag(data: bytearray, generator: random.Random) -> None:
    """Give an element the tag of another one, or of the pixels."""
    if elements := _elements(data):
        other = generator.choice(elements)
        tag = generator.choice([bytes(data[other : other + 4]), b"\xe0\x7f\x10\0"])
        place = generator.choice(elements)
        data[place : place + 4] = tag


def _change_number(data: bytearray, generator: random.Random) -> None:
    """Change a number that describes the picture, such as its rows or bits."""
    if found := [each.start() for each in re.finditer(rb"\x28\0..US\x02\0", data, re.S)]:
        struct.pack_into(
            "<H", data, generator.choice(found) + 8, generator.choice(_NUMBERS) & 0xFFFF
        )


def _change_syntax(data: bytearray, generator: random.Random) -> None:
    data[:] = with_syntax(bytes(data), generator.choice(SYNTAXES))


def _nest(data: bytearray, generator: random.Random) -> None:
    elements = [place for place in _elements(data) if data[place] > 2] or [132]
    place = generator.choice([*elements, generator.randrange(132, _header(data))])
    data[place:place] = nested(generator.choice([10, 100, 2000]))


def _change_fragments(data: bytearray, generator: random.Random) -> None:
    """Lengthen, repeat or take away a fragment, or the end of them all."""
    fragments = [each.start() for each in re.finditer(rb"\xfe\xff[\0\xdd]\xe0", data)]
    if not fragments:
        return
    place = generator.choice(fragments)
    end = min([each for each in fragments if each > place] or [len(data)])
    match generator.randrange(3):
        case 0 if place + 8 <= len(data):
            struct.pack_into("<I", data, place + 4, generator.choice(_NUMBERS))
        case 1:
            data[place:place] = data[place : min(end, place + 2000)] * generator.choice(
                [1, 20, 1000]
            )
        case _:
            del data[place:end]


def _copy_part(data: bytearray, generator: random.Random) -> None:
    place, other = generator.randrange(len(data)), generator.randrange(len(data))
    data[place : place + 100] = data[other : other + 100]


_MUTATIONS = (
    _change_bytes,
    _change_header,
    _cut,
    _write_length_anywhere,
    _change_length,
    _change_tag,
    _change_number,
    _change_syntax,
    _nest,
    _change_fragments,
    _copy_part,
)
_NUMBERS = (0, 1, 2, 3, 16, 17, 32, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def _header(data: bytearray) -> int:
    return min(len(data), 3000)


def _elements(data: bytearray) -> list[int]:
    """Return where elements of explicit value representation begin, most likely."""
    pattern = rb"[\x02\x08\x10\x18\x20\x28]\0..[A-Z]{2}"
    return [each.start() for each in re.finditer(pattern, data[: _header(data)], re.S)]


def nested(depth: int) -> bytes:
    """Return the beginning of sequences in sequences, of explicit value representation."""
    sequence = struct.pack("<HH2sHI", 8, 0x1115, b"SQ", 0, 0xFFFFFFFF)
    return (sequence + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)) * depth


# --- bombs --------------------------------------------------------------------------------------

SMALL = np.zeros((32, 32), np.uint8)
LARGE = {"Rows": 60_000, "Columns": 60_000}


def _deflated_data_set() -> bytes:
    data = dicom_files.image(SMALL, uid.DeflatedExplicitVRLittleEndian)
    start = data.index(b"1.2.840.10008.1.2.1.99") + 22
    while data[start : start + 2] == b"\2\0":  # the rest of the meta information
        start += 8 + struct.unpack_from("<H", data, start + 6)[0]
    element = struct.pack("<HH2sHI", 9, 0x1010, b"OB", 0, 200_000_000)
    return data[:start] + dicom_files.deflated(element + bytes(200_000_000))


def _deflated_frame() -> bytes:
    """Return a picture of 32 x 32 whose frame would unpack to 200 MB."""
    frame = dicom_files.deflated(bytes(200_000_000))
    return dicom_files.compressed([frame], SMALL, dicom_files.DEFLATED_FRAME)


def _before_the_picture(elements: bytes) -> bytes:
    data = dicom_files.image(SMALL)
    place = data.index(b"\x28\0\2\0")
    return data[:place] + elements


# Small files that would unpack to much, or keep a reader busy.
BOMBS: dict[str, Callable[[], bytes]] = {
    "deflated data set": _deflated_data_set,
    "deflated frame": _deflated_frame,
    "RLE": lambda: dicom_files.compressed(
        [dicom_files.rle(SMALL)], SMALL, uid.RLELossless, **LARGE
    ),
    "sequences": lambda: _before_the_picture(nested(3000)),
    "elements": lambda: _before_the_picture(struct.pack("<HH2sH", 9, 0x1010, b"SH", 0) * 500_000),
    "fragments": lambda: dicom_files.compressed(
        [b"\0\0"] * 250_000, SMALL, uid.JPEGBaseline8Bit, False, NumberOfFrames=1
    ),
    "frames": lambda: dicom_files.image(SMALL, NumberOfFrames=2**31 - 1),
}
