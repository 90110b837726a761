"""Whole runs of training."""

# ruff: noqa: E402 - what is imported below needs what is skipped over above

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")
pytest.importorskip("pytorch_metric_learning")

from pg_siamese.training import callbacks, loop
from tests.unit.training.stripes import tiny


def test_a_run_keeps_its_figures(trained: tuple[Path, loop.Trained]) -> None:
    folder = trained[0].parent / "run"
    rows = json.loads((folder / "metrics.json").read_text())
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert all({"train_loss", "train_accuracy"} <= set(row) for row in rows)
    figures = {"val_loss", "val_accuracy", "val_map5", "val_map5/grey"}
    assert [figures <= set(row) for row in rows] == [False, True, False, True]
    assert list(folder.rglob("events.out.tfevents*"))


@pytest.fixture
def learned_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """End a run with what it has learned, without the export and the figures."""
    monkeypatch.setattr(loop, "finish", lambda learner, *_, **__: learner)


@pytest.mark.usefixtures("learned_only")
def test_one_seed_gives_one_encoder(tmp_path: Path, data: tuple[str, ...]) -> None:
    first, second, other = (
        loop.fit(
            tiny(epochs=1, data=data, seed=seed),
            command="",
            folder=tmp_path / str(number),
            threads=1,
            test=False,
        ).encoder.state_dict()
        for number, seed in enumerate((0, 0, 1))
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.usefixtures("learned_only")
def test_a_resumed_run_ends_where_a_whole_one_does(
    tmp_path: Path, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny(data=data)
    whole = loop.fit(experiment, command="", folder=tmp_path / "a", threads=1, test=False)

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
            loop.fit(experiment, command="", folder=tmp_path / "b", threads=1, test=False)
    said: list[str] = []
    resumed = loop.fit(
        experiment,
        command="",
        folder=tmp_path / "b",
        resume=True,
        threads=1,
        test=False,
        say=said.append,
    )
    assert any("going on from" in line for line in said)
    rows = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert rows == json.loads((tmp_path / "a" / "metrics.json").read_text())
    first, second = whole.encoder.state_dict(), resumed.encoder.state_dict()
    different = {
        key: (first[key], second[key]) for key in first if not torch.equal(first[key], second[key])
    }
    assert not different


@pytest.mark.usefixtures("learned_only")
def test_training_stops_early(tmp_path: Path, data: tuple[str, ...]) -> None:
    settings = {"patience": 1, "monitor": "train_accuracy", "mode": "min"}
    loop.fit(
        tiny(data=data, epochs=30, validation=settings),
        command="",
        folder=tmp_path,
        threads=1,
        test=False,
    )
    assert len(json.loads((tmp_path / "metrics.json").read_text())) < 15


@pytest.mark.usefixtures("learned_only")
def test_the_rate_falls_where_validation_gets_no_better(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    # Stripes are easy: mAP@5 is 100 from the first epoch on, and so never better.
    optimiser = {"schedule": "plateau", "patience": 2, "learning_rate": 1e-3}
    loop.fit(
        tiny(data=data, epochs=7, validation={"keep": "last"}, optimiser=optimiser),
        command="",
        folder=tmp_path,
        threads=1,
        test=False,
    )
    rows = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["val_map5"] for row in rows] == [100.0] * 7
    state = torch.load(tmp_path / loop.LAST, weights_only=True)
    rates = [group["lr"] for group in state["optimizer_states"][0]["param_groups"]]
    assert rates == [2.5e-4, 2.5e-4]
