"""Which images are drawn for the batches of training: seeded, and again for each epoch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils import common_functions
from torch import Tensor
from torch.utils.data import Sampler, WeightedRandomSampler

from pg_siamese.datasets import DataFormatError
from pg_siamese.training.experiments import ExperimentError
from pg_siamese.training.experiments.settings import Sampling

Integers = npt.NDArray[np.int64]


def class_sampler(
    labels: Tensor, balance: float, seed: int, count: int = 0, shares: Tensor | None = None
) -> WeightedRandomSampler:
    """Draw as many images as there are (or ``count``), rare classes more often than their share.

    A class of n images is drawn in proportion to n ** (1 - balance): 0 leaves the data's own
    shares, 1 draws all classes equally often. In between, a class of 66 images among 4,000 is
    seen often enough and yet not learned by heart. ``shares`` multiply it, for each image.
    """
    counts = torch.bincount(labels).double()
    weights = counts.clamp(min=1).pow(-balance)[labels]
    if shares is not None:
        weights = weights * shares
    generator = torch.Generator().manual_seed(seed)
    return WeightedRandomSampler(weights.tolist(), count or len(labels), generator=generator)


class _Members:
    """The images of each class, to draw from without a loop."""

    def __init__(self, labels: Integers) -> None:
        self.order = np.argsort(labels, kind="stable")
        self.counts = np.bincount(labels)
        self.starts = np.cumsum(self.counts) - self.counts
        self.known = np.flatnonzero(self.counts)
        self.paired = np.flatnonzero(self.counts > 1)
        if len(self.known) < 2:
            raise DataFormatError("no pair of different labels among these images")
        if not len(self.paired):
            raise DataFormatError("no two images of one label among these images")

    def one(self, labels: Integers, random: np.random.Generator) -> Integers:
        """Draw one image of each label."""
        chosen: Integers = self.order[self.starts[labels] + random.integers(0, self.counts[labels])]
        return chosen

    def two(self, labels: Integers, random: np.random.Generator) -> tuple[Integers, Integers]:
        """Draw two different images of each label."""
        count = self.counts[labels]
        first = random.integers(0, count)
        second = (first + random.integers(1, count)) % count
        start = self.starts[labels]
        return self.order[start + first], self.order[start + second]

    def other(self, labels: Integers, random: np.random.Generator) -> Integers:
        """Draw a label that is another one, for each."""
        place = np.searchsorted(self.known, labels)
        step = random.integers(1, len(self.known), len(labels))
        others: Integers = self.known[(place + step) % len(self.known)]
        return others


def draw_pairs(labels: Integers, count: int, seed: int) -> tuple[Integers, Integers]:
    """Draw ``count`` pairs of images in random order, half of which match (same label).

    Labels are drawn uniformly, so that rare ones count as much as others. One with a single image
    is only in pairs that don't match.

    Returns:
        First and second index, each (count,).

    Raises:
        DataFormatError: there is no pair of one kind.
    """
    random = np.random.default_rng(seed)
    members = _Members(labels)
    match = random.permutation(np.arange(count) % 2 == 0)
    first, second = np.empty(count, np.int64), np.empty(count, np.int64)
    same = random.choice(members.paired, int(match.sum()))
    first[match], second[match] = members.two(same, random)
    label = random.choice(members.known, count - len(same))
    first[~match] = members.one(label, random)
    second[~match] = members.one(members.other(label, random), random)
    return first, second


def draw_triplets(labels: Integers, count: int, seed: int) -> tuple[Integers, Integers, Integers]:
    """Draw ``count`` triplets: anchor, positive (same label), negative (another one).

    Labels are drawn uniformly among those with two images.

    Returns:
        Three indices, each (count,).

    Raises:
        DataFormatError: there is no such triplet.
    """
    random = np.random.default_rng(seed)
    members = _Members(labels)
    same = random.choice(members.paired, count)
    anchor, positive = members.two(same, random)
    return anchor, positive, members.one(members.other(same, random), random)


class Batches(Sampler[list[int]]):
    """Draws the batches of an epoch, each a list of image numbers in the objective's order.

    Every epoch has a draw of its own, which depends on ``seed`` and the epoch's number alone. So a
    run that continues from a checkpoint draws what it would have drawn.

    ``images`` is how many an epoch has, by default as many as there are labels. ``shares`` is how
    much each image counts among the classes (see ``Sampling``).

    Raises:
        ExperimentError: the objective takes another kind, or there are too few images.
    """

    def __init__(
        self,
        labels: Tensor,
        sampling: Sampling,
        batch_size: int,
        takes: str,
        seed: int,
        images: int | None = None,
        shares: Tensor | None = None,
    ) -> None:
        kinds = {"classes": ("classes", "per_class")}.get(takes, (takes,))
        if sampling.kind not in kinds:
            raise ExperimentError(
                f'the objective takes sampling.kind {" or ".join(kinds)}, not "{sampling.kind}"'
            )
        self.labels = labels
        self.shares = shares
        self.sampling = sampling
        self.seed = seed
        self.epoch = 0
        self.width = {"pairs": 2, "triplets": 3}.get(sampling.kind, 1)
        self.count = sampling.per_epoch or images or len(labels)
        self.batch_size = min(batch_size, self.count)
        if sampling.kind == "per_class":
            self.batch_size -= self.batch_size % sampling.per_class
            most = sampling.per_class * len(torch.unique(labels))
            self.batch_size = min(self.batch_size, most)
        if self.batch_size < 1:
            raise ExperimentError(f"{self.count} images are too few for a batch")

    def __len__(self) -> int:
        return self.count // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Draw for this epoch from now on. Lightning calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        rows = self._draw()
        for number in range(len(self)):
            part = rows[:, number * self.batch_size : (number + 1) * self.batch_size]
            yield part.reshape(-1).tolist()

    def _draw(self) -> Integers:
        """Return image numbers (1, 2 or 3, count): single images, pairs or triplets."""
        seed = int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)[0])
        labels = self.labels.numpy()
        if self.sampling.kind == "pairs":
            return np.stack(draw_pairs(labels, self.count, seed))
        if self.sampling.kind == "triplets":
            return np.stack(draw_triplets(labels, self.count, seed))
        if self.sampling.kind == "per_class":
            # The library's own generator, which it has no other way to seed.
            common_functions.NUMPY_RANDOM = np.random.RandomState(seed)
            chosen = MPerClassSampler(
                labels, self.sampling.per_class, self.batch_size, max(self.count, self.batch_size)
            )
            return np.array(list(chosen), np.int64)[None]
        drawn = class_sampler(self.labels, self.sampling.balance, seed, self.count, self.shares)
        return np.array(list(drawn), np.int64)[None]
