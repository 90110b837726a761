"""Networks, objectives, samplers and experiment files, each by itself."""

# ruff: noqa: E402 - what is imported below needs what is skipped over above

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pytorch_metric_learning")
pytest.importorskip("efficientnet_lite_pytorch")

from pg_siamese.datasets import DataFormatError
from pg_siamese.training.experiments import (
    ExperimentError,
    Sampling,
    experiment_names,
    load_experiment,
)
from pg_siamese.training.learner import sets_of
from pg_siamese.training.networks import NETWORKS, build_network
from pg_siamese.training.objectives import OBJECTIVES, build_objective
from pg_siamese.training.objectives.base import distance
from pg_siamese.training.sampling import Batches, draw_pairs, draw_triplets

NAMES = (
    "cifar10_8d",
    "cifar10_8d_improved",
    "fashion_mnist",
    "folder",
    "folder_pretrained",
    "imagenette_pretrained",
    "imagenette_scratch",
    "medical",
    "medmnist_siamese",
    "medmnist_siamese_128",
    "mnist_2d",
)

# --- experiments ------------------------------------------------------------------------------


def test_the_experiments_are_there() -> None:
    assert tuple(experiment_names()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_can_be_built(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.name == name
    assert experiment.labels == "class" or len(experiment.data) > 1
    size = (experiment.input.height, experiment.input.width)
    network = experiment.network
    encoder: Any = build_network(network.name, network.dimension, size, network.options)
    objective: Any = build_objective(
        experiment.objective.name,
        network.dimension,
        10,
        experiment.metric,
        experiment.objective.options,
    )
    labels = torch.arange(200) % 10
    Batches(labels, experiment.sampling, experiment.batch_size, objective.takes, seed=0)
    with torch.inference_mode():
        embedding = encoder.eval()(torch.zeros((2, *size, 3), dtype=torch.uint8))
    assert embedding.shape == (2, network.dimension)
    assert embedding.dtype == torch.float32


# --- networks ---------------------------------------------------------------------------------


def test_ensemble_is_one_unit_vector_of_shares() -> None:
    options: dict[str, Any] = {"residuals": 2, "width": 4, "lite_blocks": 2}
    options |= {"set_dimension": 4, "set_share": 0.25, "lite_share": 0.5}
    encoder: Any = build_network("ensemble", 16, (28, 28), options).eval()
    with torch.inference_mode():
        vectors = encoder(torch.randint(0, 256, (5, 28, 28, 3), dtype=torch.uint8))
    squares = [part.square().sum(dim=1) for part in vectors.split([4, 4, 4, 4], dim=1)]
    for square, share in zip(squares, [0.25, 0.3, 0.3, 0.15], strict=True):
        torch.testing.assert_close(square, torch.full((5,), share))


def test_share_of_the_pretrained_member_by_data_set() -> None:
    options: dict[str, Any] = {"width": 4, "lites": 2, "lite_blocks": 2, "set_dimension": 3}
    options |= {"lite_share": {"b": 2.0, "c": 0.5, "elsewhere": 9.0}}
    encoder: Any = build_network("ensemble", 15, (28, 28), options, ("a", "b")).eval()
    sure = 1e3 * torch.eye(3)
    parts = torch.nn.functional.normalize(torch.randn(3, 3, 4), dim=2)
    vectors = encoder._joined(sure, parts.flatten(1))
    torch.testing.assert_close(vectors.square().sum(dim=1), torch.ones(3))
    lites = vectors[:, -8:].square().sum(dim=1)
    torch.testing.assert_close(lites, 0.5 * torch.tensor([2 / 3, 4 / 5, 2 / 3]))


def test_members_of_an_ensemble_learn_from_rows_of_their_own() -> None:
    """In training a row of the batch changes one member, and is judged by that one alone."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"width": 4, "lites": 2, "lite_blocks": 2, "lite_frozen": 1}
    options |= {"set_dimension": 4, "lite_rows": 0.75}
    encoder: Any = build_network("ensemble", 16, (28, 28), options).train()
    objective: Any = build_objective(
        "cosface_parts", 16, 3, "cosine", {"members": 3, "set_dimension": 4}, [0, 0, 1]
    )
    vectors = encoder(torch.randint(0, 256, (10, 28, 28, 3), dtype=torch.uint8))
    filled = vectors[:, 4:].reshape(10, 3, 4).any(dim=2)
    owner = torch.tensor([0] * 4 + [1] * 3 + [2] * 3)
    assert torch.equal(filled, owner[:, None] == torch.arange(3))
    labels = torch.arange(10) % 3
    outcome = objective(vectors, labels)
    parts = vectors.split([4, 4, 4, 4], dim=1)
    expected = sum(
        objective.losses[n](parts[n + 1][owner == n], labels[owner == n]) for n in range(3)
    )
    chances = torch.nn.functional.normalize(parts[0], p=1, dim=1)
    sets = torch.tensor([0, 0, 1])[labels]
    expected = expected + torch.nn.functional.nll_loss(chances.log(), sets)
    torch.testing.assert_close(outcome.loss, expected)
    with pytest.raises(ValueError, match="a batch of 2 is too small for 3 members"):
        encoder(torch.zeros((2, 28, 28, 3), dtype=torch.uint8))


@pytest.mark.parametrize(
    ("dimension", "options", "message"),
    [
        (16, {"set_dimension": 5}, "cannot be shared by 2 members"),
        (16, {"set_dimension": 16}, "cannot be shared"),
        (16, {"set_dimension": 0}, "cannot be shared"),
        (16, {"set_dimension": 4, "set_share": 1.0}, "set_share"),
        (16, {"set_dimension": 4, "lite_blocks": 17}, "there are 16"),
        (16, {"set_dimension": 4, "lite_blocks": 2, "lite_frozen": 3}, "there are 2"),
        (16, {"set_dimension": 4, "lites": 0}, "lites is 0"),
        (16, {"set_dimension": 4, "lite_rows": 0}, "lite_rows is 0"),
        (16, {"set_dimension": 4, "lite_share": 0}, "lite_share is 0"),
    ],
)
def test_ensembles_that_cannot_be(dimension: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        build_network("ensemble", dimension, (28, 28), options)


def test_parts_are_judged_by_sets_and_classes() -> None:
    """The first part by the set, the others by the class; none by what is not its own."""
    torch.manual_seed(0)
    build: Any = build_objective(
        "cosface_parts", 12, 3, "cosine", {"members": 2, "set_dimension": 4}, [0, 0, 1]
    )
    logits = torch.randn(6, 4)
    softmax = 0.7 * torch.nn.functional.normalize(logits.softmax(dim=1), dim=1)
    vectors = torch.cat([softmax, torch.randn(6, 8)], dim=1)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    swapped = torch.tensor([1, 0, 2, 1, 0, 2])  # other classes of the same sets
    parts = vectors.split([4, 4, 4], dim=1)
    sets = torch.tensor([0, 0, 1, 0, 0, 1])
    expected = torch.nn.functional.cross_entropy(logits, sets) + sum(
        build.losses[place](parts[place + 1], labels) for place in (0, 1)
    )
    torch.testing.assert_close(build(vectors, labels).loss, expected)
    assert not torch.isclose(build(vectors, swapped).loss, expected)


def test_more_sets_than_their_part_has_room_for() -> None:
    with pytest.raises(ExperimentError, match="there are 3 data sets"):
        build_objective("cosface_parts", 12, 3, "cosine", {"set_dimension": 2}, [0, 1, 2])


def test_frozen_blocks_stay_as_they_are() -> None:
    options = {"width": 4, "lite_blocks": 3, "lite_frozen": 2, "set_dimension": 4, "lites": 2}
    encoder: Any = build_network("ensemble", 16, (28, 28), options).train()
    before = {name: value.clone() for name, value in encoder.lite.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=1.0)
    encoder(torch.randint(0, 256, (4, 28, 28, 3), dtype=torch.uint8)).sum().backward()
    optimiser.step()
    changed = {
        ".".join(name.split(".")[:3])
        for name, value in encoder.lite.state_dict().items()
        if not torch.equal(value, before[name])
    }
    # The stem, its norm and blocks 0 and 1 are frozen; each branch has a block 2 of its own.
    assert changed == {"branches.0.0", "branches.1.0"}


def test_sets_of_classes() -> None:
    names = ("a", "a: b", "c")
    assert sets_of(names, ("a: x", "a: b: x", "c: b", "a: y")) == [0, 1, 2, 0]
    assert sets_of(names, names) == [0, 1, 2]


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"siamese_cnn", "conv5"}))
def test_networks_for_cosine_give_unit_vectors(name: str) -> None:
    encoder: Any = build_network(name, 12, (64, 64), {}).eval()
    with torch.inference_mode():
        vectors = encoder(torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8))
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)


def test_siamese_cnn_is_the_original_one() -> None:
    encoder: Any = build_network("siamese_cnn", 16, (28, 28), {})
    assert sum(p.numel() for p in encoder.parameters()) == 6 + 304 + 1616 + 256 * 16 + 16
    with pytest.raises(ExperimentError, match="too small"):
        build_network("siamese_cnn", 16, (12, 12), {})


def test_a_frozen_network_learns_in_its_projection_only() -> None:
    encoder: Any = build_network("efficientnet_lite0", 8, (64, 64), {}).train()
    learning = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert learning == ["projection.weight", "projection.bias"]
    assert not encoder.network.training
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    encoder.eval()
    assert torch.allclose(encoder.head(encoder.features(pixels)), encoder(pixels))


def test_unknown_networks_and_options() -> None:
    with pytest.raises(ExperimentError, match='no network "x"; there are: siamese_cnn'):
        build_network("x", 2, (28, 28), {})
    with pytest.raises(ExperimentError, match='"conv5" has no option "depth"; there are: channels'):
        build_network("conv5", 2, (28, 28), {"depth": 3})


# --- objectives -------------------------------------------------------------------------------

# Two pairs: one of label 0 at distance 3, one of labels 0 and 1 at distance 1.
PAIRS = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
PAIR_LABELS = torch.tensor([0, 0, 0, 1])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_contrastive_loss_on_the_sigmoid_by_hand() -> None:
    objective: Any = build_objective("contrastive_sigmoid", 2, 2, "l2", {})
    with torch.no_grad():
        objective.head.weight.fill_(2.0)
        objective.head.bias.fill_(-1.0)
    outcome = objective(PAIRS, PAIR_LABELS)
    same, other = sigmoid(2 * 3 - 1), sigmoid(2 * 1 - 1)
    assert outcome.loss.item() == pytest.approx((same**2 + (1 - other) ** 2) / 2, rel=1e-5)
    assert float(outcome.accuracy) == 0.5  # the first pair is taken for different, wrongly
    assert objective.calibration() == (-2.0, 1.0)


def test_pair_cross_entropy_by_hand() -> None:
    objective: Any = build_objective("pair_cross_entropy", 2, 2, "l2", {})
    with torch.no_grad():
        objective.head.weight.fill_(2.0)
        objective.head.bias.fill_(-1.0)
    outcome = objective(PAIRS, PAIR_LABELS)
    expected = -(math.log(1 - sigmoid(5)) + math.log(sigmoid(1))) / 2
    assert outcome.loss.item() == pytest.approx(expected, rel=1e-5)


def test_hadsell_loss_by_hand() -> None:
    objective: Any = build_objective("contrastive_hadsell", 2, 2, "l2", {"margin": 4.0})
    outcome = objective(PAIRS, PAIR_LABELS)
    assert outcome.loss.item() == pytest.approx((0.5 * 3**2 + 0.5 * (4 - 1) ** 2) / 2, rel=1e-5)
    assert float(outcome.accuracy) == 0  # the matching pair is beyond half the margin
    assert objective.calibration() is None
    angular: Any = build_objective(
        "contrastive_hadsell", 2, 2, "l2", {"margin": 4.0, "angular": 1.0}
    )
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


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_learn(name: str) -> None:
    torch.manual_seed(0)
    objective: Any = build_objective(name, 4, 3, "cosine", {})
    labels = torch.arange(12) % 3
    if objective.takes == "pairs":
        labels = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 1, 2, 2, 0])
    if objective.takes == "triplets":
        labels = torch.tensor([0, 1, 2, 0, 0, 1, 2, 0, 1, 2, 0, 2])
    vectors = torch.nn.Parameter(torch.randn(12, 4))
    optimiser = torch.optim.Adam([vectors, *objective.parameters()], lr=0.1)
    losses = []
    for _ in range(30):
        # The first part of one of them is a softmax.
        given = vectors.abs() if name == "cosface_parts" else vectors
        outcome = objective(torch.nn.functional.normalize(given, dim=1), labels)
        optimiser.zero_grad()
        outcome.loss.backward()
        optimiser.step()
        losses.append(outcome.loss.item())
    assert losses[-1] < losses[0]


def test_equal_images_have_a_finite_gradient() -> None:
    vectors = torch.ones((2, 3), requires_grad=True)
    torch.autograd.backward(distance(vectors[:1], vectors[1:], "l2").sum())
    assert vectors.grad is not None and torch.isfinite(vectors.grad).all()


# --- samplers ---------------------------------------------------------------------------------

LABELS = np.array([0] * 50 + [1] * 5 + [2])  # the last class has one image


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


@pytest.mark.parametrize(
    ("kind", "takes", "width"),
    [("classes", "classes", 1), ("pairs", "pairs", 2), ("triplets", "triplets", 3)],
)
def test_batches_are_seeded_and_new_in_each_epoch(kind: str, takes: str, width: int) -> None:
    batches = Batches(torch.from_numpy(LABELS), Sampling(kind=kind), 16, takes, seed=3)
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
