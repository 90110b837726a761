"""Which images are drawn: for the batches of training, and as pairs for calibration."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import WeightedRandomSampler

Integers = npt.NDArray[np.int64]


def class_sampler(labels: Tensor, balance: float, seed: int) -> WeightedRandomSampler:
    """Draw as many images an epoch as there are, rare classes more often than their share.

    A class of n images is drawn in proportion to n ** (1 - balance): 0 leaves the data's own
    shares, 1 draws all classes equally often. In between, a class of 66 images among 4,000 is
    seen often enough and yet not learned by heart.
    """
    counts = torch.bincount(labels).double()
    weights = counts.clamp(min=1).pow(-balance)[labels]
    generator = torch.Generator().manual_seed(seed)
    return WeightedRandomSampler(weights.tolist(), len(labels), generator=generator)


def balanced_pairs(
    labels: Integers, sets: Integers, count: int, seed: int
) -> tuple[Integers, Integers, npt.NDArray[np.bool_]]:
    """Draw `count` pairs of images, half of which match (same label).

    The first image comes from each set equally often. Of the pairs that don't match, half are
    of one set (where there are other classes in it) and half of two sets (where there are other
    sets): so neither the easy nor the hard ones are all there is.

    `labels` (N,) are joined labels and `sets` (N,) set numbers. Returns first and second index
    (count,) and whether they match (count,).
    """
    random = np.random.default_rng(seed)
    shared = np.bincount(labels)[labels] > 1
    members = {int(s): np.flatnonzero(sets == s) for s in np.unique(sets)}
    paired = {s: found for s, i in members.items() if len(found := i[shared[i]])}
    if len(np.unique(labels)) < 2:
        raise ValueError("no pair of different classes among these images")
    if not paired:
        raise ValueError("no pair of one class among these images")
    first = np.empty(count, np.int64)
    second = np.empty(count, np.int64)
    match = np.arange(count) % 2 == 0
    for i in range(count):
        anchors = paired if match[i] else members
        anchor = int(random.choice(anchors[int(random.choice(list(anchors)))]))
        same_set, same_label = sets == sets[anchor], labels == labels[anchor]
        if match[i]:
            pool = same_label
            pool[anchor] = False
        else:
            pool = same_set & ~same_label if i % 4 == 1 else ~same_set
            if not pool.any():
                pool = ~same_label
        first[i], second[i] = anchor, random.choice(np.flatnonzero(pool))
    return first, second, match
