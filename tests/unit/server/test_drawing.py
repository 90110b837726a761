"""Thumbnails and contact sheets: sizes, places, captions, and what DICOM files look like."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pg_siamese_server.encoding import contact_sheet, drawing
from pg_siamese_server.encoding.contact_sheet import GAP, LINE, Sheet
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import ImageError, SiameseError
from tests import dicom_files as made
from tests.support import Array, encode
from tests.unit.server.test_dicom import REAL, REFUSED

RED = np.full((28, 28, 3), (200, 0, 0), np.uint8)


def opened(file: bytes) -> Array:
    image = Image.open(io.BytesIO(file))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def noise(height: int, width: int, *channels: int) -> Array:
    return np.random.default_rng(0).integers(0, 256, (height, width, *channels), dtype=np.uint8)


# Thumbnails.


@pytest.mark.parametrize("name", sorted(path.stem for path in REAL.glob("*.dcm")) or [None])
def test_dicom_files_look_as_their_references(name: str | None) -> None:
    if name is None:
        pytest.skip("needs the DICOM files beside the project (shared/data/dicom)")
    data = (REAL / f"{name}.dcm").read_bytes()
    if name in REFUSED:
        with pytest.raises(ImageError, match=REFUSED[name]):
            drawing.thumbnail(data, 128)
        return
    shown = opened(drawing.thumbnail(data, 128, frame=1))  # what the references show
    assert max(shown.shape) <= 128
    reference = Image.open(REAL / "ref" / f"{name}.png").convert("RGB")
    wanted = np.asarray(reference.resize(shown.shape[1::-1], Image.Resampling.BICUBIC))
    assert np.abs(shown.astype(int) - wanted).mean() <= 1


@pytest.mark.parametrize(
    ("size", "side", "wanted"),
    [
        ((400, 100), 128, (128, 32)),
        ((100, 400), 128, (32, 128)),
        ((2000, 3), 64, (64, 1)),
        ((28, 28), 128, (28, 28)),
        ((128, 90), 128, (128, 90)),
    ],
)
def test_proportions_stay_and_nothing_is_enlarged(
    size: tuple[int, int], side: int, wanted: tuple[int, int]
) -> None:
    file = encode(noise(size[1], size[0], 3))
    assert opened(drawing.thumbnail(file, side)).shape == (*wanted[::-1], 3)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "GIF", "JPEG"])
def test_every_format(kind: str) -> None:
    pixels = np.repeat(np.repeat(noise(8, 8), 10, axis=0), 10, axis=1)
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    shown = opened(drawing.thumbnail(encode(pixels, kind, **options), 80))
    assert np.abs(shown.astype(int) - pixels[..., None]).max() <= 2


def test_grey_is_stored_as_grey() -> None:
    grey = drawing.thumbnail(encode(noise(40, 40)), 40)
    assert Image.open(io.BytesIO(grey)).mode == "L"
    colour = drawing.thumbnail(encode(noise(40, 40, 3)), 40)
    assert Image.open(io.BytesIO(colour)).mode == "RGB"


def test_window() -> None:
    values = np.linspace(-1000, 1000, 32 * 32).round().astype(np.int16).reshape(32, 32)
    data = made.image(values, Modality="CT", RescaleSlope="1", RescaleIntercept="0")
    spec = InputSpec(32, 32, dicom_window="40/400")
    shown = opened(drawing.thumbnail(data, 32, spec=spec))[..., 0]
    assert np.array_equal(shown, made.windowed(values, 40, 400))


class Stop(Exception):
    """Raised to leave."""


def test_writing_can_be_stopped() -> None:
    """At each part of the file, since zlib takes seconds for a large picture."""
    picture, polls = Image.fromarray(noise(500, 500, 3)), 0

    def poll() -> None:
        nonlocal polls
        polls += 1
        if polls == 5:
            raise Stop

    with pytest.raises(Stop):
        drawing.png_file(picture, poll)


# Contact sheets.


def sheet(captions: list[str], columns: int = 3, side: int = 40) -> Sheet:
    return Sheet(captions, columns, side)


def cell(pixels: Array, line: int, column: int, side: int = 40, lines: int = 0) -> Array:
    left, top = GAP + column * (side + GAP), GAP + line * (side + lines * LINE + GAP)
    return pixels[top : top + side, left : left + side]


def test_pictures_are_in_their_places() -> None:
    made = sheet([""] * 5)
    made.draw(0, RED)
    made.draw(4, noise(5, 10, 3))
    pixels = opened(made.file())
    assert pixels.shape == (2 * (40 + GAP) + GAP, 3 * (40 + GAP) + GAP, 3)
    assert (cell(pixels, 0, 0) == RED[0, 0]).all()
    wide = cell(pixels, 1, 1)
    assert (wide[:10] == 255).all() and (wide[30:] == 255).all()
    blocks = noise(5, 10, 3).repeat(4, axis=0).repeat(4, axis=1)
    assert np.array_equal(wide[10:30], blocks)
    assert (cell(pixels, 0, 1) == 255).all() and (cell(pixels, 1, 2) == 255).all()


def test_large_pictures_fit_and_few_need_no_more_columns() -> None:
    made = sheet([""], columns=8)
    made.draw(0, noise(40, 20, 3))
    assert opened(made.file()).shape == (40 + 2 * GAP, 40 + 2 * GAP, 3)


def test_marked_cells() -> None:
    made = sheet(["", ""], side=100)
    made.draw(0, RED)
    made.mark(1, "not found")
    marked = cell(opened(made.file()), 0, 1, side=100)
    assert (marked != 255).any(axis=2).all(), "no white, as an empty picture has"
    assert marked.min() < 100, "with a text"


def ink(pixels: Array) -> Array:
    """Columns of a strip that have something dark."""
    found: Array = (pixels.min(axis=2) < 128).any(axis=0)
    return found


def below(pixels: Array, number: int, side: int = 100) -> Array:
    top = GAP + side + number * LINE
    return pixels[top : top + LINE]


def test_captions() -> None:
    made = sheet(["one\ntwo\nthree\nfour", "a"], side=100)
    made.draw(0, RED)
    made.draw(1, RED)
    pixels = opened(made.file())
    assert pixels.shape[0] == 2 * GAP + 100 + 3 * LINE, "three lines at most"
    first, second, third = (ink(below(pixels, number)) for number in range(3))
    assert first[GAP : GAP + 100].any() and second[GAP : GAP + 100].any()
    assert third[GAP : GAP + 100].any()
    assert first[GAP + 100 :].any() and not second[GAP + 100 :].any()


@pytest.mark.parametrize(
    "caption",
    ["w" * 500, "MMMMMMMMMMMMMMMMMM", "i" * 300, "\x1b[31m\t\x00 \u202e" * 20, "日本" * 40],
)
@pytest.mark.parametrize("side", [16, 100])
def test_captions_stay_in_their_cells(caption: str, side: int) -> None:
    made = sheet(["", caption, ""], side=side)
    for place in range(3):
        made.draw(place, RED)
    strip = ink(below(opened(made.file()), 0, side))
    left = GAP + side + GAP
    assert not strip[: left - 3].any() and not strip[left + side + 3 :].any()
    assert strip.any()


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact_sheet, "MAX_PIXELS", (3 * 48 + 8) * (48 + 8))
    sheet([""] * 3)
    with pytest.raises(SiameseError, match="152 x 104 pixels is too large") as caught:
        sheet([""] * 4)
    assert caught.value.sqlstate == "54000"


@pytest.mark.parametrize("text", ["aß", "éñ", "łż", "Ωµ", "Жд", "≤°", "–…"])
def test_letters(text: str) -> None:
    """Each is drawn as itself, and not as the box of letters that the font lacks."""
    letters = drawing.font(20)
    shapes = {bytes(letters.getmask(each)) for each in (*text, "\uf8ff", "中")}
    assert len(shapes) == len(text) + 1


@pytest.mark.parametrize("size", [15, 1025, 0, -1])
def test_sizes(size: Any) -> None:
    with pytest.raises(SiameseError, match="size must be between 16 and 1024"):
        drawing.check_side(size)
