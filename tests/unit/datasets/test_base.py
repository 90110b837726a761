"""What every data set comes as: splits, and labels of several sets in a row."""

from __future__ import annotations

import numpy as np

from pg_siamese.datasets import LabelledImages, hold_out, join_labels


def test_hold_out_is_stratified_disjoint_and_repeatable() -> None:
    images = np.arange(100, dtype=np.uint8)[:, None, None] + np.zeros((1, 2, 2), np.uint8)
    labels = np.repeat([0, 1], [80, 20])
    whole = LabelledImages("set", "train", images, labels, ("a", "b"))
    train, val = hold_out(whole, 10, seed=1)
    assert np.bincount(val.labels).tolist() == [8, 2]
    assert (train.split, val.split) == ("train", "val")
    seen = np.concatenate([train.images[:, 0, 0], val.images[:, 0, 0]])
    assert sorted(seen.tolist()) == list(range(100))
    again = hold_out(whole, 10, seed=1)[1]
    assert (again.images == val.images).all()


def test_labels_of_several_sets_are_numbered_through() -> None:
    pixels = np.zeros((3, 2, 2), np.uint8)
    parts = [
        LabelledImages("a", "train", pixels, np.array([1, 0, 1]), ("x", "y")),
        LabelledImages("b", "train", pixels[:2], np.array([0, 2]), ("x", "y", "z")),
    ]
    joined = join_labels(parts)
    assert joined.labels.tolist() == [1, 0, 1, 2, 4]
    assert joined.sets.tolist() == [0, 0, 0, 1, 1]
    assert joined.classes == ("a: x", "a: y", "b: x", "b: y", "b: z")
    assert joined.starts == (0, 2)
