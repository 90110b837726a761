"""Metadata never makes good pixels bad; and files without their last bytes."""

from __future__ import annotations

import itertools
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from pg_siamese_server.encoding.images import decode_image
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import ImageError
from tests.scenarios.mutations import chunk
from tests.support import Array, encode, saved
from tests.unit.server.common import whole

WIDTH, HEIGHT = 97, 64
SPEC = InputSpec(WIDTH, HEIGHT)
TURNED = InputSpec(HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def pixels() -> Array:
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def ifd(*entries: tuple[int, int, int, bytes], cut: int | None = None) -> bytes:
    """An EXIF block of entries (tag, type, count, four bytes)."""
    lines = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    block = b"II*\0" + struct.pack("<IH", 8, len(entries)) + lines + bytes(4)
    return b"Exif\0\0" + (block if cut is None else block[:cut])


ORIENTATION = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
ODD_EXIF = {
    "unit as LONG": ifd(ORIENTATION, (0x0128, 4, 1, struct.pack("<I", 70000))),
    "unknown type": ifd(ORIENTATION, (0x0128, 99, 1, b"abcd")),
    "offset outside": ifd(ORIENTATION, (0x011A, 5, 1, struct.pack("<I", 2**31))),
    "huge count": ifd(ORIENTATION, (0x010F, 2, 2**31, struct.pack("<I", 8))),
    "text as numbers": ifd(ORIENTATION, (0x010F, 3, 1, b"\xff\xff\0\0")),
    "rational of zero": ifd(ORIENTATION, (0x011A, 5, 1, struct.pack("<I", 0))),
    "sub-directory outside": ifd(ORIENTATION, (0x8769, 4, 1, struct.pack("<I", 2**32 - 1))),
    "sub-directory as text": ifd(ORIENTATION, (0x8769, 2, 4, b"abcd")),
    "itself as sub-directory": ifd(ORIENTATION, (0x8769, 4, 1, struct.pack("<I", 8))),
    "cut off": ifd(ORIENTATION, (0x0128, 3, 1, b"\2\0\0\0"), cut=30),
    "orientation as LONG": ifd((0x0112, 4, 1, struct.pack("<I", 6))),
}
HOPELESS_EXIF = {
    "garbage": b"Exif\0\0" + bytes(range(256)),
    "empty": b"Exif\0\0",
    "header only": b"Exif\0\0II*\0",
    "orientation of 99": ifd((0x0112, 3, 1, struct.pack("<HH", 99, 0))),
    "orientation as text": ifd((0x0112, 2, 4, b"6\0\0\0")),
}


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(content)) + content


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    return png[:33] + b"".join(chunks) + png[33:]


def with_exif(kind: str, pixels: Array, exif: bytes) -> bytes:
    if kind == "JPEG":
        return with_segments(encode(pixels, kind, quality=95), segment(0xE1, exif))
    if kind == "PNG":
        return with_chunks(encode(pixels, kind), chunk(b"eXIf", exif[6:]))
    return encode(pixels, kind, lossless=True, exif=exif[6:] or b"?")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", [*ODD_EXIF, *HOPELESS_EXIF])
def test_odd_exif_keeps_its_orientation_or_is_ignored(kind: str, name: str, pixels: Array) -> None:
    data = with_exif(kind, pixels, (ODD_EXIF | HOPELESS_EXIF)[name])
    plain = encode(pixels, kind, **({"quality": 95} if kind == "JPEG" else {"lossless": True}))
    expected = decode_image(plain, SPEC)
    if name in ODD_EXIF:
        np.testing.assert_array_equal(decode_image(data, TURNED), np.rot90(expected, -1))
    else:
        np.testing.assert_array_equal(decode_image(data, SPEC), expected)


