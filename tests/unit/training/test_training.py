"""Training: sampling, augmentation, evaluation, calibration, and a whole small run to ONNX."""

# ruff: noqa: E402 - what is imported below needs what is skipped over above

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")
pytest.importorskip("pytorch_metric_learning")

import onnx

from pg_siamese.datasets import LabelledImages, hold_out, open_dataset
from pg_siamese.evaluation.pairs import balanced_pairs, calibrate, pair_distances, score_pairs
from pg_siamese.evaluation.retrieval import (
    Embedded,
    nearest,
    retrieval,
    retrieval_by_set,
    right_set,
)
from pg_siamese.training import callbacks, export, files, loop
from pg_siamese.training.data import Augmenter, JoinedImages
from pg_siamese.training.experiments import Augmentation, load_experiment, parse_experiment
from pg_siamese.training.learner import MetricLearner, embed, load_learner
from pg_siamese.training.networks.residual import ResidualEncoder
from pg_siamese.training.sampling import class_sampler


def striped(name: str, split: str, count: int, seed: int, grey: bool) -> LabelledImages:
    """Noisy stripes, across or down: two classes that need a convolution to tell them apart."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    wave = np.sin(np.arange(28) * (0.8 if grey else 1.6)) * 60 + 128
    images = np.where(labels[:, None, None] == 0, wave[None, :, None], wave[None, None, :])
    images = images + random.normal(0, 20, (count, 28, 28))
    pixels = images.clip(0, 255).astype(np.uint8)
    if not grey:
        pixels = np.repeat(pixels[..., None], 3, axis=3)
    return LabelledImages(name, split, pixels, labels, ("across", "down"))


PARTS = (("train", 96), ("val", 24), ("test", 24))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Two sets of stripes as npz files, by the texts that open them."""
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(("grey", "colour")):
        arrays: dict[str, np.ndarray] = {}
        for place, (split, count) in enumerate(PARTS):
            part = striped(name, split, count, 10 * number + place, name == "grey")
            arrays |= {f"{split}_images": part.images, f"{split}_labels": part.labels}
        np.savez(folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    return tuple(f"npz:{folder / name}.npz" for name in ("grey", "colour"))


TINY = parse_experiment(
    {
        "name": "tiny",
        "title": "A tiny encoder",
        "data": [],
        "augmentation": {"grey": {"shift": 1}, "colour": {"brightness": 0.1}},
        "intended_use": "Tests.",
        "limits": "Knows nothing but stripes.",
        "epochs": 4,
        "batch_size": 32,
        "average_decay": 0.9,
        "network": {
            "name": "residual",
            "dimension": 16,
            "stem": [8, 2],
            "stages": [[16, 2], [32, 2]],
        },
        "sampling": {"balance": 1.0},
        "validation": {"every": 2, "keep": "last"},
    }
)


# --- data -------------------------------------------------------------------------------------


def test_joined_sets_label_the_class_of_the_set(data: tuple[str, ...]) -> None:
    joined = JoinedImages([open_dataset(spec).train for spec in data])
    assert joined.names == ("grey", "colour")
    assert joined.classes == ("grey: 0", "grey: 1", "colour: 0", "colour: 1")
    assert joined.pixels.shape == (192, 28, 28, 3)
    assert torch.bincount(joined.labels).tolist() == [48] * 4
    assert torch.equal(joined.sets, joined.labels // 2)
    pixels, labels, sets = joined.__getitems__([191, 0])
    assert labels.tolist() == [3, 0]
    assert sets.tolist() == [1, 0]
    assert torch.equal(pixels[1], joined[0][0])


def test_joined_sets_by_set(data: tuple[str, ...]) -> None:
    joined = JoinedImages([open_dataset(spec).train for spec in data], labels="set")
    assert joined.classes == ("grey", "colour")
    assert torch.equal(joined.labels, joined.sets)


def test_some_and_replaced_images_keep_their_labels(data: tuple[str, ...]) -> None:
    joined = JoinedImages([open_dataset(spec).train for spec in data])
    some = joined.some(10, seed=1)
    assert len(some) == len(some.labels) == len(some.sets) == 10
    assert torch.equal(some.pixels, joined.some(10, seed=1).pixels)
    assert joined.some(0, seed=1) is joined
    twice = joined.with_pixels(torch.zeros(2 * len(joined), 5), times=2)
    assert torch.equal(twice.labels, joined.labels.repeat(2))


def test_joined_sets_must_be_of_one_size() -> None:
    small = LabelledImages("small", "train", np.zeros((1, 8, 8), np.uint8), np.array([0]), ("a",))
    with pytest.raises(ValueError, match="different sizes"):
        JoinedImages([small, striped("grey", "train", 4, 0, True)])


def test_hold_out_is_stratified_disjoint_and_repeatable() -> None:
    images = np.arange(100, dtype=np.uint8)[:, None, None] + np.zeros((1, 2, 2), np.uint8)
    labels = np.repeat([0, 1], [80, 20])
    whole = LabelledImages("set", "train", images, labels, ("a", "b"))
    train, val = hold_out(whole, 10, seed=1)
    assert np.bincount(val.labels).tolist() == [8, 2]
    assert (train.split, val.split) == ("train", "val")
    seen = np.concatenate([train.images[:, 0, 0], val.images[:, 0, 0]])
    assert sorted(seen.tolist()) == list(range(100))
    again = hold_out(whole, 10, seed=1)[1]
    assert (again.images == val.images).all()


def test_no_augmentation_changes_nothing() -> None:
    augment = Augmenter(("a", "b"), {"a": Augmentation(), "b": Augmentation(flip_vertical=1)})
    pixels = torch.randint(0, 256, (6, 28, 28, 3), dtype=torch.uint8)
    sets = torch.tensor([0, 1, 0, 1, 0, 1])
    changed = augment(pixels, sets)
    assert torch.allclose(changed[sets == 0], pixels[sets == 0].float(), atol=0.01)
    assert torch.allclose(changed[sets == 1], pixels[sets == 1].flip(1).float(), atol=0.01)


def test_augmentation_is_random_bounded_and_seeded() -> None:
    augment = Augmenter(("a",), {"a": Augmentation(180, 3, 0.2, 0.3, 0.5, 0.5, 0.5)})
    pixels = torch.randint(0, 256, (8, 28, 28, 3), dtype=torch.uint8)
    sets = torch.zeros(8, dtype=torch.int64)
    torch.manual_seed(1)
    first = augment(pixels, sets)
    second = augment(pixels, sets)
    torch.manual_seed(1)
    assert torch.equal(first, augment(pixels, sets))
    assert not torch.equal(first, second)
    assert first.shape == pixels.shape
    assert first.min() >= 0 and first.max() <= 255


def test_every_set_of_an_experiment_has_its_augmentation() -> None:
    medical = load_experiment("medical").augmentation
    assert set(medical) == {
        "breastmnist",
        "dermamnist",
        "ham10000_28",
        "pneumoniamnist",
        "retinamnist",
    }
    assert set(load_experiment("fashion_mnist").augmentation) == {"fashion_mnist"}
    assert medical["pneumoniamnist"].flip_vertical == 0


# --- sampling ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("balance", "share"), [(0.0, 0.1), (1.0, 0.5), (0.5, 0.25)])
def test_sampler_draws_rare_classes_as_often_as_told(balance: float, share: float) -> None:
    labels = torch.cat([torch.zeros(9000), torch.ones(1000)]).long()
    drawn = labels[list(class_sampler(labels, balance, seed=0))]
    assert len(drawn) == 10_000
    assert drawn.float().mean() == pytest.approx(share, abs=0.02)
    assert list(class_sampler(labels, balance, 0)) == list(class_sampler(labels, balance, 0))


def test_pairs_are_half_and_half_and_of_both_kinds() -> None:
    sets = np.repeat([0, 1, 2], [50, 500, 20])
    labels = sets * 2 + np.random.default_rng(0).integers(0, 2, 570)
    first, second, match = balanced_pairs(labels, sets, 4000, seed=3)
    assert match.mean() == 0.5
    assert ((labels[first] == labels[second]) == match).all()
    assert (first != second).all()
    assert np.bincount(sets[first]) / 4000 == pytest.approx([1 / 3] * 3, abs=0.03)
    assert (sets[first] == sets[second])[~match].mean() == 0.5
    again = balanced_pairs(labels, sets, 4000, seed=3)
    assert (again[0] == first).all() and (again[1] == second).all()


def test_pairs_where_one_kind_is_missing() -> None:
    labels = np.array([0, 0, 1, 1])
    first, second, match = balanced_pairs(labels, np.zeros(4, np.int64), 100, seed=0)
    assert ((labels[first] == labels[second]) == match).all()
    with pytest.raises(ValueError, match="no pair of different classes"):
        balanced_pairs(np.zeros(4, np.int64), np.zeros(4, np.int64), 10, seed=0)
    with pytest.raises(ValueError, match="no pair of one class"):
        balanced_pairs(np.arange(4), np.zeros(4, np.int64), 10, seed=0)


# --- evaluation -------------------------------------------------------------------------------


def test_retrieval_figures_by_hand() -> None:
    neighbours = np.array(
        [
            [1, 0, 1, 0, 0],  # AP = (1 + 2/3) / 2; class 0 has the majority
            [0, 0, 0, 0, 0],  # nothing relevant
            [2, 1, 2, 1, 0],  # a tie of 1 and 2 counts for either; AP = (1/2 + 2/4) / 2
        ]
    )
    score = retrieval(neighbours, np.array([1, 1, 1]))
    assert score.map5 == pytest.approx(100 * ((1 + 2 / 3) / 2 + 0 + 0.5) / 3)
    assert score.mmv5 == pytest.approx(100 / 3)
    assert score.acc1 == pytest.approx(100 / 3)
    assert score.acc3 == pytest.approx(200 / 3)
    assert score.acc5 == pytest.approx(200 / 3)


def test_nearest_is_exact_and_ties_go_to_the_lower_index() -> None:
    gallery = np.eye(4, dtype=np.float32)[[0, 1, 1, 2, 3, 1]]
    assert nearest(gallery[1:2], gallery, 3).tolist() == [[1, 2, 5]]
    random = np.random.default_rng(0)
    vectors = random.normal(size=(300, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = np.argsort(-(vectors[:20] @ vectors.T), axis=1, kind="stable")[:, :7]
    assert (nearest(vectors[:20], vectors, 7) == expected).all()


def test_retrieval_stays_within_each_set() -> None:
    # Set 1's vectors equal set 0's but carry other labels.
    vectors = np.tile(np.eye(2, dtype=np.float32).repeat(5, axis=0), (2, 1))
    labels = np.repeat([0, 1, 2, 3], 5)
    sets = np.repeat([0, 1], 10)
    everything = Embedded(vectors, labels, sets)
    scores = retrieval_by_set(everything, everything, ("a", "b"))
    assert {name: score.map5 for name, score in scores.items()} == {"a": 100, "b": 100}
    assert right_set(everything, everything) == 50


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


def test_threshold_parts_what_can_be_parted() -> None:
    distances = np.array([0.1, 0.2, 0.6, 0.8])
    match = np.array([True, True, False, False])
    calibration = calibrate(distances, match)
    assert calibration.threshold == pytest.approx(0.4)
    assert score_pairs(distances, match, calibration).accuracy == 1


# --- encoder, training, export ----------------------------------------------------------------


@pytest.mark.parametrize("size", [(28, 28), (17, 30)])
def test_encoder_gives_unit_vectors(size: tuple[int, int]) -> None:
    encoder = ResidualEncoder(dimension=24).eval()
    pixels = torch.randint(0, 256, (3, *size, 3), dtype=torch.uint8)
    vectors = encoder(pixels)
    assert vectors.shape == (3, 24)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(vectors, encoder(pixels.float()))


def test_folding_batch_norms_changes_nothing_but_the_speed() -> None:
    encoder = ResidualEncoder(dimension=8, stem=(8, 1), stages=((16, 2), (16, 1)))
    pixels = torch.randint(0, 256, (16, 28, 28, 3), dtype=torch.uint8)
    encoder.train()
    for _ in range(3):
        encoder(pixels)
    folded = export.fold_batch_norms(encoder)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in folded.modules())
    assert torch.allclose(folded(pixels), encoder.eval()(pixels), atol=1e-5)


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]
) -> tuple[Path, loop.Trained]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny = dataclasses.replace(TINY, data=data)
    result = loop.fit(tiny, command="pg_siamese train tiny", folder=folder / "run", threads=1)
    files.write_model(result.model, folder / "tiny.onnx", result.metadata)
    return folder / "tiny.onnx", result


def test_weights_as_float16(trained: tuple[Path, loop.Trained], tmp_path: Path) -> None:
    """Half the size, and the same but for the rounding of the weights."""
    path, result = trained
    small = tmp_path / "small.onnx"
    files.write_model(export.to_onnx(result.encoder, half=True), small, result.metadata)
    kinds = {w.data_type for w in onnx.load(small).graph.initializer if np.prod(w.dims) >= 1024}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert small.stat().st_size < 0.65 * path.stat().st_size
    assert 0.9999 <= loop.check(result, small) < 1
    pixels = np.random.default_rng(0).integers(0, 256, (9, 28, 28, 3), np.uint8)
    assert export.embed_onnx(small, pixels).dtype == np.float32


def test_stated_figures_are_those_of_the_file(trained: tuple[Path, loop.Trained]) -> None:
    """Also where its weights are rounded, which moves distances."""
    path, result = trained
    learner = load_learner(path.parent / "run" / "last.ckpt")
    learner.experiment = dataclasses.replace(result.experiment, weights="float16")
    halved = loop.finish(learner, result.splits, command="", test=False)
    val = JoinedImages([each.val for each in result.splits])
    labels, sets = val.labels.numpy(), val.sets.numpy()
    for each in (result, halved):
        vectors = export.embed_onnx(each.model.SerializeToString(), val.pixels.numpy())
        pairs = pair_distances(Embedded(vectors, labels, sets), 20_000, 0, "cosine")
        found = calibrate(*pairs)
        assert each.metadata["calibration"] == {"weight": found.weight, "bias": found.bias}
    assert result.metadata["calibration"] != halved.metadata["calibration"]


def test_export_equals_pytorch(trained: tuple[Path, loop.Trained]) -> None:
    path, result = trained
    assert loop.check(result, path) >= 0.9999
    pixels = np.random.default_rng(0).integers(0, 256, (33, 28, 28, 3), np.uint8)
    expected = embed(result.encoder, torch.from_numpy(pixels))
    for batch_size in (1, 5, 33):
        found = export.embed_onnx(path, pixels, batch_size)
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() < 1e-4
        assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5


def test_a_file_of_another_encoder_is_noticed(trained: tuple[Path, loop.Trained]) -> None:
    path, result = trained
    other = dataclasses.replace(result, encoder=ResidualEncoder(16, (8, 2), ((16, 2), (32, 2))))
    with pytest.raises(loop.ExportError, match="cosine"):
        loop.check(other, path)


def test_it_learned(trained: tuple[Path, loop.Trained]) -> None:
    metrics = trained[1].metadata["training"]["metrics"]
    assert metrics["test"]["retrieval"]["grey"]["map5"] > 90
    assert metrics["test"]["retrieval"]["colour"]["map5"] > 90
    assert metrics["test"]["pairs"]["accuracy"] > 0.75


def test_the_file_keeps_to_the_contract(trained: tuple[Path, loop.Trained]) -> None:
    path, result = trained
    model = onnx.load(str(path))
    assert model.opset_import[0].version >= 17
    assert {item.key for item in model.metadata_props} == {"pg_siamese"}
    (image,), (embedding,) = model.graph.input, model.graph.output
    assert (image.name, embedding.name) == ("image", "embedding")
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert embedding.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    shape = image.type.tensor_type.shape.dim
    assert shape[0].dim_param
    assert [d.dim_value for d in shape[1:]] == [28, 28, 3]
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)
    assert {item.domain for item in model.opset_import} == {""}
    # Nothing of the machine that made it: stack traces, paths.
    assert b".py" not in path.read_bytes()
    metadata = files.read_metadata(path)
    assert metadata == json.loads(json.dumps(result.metadata))
    assert metadata["calibration"]["weight"] < 0
    assert 0 < metadata["threshold"] < 2
    assert metadata["domain"]["limits"]
    assert set(metadata["training"]["domain"]["refused"]) == {"validation", "test"}
    assert set(metadata["training"]["domain"]["refused"]["test"]) == {"grey", "colour"}
    assert metadata["classes"][0] == "grey: 0"
    assert metadata["input"] == {
        "width": 28,
        "height": 28,
        "channels": 3,
        "resize": "stretch",
        "interpolation": "bicubic",
    }


