"""Decoding: every format and mode, limits, and files that are no images."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pg_siamese_server.encoding.images import FORMATS, decode_image
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import ImageError, ModelError
from tests.conftest import Pictures, pictures_of
from tests.scenarios.mutations import chunk, png_file
from tests.support import Array, encode, saved
from tests.unit.server.common import (
    CancelledError,
    cancel_at,
    check_is_image_or_refused,
    damaged,
    turned,
)

WIDTH, HEIGHT = 12, 8
SPEC = InputSpec(WIDTH, HEIGHT)
GREY_SPEC = InputSpec(WIDTH, HEIGHT, channels=1)


@pytest.fixture(scope="module")
def colour() -> Array:
    """A real photograph's corner (or noise, where there is none): uint8 (8, 12, 3)."""
    found = pictures_of("retinamnist", "train", 1).pixels[0]
    if found.ndim == 3:
        return np.ascontiguousarray(found[10 : 10 + HEIGHT, 8 : 8 + WIDTH])
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def grey(colour: Array) -> Array:
    return np.ascontiguousarray(colour[..., 0])


def three(grey: Array) -> Array:
    return np.repeat(grey[..., None], 3, axis=2)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("PNG", {"interlace": 1}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats(kind: str, options: dict[str, Any], colour: Array, grey: Array) -> None:
    found = decode_image(encode(colour, kind, **options), SPEC)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, colour)
    np.testing.assert_array_equal(decode_image(encode(grey, kind, **options), SPEC), three(grey))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats(kind: str, colour: Array) -> None:
    smooth = np.asarray(Image.fromarray(colour).resize((4, 4)).resize((WIDTH, HEIGHT)))
    found = decode_image(encode(smooth, kind, quality=95), SPEC)
    assert np.abs(found.astype(int) - smooth).mean() < 8


def test_grey_jpeg(grey: Array) -> None:
    data = encode(grey, "JPEG", quality=95)
    found = decode_image(data, SPEC)
    assert (found[..., 0] == found[..., 1]).all() and (found[..., 0] == found[..., 2]).all()
    np.testing.assert_array_equal(found[..., :1], decode_image(data, GREY_SPEC))


