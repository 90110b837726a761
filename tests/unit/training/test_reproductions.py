"""Networks and objectives of the systems that are reproduced."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pg_siamese.training.experiments import ExperimentError
from pg_siamese.training.registry import build_network, build_objective
from pg_siamese.training.reproductions.pairs import distance

# Two pairs: one of label 0 at distance 3, one of labels 0 and 1 at distance 1.
PAIRS = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
PAIR_LABELS = torch.tensor([0, 0, 0, 1])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_siamese_cnn_is_the_original_one() -> None:
    encoder: Any = build_network("siamese_cnn", 16, (28, 28), {})
    assert sum(p.numel() for p in encoder.parameters()) == 6 + 304 + 1616 + 256 * 16 + 16
    with pytest.raises(ExperimentError, match="too small"):
        build_network("siamese_cnn", 16, (12, 12), {})


def with_head(name: str) -> Any:
    """An objective whose head is 2 x - 1."""
    objective: Any = build_objective(name, 2, 2, "l2", {})
    with torch.no_grad():
        objective.head.weight.fill_(2.0)
        objective.head.bias.fill_(-1.0)
    return objective


def test_contrastive_loss_on_the_sigmoid_by_hand() -> None:
    objective = with_head("contrastive_sigmoid")
    outcome = objective(PAIRS, PAIR_LABELS)
    same, other = sigmoid(2 * 3 - 1), sigmoid(2 * 1 - 1)
    assert outcome.loss.item() == pytest.approx((same**2 + (1 - other) ** 2) / 2, rel=1e-5)
    assert float(outcome.accuracy) == 0.5  # the first pair is taken for different, wrongly
    assert objective.calibration() == (-2.0, 1.0)


def test_pair_cross_entropy_by_hand() -> None:
    outcome = with_head("pair_cross_entropy")(PAIRS, PAIR_LABELS)
    expected = -(math.log(1 - sigmoid(5)) + math.log(sigmoid(1))) / 2
    assert outcome.loss.item() == pytest.approx(expected, rel=1e-5)


def test_hadsell_loss_by_hand() -> None:
    objective: Any = build_objective("contrastive_hadsell", 2, 2, "l2", {"margin": 4.0})
    outcome = objective(PAIRS, PAIR_LABELS)
    assert outcome.loss.item() == pytest.approx((0.5 * 3**2 + 0.5 * (4 - 1) ** 2) / 2, rel=1e-5)
    assert float(outcome.accuracy) == 0  # the matching pair is beyond half the margin
    assert objective.calibration() is None
    options = {"margin": 4.0, "angular": 1.0}
    angular: Any = build_objective("contrastive_hadsell", 2, 2, "l2", options)
    # Two classes: one to the right, one to the left. Points at the origin have no direction, the
    # third is right of it and of label 0, the fourth above it.
    sure = math.log(1 + math.exp(-60))
    expected = outcome.loss.item() + (math.log(2) * 3 + sure) / 4
    assert angular(PAIRS, PAIR_LABELS).loss.item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ExperimentError, match="two dimensions, not 3"):
        build_objective("contrastive_hadsell", 3, 2, "l2", {"angular": 1.0})


def test_hadsell_directions_lie_in_the_order_that_is_told() -> None:
    options = {"angular": 1.0, "order": [2, 0, 3, 1]}
    objective: Any = build_objective("contrastive_hadsell", 2, 4, "l2", options)
    expected = [[0, 1], [0, -1], [1, 0], [-1, 0]]  # class 2 first, to the right, then class 0
    assert np.allclose(objective.directions, expected, atol=1e-6)
    with pytest.raises(ExperimentError, match="each of the 4 classes once"):
        build_objective("contrastive_hadsell", 2, 4, "l2", {"angular": 1.0, "order": [0, 1, 2, 2]})


def test_triplet_loss_by_hand() -> None:
    vectors = torch.tensor([[0.0, 0.0], [0.0, 3.0], [2.0, 0.0]])  # anchor, positive, negative
    objective: Any = build_objective("triplet", 2, 2, "l2", {"margin": 0.5})
    assert objective.takes == "triplets"
    outcome = objective(vectors, torch.tensor([0, 0, 1]))
    assert outcome.loss.item() == pytest.approx(3 - 2 + 0.5, rel=1e-5)
    assert float(outcome.accuracy) == 0
    unit = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    cosine: Any = build_objective("triplet", 2, 2, "cosine", {"margin": 0.5})
    assert float(cosine(unit, torch.tensor([0, 0, 1])).loss) == pytest.approx(1.5, rel=1e-5)


def test_mined_triplets_and_none_of_them() -> None:
    objective: Any = build_objective("triplet", 2, 2, "l2", {"margin": 0.5, "mining": "hard"})
    assert objective.takes == "classes"
    vectors = torch.tensor([[0.0, 0.0], [0.0, 3.0], [2.0, 0.0]], requires_grad=True)
    assert objective(vectors, torch.tensor([0, 0, 1])).loss.item() > 0
    outcome = objective(vectors, torch.tensor([0, 1, 2]))
    assert outcome.loss.item() == 0
    outcome.loss.backward()


def test_equal_images_have_a_finite_gradient() -> None:
    vectors = torch.ones((2, 3), requires_grad=True)
    torch.autograd.backward(distance(vectors[:1], vectors[1:], "l2").sum())
    assert vectors.grad is not None and torch.isfinite(vectors.grad).all()
