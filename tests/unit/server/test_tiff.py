"""TIFF: every sample format gives the pixels that the standard says, or is refused by name."""

from __future__ import annotations

import io
import itertools
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from pg_siamese_server.encoding.images import decode_image, render_image
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import ImageError
from tests.support import Array, encode
from tests.unit.server.common import check_is_image_or_refused, damaged, turned
from tests.unit.server.tiff_files import CODECS, Tiff, join

WIDTH, HEIGHT = 21, 10
SPEC = InputSpec(WIDTH, HEIGHT)
CHANNELS = {0: 1, 1: 1, 2: 3, 5: 4}


def samples(bits: int, channels: int = 1, kind: str = "u") -> Array:
    generator = np.random.default_rng(bits)
    shape = (HEIGHT, WIDTH, channels)
    if kind == "f":
        return generator.random(shape).astype(f"f{bits // 8}")
    size = max(8, 1 << (bits - 1).bit_length())
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if kind == "i" else (0, 2**bits)
    return generator.integers(low, high, shape).astype(f"{kind}{size // 8}")


def scaled(values: Array, low: float, high: float) -> Array:
    found = (values.astype(np.float64) - low) / (high - low) * 255
    return np.rint(np.clip(found, 0, 255)).astype(np.uint8)


def shown(page: Tiff, low: float, high: float) -> Array:
    """What a viewer shows, by the standard: RGB."""
    pixels = scaled(page.samples, low, high).astype(int)
    if page.photometric in (0, 1):
        pixels = np.repeat(pixels, 3, axis=2)
        return 255 - pixels if page.photometric == 0 else pixels
    if page.photometric == 5:
        key = 255 - pixels[..., 3:]
        light: Array = np.rint((255 - pixels[..., :3]) * key / 255)
        return light.astype(int)
    return pixels


def check(page: Tiff, low: float, high: float, spec: InputSpec = SPEC) -> None:
    data = page.file()
    with tifffile.TiffFile(io.BytesIO(data)) as file:  # the file is what it is meant to be
        read = file.pages[0].asarray()
    if page.planar and page.samples.shape[2] > 1:
        read = np.moveaxis(read, 0, -1)
    np.testing.assert_array_equal(read.reshape(page.samples.shape), page.samples)
    found = decode_image(data, spec).astype(int)
    assert np.abs(found - shown(page, low, high)).max() <= (2 if page.photometric == 5 else 0)


@pytest.mark.law(13)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("photometric", CHANNELS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 10, 12, 14, 16])
def test_unsigned_samples(bits: int, photometric: int, order: str) -> None:
    for codec, planar, tile in itertools.product(CODECS, (False, True), (None, (16, 16))):
        values = samples(bits, CHANNELS[photometric])
        page = Tiff(values, bits, order, photometric, codec, planar, tile=tile)
        check(page, 0, 2**bits - 1)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("codec", ["lzw", "deflate", "zstd"])
@pytest.mark.parametrize("bits", [8, 16])
def test_differences_along_the_row(bits: int, codec: str, order: str) -> None:
    for photometric, planar, tile in itertools.product((1, 2), (False, True), (None, (16, 16))):
        values = samples(bits, CHANNELS[photometric])
        page = Tiff(values, bits, order, photometric, codec, planar, predictor=2, tile=tile)
        check(page, 0, 2**bits - 1)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bits", [1, 4, 8, 16])
def test_reversed_bits(bits: int, codec: str) -> None:
    page = Tiff(samples(bits), bits, codec=codec, fill_order=2)
    found = decode_image(page.file(), SPEC)
    np.testing.assert_array_equal(found, shown(page, 0, 2**bits - 1))


@pytest.mark.parametrize("order", "<>")
def test_big_tiff(order: str) -> None:
    check(Tiff(samples(16, 3), 16, order, 2, "lzw", big=True), 0, 65535)