@pytest.mark.parametrize(
    "segments",
    [
        [segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta \xff\xfe broken")],
        [segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\xff\xff\xff\xff")],
        [segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x10")],
        [segment(0xE2, b"ICC_PROFILE\0\x01\x02" + b"x" * 200)],
        [segment(0xE2, b"ICC_PROFILE\0")],
        [segment(0xE2, b"MPF\0garbage")],
        [segment(0xE2, b"MPF\0" + ifd((0xB001, 4, 1, struct.pack("<I", 2)))[6:])],
        [segment(0xE2, b"MPF\0II*\0\x08\0\0\0\x01\0\x02\xb0\x07\0\x20\0\0\0\xff\xff\0\0")],
        [segment(0xEE, b"Adobe\0d")],
        [segment(0xFE, b"a comment \xff\xfe")],
        [segment(0xE0, b"JFIF\0")],
        [segment(0xE0, b"JFXX\0\x10")],
        [segment(0xEB, b"JP\0\x01")] * 3,
    ],
    ids=lambda segments: repr(segments[0][4:16]),
)
def test_odd_segments_of_jpeg(segments: list[bytes], pixels: Array) -> None:
    plain = encode(pixels, "JPEG", quality=95)
    found = decode_image(with_segments(plain, *segments), SPEC)
    np.testing.assert_array_equal(found, decode_image(plain, SPEC))


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"iCCP", b"no profile")],
        [chunk(b"iCCP", b"name\0\0" + zlib.compress(b"garbage" * 50))],
        [chunk(b"tEXt", b"\xff" * 50)],
        [chunk(b"zTXt", b"key\0\x09garbage")],
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe")],
        [chunk(b"pHYs", b"\0")],
        [chunk(b"gAMA", b"\0")],
        [chunk(b"cHRM", b"abc")],
        [chunk(b"sRGB", b"")],
        [chunk(b"sBIT", b"")],
        [chunk(b"tIME", b"")],
        [chunk(b"acTL", b"\0\0\0\x02\0\0\0\0")],
        [chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 20\nzz zz\n")],
    ],
    ids=lambda chunks: repr(chunks[0][4:12]),
)
def test_odd_chunks_of_png(chunks: list[bytes], pixels: Array) -> None:
    data = with_chunks(encode(pixels, "PNG"), *chunks)
    np.testing.assert_array_equal(decode_image(data, SPEC), pixels)


def test_fuzzed_metadata(pixels: Array) -> None:
    generator = np.random.default_rng(0)
    jpeg = encode(pixels, "JPEG", quality=95)
    expected = decode_image(jpeg, SPEC)
    blocks = [ifd(ORIENTATION, (0x8769, 4, 1, struct.pack("<I", 8))), *ODD_EXIF.values()]
    for number, block in itertools.product(range(30), blocks):
        mutated = np.frombuffer(block, np.uint8).copy()
        mutated[generator.integers(6, len(mutated), 3)] = generator.integers(0, 256, 3)
        data = with_segments(jpeg, segment(0xE1, mutated.tobytes()))
        found = decode_image(data, TURNED), decode_image(data, SPEC)
        # In whichever orientation the damage leaves it, it is the same picture.
        upright = [np.rot90(found[0], 1), found[1]]
        ways = [turn(item) for item in upright for turn in (np.array, np.fliplr, np.flipud)]
        ways += [np.rot90(item, 2) for item in upright]
        ways += [np.swapaxes(found[0], 0, 1), np.rot90(np.swapaxes(found[0], 0, 1), 2)]
        ways += [np.rot90(found[0], -1)]
        assert any((way == expected).all() for way in ways), number


# Without their last bytes


def kinds(pixels: Array) -> dict[str, bytes]:
    return {
        "PNG": encode(pixels, "PNG"),
        "GIF": encode(pixels, "GIF"),
        "WEBP": encode(pixels, "WEBP", lossless=True),
        "BMP": encode(pixels, "BMP"),
        "JPEG": encode(pixels, "JPEG", quality=90),
        "JPEG progressive": encode(pixels, "JPEG", quality=90, progressive=True),
        "JPEG 4:2:0": encode(pixels, "JPEG", quality=90, subsampling=2),
        "JPEG restarts": encode(pixels, "JPEG", quality=90, restart_marker_rows=1),
        "JPEG grey": encode(pixels[..., 0], "JPEG", quality=90),
    }


# How many bytes at the end are no part of the picture.
JPEGS = ("JPEG", "JPEG progressive", "JPEG 4:2:0", "JPEG grey")
ENDS = {"PNG": 20, "GIF": 2} | dict.fromkeys(JPEGS, 2)


@pytest.mark.parametrize("kind", ENDS)
def test_whole_pictures_without_their_end(kind: str, pixels: Array) -> None:
    data = kinds(pixels)[kind]
    expected = decode_image(data, SPEC)
    for cut in range(1, ENDS[kind] + 1):
        for tail in (b"", bytes(1), bytes(200)) if kind != "PNG" else (b"",):
            found = decode_image(data[:-cut] + tail, SPEC)
            np.testing.assert_array_equal(found, expected)
    for tail in (b"\0", bytes(5000), b"garbage \xff\xd8\xff\xda after it", data):
        np.testing.assert_array_equal(decode_image(data + tail, SPEC), expected)


