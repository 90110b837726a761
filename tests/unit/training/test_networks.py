"""The networks of the shipped encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from pg_siamese.training.experiments import ExperimentError
from pg_siamese.training.export import to_onnx
from pg_siamese.training.networks.residual import ResidualEncoder
from pg_siamese.training.registry import build_network, build_objective


@pytest.mark.parametrize("size", [(28, 28), (17, 30)])
def test_encoder_gives_unit_vectors(size: tuple[int, int]) -> None:
    encoder = ResidualEncoder(dimension=24).eval()
    pixels = torch.randint(0, 256, (3, *size, 3), dtype=torch.uint8)
    vectors = encoder(pixels)
    assert vectors.shape == (3, 24)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(vectors, encoder(pixels.float()))


def test_a_frozen_network_learns_in_its_projection_only() -> None:
    encoder: Any = build_network("efficientnet_lite0", 8, (64, 64), {}).train()
    learning = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert learning == ["projection.weight", "projection.bias"]
    assert not any(part.training for part in encoder.frozen.modules())
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    encoder.eval()
    assert torch.allclose(encoder.head(encoder.features(pixels)), encoder(pixels))


def test_a_partly_frozen_network_learns_in_its_other_blocks() -> None:
    torch.manual_seed(0)
    encoder: Any = build_network("efficientnet_lite0", 8, (32, 32), {"frozen_blocks": 14})
    whole: Any = build_network("efficientnet_lite0", 8, (32, 32), {"frozen_blocks": 0})
    assert len(encoder.frozen) == 15 and len(whole.frozen) == 1
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    encoder.train()(pixels)[:, 0].sum().backward()
    torch.optim.SGD(encoder.parameters(), lr=1.0).step()
    after = encoder.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"learned", "projection"}
    with pytest.raises(ExperimentError, match="there are 16 blocks"):
        build_network("efficientnet_lite0", 8, (32, 32), {"frozen_blocks": 17})


@pytest.mark.parametrize("levels", [[], [2, 5]])
def test_an_encoder_starts_from_an_exported_one(levels: list[int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"levels": levels, "level_share": 2.0, "frozen_blocks": 5}
    first: Any = build_network("efficientnet_lite0", 8, (32, 32), options).eval()
    for part in first.modules():
        if not isinstance(part, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            continue
        if part.running_mean is not None and part not in list(first.frozen.modules()):
            torch.nn.init.uniform_(part.running_mean, -0.1, 0.1)
    onnx.save(to_onnx(first, (32, 32), half=True), tmp_path / "first.onnx")
    onnx.save(to_onnx(ResidualEncoder(8).eval(), (32, 32)), tmp_path / "other.onnx")
    options |= {"frozen_blocks": 14, "start": str(tmp_path / "first.onnx")}
    second: Any = build_network("efficientnet_lite0", 8, (32, 32), options).eval()
    pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    assert torch.nn.functional.cosine_similarity(first(pixels), second(pixels)).min() > 0.9999
    learning = {name.split(".")[0] for name, p in second.named_parameters() if p.requires_grad}
    assert learning == {"learned", "projection", *(["level_head"] if levels else [])}
    third: Any = build_network("efficientnet_lite0", 16, (32, 32), options)
    assert third(pixels).shape == (4, 16)
    for name, said in (("nothing", "no such file"), ("other", "the file holds another network")):
        options["start"] = str(tmp_path / f"{name}.onnx")
        with pytest.raises(ExperimentError, match=said):
            build_network("efficientnet_lite0", 8, (32, 32), options)


def test_levels_are_half_of_the_vector() -> None:
    """Statistics of frozen blocks make it: what the other blocks learn never changes it."""
    torch.manual_seed(0)
    options = {"frozen_blocks": 5, "levels": [2, 5], "level_share": 3.0}
    encoder: Any = build_network("efficientnet_lite0", 12, (64, 64), options).eval()
    assert encoder.parts == (6, 6)
    pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    with torch.inference_mode():
        before = encoder(pixels)
        torch.testing.assert_close(encoder.head(encoder.features(pixels)), before)
    squares = [part.square().sum(dim=1) for part in before.split(6, dim=1)]
    torch.testing.assert_close(squares[0], torch.full((4,), 0.25))
    torch.testing.assert_close(squares[1], torch.full((4,), 0.75))
    # Mean and deviation of each channel, whatever its place.
    statistics = encoder.features(pixels)[:, -encoder.statistics :]
    maps = encoder.frozen[:3]((pixels.permute(0, 3, 1, 2) - 127.0) / 128.0)
    torch.testing.assert_close(statistics[:, :24], maps.mean(dim=(2, 3)))
    torch.testing.assert_close(statistics[:, 24:48], maps.std(dim=(2, 3), correction=0))
    with torch.no_grad():
        for weight in encoder.learned.parameters():
            weight.mul_(1.5)
    after = encoder(pixels)
    torch.testing.assert_close(after[:, 6:], before[:, 6:])
    assert not torch.allclose(after[:, :6], before[:, :6], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen_blocks": 4, "levels": [5]}, "frozen blocks are 1 to 4"),
        ({"levels": [0]}, "levels are"),
        ({"levels": [5], "level_share": 0}, "level_share is 0"),
    ],
)
def test_levels_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        build_network("efficientnet_lite0", 8, (32, 32), options)


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
    parts = (encoder.parts, encoder.set_dimension)
    objective: Any = build_objective("cosface_parts", 16, 3, "cosine", {}, [0, 0, 1], *parts)
    vectors = encoder(torch.randint(0, 256, (10, 28, 28, 3), dtype=torch.uint8))
    filled = vectors[:, 4:].reshape(10, 3, 4).any(dim=2)
    owner = torch.tensor([0] * 4 + [1] * 3 + [2] * 3)
    assert torch.equal(filled, owner[:, None] == torch.arange(3))
    labels = torch.arange(10) % 3
    outcome = objective(vectors, labels)
    sets_part, *own = vectors.split([4, 4, 4, 4], dim=1)
    expected = sum(objective.losses[n](own[n][owner == n], labels[owner == n]) for n in range(3))
    chances = torch.nn.functional.normalize(sets_part, p=1, dim=1)
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
