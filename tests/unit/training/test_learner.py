"""The Lightning module and its checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pg_siamese.training import loop
from pg_siamese.training.learner import MetricLearner, load_learner, sets_of
from tests.unit.training.stripes import tiny


def test_sets_of_classes() -> None:
    names = ("a", "a: b", "c")
    assert sets_of(names, ("a: x", "a: b: x", "c: b", "a: y")) == [0, 1, 2, 0]
    assert sets_of(names, names) == [0, 1, 2]


def test_a_checkpoint_gives_the_encoder_back(trained: tuple[Path, loop.Trained]) -> None:
    folder = trained[0].parent / "run"
    learner = load_learner(folder / "last.ckpt")
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 4 * 192 // 32
    assert learner.experiment == trained[1].experiment
    expected = trained[1].encoder.state_dict()
    found = learner.encoder.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    broken = folder / "broken.ckpt"
    broken.write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"broken\.ckpt: no checkpoint"):
        load_learner(broken)
    torch.save({"state_dict": {}}, broken)
    with pytest.raises(ValueError, match="no checkpoint"):
        load_learner(broken)


def test_bfloat16_is_for_training_alone(data: tuple[str, ...]) -> None:
    experiment = tiny(data=data, precision="bfloat16")
    learner = MetricLearner(experiment, ("grey",), ("grey: across", "grey: down"))
    seen = []
    stem = learner.encoder.get_submodule("stem")
    stem.register_forward_hook(lambda *given: seen.append(given[-1].dtype))
    pixels = torch.zeros((2, 28, 28, 3), dtype=torch.uint8)
    for training in (True, False):
        assert learner.train(training).encode(pixels).dtype == torch.float32
    assert seen == [torch.bfloat16, torch.float32]
