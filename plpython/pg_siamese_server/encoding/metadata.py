"""Read the orientation from metadata, and make files without metadata.

Metadata never makes good pixels bad. So the orientation is read by hand. If Pillow fails on the
rest, the picture is decoded again from a copy without it.
"""

from __future__ import annotations

import re
import struct
import zlib

ORIENTATION = 0x0112
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_WORDS = {1: "B", 3: "H", 4: "I"}  # BYTE, SHORT, LONG: the types that writers use for it

# JPEG markers without a length, and the application segments that say how to read the pixels.
_BARE = frozenset((0x01, *range(0xD0, 0xD9)))
_APP0, _APP2, _APP14 = 0xE0, 0xE2, 0xEE
_COMMENT = 0xFE
_START_OF_SCAN = 0xDA

_PNG_KEPT = frozenset((b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"sBIT", b"iCCP"))
_MAX_PROFILE_BYTES = 4 * 1024 * 1024
_TRANSPARENT_BYTES = {0: 2, 2: 6}  # by colour type
_WEBP_DROPPED = frozenset((b"EXIF", b"XMP "))
_WEBP_FLAGS = 0x08 | 0x04  # EXIF and XMP, of the chunk VP8X


def exif_orientation(exif: bytes) -> int | None:
    """Return the orientation of an EXIF block (with or without its Exif header), or None."""
    block = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", block, place)
            if tag == ORIENTATION and kind in _WORDS:
                (value,) = struct.unpack_from(f"{order}{_WORDS[kind]}", block, place + 8)
                return int(value)
    except struct.error:  # cut off, or an offset that leads out of it
        pass
    return None


def orientation(info: dict[str | tuple[int, int], object]) -> int:
    """Return the orientation in Pillow's ``info`` of an image, or 1 (upright) without one."""
    exif = info.get("exif")
    found = exif_orientation(exif) if isinstance(exif, bytes) else None
    if found is None:
        found = exif_orientation(_raw_profile(info.get("Raw profile type exif")))
    if found is None:
        xmp = info.get("xmp") or info.get("XML:com.adobe.xmp")
        text = xmp.encode() if isinstance(xmp, str) else xmp
        match = _XMP_ORIENTATION.search(text) if isinstance(text, bytes) else None
        found = int(match[1]) if match else None
    return found if found is not None and 1 <= found <= 8 else 1


def _raw_profile(text: object) -> bytes:
    """Return the bytes of a text chunk as ImageMagick writes EXIF into PNG."""
    try:
        return bytes.fromhex("".join(text.split("\n")[3:])) if isinstance(text, str) else b""
    except ValueError:
        return b""


def without_metadata(data: bytes) -> tuple[bytes, int] | None:
    """Return a copy of a JPEG, PNG or WebP file without metadata, and its orientation.

    Colour profiles stay. Return None for other formats, and if the file's own structure is broken.
    """
    try:
        if data[:2] == b"\xff\xd8":
            return _bare_jpeg(data)
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            return _bare_png(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _bare_webp(data)
    except (struct.error, IndexError):
        pass
    return None


def _bare_jpeg(data: bytes) -> tuple[bytes, int]:
    kept, found, place = [data[:2]], None, 2
    while True:
        while data[place] == 0xFF and data[place + 1] == 0xFF:
            place += 1  # fill bytes
        marker = data[place + 1]
        if data[place] != 0xFF or marker == _START_OF_SCAN:
            break
        end = place + 2
        if marker not in _BARE:
            end += struct.unpack_from(">H", data, end)[0]
        segment = data[place:end]
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0" and found is None:
            found = exif_orientation(segment[4:])
        if _is_kept(marker, segment):
            kept.append(segment)
        place = end
    return b"".join((*kept, data[place:])), found or 1


def _is_kept(marker: int, segment: bytes) -> bool:
    if marker == _COMMENT:
        return False
    if not _APP0 <= marker <= 0xEF:
        return True
    return (
        (marker == _APP0 and segment[4:9] == b"JFIF\0" and len(segment) >= 18)
        or (marker == _APP2 and segment[4:16] == b"ICC_PROFILE\0" and len(segment) >= 18)
        or (marker == _APP14 and segment[4:9] == b"Adobe")
    )


def _bare_png(data: bytes) -> tuple[bytes, int]:
    kept, found, place = [data[:8]], None, 8
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        content = data[place + 8 : place + 8 + size]
        if kind == b"eXIf" and found is None:
            found = exif_orientation(content)
        broken = (kind == b"iCCP" and not _is_profile(content)) or (
            kind == b"tRNS" and size < _TRANSPARENT_BYTES.get(data[25], 0)
        )
        if kind in _PNG_KEPT and not broken:
            kept.append(data[place : place + 12 + size])
        place += 12 + size
    return b"".join(kept), found or 1


def _is_profile(content: bytes) -> bool:
    name, _, packed = content.partition(b"\0")
    try:
        stream = zlib.decompressobj()
        stream.decompress(packed[1:], _MAX_PROFILE_BYTES)
    except zlib.error:
        return False
    return 0 < len(name) < 80 and packed[:1] == b"\0" and stream.eof


def _bare_webp(data: bytes) -> tuple[bytes, int]:
    kept, found, place = [], None, 12
    while place + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, place)
        chunk = data[place : place + 8 + size + size % 2]
        if kind == b"EXIF" and found is None:
            found = exif_orientation(chunk[8:])
        if kind == b"VP8X":
            chunk = chunk[:8] + bytes([chunk[8] & ~_WEBP_FLAGS]) + chunk[9:]
        if kind not in _WEBP_DROPPED:
            kept.append(chunk)
        place += len(chunk)
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body, found or 1


def padded_webp(data: bytes) -> bytes:
    """Add a missing zero after a chunk of odd length to a WebP file, if nothing else is missing."""
    place, size = 12, 0
    while place + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, place + 4)
        place += 8 + size + size % 2
    return data + b"\0" if size % 2 and place == len(data) + 1 else data


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Read width and height from the header of a WebP file."""
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", body, 1)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None
