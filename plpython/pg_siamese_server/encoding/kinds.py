"""Recognise bytes that are no image of a supported format, and say what to do with them."""

from __future__ import annotations

import re
from dataclasses import dataclass

CONVERT = "Convert it to PNG or JPEG first."
STORE_FILE = "Store the bytes of the image file itself."


@dataclass(frozen=True)
class Kind:
    """A kind of file by its name in a sentence, with a hint for the user."""

    name: str
    hint: str


_HEIC = Kind("a HEIC image", "Convert it to JPEG first, for example with heif-convert.")
_AVIF = Kind("an AVIF image", CONVERT)
_JXL = Kind("a JPEG XL image", "Convert it to PNG or JPEG first, for example with djxl.")
_JP2 = Kind("a JPEG 2000 image", CONVERT)
_SVG = Kind("an SVG drawing", "Render it to PNG first.")
_VIDEO = Kind("a video", "Store single frames of it as PNG or JPEG.")
_OFFICE = "Store the pictures in it as files of their own."
_PREFIXES = (
    (b"\xff\x0a", _JXL),
    (b"\0\0\0\x0cJXL \r\n\x87\n", _JXL),
    (b"\0\0\0\x0cjP  \r\n\x87\n", _JP2),
    (b"\xff\x4f\xff\x51", _JP2),
    (b"II\xbc\x01", Kind("a JPEG XR image", CONVERT)),
    (b"8BPS", Kind("a Photoshop document", "Export it to PNG first.")),
    (b"\0\0\1\0", Kind("a Windows icon", CONVERT)),
    (b"icns", Kind("an Apple icon", CONVERT)),
    (b"qoif", Kind("a QOI image", CONVERT)),
    (b"\x76\x2f\x31\x01", Kind("an OpenEXR image", CONVERT)),
    (b"SIMPLE  =", Kind("a FITS file", "Scale its picture to PNG first.")),
    (b"%PDF-", Kind("a PDF document", "Render its pages to PNG first, for example with pdftoppm.")),
    (b"%!PS", Kind("a PostScript document", "Render its pages to PNG first.")),
    (b"\x93NUMPY", Kind("a NumPy array", "Save the pixels as PNG, with Pillow's Image.fromarray.")),
    (b"\x80\x02", Kind("a Python pickle", STORE_FILE)),
    (b"\x80\x03", Kind("a Python pickle", STORE_FILE)),
    (b"\x80\x04", Kind("a Python pickle", STORE_FILE)),
    (b"\x80\x05", Kind("a Python pickle", STORE_FILE)),
    (b"\x89HDF\r\n\x1a\n", Kind("an HDF5 file", "Save its pictures as PNG first.")),
    (b"PK\3\4", Kind("a ZIP archive", f"Unpack it. {_OFFICE}")),
    (b"PK\5\6", Kind("a ZIP archive", "Unpack it. It is empty.")),
    (b"\x1f\x8b", Kind("a gzip file", f"Unpack it first. {STORE_FILE}")),
    (b"BZh", Kind("a bzip2 file", f"Unpack it first. {STORE_FILE}")),
    (b"\xfd7zXZ\0", Kind("an xz file", f"Unpack it first. {STORE_FILE}")),
    (b"\x28\xb5\x2f\xfd", Kind("a Zstandard file", f"Unpack it first. {STORE_FILE}")),
    (b"7z\xbc\xaf\x27\x1c", Kind("a 7-Zip archive", f"Unpack it. {_OFFICE}")),
    (b"Rar!\x1a\x07", Kind("a RAR archive", f"Unpack it. {_OFFICE}")),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", Kind("a Microsoft Office document", _OFFICE)),
    (b"SQLite format 3\0", Kind("a SQLite database", STORE_FILE)),
    (b"PGDMP", Kind("a PostgreSQL dump", STORE_FILE)),
    (b"NRRD", Kind("an NRRD volume", "Save its slices as PNG first.")),
    (b"\x1a\x45\xdf\xa3", _VIDEO),
    (b"\0\0\1\xba", _VIDEO),
    (b"OggS", _VIDEO),
)
_BRANDS = {
    b"heic": _HEIC,
    b"heix": _HEIC,
    b"heim": _HEIC,
    b"heis": _HEIC,
    b"hevc": _HEIC,
    b"mif1": _HEIC,
    b"msf1": _HEIC,
    b"avif": _AVIF,
    b"avis": _AVIF,
    b"crx ": Kind("a camera raw file", "Develop it to JPEG or PNG first."),
}
_TEXTS = (
    (
        re.compile(rb"version https://git-lfs\.github\.com/spec/"),
        Kind("a git-lfs pointer, not the file that it stands for", "Fetch it with git lfs pull."),
    ),
    (
        re.compile(rb"\\\\?x[0-9a-fA-F\s]{8,}"),
        Kind(
            "the text form of bytea, not its bytes",
            "Pass the bytes as a binary parameter, or decode the text with decode(…, 'hex').",
        ),
    ),
    (
        re.compile(rb"data:[a-zA-Z0-9.+/-]+[;,]"),
        Kind("a data URL", "Decode what follows the comma, with decode(…, 'base64')."),
    ),
    (
        re.compile(rb"<!doctype html|<html\b|<head\b|<body\b", re.I),
        Kind(
            "an HTML page",
            "A server answered with a page instead of the picture. Download it again.",
        ),
    ),
    (re.compile(rb"<\?xml|<[a-zA-Z]"), Kind("an XML document", STORE_FILE)),
    (re.compile(rb"(?:file|https?|s3|gs)://"), Kind("a URL, not an image", STORE_FILE)),
    (re.compile(rb"[\[{]"), Kind("JSON text", STORE_FILE)),
    (re.compile(rb"P[1-7]\s"), Kind("a PNM image", CONVERT)),
    (re.compile(rb"#\?(?:RADIANCE|RGBE)"), Kind("a Radiance image", CONVERT)),
    (
        re.compile(rb"(?:[0-9a-fA-F]{2}\s*){8,}\Z"),
        Kind("hexadecimal text", "Decode it with decode(…, 'hex')."),
    ),
)
# Lines of base64, known by the start of an image file or by their characters.
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/_-\r\n"
_BASE64_IMAGES = (b"iVBORw0KGgo", b"/9j/", b"R0lGOD", b"UklGR", b"Qk", b"SUkqA", b"TU0AK")
_BASE64_LOOK = (re.compile(rb"[A-Z]"), re.compile(rb"[a-z]"), re.compile(rb"[0-9]"))
_MIN_BASE64 = 24
_MIN_TEXT = 16  # fewer bytes may be anything
_PREFIX_BYTES = 4096
_BLANK = b"\0\t\n\f\r "

