"""Comparing the pixels of pictures."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.search import pictures
from pg_siamese_server.search.pictures import CROPS, MIRRORED, PLAIN_WAY, Likeness, Pictures
from tests.database.test_duplicates import drawn, saved


class Files(Pictures):
    """Pictures of files, whose keys are their places."""

    def __init__(self, files: list[bytes]) -> None:
        nothing: Any = None
        super().__init__(
            nothing, nothing, InputSpec(28, 28), lambda numbers: numbers.tolist(), self.count_poll
        )
        self.files = files
        self.decoded = self.polls = 0

    def count_poll(self) -> None:
        self.polls += 1

    def _read(self, numbers: dict[Any, int]) -> None:
        for key, number in numbers.items():
            self.decoded += 1
            self._keep(number, key, self.files[key])


def all_pairs(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    pairs = np.array(list(itertools.combinations(range(count), 2)))
    return pairs[:, 0], pairs[:, 1]


def test_each_picture_is_decoded_once() -> None:
    files = [saved(drawn(number % 8, side=64)) for number in range(12)]
    found = Files(files)
    candidates = set(found.candidates(*all_pairs(12), 3.6, mirrored=False))
    assert candidates == {(number, number + 8, PLAIN_WAY) for number in range(4)}
    assert found.decoded == 12


def test_each_comparison_can_be_stopped() -> None:
    """Those of pictures that are in memory, too."""
    found = Files([saved(drawn(number, side=64)) for number in range(2)])
    found.compare(0, 1)
    before = found.polls
    for _ in range(3):
        found.compare(0, 1, [PLAIN_WAY, *CROPS])
    assert found.polls == before + 3
    assert found.decoded == 2


def test_few_sketches_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for few, the same is found."""
    files = [saved(drawn(number % 8, side=64)) for number in range(12)]
    monkeypatch.setattr(pictures, "MAX_SKETCHES", 6)
    monkeypatch.setattr(pictures, "MAX_PICTURES", 4)
    monkeypatch.setattr(pictures, "MAX_PAIRS", 3)
    found = Files(files)
    pairs = {pair[:2] for pair in found.candidates(*all_pairs(12), 3.6, mirrored=False)}
    assert pairs == {(number, number + 8) for number in range(4)}
    assert len(found._sketches) <= 6
    assert len(found._pictures) <= 4
    assert found.compare(0, 8).difference == pytest.approx(0, abs=1e-6)


def test_a_crop_that_lies_beside_every_box() -> None:
    """Whichever of the two is the crop."""
    picture = drawn(3, side=200)
    crop = picture.crop((3, 6, 193, 196))
    other = drawn(4, side=200)
    found = Files([saved(each) for each in (picture, crop, other)])
    for first, second in ((0, 1), (1, 0)):
        likeness = found.compare(first, second, CROPS)
        assert likeness.is_copy
        assert likeness.difference < 2
        assert found.compare(first, second).difference > 10
    assert not found.compare(0, 2, CROPS).is_copy
    assert not found.compare(0, 2, CROPS).difference < 10


def test_small_pictures_have_no_crops() -> None:
    picture = drawn(3, side=40)
    files = [saved(picture), saved(picture.crop((0, 0, 38, 38)))]
    assert list(Files(files).candidates(*all_pairs(2), 3.6, mirrored=False)) == []


def test_mirrors_and_plain_pictures() -> None:
    picture = drawn(5)
    mirror = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    wide = picture.resize((160, 128))
    plain = [Image.new("L", (64, 64), grey) for grey in (10, 12, 60)]
    found = Files([saved(each) for each in (picture, mirror, wide, *plain)])
    likeness = found.compare(0, 1, [PLAIN_WAY, MIRRORED])
    assert likeness == Likeness(0.0, True, True)
    assert not found.compare(0, 2).is_copy  # another shape
    assert found.compare(3, 4)[:2] == (2, True)
    assert found.compare(3, 5).difference == 50
