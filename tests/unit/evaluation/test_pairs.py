"""Pairs, their calibration and their scores."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pg_siamese.evaluation.pairs import (
    Calibration,
    balanced_pairs,
    best_threshold,
    calibrate,
    contrastive_loss,
    pair_distances,
    score_pairs,
)
from tests.support import Array
from tests.unit.evaluation.embeddings import embedded, vectors


def test_contrastive_loss_by_hand() -> None:
    # P(match) 0.8 for a match: p = 0.2, p² = 0.04. P(match) 0.6 for none: (1 - 0.4)² = 0.36.
    logit = np.log(np.array([0.8 / 0.2, 0.6 / 0.4]))
    assert contrastive_loss(logit, np.array([True, False])) == pytest.approx((0.04 + 0.36) / 2)
    # It is bounded, and finite, however sure and wrong the answer is.
    far = np.array([-1e6, 1e6])
    assert contrastive_loss(far, np.array([True, False])) == pytest.approx(1)
    assert contrastive_loss(far, np.array([False, True])) == pytest.approx(0)


def test_pair_scores_by_hand() -> None:
    # P(match) = sigmoid(2 - 4 d): 0.5 at the distance 0.5.
    calibration = Calibration(weight=-4, bias=2, threshold=0.4)
    apart = np.array([0.0, 0.45, 0.5, 1.0])
    match = np.array([True, True, False, False])
    scores = score_pairs(apart, match, calibration)
    assert scores.accuracy == 0.75  # 0.45 is beyond the threshold
    assert scores.auc == 1.0
    probability = 1 / (1 + np.exp(4 * apart - 2))
    right = np.where(match, probability, 1 - probability)
    assert scores.log_loss == pytest.approx(-np.log(right).mean())
    assert scores.contrastive_loss == pytest.approx(((1 - right) ** 2).mean())


def test_the_threshold_lies_between_the_pairs() -> None:
    apart = np.array([0.1, 0.2, 0.6, 0.8])
    assert best_threshold(apart, np.array([True, True, False, False])) == pytest.approx(0.4)
    # Where matching pairs are the farther ones, there is still one, and it is finite.
    assert math.isfinite(best_threshold(apart, np.array([False, False, True, True])))


def test_calibration_recovers_a_known_curve() -> None:
    random = np.random.default_rng(0)
    distances = random.uniform(0, 2, 40_000)
    match = random.random(40_000) < 1 / (1 + np.exp(6 * distances - 4))
    calibration = calibrate(distances, match)
    assert calibration.weight == pytest.approx(-6, rel=0.05)
    assert calibration.bias == pytest.approx(4, rel=0.05)
    assert 0.4 < calibration.threshold < 0.9
    score = score_pairs(distances, match, calibration)
    assert 0.7 < score.accuracy < 1
    assert 0 < score.log_loss < math.log(2)


def draw(labels: Array, sets: Array, count: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Draw pairs, and check what must hold of all."""
    first, second, match = balanced_pairs(labels, sets, count, seed)
    assert ((labels[first] == labels[second]) == match).all()
    assert (first != second).all()
    return first, second, match


def test_pairs_of_sets_are_half_and_half() -> None:
    sets = np.array([0] * 30 + [1] * 3)
    first, _, match = draw(sets, sets, 400)
    assert match.sum() == 200
    # A small set is drawn as often as a large one.
    assert 150 < (sets[first] == 0).sum() < 250


def test_pairs_are_half_and_half_and_of_both_kinds() -> None:
    sets = np.repeat([0, 1, 2], [50, 500, 20])
    labels = sets * 2 + np.random.default_rng(0).integers(0, 2, 570)
    first, second, match = draw(labels, sets, 4000, seed=3)
    assert match.mean() == 0.5
    assert np.bincount(sets[first]) / 4000 == pytest.approx([1 / 3] * 3, abs=0.03)
    assert (sets[first] == sets[second])[~match].mean() == 0.5
    again = balanced_pairs(labels, sets, 4000, seed=3)
    assert (again[0] == first).all() and (again[1] == second).all()


def test_matching_pairs_are_of_two_groups() -> None:
    random = np.random.default_rng(0)
    labels, groups = random.integers(0, 3, 60), random.integers(0, 12, 60)
    labels[0], groups[0] = 3, 20  # a class of one group
    labels[1], groups[1] = 3, 20
    sets = np.zeros(60, np.int64)
    first, second, match = balanced_pairs(labels, sets, 600, 0, groups)
    assert ((labels[first] == labels[second]) == match).all()
    assert (groups[first] != groups[second])[match].all()
    assert 3 not in labels[first][match] and 3 in labels[first][~match]
    # Each image for itself is the same as no groups.
    alone = balanced_pairs(labels, sets, 600, 0, np.arange(60))
    plain = balanced_pairs(labels, sets, 600, 0)
    assert all((one == other).all() for one, other in zip(alone, plain, strict=True))
    with pytest.raises(ValueError, match="no pair of one class among these images in two groups"):
        balanced_pairs(labels, sets, 10, 0, labels)


def test_pairs_of_one_set() -> None:
    draw(np.array([0, 0, 1, 1]), np.zeros(4, np.int64), 100)


@pytest.mark.parametrize(
    ("labels", "reason"), [([0, 0], "different classes"), ([0, 1], "of one class")]
)
def test_there_must_be_pairs_of_both_kinds(labels: list[int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        balanced_pairs(np.array(labels), np.zeros(2, np.int64), 10, seed=0)


def test_pairs_of_a_metric_are_measured_by_it() -> None:
    points = embedded(vectors((1, 0), (5, 0), (0, 1), (0, 5)), [0, 0, 1, 1])
    angles, match = pair_distances(points, 40, 0, "cosine")
    assert angles[match].max() == pytest.approx(0)
    lengths, match = pair_distances(points, 40, 0, "l2")
    assert lengths[match].tolist() == pytest.approx([4.0] * 20)