@pytest.mark.law(13)
def test_cmyk_jpeg() -> None:
    """Red of full ink, not its negative."""
    red = saved(Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(decode_image(red, SPEC).astype(int) - [254, 0, 0]).max() < 8


def test_to_one_channel(colour: Array) -> None:
    found = decode_image(encode(colour), GREY_SPEC)
    assert found.shape == (HEIGHT, WIDTH, 1)
    luma = colour @ [0.299, 0.587, 0.114]
    assert np.abs(found[..., 0] - luma).max() <= 1


@pytest.mark.law(13)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled(kind: str, grey: Array) -> None:
    """Pillow's own conversion would turn all above 255 white."""
    deep = grey.astype(np.uint16) * 257
    np.testing.assert_array_equal(decode_image(encode(deep, kind), SPEC), three(grey))
    np.testing.assert_array_equal(decode_image(encode(deep // 256, kind), SPEC) // 2, 0)


def test_sixteen_bit_big_endian_tiff(grey: Array) -> None:
    image = Image.frombytes("I;16B", (WIDTH, HEIGHT), (grey.astype(">u2") * 257).tobytes())
    np.testing.assert_array_equal(decode_image(saved(image, "TIFF"), SPEC), three(grey))


def png_of(depth: int, kind: int, rows: Array, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of this bit depth and colour type, made of packed rows by hand."""
    lines = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return png_file(WIDTH, HEIGHT, depth, kind, lines, b"".join(chunk(*each) for each in chunks))


def deep_png(samples: Array, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of 16 bits a channel: grey, RGB, grey or RGB with alpha."""
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[samples.shape[2]]
    return png_of(16, colour, samples.astype(">u2"), *chunks)


def test_sixteen_bit_colour(colour: Array) -> None:
    found = decode_image(deep_png(colour.astype(int) * 257), SPEC)
    assert np.abs(found.astype(int) - colour).max() <= 1


def test_sixteen_bit_with_transparent_value(grey: Array) -> None:
    deep = grey.astype(np.uint16) * 257
    deep[0, 0], deep[0, 1] = 0x0100, 0
    found = decode_image(deep_png(deep[..., None], (b"tRNS", b"\x01\x00")), SPEC)
    assert found[0, 0].tolist() == [255] * 3  # transparent, so the background
    assert found[0, 1].tolist() == [0] * 3
    np.testing.assert_array_equal(found[1:], three(grey)[1:])


def test_alpha_is_laid_on_white(colour: Array) -> None:
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    alpha[:4] = 0
    found = decode_image(encode(np.concatenate([colour, alpha], axis=2)), SPEC)
    assert (found[:4] == 255).all()
    np.testing.assert_array_equal(found[4:], colour[4:])
    half = np.dstack([np.zeros((HEIGHT, WIDTH), np.uint8), np.full((HEIGHT, WIDTH), 128, np.uint8)])
    assert set(decode_image(encode(half), SPEC).ravel()) <= {126, 127, 128}


def test_palette(colour: Array) -> None:
    image = Image.fromarray(colour).quantize(16)
    expected = np.asarray(image.convert("RGB"))
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        np.testing.assert_array_equal(decode_image(saved(image, kind), SPEC), expected)
    clear = int(np.asarray(image)[0, 0])
    found = decode_image(saved(image, "PNG", transparency=clear), SPEC)
    hidden = np.asarray(image) == clear
    assert (found[hidden] == 255).all()
    np.testing.assert_array_equal(found[~hidden], expected[~hidden])


def test_one_bit(grey: Array) -> None:
    image = Image.fromarray(grey > 100)
    for kind in ("PNG", "TIFF", "BMP", "GIF"):
        found = decode_image(saved(image, kind), SPEC)
        np.testing.assert_array_equal(found, three(np.where(grey > 100, 255, 0)))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame(kind: str, grey: Array) -> None:
    frames = [Image.fromarray(grey).convert("RGB"), Image.new("RGB", (WIDTH, HEIGHT), "red")]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    np.testing.assert_array_equal(decode_image(data, SPEC), three(grey))


@pytest.mark.law(13)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    upright = Image.new("RGB", (WIDTH, HEIGHT), "black")
    upright.paste("white", (0, 0, WIDTH // 2, HEIGHT // 2))
    tag = Image.Exif()
    tag[0x0112] = orientation
    # Stored as the camera had it: turning it by its tag makes it upright.
    stored = next(
        image
        for image in [upright, *(upright.transpose(way) for way in Image.Transpose)]
        if turned(image, orientation).tobytes() == upright.tobytes()
    )
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    found = decode_image(saved(stored, kind, exif=tag, **options), SPEC)
    assert np.abs(found.astype(int) - np.asarray(upright)).max() < 40


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_of_sixteen_bits(kind: str, grey: Array) -> None:
    tag = Image.Exif()
    tag[0x0112] = 3  # turned by 180 degrees
    image = Image.fromarray(np.ascontiguousarray(grey[::-1, ::-1]).astype(np.uint16) * 257)
    np.testing.assert_array_equal(decode_image(saved(image, kind, exif=tag), SPEC), three(grey))


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_stretch(method: str, colour: Array) -> None:
    found = decode_image(encode(colour), InputSpec(5, 6, interpolation=method))
    expected = Image.fromarray(colour).resize((5, 6), getattr(Image.Resampling, method.upper()))
    np.testing.assert_array_equal(found, np.asarray(expected))


def test_crop() -> None:
    """The short side is brought to the size; the ends of the long one are left out."""
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, :10] = wide[:, 30:] = 255
    assert (decode_image(encode(wide), InputSpec(10, 10, resize="crop")) == 0).all()


def test_pad() -> None:
    white = np.full((10, 40, 3), 255, np.uint8)
    found = decode_image(encode(white), InputSpec(20, 20, resize="pad"))
    assert (found[:7] == 0).all() and (found[13:] == 0).all()
    assert (found[8:12] == 255).all()


@pytest.mark.parametrize("mode", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_extreme_shapes(mode: str, size: tuple[int, int]) -> None:
    data = saved(Image.new("RGB", size, "white"), "PNG")
    assert decode_image(data, InputSpec(28, 28, resize=mode)).max() == 255


def test_real_images(pictures: Pictures) -> None:
    for pixels, file in zip(pictures.pixels[:50], pictures.files[:50], strict=True):
        found = decode_image(file, InputSpec(28, 28))
        np.testing.assert_array_equal(found, pixels if pixels.ndim == 3 else three(pixels))


def refuse(data: bytes | None, sqlstate: str, message: str, spec: InputSpec = SPEC) -> ImageError:
    with pytest.raises(ImageError, match=message) as caught:
        decode_image(data, spec)
    assert caught.value.sqlstate == sqlstate
    return caught.value


def test_no_image(grey: Array) -> None:
    refuse(None, "22004", "image is null")
    refuse(b"", "22P03", "image is empty")
    refuse(b"not an image", "22P03", "cannot be decoded")
    refuse(b"\0" * 1000, "22P03", "cannot be decoded")
    refuse(b"RIFF\0\0\0\0WEBP", "22P03", "cannot be decoded")


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated(kind: str, pictures: Pictures) -> None:
    data = encode(pictures.pixels[0], kind)
    for length in (4, 12, 30, len(data) // 2, len(data) * 3 // 4):
        refuse(data[:length], "22P03", "cannot be decoded")


@pytest.mark.parametrize("kind", ["ICO", "PPM", "TGA", "PCX", "SGI", "EPS", "JPEG2000", "ICNS"])
def test_other_formats(kind: str, colour: Array) -> None:
    """Each format is a parser that untrusted bytes would reach."""
    image = Image.fromarray(colour).resize((32, 32))
    refuse(saved(image, kind), "22P03", "cannot be decoded")


def test_limit_of_bytes(colour: Array) -> None:
    data = encode(colour)
    decode_image(data, InputSpec(WIDTH, HEIGHT, max_bytes=len(data)))
    limit = InputSpec(WIDTH, HEIGHT, max_bytes=len(data) - 1)
    error = refuse(data, "54000", f"{len(data)} bytes is too large", limit)
    assert error.detail == f"The limit is {len(data) - 1} bytes."
    assert "max_bytes" in (error.hint or "")


@pytest.mark.parametrize("kind", FORMATS)
def test_limit_of_pixels(kind: str, colour: Array) -> None:
    data = encode(colour, kind)
    decode_image(data, InputSpec(WIDTH, HEIGHT, max_pixels=WIDTH * HEIGHT))
    limit = InputSpec(WIDTH, HEIGHT, max_pixels=WIDTH * HEIGHT - 1)
    error = refuse(data, "54000", "image of 12 x 8 pixels is too large", limit)
    assert error.detail == "The limit is 95 pixels, 65535 on a side."
    assert "max_pixels" in (error.hint or "")


def test_bombs_are_refused_by_their_header() -> None:
    refuse(png_file(50_000, 50_000, 8, 2, zlib.compress(bytes(100))), "54000", "is too large")
    refuse(png_file(2**31 - 1, 1, 8, 2, zlib.compress(bytes(100))), "54000", "is too large")


def webp(kind: bytes, body: bytes) -> bytes:
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


@pytest.mark.parametrize(
    "data",
    [
        webp(b"VP8X", b"\0\0\0\0" + (16_382).to_bytes(3, "little") * 2),
        webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 16_383, 16_383)),
        webp(b"VP8L", b"\x2f" + struct.pack("<I", 16_382 | 16_382 << 14) + b"\0" * 5),
    ],
    ids=["VP8X", "VP8", "VP8L"],
)
def test_webp_size_is_read_before_its_decoder_allocates(data: bytes) -> None:
    refuse(data, "54000", "is too large")


@pytest.mark.law(13)
def test_thirty_two_bits_have_no_range(grey: Array) -> None:
    for values in (grey.astype(np.int32), grey.astype(np.float32)):
        refuse(encode(values, "TIFF"), "22P03", "no defined range")


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_never_crash(kind: str, pictures: Pictures) -> None:
    for mutated in damaged(encode(pictures.pixels[0], kind), 60, 4):
        check_is_image_or_refused(mutated, SPEC)


@pytest.mark.law(5)
def test_long_decodes_can_be_left() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    with pytest.raises(CancelledError):
        decode_image(encode(noise), SPEC, cancel_at(1))


@pytest.mark.parametrize(
    "given",
    [
        {"width": 0},
        {"height": 5000},
        {"width": 8.0},
        {"channels": 4},
        {"resize": "zoom"},
        {"interpolation": "cubic"},
        {"max_bytes": 0},
        {"max_pixels": -1},
        {"input_range": (0,)},
        {"input_range": (1, 1)},
        {"input_range": (0, float("inf"))},
        {"input_range": (0, True)},
        {"input_range": ("0", "1")},
        {"input_range": (0.0, 1e-320)},
    ],
)
def test_specification_is_checked(given: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        InputSpec(**{"width": 8, "height": 8, **given})


def test_specification_survives_json() -> None:
    spec = InputSpec(8, 9, channels=1, resize="pad", interpolation="nearest", max_bytes=7)
    assert InputSpec.from_json({**spec.to_json(), "unknown": 1}) == spec
    ranged = InputSpec(8, 9, input_range=(0, 4095))
    assert InputSpec.from_json(json.loads(json.dumps(ranged.to_json()))) == ranged
    assert "input_range" not in spec.to_json()  # as versions before 0.3.0 stored it


@pytest.fixture(scope="module")
def twelve_bits() -> Array:
    """Samples from 0 to 4095, (height, width, 4)."""
    return np.random.default_rng(0).integers(0, 4096, (HEIGHT, WIDTH, 4))


def eight_bits(samples: Array, high: int) -> Array:
    found = np.rint(samples / high * 255).astype(np.uint8)
    return three(found[..., 0]) if found.shape[2] < 3 else found[..., :3]


@pytest.mark.law(13)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("stored", ["as they are", "filled with zeros", "replicated", "scaled"])
def test_significant_bits(stored: str, channels: int, twelve_bits: Array) -> None:
    """Twelve bits in 16, scaled as the standard says and as they are: the same picture."""
    values = twelve_bits[..., :channels].copy()
    samples = {
        "as they are": values,
        "filled with zeros": values * 16,
        "replicated": values * 16 + values // 256,
        "scaled": np.rint(values / 4095 * 65535).astype(int),
    }[stored]
    if channels in (2, 4):
        samples[..., -1] = 65535
    found = decode_image(deep_png(samples, (b"sBIT", bytes([12] * channels))), SPEC)
    assert np.abs(found.astype(int) - eight_bits(values, 4095)).max() <= 1


def test_dark_picture_of_scaled_samples(twelve_bits: Array) -> None:
    dark = twelve_bits[..., :1] // 16 * 16  # of 0 to 255 of 4095, by the standard
    found = decode_image(deep_png(dark, (b"sBIT", b"\x0c")), SPEC)
    np.testing.assert_array_equal(found, eight_bits(dark, 65535))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_input_range(channels: int, twelve_bits: Array) -> None:
    samples = twelve_bits[..., :channels].copy()
    if channels in (2, 4):
        samples[..., -1] = 65535
    ranged = InputSpec(WIDTH, HEIGHT, input_range=(0, 4095))
    found = decode_image(deep_png(samples), ranged)
    np.testing.assert_array_equal(found, eight_bits(samples, 4095))
    # What the file says itself goes before it, and 8 bits have their range.
    full = np.where(samples > 2000, 65535, 0)
    found = decode_image(deep_png(full, (b"sBIT", bytes([12] * channels))), ranged)
    np.testing.assert_array_equal(found, eight_bits(full, 65535))
    inverted = InputSpec(WIDTH, HEIGHT, input_range=(4095, 0))
    found = decode_image(deep_png(samples[..., :1]), inverted)
    np.testing.assert_array_equal(found, 255 - eight_bits(samples[..., :1], 4095))


def test_input_range_leaves_eight_bits_alone(colour: Array) -> None:
    ranged = InputSpec(WIDTH, HEIGHT, input_range=(0, 4095))
    np.testing.assert_array_equal(decode_image(encode(colour), ranged), colour)


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_sample_of_sixteen_bits(channels: int, twelve_bits: Array) -> None:
    """All 16 bits of it count; one that differs in the low ones only is another colour."""
    samples = twelve_bits[..., :channels] * 16
    key = samples[2, 3].tolist()
    samples[5, 6] = [*key[:-1], key[-1] ^ 1]
    found = decode_image(deep_png(samples, (b"tRNS", struct.pack(f">{channels}H", *key))), SPEC)
    assert found[2, 3].tolist() == [255] * 3
    assert np.abs(found[5, 6].astype(int) - eight_bits(samples, 65535)[5, 6]).max() <= 1


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("high", [0, 0xFF00])
def test_transparent_grey_of_few_bits(depth: int, high: int) -> None:
    top = 2**depth - 1
    values = np.random.default_rng(depth).integers(0, top + 1, (HEIGHT, WIDTH))
    single = (values[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    packed = np.packbits(single.reshape(HEIGHT, -1).astype(np.uint8), axis=1)
    key = int(values[0, 0]) & (top - 1 if depth > 1 else top)
    data = png_of(depth, 0, packed, (b"tRNS", struct.pack(">H", key | high)))
    expected = three(np.where(values == key, 255, values * 255 // top).astype(np.uint8))
    np.testing.assert_array_equal(decode_image(data, SPEC), expected)
    np.testing.assert_array_equal(decode_image(data, GREY_SPEC), expected[..., :1])


def test_transparent_colour(colour: Array) -> None:
    key = colour[1, 1]
    data = png_of(8, 2, colour, (b"tRNS", struct.pack(">3H", *(int(v) | 0x100 for v in key))))
    expected = np.where((colour == key).all(axis=2)[..., None], 255, colour)
    np.testing.assert_array_equal(decode_image(data, SPEC), expected)


def test_transparency_of_odd_length(colour: Array) -> None:
    data = png_of(8, 2, colour, (b"tRNS", b"\0"))
    np.testing.assert_array_equal(decode_image(data, SPEC), colour)
