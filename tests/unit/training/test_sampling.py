"""Which images are drawn for a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pg_siamese.datasets import DataFormatError
from pg_siamese.training.experiments import ExperimentError
from pg_siamese.training.experiments.settings import Sampling
from pg_siamese.training.sampling import Batches, class_sampler, draw_pairs, draw_triplets

LABELS = np.array([0] * 50 + [1] * 5 + [2])  # the last class has one image


@pytest.mark.parametrize(("balance", "share"), [(0.0, 0.1), (1.0, 0.5), (0.5, 0.25)])
def test_sampler_draws_rare_classes_as_often_as_told(balance: float, share: float) -> None:
    labels = torch.cat([torch.zeros(9000), torch.ones(1000)]).long()
    drawn = labels[list(class_sampler(labels, balance, seed=0))]
    assert len(drawn) == 10_000
    assert drawn.float().mean() == pytest.approx(share, abs=0.02)
    assert list(class_sampler(labels, balance, 0)) == list(class_sampler(labels, balance, 0))


def test_shares_of_data_sets_multiply_what_is_drawn() -> None:
    labels = torch.cat([torch.zeros(600), torch.ones(400)]).long()
    shares = torch.where(labels == 0, 0.5, 1.0)
    batches = Batches(labels, Sampling(per_epoch=10_000), 100, "classes", 0, shares=shares)
    drawn = labels[[row for batch in batches for row in batch]]
    assert drawn.float().mean() == pytest.approx(400 / 700, abs=0.02)


def test_drawn_pairs_are_half_and_half() -> None:
    first, second = draw_pairs(LABELS, 2000, seed=1)
    match = LABELS[first] == LABELS[second]
    assert match.sum() == 1000
    assert (first != second).all()
    assert 2 not in LABELS[first[match]]
    assert 2 in LABELS[first[~match]]
    # Rare classes count as much as others.
    assert (LABELS[first[match]] == 1).mean() == pytest.approx(0.5, abs=0.05)
    again = draw_pairs(LABELS, 2000, seed=1)
    assert (again[0] == first).all() and (again[1] == second).all()
    assert (draw_pairs(LABELS, 2000, seed=2)[0] != first).any()


def test_drawn_triplets() -> None:
    anchor, positive, negative = draw_triplets(LABELS, 500, seed=1)
    assert (LABELS[anchor] == LABELS[positive]).all()
    assert (anchor != positive).all()
    assert (LABELS[anchor] != LABELS[negative]).all()
    assert 2 in LABELS[negative]


def test_images_without_pairs_are_refused() -> None:
    with pytest.raises(DataFormatError, match="no two images of one label"):
        draw_pairs(np.arange(4), 10, seed=0)
    with pytest.raises(DataFormatError, match="no pair of different labels"):
        draw_triplets(np.zeros(4, np.int64), 10, seed=0)


@pytest.mark.parametrize(("kind", "width"), [("classes", 1), ("pairs", 2), ("triplets", 3)])
def test_batches_are_seeded_and_new_in_each_epoch(kind: str, width: int) -> None:
    batches = Batches(torch.from_numpy(LABELS), Sampling(kind=kind), 16, kind, seed=3)
    first = list(batches)
    assert len(first) == len(batches) == 3
    assert all(len(batch) == 16 * width for batch in first)
    assert list(batches) == first
    batches.set_epoch(1)
    assert list(batches) != first


def test_batches_with_as_many_of_each_class() -> None:
    labels = torch.arange(40) % 4
    batches = Batches(labels, Sampling(kind="per_class", per_class=3), 8, "classes", seed=3)
    first = list(batches)
    assert first and all(len(batch) == 6 for batch in first)
    for batch in first:
        assert sorted(torch.bincount(labels[batch], minlength=4).tolist()) == [0, 0, 3, 3]
    assert list(batches) == first


def test_a_sampler_that_the_objective_does_not_take() -> None:
    with pytest.raises(ExperimentError, match=r'takes sampling\.kind pairs, not "classes"'):
        Batches(torch.zeros(4).long(), Sampling(), 2, "pairs", seed=0)