OPEN_RANGES = [("i", 8), ("i", 16), ("i", 32), ("u", 32), ("f", 16), ("f", 32), ("f", 64)]


@pytest.mark.law(13)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("kind", "bits"), OPEN_RANGES)
def test_samples_without_a_range_need_one(kind: str, bits: int, order: str) -> None:
    for photometric, codec in itertools.product((0, 1, 2), ("none", "lzw")):
        page = Tiff(samples(bits, CHANNELS[photometric], kind), bits, order, photometric, codec)
        name = {"i": "signed", "u": "unsigned", "f": "floating-point"}[kind]
        with pytest.raises(ImageError, match=f"{bits}-bit {name} samples has no defined") as caught:
            decode_image(page.file(), SPEC)
        assert "input_range" in (caught.value.hint or "")
        low, high = float(page.samples.min()) * 0.5, float(page.samples.max()) * 0.75
        check(page, low, high, InputSpec(WIDTH, HEIGHT, input_range=(low, high)))


def test_differences_of_fractions() -> None:
    page = Tiff(samples(32, kind="f"), 32, codec="deflate", predictor=3)
    check(page, 0.25, 0.75, InputSpec(WIDTH, HEIGHT, input_range=(0.25, 0.75)))


def test_no_number() -> None:
    values = samples(32, kind="f")
    values[3, 4] = np.nan
    with pytest.raises(ImageError, match="not numbers"):
        decode_image(Tiff(values, 32).file(), InputSpec(WIDTH, HEIGHT, input_range=(0, 1)))


def test_input_range_of_sixteen_bits() -> None:
    """12-bit values in 16 bits, of which nothing in the file tells."""
    page = Tiff(samples(12), 16)
    assert decode_image(page.file(), SPEC).max() <= 16
    check(page, 0, 4095, InputSpec(WIDTH, HEIGHT, input_range=(0, 4095)))
    # Fewer bits say it themselves.
    check(Tiff(samples(12), 12), 0, 4095, InputSpec(WIDTH, HEIGHT, input_range=(0, 999)))
    check(Tiff(samples(8), 8), 0, 255, InputSpec(WIDTH, HEIGHT, input_range=(0, 999)))


@pytest.mark.law(13)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("photometric", [1, 2])
def test_alpha(photometric: int, planar: bool, bits: int) -> None:
    colours = CHANNELS[photometric]
    values = samples(bits, colours + 1)
    values[:5, :, -1], values[5:, :, -1] = 0, 2**bits - 1
    page = Tiff(values, bits, photometric=photometric, planar=planar)
    found = decode_image(page.file(), SPEC)
    assert (found[:5] == 255).all()
    opaque = Tiff(values[..., :colours], bits, photometric=photometric)
    np.testing.assert_array_equal(found[5:], shown(opaque, 0, 2**bits - 1)[5:])
    # What the tag calls neither alpha nor colour is left out.
    ignored = Tiff(values, bits, photometric=photometric, tags={338: (3, (0,))})
    np.testing.assert_array_equal(decode_image(ignored.file(), SPEC), shown(opaque, 0, 2**bits - 1))


def test_premultiplied_alpha() -> None:
    values = np.full((HEIGHT, WIDTH, 4), 64, np.uint8)
    values[..., 3] = 128
    for photometric, kept in ((1, values[..., 2:]), (2, values)):
        page = Tiff(kept, 8, photometric=photometric, tags={338: (3, (1,))})
        found = decode_image(page.file(), SPEC)
        assert np.abs(found.astype(int) - (64 + 127)).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("codec", ["none", "lzw", "packbits"])
def test_palette(bits: int, codec: str) -> None:
    table = np.random.default_rng(0).integers(0, 256, (3, 2**bits))
    tags: Any = {320: (3, tuple((table * 257).ravel().tolist()))}
    page = Tiff(samples(bits), bits, photometric=3, codec=codec, tags=tags)
    expected = table[:, page.samples[..., 0]].transpose(1, 2, 0)
    np.testing.assert_array_equal(decode_image(page.file(), SPEC), expected)