@pytest.mark.parametrize("kind", [name for name in ENDS if name != "GIF"] + ["BMP", "WEBP"])
def test_pictures_that_are_not_whole(kind: str, pixels: Array) -> None:
    data = kinds(pixels)[kind]
    end = ENDS.get(kind, 0)
    for cut in (end + 12, end + 30, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(ImageError, match="image cannot be decoded") as caught:
            decode_image(data[:-cut], SPEC)
        assert caught.value.sqlstate == "22P03" and caught.value.hint


@pytest.mark.parametrize("kind", [name for name in ENDS if name != "GIF"])
def test_zeros_in_place_of_data(kind: str, pixels: Array) -> None:
    """What a download leaves that broke off in a file made to its full size before."""
    data = kinds(pixels)[kind]
    for share in (0.3, 0.6, 0.9):
        kept = int(len(data) * share)
        with pytest.raises(ImageError, match="image cannot be decoded"):
            decode_image(data[:kept] + bytes(len(data) - kept), SPEC)


@pytest.mark.parametrize("kind", ["JPEG", "JPEG 4:2:0", "JPEG restarts", "JPEG grey"])
@pytest.mark.parametrize("width", [96, 97, 98, 90])
def test_end_marker_after_half_of_the_picture(kind: str, width: int, pixels: Array) -> None:
    """libjpeg makes the rest grey, and says nothing that Pillow passes on."""
    data = kinds(pixels[:, :width])[kind]
    for share in (0.5, 0.75, 0.9):
        with pytest.raises(ImageError, match="JPEG image cannot be decoded"):
            decode_image(data[: int(len(data) * share)] + b"\xff\xd9", SPEC)


def test_grey_pictures_are_whole() -> None:
    """Their corner is what libjpeg makes of no data."""
    for mode, colour in (("L", 128), ("RGB", (128, 128, 128)), ("CMYK", (127, 127, 127, 127))):
        data = saved(Image.new(mode, (WIDTH, HEIGHT), colour), "JPEG", quality=90)
        decode_image(data, SPEC)
        decode_image(data[:-2], SPEC)


def test_padding_of_webp() -> None:
    generator = np.random.default_rng(0)
    odd = 0
    for size in range(20, 30):
        noise = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        data = encode(noise, "WEBP", lossless=True)
        if struct.unpack_from("<I", data, 16)[0] % 2:
            odd += 1
            spec = InputSpec(size, size)
            found = decode_image(data[:-1], spec)
            np.testing.assert_array_equal(found, decode_image(data, spec))
    assert odd


# Decoding large JPEGs at a part of their size


def mean_difference(data: bytes, spec: InputSpec) -> float:
    """How far it is from what is decoded at its whole size first."""
    return float(np.abs(decode_image(data, spec).astype(int) - whole(data, spec)).mean())


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("size", [(400, 300), (403, 301), (1207, 999)])
def test_part_of_the_size_gives_the_same(
    size: tuple[int, int], orientation: int, resize: str, pixels: Array
) -> None:
    large = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    exif = ifd((0x0112, 3, 1, struct.pack("<HH", orientation, 0)))
    data = with_segments(encode(large, "JPEG", quality=92), segment(0xE1, exif))
    for channels, side in ((3, 32), (1, 28)):
        spec = InputSpec(side, side + 5, channels=channels, resize=resize)
        assert mean_difference(data, spec) < 1


@pytest.mark.parametrize("side", [144, 224])
def test_part_of_the_size_for_larger_encoders(side: int, pixels: Array) -> None:
    random = np.random.default_rng(0)
    large = np.asarray(Image.fromarray(pixels).resize((1500, 1400), Image.Resampling.BICUBIC))
    detailed = (large + random.normal(0, 8, large.shape)).clip(0, 255).astype(np.uint8)
    assert 0 < mean_difference(encode(detailed, "JPEG", quality=92), InputSpec(side, side)) < 1


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_part_of_the_size_in_other_modes(mode: str, pixels: Array) -> None:
    large = Image.fromarray(pixels).convert(mode).resize((803, 605), Image.Resampling.BICUBIC)
    assert mean_difference(saved(large, "JPEG", quality=92), InputSpec(32, 32)) < 1


def test_single_pixels_are_taken_from_the_whole(pixels: Array) -> None:
    large = np.asarray(Image.fromarray(pixels).resize((1000, 800), Image.Resampling.BICUBIC))
    data = encode(large, "JPEG", quality=92)
    assert mean_difference(data, InputSpec(28, 28, interpolation="nearest")) == 0


def test_limits_are_those_of_the_whole(pixels: Array) -> None:
    large = np.asarray(Image.fromarray(pixels).resize((1000, 800)))
    with pytest.raises(ImageError, match="1000 x 800 pixels is too large"):
        decode_image(encode(large, "JPEG"), InputSpec(28, 28, max_pixels=799_999))


def test_no_warning_reaches_the_log(pixels: Array) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_image(with_exif("JPEG", pixels, ODD_EXIF["cut off"]), SPEC)
