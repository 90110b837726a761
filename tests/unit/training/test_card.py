"""The model card: text of a template, figures of the model's metadata."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pg_siamese.training.card import renew_card, write_card
from pg_siamese.training.experiments import load_experiment
from pg_siamese.training.files import read_metadata
from tests.conftest import MODELS


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copy(MODELS / "medical.onnx", tmp_path))


def card(model: Path, experiment: str, sets: tuple[str, ...], **changes: Any) -> str:
    metadata = read_metadata(model) | changes
    splits: list[Any] = [
        SimpleNamespace(
            name=name,
            train=range(1000),
            val=range(78),
            test=range(156),
            has_groups=name == "imagenette",
        )
        for name in sets
    ]
    of = load_experiment(experiment)
    return write_card(of, splits, metadata, model, 0.9999994, 1234.5).read_text()


def test_a_card_has_the_figures_of_the_file(model: Path) -> None:
    sets = ("breastmnist", "ham10000_28", "pneumoniamnist", "retinamnist")
    written = card(model, "medical", sets)
    shipped = (MODELS / "medical.md").read_text()
    # Files, figures and the errors of the domain: the last cell is a number or a SHA-256.
    of_figures = r"(?m)^\| [a-z0-9_. ]+ \|(?: [^|]+ \|)* (?:[0-9.]+|`[0-9a-f]{64}`) \|$"
    rows = re.findall(of_figures, shipped)
    assert len(rows) == 25
    assert re.findall(of_figures, written) == rows
    assert "| breastmnist | 1,000 | 78 | 156 | CC BY 4.0 |" in written
    assert "| Speed | 1,234 images per second" in written
    assert "of the right one: 100.00 % (validation), 99.96 % (test).\n" in written
    assert "drawn in proportion to n ** 0.5. Images are changed at random" in written
    assert "half are of one data set and half of two." in written
    assert "come in groups" not in written
    assert "\n\n\n" not in written
    assert "{{" not in written


def test_a_card_of_one_set_whose_head_is_the_calibration(model: Path) -> None:
    written = card(model, "imagenette_scratch", ("imagenette",), metric="l2")
    assert "Retrieval within each data set" in written
    assert "compared by Euclidean distance" in written
    assert "Weight and bias are the Siamese head's own." in written
    assert "all are of different classes." in written
    assert "\n\nImages of imagenette come in groups. Each group is in one split only" in written
    assert "of the right one" not in written
    assert "The epoch with the best val_map5 was exported." in written
    assert "\n\n\n" not in written


def test_a_card_says_which_images_were_left_out(model: Path) -> None:
    training = read_metadata(model)["training"]
    training["left_out"] = {"imagenette": 1234}
    figures = training["metrics"]["test"]
    figures["as_published"] = {"imagenette": figures["retrieval"]["breastmnist"]}
    written = card(model, "medical", ("imagenette", "breastmnist"), training=training)
    assert "1,234 train images were left out of the training" in written
    assert "Each group is in one split only" not in written
    assert "the gallery is the train split, the queries" in written
    assert "| imagenette, as published | test |" in written
    assert "A query's own group is no neighbour." in written
    assert written.startswith("# Encoder")
    assert "\n\n\n" not in written


def test_a_card_of_sets_that_are_told_apart(model: Path) -> None:
    written = card(model, "medmnist_siamese", ("a", "b"), labels="set")
    assert "turns an image into a vector with" in written
    assert "L2-normalised" not in written
    assert "Match = same data set." in written
    assert "all are of different data sets." in written
    assert "| a | 1,000 | 78 | 156 | see its source |" in written


def test_a_renewed_card_keeps_all_but_the_domain(model: Path) -> None:
    before = card(model, "medical", ("breastmnist", "retinamnist"))
    metadata = read_metadata(model)
    metadata["training"]["domain"]["command"] = "another command"
    renew_card(model.with_suffix(".md"), metadata, model)
    after = model.with_suffix(".md").read_text()
    command = read_metadata(model)["training"]["domain"]["command"]
    assert after == before.replace(f"Fitted by `{command}`", "Fitted by `another command`")