def test_metadata_says_how_it_was_made(
    trained: tuple[Path, loop.Trained], data: tuple[str, ...]
) -> None:
    metadata = trained[1].metadata
    training = metadata["training"]
    assert (metadata["labels"], metadata["metric"]) == ("class", "cosine")
    assert (training["experiment"], training["seed"]) == ("tiny", 0)
    assert [item["spec"] for item in training["data"]] == list(data)
    assert [item["file"] for item in training["data"]] == ["grey.npz", "colour.npz"]
    assert training["objective"] == "cosface"


def test_a_run_keeps_its_figures(trained: tuple[Path, loop.Trained]) -> None:
    folder = trained[0].parent / "run"
    rows = json.loads((folder / "metrics.json").read_text())
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert all({"train_loss", "train_accuracy"} <= set(row) for row in rows)
    figures = {"val_loss", "val_accuracy", "val_map5", "val_map5/grey"}
    assert [figures <= set(row) for row in rows] == [False, True, False, True]
    assert list(folder.rglob("events.out.tfevents*"))


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


def test_one_seed_gives_one_encoder(tmp_path: Path, data: tuple[str, ...]) -> None:
    short = dataclasses.replace(TINY, epochs=1, data=data)
    first, second, other = (
        loop.fit(
            dataclasses.replace(short, seed=seed),
            command="",
            folder=tmp_path / str(number),
            threads=1,
            test=False,
        ).encoder.state_dict()
        for number, seed in enumerate((0, 0, 1))
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_a_resumed_run_ends_where_a_whole_one_does(
    tmp_path: Path, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = dataclasses.replace(TINY, data=data)
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


def test_training_stops_early(tmp_path: Path, data: tuple[str, ...]) -> None:
    settings = dataclasses.replace(
        TINY.validation, every=1, patience=1, monitor="train_accuracy", mode="min", keep="best"
    )
    loop.fit(
        dataclasses.replace(TINY, data=data, epochs=30, validation=settings),
        command="",
        folder=tmp_path,
        threads=1,
        test=False,
    )
    assert len(json.loads((tmp_path / "metrics.json").read_text())) < 15


def test_the_rate_falls_where_validation_gets_no_better(
    tmp_path: Path, data: tuple[str, ...]
) -> None:
    # Stripes are easy: mAP@5 is 100 from the first epoch on, and so never better.
    settings = dataclasses.replace(TINY.validation, every=1)
    optimiser = dataclasses.replace(
        TINY.optimiser, schedule="plateau", patience=2, learning_rate=1e-3
    )
    loop.fit(
        dataclasses.replace(TINY, data=data, epochs=7, validation=settings, optimiser=optimiser),
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


def test_bfloat16_is_for_training_alone(data: tuple[str, ...]) -> None:
    experiment = dataclasses.replace(TINY, data=data, precision="bfloat16")
    learner = MetricLearner(experiment, ("grey",), ("grey: across", "grey: down"))
    seen = []
    stem = learner.encoder.get_submodule("stem")
    stem.register_forward_hook(lambda *given: seen.append(given[-1].dtype))
    pixels = torch.zeros((2, 28, 28, 3), dtype=torch.uint8)
    for training in (True, False):
        assert learner.train(training).encode(pixels).dtype == torch.float32
    assert seen == [torch.bfloat16, torch.float32]
