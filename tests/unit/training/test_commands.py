"""The commands `train`, `export` and `calibrate-domain`, and the experiments that they take."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pg_siamese import datasets
from pg_siamese.cli.main import app
from pg_siamese.training import export, files
from pg_siamese.training.experiments import ExperimentError, load_experiment
from pg_siamese.training.registry import build_network
from tests.support import grid_encoder

SETTINGS = """
title = "A tiny encoder"
data = []
epochs = 2
batch_size = 8
intended_use = "Tests."
limits = "Knows two colours."
{more}
[input]
width = 20
height = 16
[network]
name = "{network}"
dimension = {dimension}
[objective]
name = "{objective}"
[sampling]
kind = "{kind}"
per_epoch = 16
"""


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.output


def fails(*arguments: object) -> str:
    """Return what is said, with white space folded."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 1, result.output
    return " ".join(result.output.split())


def train(toml: Path, folder: Path, *more: object) -> Path:
    """Train on a folder beside the settings; return the folder of the run."""
    runs = toml.parent / "runs"
    run("train", toml, "--data", f"folder:{folder}", "--runs", runs, "--threads", 1, *more)
    (place,) = (runs / toml.stem).iterdir()
    return place


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red, green and blue pictures of different sizes, by class."""
    root = tmp_path_factory.mktemp("pictures") / "colours"
    random = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 100, (18 + number, 20, 3), np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")
    return root


def settings(
    path: Path,
    network: str = "conv3_gap",
    objective: str = "cosface",
    kind: str = "classes",
    dimension: int = 8,
    more: str = "",
) -> Path:
    given = {"network": network, "objective": objective, "kind": kind, "dimension": dimension}
    path.write_text(SETTINGS.format(**given, more=more))
    return path


def test_options_of_a_collection_go_together() -> None:
    said = fails("train", "folder", "--from-collection", "scans")
    assert "--from-collection needs --label-column" in said
    for option in ("--label-column", "--group-column"):
        assert "need --from-collection" in fails("train", "folder", option, "x")


def test_a_start_from_a_file(folder: Path, tmp_path: Path) -> None:
    data = ("--data", f"folder:{folder}", "--runs", tmp_path)
    said = fails("train", "folder", "--start", tmp_path / "none.onnx", *data)
    assert "none.onnx: no such file" in said
    said = fails("train", "folder_small", "--start", tmp_path / "none.onnx", *data)
    assert 'network "residual" has no option "start"' in said


def test_the_last_layer_alone(tmp_path: Path) -> None:
    chosen = load_experiment("folder_pretrained").changed(name="x")
    with pytest.raises(ExperimentError, match="x has no layers to freeze"):
        chosen.head_only()
    clinical = load_experiment("clinical")
    network = clinical.head_only().network
    assert clinical.network.options["frozen_blocks"] == 11
    del clinical.network.options["frozen_blocks"]  # all are frozen by default
    assert network.options == clinical.network.options
    encoder = build_network(network.name, network.dimension, (32, 32), network.options)
    learning = {
        name.split(".")[0] for name, weight in encoder.named_parameters() if weight.requires_grad
    }
    assert learning == {"projection", "level_head"}


def test_a_folder_is_trained_and_exported_anew(folder: Path, tmp_path: Path) -> None:
    toml = settings(tmp_path / "tiny.toml")
    place = train(toml, folder, "--seed", 5, "--output", tmp_path / "a.onnx")
    assert place.name == "seed-5"
    names = "best.ckpt last.ckpt metrics.json model.md model.onnx tensorboard"
    assert {path.name for path in place.iterdir()} >= set(names.split())
    metadata = files.read_metadata(tmp_path / "a.onnx")
    assert metadata == files.read_metadata(place / "model.onnx")
    assert metadata["classes"] == ["colours: blue", "colours: green", "colours: red"]
    assert metadata["input"]["width"] == 20
    assert metadata["training"]["data"][0]["spec"] == f"folder:{folder}"
    assert metadata["training"]["data"][0]["file"] == "36 image files"
    card = (tmp_path / "a.md").read_text()
    assert card.startswith("# A tiny encoder\n")
    assert "Knows two colours." in card
    assert "three convolutions" in card

    run("export", place, "--output", tmp_path / "b.onnx", "--threads", 1)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 20, 3), np.uint8)
    first, second = (export.embed_onnx(tmp_path / f"{name}.onnx", pixels) for name in "ab")
    assert (first == second).all()
    repeated = files.read_metadata(tmp_path / "b.onnx")
    assert repeated["calibration"] == metadata["calibration"]
    assert repeated["domain"] == metadata["domain"]

    # A file of an earlier version gets the same domain, and keeps its graph.
    model, beside = tmp_path / "b.onnx", tmp_path / "b.md"
    del repeated["domain"], repeated["training"]["domain"]
    files.write_model(onnx.load(model), model, repeated)
    text = beside.read_text()
    before, _, after = text.partition("## Domain\n")
    beside.write_text(before + "## Limits\n" + after.partition("## Limits\n")[2])
    said = run("calibrate-domain", model, "--outside", f"folder:{folder}")
    assert "pages of text: " in said
    found = files.read_metadata(model)
    assert found["domain"]["limits"] == pytest.approx(metadata["domain"]["limits"], rel=1e-3)
    assert list(found["training"]["domain"]["accepted"])[-1] == "colours"
    assert (export.embed_onnx(model, pixels) == first).all()
    renewed = beside.read_text()
    assert datasets.sha256(model) in renewed
    assert renewed.count("## Domain\n") == 1
    assert f"Fitted by `pg_siamese calibrate-domain {model} --outside folder:{folder}`" in renewed
    assert renewed.endswith("## Limits\n\nKnows two colours.\n")
    assert [line for line in renewed.splitlines() if line.startswith("#")] == [
        line for line in text.splitlines() if line.startswith("#")
    ]


def test_only_a_calibration_has_a_domain(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    described = {"input": {"width": 8, "height": 8}}
    model.write_bytes(grid_encoder(("n", 3, 8, 8), pool=4, metadata=json.dumps(described)))
    assert "neither calibration nor threshold" in fails("calibrate-domain", model)
    assert "No such file" in fails("calibrate-domain", tmp_path / "none.onnx")


@pytest.mark.parametrize(
    ("network", "objective", "kind", "more"),
    [
        ("siamese_cnn", "contrastive_sigmoid", "pairs", 'metric = "l2"'),
        ("conv3_gap", "triplet_cross_entropy", "triplets", ""),
    ],
)
def test_other_systems_train(
    folder: Path, tmp_path: Path, network: str, objective: str, kind: str, more: str
) -> None:
    place = train(settings(tmp_path / "x.toml", network, objective, kind, more=more), folder)
    metadata = files.read_metadata(place / "model.onnx")
    assert metadata["training"]["objective"] == objective
    assert metadata["metric"] == ("l2" if more else "cosine")


def test_the_head_of_a_siamese_network_is_the_calibration(folder: Path, tmp_path: Path) -> None:
    toml = settings(tmp_path / "x.toml", "conv3_gap", "pair_cross_entropy", "pairs")
    place = train(toml, folder)
    weights = torch.load(place / "best.ckpt", weights_only=True)["state_dict"]
    metadata = files.read_metadata(place / "model.onnx")
    assert metadata["calibration"] == {
        "weight": -float(weights["objective.head.weight"]),
        "bias": -float(weights["objective.head.bias"]),
    }
    assert "Siamese head's own" in (place / "model.md").read_text()


def test_snapshots_show_how_the_plane_forms(folder: Path, tmp_path: Path) -> None:
    kinds = ("conv5", "contrastive_hadsell", "pairs")
    place = train(settings(tmp_path / "x.toml", *kinds, 2, "snapshots = 3"), folder)
    stored = np.load(place / "snapshots.npz")
    count = len(stored["labels"])
    assert stored["points"].shape == (3, count, 2)
    assert stored["points"].dtype == np.float16
    assert stored["epochs"].tolist() == [0, 1, 2]
    rows = json.loads((place / "metrics.json").read_text())
    assert {"val_loss", "val_accuracy", "train_loss"} <= set(rows[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("network", "none"), 'no network "none"'),
        (("objective", "none"), 'no objective "none"'),
        (("kind", "pairs"), "takes sampling.kind classes or per_class"),
        (("kind", "none"), "'^(classes|per_class|pairs|triplets)$' - at `$.sampling.kind`"),
        (("more", "epoch = 3"), "x.toml: Object contains unknown field `epoch`"),
        (
            ("more", 'metric = "l1"'),
            "x.toml: Expected `str` matching regex '^(cosine|l2)$' - at `$.metric`",
        ),
        (("more", 'seed = "0"'), "Expected `int`, got `str` - at `$.seed`"),
        (("more", "[validation]\nevery = 0"), "Expected `int` >= 1 - at `$.validation.every`"),
        (("more", "snapshots = 5"), "network.dimension = 2 only"),
        (("more", "= 3"), "no valid TOML"),
    ],
)
def test_what_cannot_be_trained_is_said(
    folder: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    toml = settings(tmp_path / "x.toml", **{change[0]: change[1]})  # type: ignore[arg-type]
    assert message in fails("train", toml, "--data", f"folder:{folder}", "--runs", tmp_path)


def test_options_of_networks_and_objectives_are_checked(folder: Path, tmp_path: Path) -> None:
    toml = settings(tmp_path / "x.toml")
    toml.write_text(toml.read_text().replace('name = "cosface"', 'name = "cosface"\nmargins = 1'))
    line = fails("train", toml, "--data", f"folder:{folder}", "--runs", tmp_path)
    assert '"cosface" has no option "margins"; there are: margin, scale' in line


def test_commands_say_what_there_is(tmp_path: Path) -> None:
    assert "fashion_mnist" in fails("train", "none")
    assert "needs data: --data folder:PATH" in fails("train", "folder")
    assert "no such file or folder" in fails("export", tmp_path / "none")
    assert "neither best.ckpt nor last.ckpt" in fails("export", tmp_path)


def test_too_few_images_are_said(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "data" / name / "1.png")
    toml = settings(tmp_path / "x.toml")
    line = fails("train", toml, "--data", f"folder:{tmp_path / 'data'}", "--runs", "r")
    assert "error: " in line and "images" in line
