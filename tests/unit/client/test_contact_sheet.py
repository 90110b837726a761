"""Contact sheets: what is drawn, and what it looks like."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from pg_siamese.client.contact_sheet import (
    NEUTRAL_COLOUR,
    OTHER_COLOUR,
    SAME_COLOUR,
    Neighbour,
    SheetRow,
    contact_sheet,
    draw_sheet,
    square,
)

Pixels = npt.NDArray[np.uint8]


def grey(*size: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, size or (28, 28), dtype=np.uint8)


def count(path: Path, colour: str) -> int:
    """How many pixels of a picture have exactly this colour."""
    picture = np.asarray(Image.open(path).convert("RGB"))
    wanted = np.round(np.array(to_rgb(colour)) * 255).astype(np.uint8)
    return int((picture == wanted).all(axis=2).sum())


def row(query: str | None, *labels: str | None, pixels: Pixels | None = None) -> SheetRow:
    pixels = grey() if pixels is None else pixels
    return SheetRow("set", pixels, query, [Neighbour(pixels, label, 0.1, 0.9) for label in labels])


@pytest.mark.parametrize(
    "size", [(28, 28), (28, 28, 3), (28, 28, 1), (28, 20, 3), (500, 500)], ids=str
)
def test_a_sheet_is_a_png_that_is_large_enough_to_read(
    tmp_path: Path, size: tuple[int, ...]
) -> None:
    pixels = grey(*size)
    path = contact_sheet([row("a", "a", "b", pixels=pixels)], tmp_path / "new" / "sheet.png", "t")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width >= 3 * 200
        assert picture.height >= 300
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]


def test_frames_tell_matching_labels_from_others(tmp_path: Path) -> None:
    both = contact_sheet([row("a", "a", "b")], tmp_path / "both.png")
    same = contact_sheet([row("a", "a", "a")], tmp_path / "same.png")
    other = contact_sheet([row("a", "b", "b")], tmp_path / "other.png")
    assert count(both, SAME_COLOUR) > 1000
    assert count(both, OTHER_COLOUR) > 1000
    assert count(same, SAME_COLOUR) > count(both, SAME_COLOUR)
    assert count(same, OTHER_COLOUR) == 0
    assert count(other, SAME_COLOUR) == 0


@pytest.mark.parametrize(("query", "label"), [(None, "a"), ("a", None), (None, None)])
def test_unknown_labels_have_a_neutral_frame(
    tmp_path: Path, query: str | None, label: str | None
) -> None:
    path = contact_sheet([row(query, label)], tmp_path / "sheet.png")
    assert count(path, NEUTRAL_COLOUR) > 1000
    assert count(path, SAME_COLOUR) == count(path, OTHER_COLOUR) == 0


def test_small_images_are_enlarged_as_sharp_blocks(tmp_path: Path) -> None:
    # A chessboard of two unusual greys: a blur would give many values in between.
    board = np.where(np.indices((28, 28)).sum(axis=0) % 2, 60, 190).astype(np.uint8)
    path = contact_sheet([row(None, pixels=board)], tmp_path / "sheet.png")
    picture = np.asarray(Image.open(path).convert("L"))
    middle = picture[90:250, 80:240]
    values, counts = np.unique(middle, return_counts=True)
    assert {60, 190} <= set(values.tolist())
    assert counts[np.isin(values, [60, 190])].sum() == middle.size


def test_labels_and_distances_are_written() -> None:
    sheet = SheetRow("pneumoniamnist", grey(), "normal", [Neighbour(grey(), "ill", 0.1234, 0.87)])
    figure = draw_sheet([sheet], "title")
    texts = {text.get_text() for axes in figure.axes for text in axes.texts}
    texts |= {text.get_text() for text in figure.texts}
    assert {"title", "pneumoniamnist", "normal", "query", "ill"} <= texts
    assert "distance 0.1234  ·  match 87%" in texts


def test_rows_may_have_different_numbers_of_neighbours() -> None:
    figure = draw_sheet([row("a", "a", "b", "c"), row("a"), row("b", "b")])
    assert len(figure.axes) == 3 + 1 + 2 + 1


def test_many_neighbours_take_several_lines() -> None:
    """A picture as wide as a hundred images would be no use."""
    few, many = draw_sheet([row("a", *"b" * 8)]), draw_sheet([row("a", *"b" * 20)])
    assert many.get_figwidth() == few.get_figwidth()
    assert len(many.axes) == 21
    tops = {round(axes.get_position().y1, 3) for axes in many.axes}
    assert len(tops) == 3
    boxes = [axes.get_position() for axes in many.axes]
    assert all(box.x0 >= 0 and box.x1 <= 1 and box.y0 >= 0 and box.y1 <= 1 for box in boxes)


def test_the_grey_scale_is_not_stretched() -> None:
    # A dark image stays dark: its own range isn't taken as black to white.
    figure = draw_sheet([row("a", pixels=np.full((28, 28), 40, np.uint8))])
    assert figure.axes[0].images[0].get_clim() == (0, 255)


def test_square_centres_on_white() -> None:
    result = square(np.zeros((2, 4), np.uint8))
    assert result.tolist() == [[255] * 4, [0] * 4, [0] * 4, [255] * 4]
    assert square(np.zeros((3, 5, 3), np.uint8)).shape == (5, 5, 3)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((28, 28), "f4"), ((28, 28, 4), "u1"), ((28,), "u1"), ((0, 28), "u1")]
)
def test_arrays_that_are_no_images_are_refused(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ValueError, match="not an image"):
        square(np.zeros(shape, dtype))


def test_a_sheet_needs_a_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([], tmp_path / "sheet.png")


def test_pyplot_is_not_used() -> None:
    """It keeps every figure in memory and may want a display."""
    script = (
        "import sys, numpy; from pg_siamese.client.contact_sheet import SheetRow, draw_sheet;"
        "draw_sheet([SheetRow('', numpy.zeros((2, 2), 'uint8'), None, [])]);"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
