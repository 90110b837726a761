"""Labelled images in splits, which every data set comes as, and splitting what has none."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pg_siamese_server.errors import counted

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Groups = npt.NDArray[np.str_]

SPLITS = ("train", "val", "test")
# What is held out if a data set has no such split.
VAL_SHARE = 0.15
TEST_SHARE = 0.15
# From this many images on, every class has a pair in each part.
PAIR_FROM = 8


class DataNotFoundError(FileNotFoundError):
    """A data set is in none of its folders and can't be downloaded."""


class DataFormatError(ValueError):
    """A data file isn't what it should be: the message names the file and the fault."""


@dataclass(frozen=True)
class LabelledImages:
    """One split of one data set.

    Attributes:
        name: the data set's name.
        split: ``train``, ``val`` or ``test``.
        images: uint8 (N, H, W) for grey and (N, H, W, 3) for RGB images.
        labels: int64 (N,), each an index into ``classes``.
        classes: names of the classes.
        files: the files it was read from.
        groups: text (N,), what each image belongs to, such as its patient. None if not known.

    Raises:
        DataFormatError: shapes, types or label numbers don't fit together.
    """

    name: str
    split: str
    images: Pixels
    labels: Labels
    classes: tuple[str, ...]
    files: tuple[Path, ...] = ()
    groups: Groups | None = None

    def __post_init__(self) -> None:
        where = f"{self.name} ({self.split})"
        if self.images.dtype != np.uint8:
            raise DataFormatError(f"{where}: images are {self.images.dtype}, not uint8")
        if self.images.ndim not in (3, 4) or (self.images.ndim == 4 and self.images.shape[3] != 3):
            raise DataFormatError(
                f"{where}: images have shape {self.images.shape}, not (N, H, W) or (N, H, W, 3)"
            )
        if self.labels.shape != (len(self.images),):
            raise DataFormatError(
                f"{where}: {len(self.images)} images, but labels of shape {self.labels.shape}"
            )
        if self.groups is not None and self.groups.shape != (len(self.images),):
            raise DataFormatError(
                f"{where}: {len(self.images)} images, but groups of shape {self.groups.shape}"
            )
        if len(self.labels) and not (
            int(self.labels.min()) >= 0 and int(self.labels.max()) < len(self.classes)
        ):
            raise DataFormatError(
                f"{where}: labels run from {self.labels.min()} to {self.labels.max()}, "
                f"but there are {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.images)

    def rgb(self) -> Pixels:
        """Return the images as uint8 (N, H, W, 3), grey ones replicated to three channels."""
        if self.images.ndim == 4:
            return self.images
        return np.repeat(self.images[..., None], 3, axis=3)

    def class_of(self, index: int) -> str:
        """Return the class name of one image."""
        return self.classes[int(self.labels[index])]

    def select(self, indices: Sequence[int] | npt.NDArray[Any] | slice) -> LabelledImages:
        """Return the images at ``indices`` (numbers, a mask or a slice), in that order."""
        chosen: Any = indices if isinstance(indices, slice) else np.asarray(indices)
        groups = None if self.groups is None else self.groups[chosen]
        return replace(self, images=self.images[chosen], labels=self.labels[chosen], groups=groups)


@dataclass(frozen=True)
class JoinedLabels:
    """The labels of several data sets in a row.

    Attributes:
        labels: int64 (N,), each an index into ``classes``.
        sets: int64 (N,), the number of each image's data set.
        classes: "set: class" for every class of every set.
        starts: number of each set's first class.
        groups: int64 (N,), equal for images of one group of one set, in all splits, or None if no
            set has groups. An image of a set without groups is a group by itself.
    """

    labels: Labels
    sets: Labels
    classes: tuple[str, ...]
    starts: tuple[int, ...]
    groups: Labels | None = None


def join_labels(parts: Sequence[LabelledImages]) -> JoinedLabels:
    """Number the classes of several data sets through: "which class of which set"."""
    starts = [sum(len(before.classes) for before in parts[:place]) for place in range(len(parts))]
    return JoinedLabels(
        labels=np.concatenate([p.labels + start for p, start in zip(parts, starts, strict=True)]),
        sets=np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        classes=tuple(f"{part.name}: {name}" for part in parts for name in part.classes),
        starts=tuple(starts),
        groups=_join_groups(parts),
    )


def _join_groups(parts: Sequence[LabelledImages]) -> Labels | None:
    if all(part.groups is None for part in parts):
        return None
    joined = []
    for part in parts:
        names = part.groups
        if names is None:
            names = np.array([f"{part.split} {place}" for place in range(len(part))], np.str_)
        joined.append(np.char.add(f"{part.name}: ", names))
    unique, places = np.unique(np.concatenate(joined), return_inverse=True)
    # By their names alone, so that a group has the same number in each split.
    numbers = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in unique]
    return np.frombuffer(b"".join(numbers), np.int64)[places]


def sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class DataSplits:
    """The three splits of one data set.

    Attributes:
        train: the train split.
        val: the validation split.
        test: the test split.
        spec: the text that ``open_dataset`` opened it by.
        published: the splits stay as they are, even if they have groups in common.
        drawn: a seed decided which image is in which split.

    Raises:
        DataFormatError: a group is in two splits that are not published, or only some splits have
            groups.
    """

    train: LabelledImages
    val: LabelledImages
    test: LabelledImages
    spec: str = ""
    published: bool = False
    drawn: bool = False

    def __post_init__(self) -> None:
        for one, other in itertools.combinations((self.train, self.val, self.test), 2):
            _check_apart(one, other, self.published)

    def for_training(self) -> LabelledImages:
        """Return the train images that share no group with validation or test images."""
        if self.train.groups is None:
            return self.train
        held = [part.groups for part in (self.val, self.test) if part.groups is not None]
        shared = np.isin(self.train.groups, np.concatenate(held))
        return self.train.select(~shared) if shared.any() else self.train

    @property
    def has_groups(self) -> bool:
        """Whether it is known what its images belong to."""
        return self.train.groups is not None

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.train.name

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the splits were read from, each once."""
        parts = (self.train, self.val, self.test)
        return tuple(dict.fromkeys(file for part in parts for file in part.files))


def _check_apart(one: LabelledImages, other: LabelledImages, published: bool) -> None:
    """Refuse two splits with a group in common: figures would tell how well it is remembered."""
    if one.groups is None and other.groups is None:
        return
    if one.groups is None or other.groups is None:
        having, lacking = (other, one) if one.groups is None else (one, other)
        raise DataFormatError(
            f"{one.name}: split {having.split} has groups, but {lacking.split} has none"
        )
    shared = np.intersect1d(one.groups, other.groups)
    if len(shared) and not published:
        sides = [
            f"{part.split} ({counted(int((part.groups == shared[0]).sum()), 'image')})"
            for part in (one, other)
        ]
        raise DataFormatError(
            f'{one.name}: group "{shared[0]}" is in {" and in ".join(sides)}, '
            f"groups in both: {len(shared)}"
        )


def hold_out(
    images: LabelledImages, count: int, seed: int, *, split: str = "val"
) -> tuple[LabelledImages, LabelledImages]:
    """Split off some images as another part, stratified by class.

    For data sets without that split. The same seed gives the same parts. A class of at least
    ``PAIR_FROM`` images gives at least two. Images of one group stay together, so the share of each
    class is then only about that of the part.

    Args:
        images: what to split.
        count: about how many images to split off.
        seed: seed of the choice.
        split: name of the part.

    Returns:
        The rest, and the part that was held out.

    Raises:
        DataFormatError: there are groups, but not two, or no class of two images.
    """
    if images.groups is None:
        held = _drawn(images, count, seed)
    else:
        held = _drawn_groups(images, images.groups, count, seed)
    return images.select(~held), replace(images.select(held), split=split)


def _drawn(images: LabelledImages, count: int, seed: int) -> npt.NDArray[np.bool_]:
    random = np.random.default_rng(seed)
    share = count / max(len(images), 1)
    held = np.zeros(len(images), bool)
    for label in np.unique(images.labels):
        members = np.flatnonzero(images.labels == label)
        few = 2 if len(members) >= PAIR_FROM else 0
        held[random.permutation(members)[: max(round(share * len(members)), few)]] = True
    return held


def _drawn_groups(
    images: LabelledImages, groups: Groups, count: int, seed: int
) -> npt.NDArray[np.bool_]:
    """Draw whole groups, so that classes are held out in about equal shares."""
    try:
        from sklearn.model_selection import StratifiedGroupKFold
    except ImportError:
        raise DataFormatError(
            f"{images.name}: splitting by groups needs scikit-learn, which comes with the extra "
            "packages of pg_siamese[train]"
        ) from None
    # No more folds than groups, nor than images of the largest class.
    most = min(len(np.unique(groups)), int(np.bincount(images.labels).max()))
    if most < 2:
        raise DataFormatError(
            f"{images.name}: too few groups or images: none is left for the split that is held out"
        )
    folds = max(2, min(round(len(images) / max(count, 1)), most))
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class of few images can't be in every fold
        found = [held for _, held in parts.split(images.labels, images.labels, groups)]
    held = np.zeros(len(images), bool)
    held[min(found, key=lambda places: abs(len(places) - count))] = True
    return held


def split_at_random(images: LabelledImages, seed: int) -> DataSplits:
    """Split a data set without splits 70 / 15 / 15, stratified by class and seeded.

    Images of one group are in one split.

    Raises:
        DataFormatError: the groups can't be split so that there is something to train on.
    """
    whole = replace(images, split="train")
    count = len(images)
    rest, test = hold_out(whole, round(TEST_SHARE * count), seed, split="test")
    # A seed of its own: else the same places of each class would be drawn again.
    train, val = hold_out(rest, round(VAL_SHARE * count), seed + 1)
    if whole.groups is not None and len(np.unique(train.labels)) < 2 <= len(whole.classes):
        raise DataFormatError(
            f"{whole.name}: whole groups leave one class to train on; each class needs several"
        )
    return DataSplits(train, val, test, drawn=True)
