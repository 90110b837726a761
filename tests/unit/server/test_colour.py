"""Colour profiles: sRGB for the encoder, whatever the file was made in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from pg_siamese_server.encoding import colour
from pg_siamese_server.encoding.images import decode_image
from pg_siamese_server.encoding.specification import InputSpec
from tests.support import Array, saved
from tests.unit.server import profiles
from tests.unit.server.common import CancelledError, cancel_at, damaged, whole
from tests.unit.server.tiff_files import Tiff

WIDTH, HEIGHT = 24, 18
SPEC = InputSpec(WIDTH, HEIGHT)
P3 = profiles.screen(profiles.DISPLAY_P3, profiles.SRGB_CURVE)
ADOBE = profiles.screen(profiles.ADOBE_RGB, 2.19921875)
SRGB = profiles.screen(profiles.SRGB, profiles.SRGB_CURVE)


@pytest.fixture(scope="module")
def pixels() -> Array:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    noise[0, :3] = [[0, 0, 0], [255, 255, 255], [224, 172, 105]]  # and a tone of skin
    return noise


@pytest.mark.law(13)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("profile", "colorants", "gamma"),
    [(P3, profiles.DISPLAY_P3, None), (ADOBE, profiles.ADOBE_RGB, 2.19921875)],
    ids=["Display P3", "Adobe RGB"],
)
def test_colours_are_those_of_the_profile(
    kind: str, profile: bytes, colorants: Array, gamma: float | None, pixels: Array
) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(Image.fromarray(pixels), kind, icc_profile=profile, **options)
    found = decode_image(data, SPEC).astype(int)
    expected = profiles.converted(pixels, colorants, gamma)
    difference = np.abs(found - expected)
    assert difference.max() <= 3 and difference.mean() < 0.6
    assert np.abs(found - pixels).max() > 10


def from_p3(pixels: Array) -> Array:
    return profiles.converted(pixels, profiles.DISPLAY_P3, None)


def test_jpeg_and_its_part_of_the_size(pixels: Array) -> None:
    soft = Image.fromarray(pixels // 4 + 96)
    large = soft.resize((WIDTH * 20, HEIGHT * 20), Image.Resampling.BICUBIC)
    plain = decode_image(saved(large, "JPEG", quality=95), SPEC)
    found = decode_image(saved(large, "JPEG", quality=95, icc_profile=P3), SPEC)
    assert np.abs(found - from_p3(plain)).mean() < 2


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_large_pictures_are_reduced_first(mode: str, pixels: Array) -> None:
    soft = Image.fromarray(pixels // 2 + 64).convert(mode)
    large = soft.resize((WIDTH * 12 + 5, HEIGHT * 12 + 7), Image.Resampling.BICUBIC)
    data = saved(large, "PNG", icc_profile=P3)
    for resize in ("stretch", "crop", "pad"):
        spec = InputSpec(WIDTH, HEIGHT, resize=resize)
        assert 0 < np.abs(decode_image(data, spec).astype(int) - whole(data, spec)).mean() < 1


def test_alpha_and_palette(pixels: Array) -> None:
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    alpha[:9] = 0
    layered = Image.fromarray(np.concatenate([pixels, alpha], axis=2))
    found = decode_image(saved(layered, "PNG", icc_profile=P3), SPEC)
    assert (found[:9] == 255).all()
    assert np.abs(found[9:] - from_p3(pixels[9:])).max() <= 3
    palette = Image.fromarray(pixels).quantize(16)
    found = decode_image(saved(palette, "PNG", icc_profile=P3), SPEC)
    assert np.abs(found - from_p3(np.asarray(palette.convert("RGB")))).max() <= 3
    clear = int(np.asarray(palette)[0, 0])
    found = decode_image(saved(palette, "PNG", icc_profile=P3, transparency=clear), SPEC)
    assert (found[np.asarray(palette) == clear] == 255).all()


def test_tiff_of_sixteen_bits(pixels: Array) -> None:
    tags: Any = {34675: (7, tuple(P3))}
    page = Tiff(pixels.astype(np.uint16) * 257, 16, photometric=2, tags=tags)
    assert np.abs(decode_image(page.file(), SPEC) - from_p3(pixels)).max() <= 3


def test_to_one_channel(pixels: Array) -> None:
    data = saved(Image.fromarray(pixels), "PNG", icc_profile=P3)
    found = decode_image(data, InputSpec(WIDTH, HEIGHT, channels=1))[..., 0]
    luma = decode_image(data, SPEC) @ [0.299, 0.587, 0.114]
    assert np.abs(found - luma).max() <= 1


def test_printing() -> None:
    """All inks but black give a dark grey in print, as only the profile knows."""
    inks = Image.new("CMYK", (WIDTH, HEIGHT), (255, 255, 255, 0))
    data = saved(inks, "JPEG", quality=95, icc_profile=profiles.press(255))
    found = decode_image(data, SPEC).astype(int)
    assert np.abs(found - 94).max() <= 4  # L of 40
    assert (decode_image(saved(inks, "JPEG", quality=95), SPEC) < 4).all()


def test_grey_is_left_as_it_is(pixels: Array) -> None:
    image = Image.fromarray(pixels[..., 0])
    data = saved(image, "PNG", icc_profile=profiles.grey(1.0))
    assert (decode_image(data, SPEC)[..., 0] == pixels[..., 0]).all()


@pytest.mark.parametrize(
    "profile",
    [
        b"",
        b"x",
        b"x" * 300,
        P3[:200],
        P3[:128] + b"\xff" * 200,
        P3[:60] + bytes(len(P3) - 60),
        profiles.grey(2.2),
        profiles.press(200),
        P3 + bytes(colour.MAX_PROFILE_BYTES),
    ],
    ids=range(9),
)
def test_what_is_no_profile_of_the_picture_is_ignored(profile: bytes, pixels: Array) -> None:
    data = saved(Image.fromarray(pixels), "TIFF", icc_profile=profile)
    np.testing.assert_array_equal(decode_image(data, SPEC), pixels)


def test_damaged_profiles_never_fail(pixels: Array) -> None:
    for profile in (P3, ADOBE, profiles.press(200)):
        mode = "CMYK" if profile[16:20] == b"CMYK" else "RGB"
        image = Image.fromarray(pixels).convert(mode)
        for mutated in damaged(profile, 100, 6):
            data = saved(image, "TIFF", icc_profile=mutated)
            assert decode_image(data, SPEC).shape == (HEIGHT, WIDTH, 3)


def test_srgb_changes_nothing_and_is_known(pixels: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(Image.fromarray(pixels), "PNG", icc_profile=SRGB)
    np.testing.assert_array_equal(decode_image(data, SPEC), pixels)
    # Nothing is built or applied the next time.
    monkeypatch.setattr(colour, "_build_transform", None)
    np.testing.assert_array_equal(decode_image(data, SPEC), pixels)


def test_transforms_are_kept_but_few(pixels: Array) -> None:
    colour._transforms.clear()
    for number in range(colour.MAX_TRANSFORMS + 5):
        profile = profiles.screen(profiles.DISPLAY_P3, 1.5 + number / 50)
        decode_image(saved(Image.fromarray(pixels), "PNG", icc_profile=profile), SPEC)
    assert len(colour._transforms) == colour.MAX_TRANSFORMS


def test_cancel_during_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colour, "STRIPE_PIXELS", 64)
    with pytest.raises(CancelledError):
        colour.to_srgb(Image.new("RGB", (64, 64)), P3, cancel_at(3))
