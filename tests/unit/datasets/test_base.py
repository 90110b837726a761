"""What every data set comes as: splits, and labels of several sets in a row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pg_siamese.datasets import (
    DataFormatError,
    DataSplits,
    LabelledImages,
    hold_out,
    join_labels,
    split_at_random,
)


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


# --- groups --------------------------------------------------------------------------------------


def grouped(groups: list[str], split: str = "train") -> LabelledImages:
    count = len(groups)
    pixels = np.arange(count, dtype=np.uint8)[:, None, None] + np.zeros((1, 2, 2), np.uint8)
    return LabelledImages(
        "set",
        split,
        pixels,
        np.arange(count) % 2,
        ("a", "b"),
        groups=np.array(groups),
    )


def names(part: LabelledImages) -> list[str]:
    assert part.groups is not None
    return [str(group) for group in part.groups]


def test_groups_are_held_out_whole() -> None:
    patients = np.random.default_rng(0).integers(0, 40, 300)
    whole = grouped([f"patient {number}" for number in patients])
    for seed in range(5):
        opened = split_at_random(whole, seed)
        parts = (opened.train, opened.val, opened.test)
        held = [set(names(part)) for part in parts]
        assert set().union(*held) == set(names(whole))
        assert sum(map(len, held)) == len(set(names(whole)))
        assert [len(part) for part in parts] == pytest.approx([210, 45, 45], abs=25)
        for part in parts:  # about half of each class
            assert part.labels.mean() == pytest.approx(0.5, abs=0.12)
        again = split_at_random(whole, seed)
        assert (again.test.images == opened.test.images).all()
    first, second = (split_at_random(whole, seed) for seed in (0, 1))
    assert set(names(first.test)) != set(names(second.test))


def test_images_keep_their_groups() -> None:
    whole = grouped([str(place) for place in range(9)])
    assert names(whole.select([3, 1])) == ["3", "1"]
    train, val = hold_out(whole, 3, seed=0)
    for part in (train, val):
        assert names(part) == [str(number) for number in part.images[:, 0, 0]]


def test_too_few_groups_to_hold_one_out() -> None:
    with pytest.raises(DataFormatError, match="set: too few groups"):
        hold_out(grouped(["one"] * 10), 3, seed=0)
    with pytest.raises(DataFormatError, match="set: too few groups"):
        split_at_random(grouped(["one", "two"] * 10), seed=0)
    with pytest.raises(DataFormatError, match="too few groups or images"):
        hold_out(grouped(["one", "two"]), 1, seed=0)


def test_a_group_on_both_sides_is_refused() -> None:
    train = grouped(["p1", "p1", "p2", "p3", "p1"])
    val = grouped(["p4"], split="val")
    test = grouped(["p1", "p1", "p3", "p5"], split="test")
    message = (
        r'set: group "p1" is in train \(3 images\) and in test \(2 images\), groups in both: 2$'
    )
    with pytest.raises(DataFormatError, match=message):
        DataSplits(train, val, test)
    DataSplits(train, val, test.select([3]))
    without = replace(test.select([3]), groups=None)
    with pytest.raises(DataFormatError, match="set: split train has groups, but test has none"):
        DataSplits(train, val, without)


def test_groups_must_fit_the_images() -> None:
    with pytest.raises(DataFormatError, match=r"2 images, but groups of shape \(3,\)"):
        replace(grouped(["a", "b"]), groups=np.array(["a", "b", "c"]))


def test_groups_of_several_sets_are_numbered_through() -> None:
    one = grouped(["x", "y", "x"])
    other = replace(grouped(["x", "x"]), name="other")
    single = replace(other, groups=None)

    def numbers(*parts: LabelledImages) -> list[int]:
        groups = join_labels(parts).groups
        assert groups is not None
        return [int(number) for number in groups]

    x, y, again, *others = numbers(one, other)
    assert x == again and others[0] == others[1]
    assert len({x, y, others[0]}) == 3, "another set's group of that name is another group"
    assert numbers(replace(one, split="test").select([2, 1])) == [x, y]
    assert numbers(one, single)[:3] == [x, y, x]
    alone = numbers(one, single)[3:] + numbers(one, replace(single, split="test"))[3:]
    assert len({x, y, *alone}) == 6
    assert join_labels([single, single]).groups is None