def written(array: Array, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


SMOOTH = np.add.outer(np.arange(64), np.arange(96)).astype(np.uint8)
SMOOTH_RGB = np.stack([SMOOTH, SMOOTH // 2, 255 - SMOOTH], axis=-1)


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
@pytest.mark.parametrize("subsampling", [(1, 1), (2, 2)])
@pytest.mark.parametrize("tile", [None, (32, 32)])
def test_jpeg(photometric: str, subsampling: tuple[int, int], tile: tuple[int, int] | None) -> None:
    options: dict[str, Any] = {"photometric": photometric, "compression": "jpeg", "tile": tile}
    if photometric == "ycbcr":
        options["subsampling"] = subsampling
    data = written(SMOOTH_RGB, compressionargs={"level": 95}, **options)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        expected = file.pages[0].asarray().astype(int)
    found = decode_image(data, InputSpec(96, 64)).astype(int)
    assert np.abs(found - expected).mean() < 1
    grey = written(SMOOTH, photometric="minisblack", compression="jpeg", tile=tile)
    assert np.abs(decode_image(grey, InputSpec(96, 64)).astype(int) - SMOOTH[..., None]).mean() < 4


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_fax(compression: str, photometric: int) -> None:
    data = encode(SMOOTH > 90, "TIFF", compression=compression, tiffinfo={262: photometric})
    found = decode_image(data, InputSpec(96, 64))
    with tifffile.TiffFile(io.BytesIO(data)) as opened:
        assert opened.pages.first.photometric == photometric
    np.testing.assert_array_equal(found[..., 0] == 255, SMOOTH > 90)


@pytest.mark.law(13)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": "jpeg2000"}, r"compression \d+ \(JPEG 2000\)"),
        ({"compression": "webp"}, r"compression \d+ \(WebP\)"),
        ({"compression": "jpegxl"}, r"compression \d+ \(JPEG XL\)"),
        ({"photometric": "cielab"}, r"photometric interpretation 8 \(CIELab\)"),
        ({"photometric": "cfa"}, r"photometric interpretation 32803 \(colour filter array"),
        ({"photometric": "ycbcr"}, r"photometric interpretation 6 \(YCbCr\) outside JPEG"),
    ],
)
def test_refused_by_name(options: dict[str, Any], message: str) -> None:
    pixels = SMOOTH if options.get("photometric") == "cfa" else SMOOTH_RGB
    data = written(pixels, **{"photometric": "rgb", **options})
    with pytest.raises(ImageError, match=message) as caught:
        decode_image(data, InputSpec(96, 64))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (Tiff(samples(16, kind="i"), 16, tags={339: (3, (5,))}), "sample format 5"),
        (Tiff(samples(8, 3), 8, photometric=2, tags={258: (3, (8, 8, 16))}), "different bits"),
        (Tiff(samples(16), 16, photometric=3), "palette and 16-bit unsigned"),
        (Tiff(samples(8, 4), 8, photometric=5, tags={332: (3, (2,))}), "inks that are not CMYK"),
        (Tiff(samples(8, 2), 8, photometric=2), "2 samples per pixel"),
        (Tiff(samples(8), 8, tags={255: (3, (2,)), 330: (4, (8,))}), "SubIFDs"),
        (Tiff(samples(8), 8, tags={259: (3, (9999,))}), r"compression 9999 \(unknown\)"),
    ],
)
def test_other_refusals(page: Tiff, message: str) -> None:
    with pytest.raises(ImageError, match=f"TIFF image with .*{message}"):
        decode_image(page.file(), SPEC)


