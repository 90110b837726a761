"""What is no image: the message names it, and says what to do."""

from __future__ import annotations

import base64
import gzip
import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from pg_siamese_server.encoding.images import decode_image
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import ImageError

SPEC = InputSpec(8, 8)


def picture(kind: str = "PNG") -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((4, 4), np.uint8))
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("a.png", picture())
    return file.getvalue()


def box(brand: bytes, *more: bytes) -> bytes:
    body = b"ftyp" + brand + b"\0\0\0\0" + b"".join(more)
    return struct.pack(">I", 4 + len(body)) + body + bytes(100)


PNG = picture()
KINDS = {
    "HEIC": (box(b"heic", b"mif1heic"), "a HEIC image", "JPEG"),
    "HEIF": (box(b"mif1", b"mif1heic"), "a HEIC image", "JPEG"),
    "AVIF": (picture("AVIF"), "an AVIF image", "PNG"),
    "JPEG XL": (b"\xff\x0a" + bytes(40), "a JPEG XL image", "PNG"),
    "JPEG XL file": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "a JPEG XL image", "PNG"),
    "JPEG 2000": (picture("JPEG2000"), "a JPEG 2000 image", "PNG"),
    "MP4": (box(b"isom"), "a video", "frames"),
    "WebM": (b"\x1a\x45\xdf\xa3" + bytes(40), "a video", "frames"),
    "AVI": (b"RIFF\0\0\0\0AVI LIST" + bytes(40), "a video", "frames"),
    "WAV": (b"RIFF\0\0\0\0WAVEfmt " + bytes(40), "a RIFF file", "image file"),
    "base64": (base64.b64encode(PNG), "base64 text", "decode("),
    "base64 in lines": (base64.encodebytes(picture("JPEG")), "base64 text", "decode("),
    "base64 for URLs": (base64.urlsafe_b64encode(picture("GIF")), "base64 text", "decode("),
    "data URL": (b"data:image/png;base64," + base64.b64encode(PNG), "a data URL", "comma"),
    "text of bytea": (b"\\x" + PNG.hex().encode(), "the text form of bytea", "binary"),
    "escaped twice": (b"\\\\x" + PNG.hex().encode(), "the text form of bytea", "binary"),
    "hexadecimal": (PNG.hex().encode(), "hexadecimal text", "hex"),
    "HTML": (b"<!DOCTYPE html>\n<html><head><title>404</title>", "an HTML page", "again"),
    "bare HTML": (b"\n <html><body>Sign in", "an HTML page", "again"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "an XML document", "image"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing", "PNG"),
    "SVG in XML": (b'<?xml version="1.0"?>\n<!-- x -->\n<svg width="1">', "an SVG drawing", "PNG"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "a git-lfs pointer",
        "git lfs pull",
    ),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3", "a PDF document", "PNG"),
    "PostScript": (b"%!PS-Adobe-3.0", "a PostScript document", "PNG"),
    "Photoshop": (b"8BPS\0\1" + bytes(40), "a Photoshop document", "PNG"),
    "NIfTI": (
        struct.pack("<I", 348) + bytes(340) + b"n+1\0" + bytes(9),
        "a NIfTI volume",
        "slices",
    ),
    "NumPy": (npy(), "a NumPy array", "PNG"),
    "pickle": (pickle.dumps([1, 2]), "a Python pickle", "image file"),
    "ZIP": (archive(), "a ZIP archive", "Unpack"),
    "gzip": (gzip.compress(PNG), "a gzip file", "Unpack"),
    "JSON": (json.dumps({"a": 1}).encode(), "JSON text", "image file"),
    "JSON of bytes": (json.dumps(list(PNG)).encode(), "JSON text", "image file"),
    "path": (b"/data/images/patient 17.png", "text", "image file"),
    "URL": (b"https://example.com/a.png", "a URL", "image file"),
    "text": ("Größe und Gewicht\n".encode() * 900, "text", "image file"),
    "PNM": (picture("PPM"), "a PNM image", "PNG"),
    "icon": (picture("ICO"), "a Windows icon", "PNG"),
    "zeros": (bytes(1000), "nothing but zeros", "again"),
    "tar": (bytes(257).replace(b"\0", b"a", 5) + b"ustar\x0000", "a tar archive", "Unpack"),
}


@pytest.mark.parametrize("name", KINDS)
def test_named_with_a_way_out(name: str) -> None:
    data, kind, way = KINDS[name]
    with pytest.raises(ImageError) as caught:
        decode_image(data, SPEC)
    error = caught.value
    assert error.sqlstate == "22P03"
    assert error.message.startswith(f"image cannot be decoded because it is {kind}")
    assert way in (error.hint or "")
    assert error.hint and error.hint.endswith((".", "]"))


def jpeg(marker: int, bits: int = 8) -> bytes:
    frame = struct.pack(">BHHB", bits, 8, 8, 1) + b"\1\x11\0"
    return b"\xff\xd8\xff" + bytes([marker]) + struct.pack(">H", 2 + len(frame)) + frame


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (jpeg(0xC3), "lossless coding"),
        (jpeg(0xF7), "JPEG-LS coding"),
        (jpeg(0xC1, 12), "12 bits per channel"),
        (jpeg(0xC3, 16), "16 bits per channel"),
    ],
)
def test_jpeg_of_other_codings(data: bytes, what: str) -> None:
    with pytest.raises(ImageError, match=f"JPEG image with {what} is not supported") as caught:
        decode_image(data, SPEC)
    assert caught.value.hint


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WebP"])
def test_damaged_files_keep_their_name(kind: str) -> None:
    data = picture(kind)
    with pytest.raises(ImageError, match=f"{kind} image cannot be decoded") as caught:
        decode_image(data[: len(data) // 2], SPEC)
    assert "damaged or incomplete" in (caught.value.detail or "")
    assert "anew" in (caught.value.hint or "")


@pytest.mark.parametrize("data", [b"\x01\x02\x03", bytes(range(128, 255)), b"\xfe" * 300])
def test_unknown_bytes_are_shown(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"image cannot be decoded$") as caught:
        decode_image(data, SPEC)
    assert data[:3].hex(" ") in (caught.value.detail or "")
    assert "PNG, JPEG, TIFF" in (caught.value.hint or "")


def test_no_bytes() -> None:
    with pytest.raises(ImageError, match="image is empty") as caught:
        decode_image(b"", SPEC)
    assert caught.value.hint


def test_random_bytes_never_crash() -> None:
    generator = np.random.default_rng(0)
    for data, _, _ in KINDS.values():
        for _ in range(20):
            mutated = np.frombuffer(data[:2000], np.uint8).copy()
            mutated[generator.integers(0, len(mutated), 3)] = generator.integers(0, 256, 3)
            for part in (mutated.tobytes(), mutated[: len(mutated) // 3].tobytes()):
                with pytest.raises(ImageError):
                    decode_image(part, SPEC)
