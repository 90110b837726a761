"""Whole runs of training."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pg_siamese.datasets import DataSplits, LabelledImages, open_dataset
from pg_siamese.training import callbacks, loop
from pg_siamese.training.data import JoinedImages
from pg_siamese.training.experiments import ExperimentError
from pg_siamese.training.experiments.settings import Experiment
from pg_siamese.training.learner import load_learner
from tests.unit.training.stripes import tiny


def test_a_run_keeps_its_figures(trained: tuple[Path, loop.Trained]) -> None:
    folder = trained[0].parent / "run"
    rows = json.loads((folder / "metrics.json").read_text())
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert all({"train_loss", "train_accuracy"} <= set(row) for row in rows)
    figures = {"val_loss", "val_accuracy", "val_map5", "val_map5/grey"}
    assert [figures <= set(row) for row in rows] == [False, True, False, True]
    assert list(folder.rglob("events.out.tfevents*"))


def learn(experiment: Experiment, folder: Path, **more: Any) -> dict[str, torch.Tensor]:
    """End a run with what it has learned, without the export and the figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "finish", lambda learner, *_, **__: learner)
        learned = loop.fit(experiment, command="", folder=folder, threads=1, test=False, **more)
    return learned.encoder.state_dict()


def test_one_seed_gives_one_encoder(tmp_path: Path, data: tuple[str, ...]) -> None:
    first, second, other = (
        learn(tiny(epochs=1, data=data, seed=seed), tmp_path / str(number))
        for number, seed in enumerate((0, 0, 1))
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_a_resumed_run_ends_where_a_whole_one_does(
    tmp_path: Path, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny(data=data)
    first = learn(experiment, tmp_path / "a")

    class Stopped(Exception):
        pass

    lines = callbacks.EpochLines.on_train_epoch_end

    def stop_after_two(self, trainer, pl_module) -> None:
        lines(self, trainer, pl_module)
        if trainer.current_epoch == 2:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.EpochLines, "on_train_epoch_end", stop_after_two)
        patch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
        with pytest.raises(Stopped):
            learn(experiment, tmp_path / "b")
    said: list[str] = []
    second = learn(experiment, tmp_path / "b", resume=True, say=said.append)
    assert any("going on from" in line for line in said)
    rows = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert rows == json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_training_stops_early(tmp_path: Path, data: tuple[str, ...]) -> None:
    settings = {"patience": 1, "monitor": "train_accuracy", "mode": "min"}
    learn(tiny(data=data, epochs=30, validation=settings), tmp_path)
    assert len(json.loads((tmp_path / "metrics.json").read_text())) < 15


def test_the_rate_falls_where_validation_gets_no_better(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    # Stripes are easy: mAP@5 is 100 from the first epoch on, and so never better.
    optimiser = {"schedule": "plateau", "patience": 2, "learning_rate": 1e-3}
    learn(tiny(data=data, epochs=7, validation={"keep": "last"}, optimiser=optimiser), tmp_path)
    rows = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["val_map5"] for row in rows] == [100.0] * 7
    state = torch.load(tmp_path / loop.LAST, weights_only=True)
    rates = [group["lr"] for group in state["optimizer_states"][0]["param_groups"]]
    assert rates == [2.5e-4, 2.5e-4]


def test_what_is_held_out_is_not_trained_on(
    tmp_path: Path, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaking(spec: str, **options: Any) -> DataSplits:
        """Give ten train images the groups of validation and test images."""
        opened = open_dataset(spec, **options)

        def grouped(part: LabelledImages, *held_out: str) -> LabelledImages:
            names = [f"{part.split} {place}" for place in range(len(part))]
            return replace(part, groups=np.array([*held_out, *names[len(held_out) :]]))

        train = grouped(opened.train, *["val 3", "test 4"] * 5)
        return DataSplits(train, grouped(opened.val), grouped(opened.test), spec, published=True)

    monkeypatch.setattr(loop, "open_dataset", leaking)
    said: list[str] = []
    result = loop.fit(
        tiny(epochs=1, data=data[:1]), command="", folder=tmp_path, threads=1, say=said.append
    )
    assert "left out: 10 train images of grey, whose groups are held out, too" in said
    assert any("training tiny: 86 images" in line for line in said)
    training = result.metadata["training"]
    assert training["left_out"] == {"grey": 10}
    for figures in training["metrics"].values():
        assert list(figures["as_published"]) == ["grey"]


def test_frozen_layers_see_changed_copies_once(tmp_path: Path, data: tuple[str, ...]) -> None:
    """An epoch draws from the images and changed copies. Validation sees them as they are."""
    experiment = tiny(
        data=data,
        copies=3,
        input={"width": 32, "height": 32},
        network={"name": "efficientnet_lite0", "dimension": 8, "frozen_blocks": 14},
        augmentation={"default": {"brightness": 0.2}},
    )
    said: list[str] = []
    learned = learn(experiment, tmp_path / "run", say=said.append)
    splits = loop.open_splits(experiment)
    train, val = (sum(len(getattr(s, part)) for s in splits) for part in ("train", "val"))
    total = 3 * train + val
    assert f"computing the features of {total:,} images once" in said
    assert f"features: {total:,} of {total:,}" in said
    assert any(key.startswith("learned.") for key in learned)
    learner = load_learner(tmp_path / "run" / loop.LAST)
    images = [JoinedImages([getattr(s, p) for s in splits], "class") for p in ("train", "val")]
    parts = loop._cached(learner, images[0], images[0], images[1], lambda line: None)
    copies = parts[0].pixels.view(3, train, *parts[0].pixels.shape[1:])
    assert not torch.equal(copies[0], copies[1])
    assert not torch.equal(copies[1], copies[2])
    assert torch.equal(parts[1].pixels, copies[0])
    assert torch.equal(parts[0].labels[:train], images[0].labels)
    network: Any = learner.encoder.eval()
    expected = network.features(images[1].pixels)
    torch.testing.assert_close(parts[2].pixels.float(), expected, rtol=1e-2, atol=1e-2)
    plain = network.features(images[0].pixels)
    torch.testing.assert_close(copies[0].float(), plain, rtol=1e-2, atol=1e-2)
    assert learner.on_features
    with pytest.raises(ExperimentError, match="copies is 3: the network has no frozen layers"):
        learn(tiny(data=data, copies=3), tmp_path / "other")