@pytest.mark.parametrize("tag", [{254: (4, (1,))}, {255: (3, (2,))}, {254: (4, (4,))}])
def test_first_full_size_page(tag: dict[int, Any]) -> None:
    small = Tiff(np.full((4, 5, 1), 9, np.uint8), 8, tags=tag)
    full, other = Tiff(samples(8), 8), Tiff(samples(8) // 2, 8)
    for pages in ([small, full, other], [small, small, full], [full, small], [full, other]):
        found = decode_image(join(pages), SPEC)
        np.testing.assert_array_equal(found, shown(full, 0, 255))
    # A page of many (2) is full size. One small page alone is all there is.
    many = Tiff(full.samples, 8, tags={254: (4, (2,))})
    np.testing.assert_array_equal(decode_image(join([many, other]), SPEC), shown(full, 0, 255))
    assert (decode_image(small.file(), SPEC) == 9).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("bits", [8, 16])
def test_orientation(bits: int, orientation: int) -> None:
    page = Tiff(samples(bits), bits, tags={274: (3, (orientation,))})
    pixels = Image.fromarray(shown(page, 0, 2**bits - 1).astype(np.uint8))
    upright = np.asarray(turned(pixels, orientation))
    spec = InputSpec(upright.shape[1], upright.shape[0])
    np.testing.assert_array_equal(decode_image(page.file(), spec), upright)


@pytest.mark.parametrize(
    "tags",
    [
        {296: (4, (70000,))},
        {282: (3, (0,)), 283: (3, (0,))},
        {34665: (4, (8,))},
        {34853: (4, (99_999_999,))},
        {700: (3, (1, 2, 3))},
        {33723: (4, (9, 9))},
        {34675: (3, (5,) * 200)},
        {305: (3, (65535,))},
        {274: (3, (99,))},
    ],
    ids=str,
)
def test_odd_tags_do_no_harm(tags: dict[int, Any]) -> None:
    for codec in ("none", "lzw"):
        check(Tiff(samples(8, 3), 8, photometric=2, codec=codec, tags=tags), 0, 255)


def test_shown_as_embedded() -> None:
    """What Pillow alone can't open, and a page that it would not take."""
    small = Tiff(np.full((4, 5, 1), 9, np.uint8), 8, tags={254: (4, (1,))})
    full = Tiff(samples(12), 12)
    found = render_image(join([small, full]), 512)
    np.testing.assert_array_equal(found, shown(full, 0, 4095))
    turned = Tiff(samples(12), 12, tags={274: (3, (6,))})
    assert render_image(turned.file(), 512).shape == (WIDTH, HEIGHT, 3)
    assert render_image(turned.file(), 7).shape == (7, 3, 3)


def test_incomplete() -> None:
    for codec in CODECS:
        page = Tiff(samples(16, 3), 16, photometric=2, codec=codec)
        higher: Any = {257: (4, (HEIGHT + 3,))}
        longer = Tiff(page.samples, 16, photometric=2, codec=codec, tags=higher)
        for broken in (longer.file(), page.file()[: len(page.file()) // 2]):
            with pytest.raises(ImageError, match="TIFF image cannot be decoded"):
                decode_image(broken, InputSpec(WIDTH, HEIGHT))


def test_size_is_limited_by_what_is_unpacked() -> None:
    page = Tiff(samples(64, 3, "f"), 64, photometric=2)
    spec = InputSpec(WIDTH, HEIGHT, input_range=(0, 1), max_pixels=WIDTH * HEIGHT)
    with pytest.raises(ImageError, match="3 samples of 64 bits is too large") as caught:
        decode_image(page.file(), spec)
    assert caught.value.sqlstate == "54000"


def test_damaged_files_never_crash() -> None:
    for bits, codec, tile in itertools.product((1, 8, 12, 16), CODECS, (None, (16, 16))):
        data = Tiff(samples(bits, 3), bits, photometric=2, codec=codec, tile=tile).file()
        for mutated in damaged(data, 40, 4, end=200):  # where the tags are
            check_is_image_or_refused(mutated, SPEC)
