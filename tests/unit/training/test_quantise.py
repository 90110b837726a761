"""Encoders whose convolutions are of 8-bit integers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from pg_siamese.evaluation.retrieval import Embedded
from pg_siamese.training import export, files, loop, quantise
from pg_siamese.training.card import write_card
from pg_siamese.training.experiments import ExperimentError
from pg_siamese.training.learner import load_learner
from pg_siamese.training.networks.residual import ResidualEncoder

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 28, 28, 3), np.uint8)


@pytest.fixture(scope="module")
def exported() -> onnx.ModelProto:
    encoder = ResidualEncoder(16, (8, 1), ((16, 2), (16, 1), (32, 2)))
    return export.to_onnx(encoder.eval())


@pytest.fixture(scope="module")
def int8(exported: onnx.ModelProto) -> onnx.ModelProto:
    return quantise.quantised(exported, PIXELS)


@pytest.fixture(scope="module")
def finished(trained: tuple[Path, loop.Trained]) -> loop.Trained:
    """The encoder of ``trained``, exported once more, as integers."""
    path, result = trained
    learner = load_learner(path.parent / "run" / "last.ckpt")
    learner.experiment = result.experiment.changed(weights="int8")
    return loop.finish(learner, result.splits, command="", test=False)


def convolutions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "Conv"]


def test_all_but_the_first_convolutions_run_on_integers(
    exported: onnx.ModelProto, int8: onnx.ModelProto, tmp_path: Path
) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "as_it_runs.onnx")
    options.log_severity_level = 4  # it warns that the file is for this processor
    onnxruntime.InferenceSession(int8.SerializeToString(), options)
    kinds = [node.op_type for node in onnx.load(tmp_path / "as_it_runs.onnx").graph.node]
    every = len(convolutions(exported))
    assert every > quantise.FLOAT_FIRST
    assert kinds.count("QLinearConv") == every - quantise.FLOAT_FIRST
    assert sum(kind.endswith("Conv") for kind in kinds) == every


def test_weights_have_a_scale_per_channel(int8: onnx.ModelProto) -> None:
    stored = {item.name: item for item in int8.graph.initializer}
    weights = [item for item in stored.values() if item.data_type == onnx.TensorProto.INT8]
    shapes = {tuple(item.dims) for item in weights if len(item.dims) == 4}
    assert shapes
    for node in int8.graph.node:
        if node.op_type == "DequantizeLinear" and tuple(stored_dims(stored, node)) in shapes:
            assert list(stored[node.input[1]].dims) == [stored[node.input[0]].dims[0]]


def stored_dims(stored: dict[str, onnx.TensorProto], node: onnx.NodeProto) -> list[int]:
    return list(stored[node.input[0]].dims) if node.input[0] in stored else []


def test_the_error_is_small_beside_what_tells_images_apart(
    exported: onnx.ModelProto, int8: onnx.ModelProto
) -> None:
    before, after = (
        export.embed_onnx(model.SerializeToString(), PIXELS) for model in (exported, int8)
    )
    error = ((after - before) ** 2).sum(axis=1).mean()
    spread = ((before - before.mean(axis=0)) ** 2).sum(axis=1).mean()
    assert 0 < error < 0.1 * spread


def test_the_same_images_give_the_same_file(
    exported: onnx.ModelProto, int8: onnx.ModelProto
) -> None:
    before = exported.SerializeToString(deterministic=True)
    again, other = (quantise.quantised(exported, images) for images in (PIXELS, PIXELS[:1]))
    written = int8.SerializeToString(deterministic=True)
    assert again.SerializeToString(deterministic=True) == written
    assert other.SerializeToString(deterministic=True) != written
    assert exported.SerializeToString(deterministic=True) == before


def test_a_network_of_few_convolutions_is_refused() -> None:
    encoder = ResidualEncoder(16, (8, 2), ((16, 2), (32, 2)))
    small = export.to_onnx(encoder.eval())
    del small.graph.node[[node.op_type for node in small.graph.node].index("Conv")]
    with pytest.raises(ExperimentError, match="more than 6 convolutions: this one has 6"):
        quantise.quantised(small, PIXELS)


def test_calibration_images_are_of_validation(trained: tuple[Path, loop.Trained]) -> None:
    splits = trained[1].splits
    drawn = quantise.calibration_pixels(splits, 0)
    own = np.concatenate([each.val.rgb() for each in splits])
    assert np.array_equal(drawn, own)  # fewer than are drawn of a larger set
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantise, "CALIBRATION_IMAGES", 5)
        first, again, other = (quantise.calibration_pixels(splits, seed) for seed in (0, 0, 1))
    assert len(first) == 10
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_what_a_run_writes(finished: loop.Trained, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    files.write_model(finished.model, path, finished.metadata)
    cosine = loop.check(finished, path)
    assert cosine >= loop.COSINE_AT_LEAST
    assert {item.domain for item in onnx.load(path).opset_import} <= {"", "ai.onnx.ml"}
    assert files.read_metadata(path) == finished.metadata
    figures = finished.metadata["training"]["quantisation"]
    assert set(figures) == {"grey", "colour"}
    assert all(0.95 < each["cosine"] <= 1 and each["overlap"] <= 1 for each in figures.values())
    card = write_card(
        finished.experiment, finished.splits, finished.metadata, path, cosine, 1.0
    ).read_text()
    grey = figures["grey"]
    assert f"| grey | {grey['cosine']:.4f} | {grey['overlap']:.2f} | {grey['map5']:+.2f} |" in card
    assert "before quantisation |" in card
    assert "\n\n\n" not in card


def test_a_file_of_another_encoder_is_noticed(
    finished: loop.Trained, exported: onnx.ModelProto, tmp_path: Path
) -> None:
    path = tmp_path / "other.onnx"
    files.write_model(exported, path, finished.metadata)
    with pytest.raises(loop.ExportError, match="mean cosine"):
        loop.check(finished, path)
    files.write_model(finished.model, path, finished.metadata)
    other = dataclasses.replace(finished, unquantised=exported)
    with pytest.raises(loop.ExportError, match="cosine to PyTorch's embedding"):
        loop.check(other, path)


def test_agreement_is_counted_within_each_set() -> None:
    random = np.random.default_rng(0)
    gallery, queries = (random.normal(size=(count, 4)).astype(np.float32) for count in (80, 20))

    def embedded(vectors: np.ndarray) -> Embedded:
        places = np.arange(len(vectors))
        return Embedded(vectors, places % 3, places % 2)

    before = embedded(gallery), embedded(queries)
    same = quantise.agreement(before, before, ("a", "b"), "cosine", "class")
    assert same == {name: {"cosine": 1.0, "overlap": 1.0, "map5": 0.0} for name in "ab"}
    turned = queries.copy()
    turned[1::2] *= -1  # of set b: the farthest become the nearest
    after = embedded(gallery), embedded(turned)
    found = quantise.agreement(before, after, ("a", "b"), "cosine", "class")
    assert found["a"] == same["a"]
    assert found["b"]["cosine"] == -1
    assert found["b"]["overlap"] == 0
    assert found["b"]["map5"] != 0
    assert set(quantise.agreement(before, after, ("a", "b"), "cosine", "set")) == {"all"}
