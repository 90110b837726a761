"""Parts of images: what the decoder takes of them, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pg_siamese_server.encoding.images import decode_image, render_image
from pg_siamese_server.encoding.regions import Region, parse
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import ImageError, SiameseError
from tests import dicom_files
from tests.support import Array, encode, saved
from tests.unit.server.common import turned

WIDTH, HEIGHT = 40, 30
WINDOW = {"WindowCenter": "128", "WindowWidth": "256"}


@pytest.fixture(scope="module")
def picture() -> Array:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("channels", [1, 3])
def test_as_the_part_itself(picture: Array, resize: str, channels: int) -> None:
    """Its surroundings do not matter, not even at its edges."""
    spec = InputSpec(9, 7, channels=channels, resize=resize)
    part = decode_image(encode(picture[6:24, 10:31]), spec)
    for region in (
        Region(10, 6, 31, 24),
        Region(10 / WIDTH, 6 / HEIGHT, 31 / WIDTH, 24 / HEIGHT),
        Region(0.2499, 0.201, 0.774, 0.8),
    ):
        np.testing.assert_array_equal(
            decode_image(encode(picture), spec, region=region), part, str(region)
        )
    assert not np.array_equal(decode_image(encode(picture), spec), part)


def test_at_its_own_size(picture: Array) -> None:
    found = render_image(encode(picture), 100, region=Region(10, 6, 31, 24))
    np.testing.assert_array_equal(found, picture[6:24, 10:31])
    whole = Region(0, 0, WIDTH, HEIGHT)
    np.testing.assert_array_equal(render_image(encode(picture), 100, region=whole), picture)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_of_the_upright_image(picture: Array, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.asarray(turned(Image.fromarray(picture), orientation))
    found = render_image(encode(picture, exif=exif), 100, region=Region(2, 3, 12, 27))
    np.testing.assert_array_equal(found, upright[3:27, 2:12])


def test_of_a_large_jpeg() -> None:
    """It is decoded at its full size: a small part has all of its pixels."""
    noise = np.random.default_rng(1).integers(0, 256, (200, 200), dtype=np.uint8)
    large = np.zeros((2000, 1600), np.uint8)
    large[1000:1200, 600:800] = noise
    found = render_image(
        encode(large, "JPEG", quality=100), 200, region=Region(600, 1000, 800, 1200)
    )
    assert np.abs(found[..., 0].astype(int) - noise).mean() < 3


def test_of_a_dicom_frame() -> None:
    """Counted in the square pixels of a viewer, whatever the encoder's resize mode."""
    frames = np.random.default_rng(2).integers(0, 256, (2, 20, 30), dtype=np.uint8)
    data = dicom_files.frames(frames, **WINDOW)
    plain = render_image(data, 100, 2)
    found = render_image(data, 100, 2, Region(5, 4, 25, 16))
    np.testing.assert_array_equal(found, plain[4:16, 5:25])
    data = dicom_files.frames(frames, **WINDOW, PixelAspectRatio=["2", "1"])
    tall = render_image(data, 100, 1)
    assert tall.shape == (40, 30, 3)
    for resize in ("stretch", "crop", "pad"):
        spec = InputSpec(10, 10, resize=resize)
        np.testing.assert_array_equal(
            decode_image(data, spec, frame=1, region=Region(10, 20, 30, 40)),
            decode_image(encode(tall[20:40, 10:30]), spec),
        )


def test_limits_are_those_of_the_whole_image(picture: Array) -> None:
    spec = InputSpec(9, 7, max_pixels=WIDTH * HEIGHT - 1)
    with pytest.raises(ImageError, match="is too large"):
        decode_image(encode(picture), spec, region=Region(0, 0, 2, 2))


def test_of_a_palette_and_of_alpha(picture: Array) -> None:
    image = Image.fromarray(picture).quantize(16)
    found = render_image(saved(image, "GIF"), 100, region=Region(3, 4, 20, 22))
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB"))[4:22, 3:20])
    clear = Image.fromarray(np.dstack([picture, np.zeros((HEIGHT, WIDTH), np.uint8)]))
    assert (render_image(saved(clear, "PNG"), 100, region=Region(3, 4, 20, 22)) == 255).all()


def test_boxes() -> None:
    """PostgreSQL writes the larger coordinates first."""
    assert parse("(0.75,1),(0.25,0)") == Region(0.25, 0, 0.75, 1)
    assert parse("(0.75,1),(0.25,0)").is_relative
    assert parse("(100,80),(0,1)") == Region(0, 1, 100, 80)
    assert not parse("(100,80),(0,1)").is_relative
    assert parse("(1e+03,80),(0,1)").right == 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(0.5,1),(0.5,0)", "region is empty"),
        ("(10,20),(0,20)", "region is empty"),
        ("(1.2,0.9),(0.2,0.3)", "neither relative nor in whole pixels"),
        ("(10.5,20),(0,0)", "neither relative nor in whole pixels"),
        ("(0.5,0.5),(-0.1,0)", "neither relative nor in whole pixels"),
        ("(NaN,1),(0,0)", "neither relative nor in whole pixels"),
        ("(Infinity,1),(0,0)", "neither relative nor in whole pixels"),
    ],
)
def test_boxes_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(SiameseError, match=message) as caught:
        parse(text)
    assert caught.value.sqlstate == "22023"
    assert caught.value.detail == f"It is {text}."
    assert "top left corner" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Region(0, 0, 41, 30), "not inside the image"),
        (Region(0, 0, 40, 31), "not inside the image"),
        (Region(-1, 0, 40, 30), "not inside the image"),
        (Region(0, -5, 40, 30), "not inside the image"),
        (Region(50, 40, 60, 50), "not inside the image"),
        (Region(0.5, 0.1, 0.501, 0.9), "smaller than a pixel"),
        (Region(0.1, 0.5, 0.9, 0.501), "smaller than a pixel"),
    ],
)
def test_regions_outside(picture: Array, region: Region, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        decode_image(encode(picture), InputSpec(9, 7), region=region)
    assert caught.value.sqlstate == "22023"
    assert caught.value.detail == "The image has 40 x 30 pixels."
