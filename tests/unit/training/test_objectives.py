"""The objectives of the shipped encoders, and what holds for all objectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pg_siamese.training.experiments import ExperimentError
from pg_siamese.training.registry import OBJECTIVES, build_objective


def test_parts_are_judged_by_sets_and_classes() -> None:
    """The first part by the set, the others by the class; none by what is not its own."""
    torch.manual_seed(0)
    build: Any = build_objective("cosface_parts", 12, 3, "cosine", {}, [0, 0, 1], (4, 4), 4)
    logits = torch.randn(6, 4)
    softmax = 0.7 * torch.nn.functional.normalize(logits.softmax(dim=1), dim=1)
    vectors = torch.cat([softmax, torch.randn(6, 8)], dim=1)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    swapped = torch.tensor([1, 0, 2, 1, 0, 2])  # other classes of the same sets
    parts = torch.split(vectors, 4, dim=1)
    sets = torch.tensor([0, 0, 1, 0, 0, 1])
    expected = torch.nn.functional.cross_entropy(logits, sets) + sum(
        build.losses[place](parts[place + 1], labels) for place in (0, 1)
    )
    torch.testing.assert_close(build(vectors, labels).loss, expected)
    assert not torch.isclose(build(vectors, swapped).loss, expected)


def test_parts_without_one_for_the_set() -> None:
    torch.manual_seed(0)
    build: Any = build_objective("cosface_parts", 8, 3, "cosine", {}, parts=(6, 2))
    vectors, labels = torch.randn(6, 8), torch.arange(6) % 3
    expected = build.losses[0](vectors[:, :6], labels) + build.losses[1](vectors[:, 6:], labels)
    torch.testing.assert_close(build(vectors, labels).loss, expected)


def test_more_sets_than_their_part_has_room_for() -> None:
    with pytest.raises(ExperimentError, match="there are 3 data sets"):
        build_objective("cosface_parts", 12, 3, "cosine", {}, [0, 1, 2], (5, 5), 2)
    with pytest.raises(ExperimentError, match="no parts that make 12 dimensions"):
        build_objective("cosface_parts", 12, 3, "cosine", {})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_learn(name: str) -> None:
    torch.manual_seed(0)
    objective: Any = build_objective(name, 4, 3, "cosine", {}, parts=(1, 1), set_dimension=2)
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
