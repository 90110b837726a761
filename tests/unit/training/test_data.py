"""Data sets joined for training, and augmentation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pg_siamese.datasets import LabelledImages, open_dataset
from pg_siamese.training.data import Augmenter, JoinedImages
from pg_siamese.training.experiments.settings import Augmentation
from tests.unit.training.stripes import striped


def test_joined_sets_label_the_class_of_the_set(data: tuple[str, ...]) -> None:
    joined = JoinedImages([open_dataset(spec).train for spec in data])
    assert joined.names == ("grey", "colour")
    assert joined.classes == ("grey: 0", "grey: 1", "colour: 0", "colour: 1")
    assert joined.pixels.shape == (192, 28, 28, 3)
    assert torch.bincount(joined.labels).tolist() == [48] * 4
    assert torch.equal(joined.sets, joined.labels // 2)
    pixels, labels, sets = joined.__getitems__([191, 0])
    assert labels.tolist() == [3, 0]
    assert sets.tolist() == [1, 0]
    assert torch.equal(pixels[1], joined[0][0])


def test_joined_sets_by_set(data: tuple[str, ...]) -> None:
    joined = JoinedImages([open_dataset(spec).train for spec in data], labels="set")
    assert joined.classes == ("grey", "colour")
    assert torch.equal(joined.labels, joined.sets)


def test_some_and_replaced_images_keep_their_labels(data: tuple[str, ...]) -> None:
    joined = JoinedImages([open_dataset(spec).train for spec in data])
    some = joined.some(10, seed=1)
    assert len(some) == len(some.labels) == len(some.sets) == 10
    assert torch.equal(some.pixels, joined.some(10, seed=1).pixels)
    assert joined.some(0, seed=1) is joined
    twice = joined.with_pixels(torch.zeros(2 * len(joined), 5), times=2)
    assert torch.equal(twice.labels, joined.labels.repeat(2))


def test_joined_sets_keep_their_groups(data: tuple[str, ...]) -> None:
    train = open_dataset(data[0]).train
    assert JoinedImages([train]).groups is None
    groups = np.array([f"patient {place // 4}" for place in range(len(train))])
    joined = JoinedImages([replace(train, groups=groups)])
    some = joined.some(10, seed=1)
    assert joined.groups is not None and some.groups is not None
    for place in range(10):
        (found,) = (joined.pixels == some.pixels[place]).all(dim=(1, 2, 3)).nonzero().tolist()
        assert some.groups[place] == joined.groups[found[0]]
    assert len(set(joined.groups.tolist())) == 24


def test_joined_sets_must_be_of_one_size() -> None:
    small = LabelledImages("small", "train", np.zeros((1, 8, 8), np.uint8), np.array([0]), ("a",))
    with pytest.raises(ValueError, match="different sizes"):
        JoinedImages([small, striped("grey", "train", 4, 0, True)])


def test_no_augmentation_changes_nothing() -> None:
    augment = Augmenter(("a", "b"), {"a": Augmentation(), "b": Augmentation(flip_vertical=1)})
    pixels = torch.randint(0, 256, (6, 28, 28, 3), dtype=torch.uint8)
    sets = torch.tensor([0, 1, 0, 1, 0, 1])
    changed = augment(pixels, sets)
    assert torch.allclose(changed[sets == 0], pixels[sets == 0].float(), atol=0.01)
    assert torch.allclose(changed[sets == 1], pixels[sets == 1].flip(1).float(), atol=0.01)


def test_augmentation_is_random_bounded_and_seeded() -> None:
    augment = Augmenter(("a",), {"a": Augmentation(180, 3, 0.2, 0.3, 0.5, 0.5, 0.5)})
    pixels = torch.randint(0, 256, (8, 28, 28, 3), dtype=torch.uint8)
    sets = torch.zeros(8, dtype=torch.int64)
    torch.manual_seed(1)
    first = augment(pixels, sets)
    second = augment(pixels, sets)
    torch.manual_seed(1)
    assert torch.equal(first, augment(pixels, sets))
    assert not torch.equal(first, second)
    assert first.shape == pixels.shape
    assert first.min() >= 0 and first.max() <= 255