KNOWN = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)


def supported(data: bytes) -> str | None:
    """Return the supported format that a file begins like, or None."""
    if data[128:132] == b"DICM" or looks_like_dicom(data):
        return "DICOM"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    return next((name for start, name in KNOWN if data.startswith(start)), None)


def recognise(data: bytes) -> Kind | None:
    """Return the kind of a file that is no image of a supported format, or None."""
    if not data.strip(b"\0"):
        return Kind(
            "nothing but zeros", "The file was not written or copied whole. Store the file again."
        )
    for start, kind in _PREFIXES:
        if data.startswith(start):
            return kind
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], _BRANDS.get(data[16:20], _VIDEO))
    if data[:4] == b"RIFF":
        return (
            _VIDEO
            if data[8:12] == b"AVI "
            else Kind("a RIFF file that is no WebP image", STORE_FILE)
        )
    if data[344:348] in (b"n+1\0", b"ni1\0"):
        return Kind("a NIfTI volume", "Save its slices as PNG first.")
    if data[257:262] == b"ustar":
        return Kind("a tar archive", f"Unpack it. {_OFFICE}")
    return _text(data)


def looks_like_dicom(data: bytes) -> bool:
    """Tell a DICOM data set without its preamble by its first element, of group 2 or 8.

    Groups ascend, so that a data set begins with one of these elements and a length that fits.
    """
    if data[:2] == b"\2\0" and data[3:4] == b"\0":
        return data[4:6] in (b"UL", b"OB", b"UI")
    if data[:2] != b"\x08\0" or data[3:4] != b"\0" or data[2] > 0x18:
        return False
    return data[4:6] in (b"UL", b"CS", b"UI", b"SH", b"DA") or (
        data[6:8] == b"\0\0" and data[4] < 128 and not data[5]
    )


def _text(data: bytes) -> Kind | None:
    start = data[:_PREFIX_BYTES].removeprefix(b"\xef\xbb\xbf").strip(_BLANK)
    if start.startswith((b"<svg", b"<?xml", b"<!--", b"<!DOCTYPE svg")) and b"<svg" in start:
        return _SVG
    for pattern, kind in _TEXTS:
        if pattern.match(start):
            return kind
    if len(start) >= _MIN_BASE64 and not start.rstrip(b"=").translate(None, _BASE64):
        looks = all(look.search(start) for look in _BASE64_LOOK)
        if looks or start.startswith(_BASE64_IMAGES):
            return Kind("base64 text", "Decode it with decode(…, 'base64'), or pass the bytes.")
    if len(data) >= _MIN_TEXT and not any(byte < 9 or 13 < byte < 32 for byte in start):
        try:
            start.decode(errors="strict") if len(data) <= _PREFIX_BYTES else start[:-4].decode()
        except UnicodeDecodeError:
            return None
        return Kind("text", STORE_FILE)
    return None
