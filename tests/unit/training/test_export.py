"""Export to ONNX: the same embeddings, and a file that keeps to the contract."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from pg_siamese.training import export, files, loop
from pg_siamese.training.learner import embed
from pg_siamese.training.networks.residual import ResidualEncoder


def test_folding_batch_norms_changes_nothing_but_the_speed() -> None:
    encoder = ResidualEncoder(dimension=8, stem=(8, 1), stages=((16, 2), (16, 1)))
    pixels = torch.randint(0, 256, (16, 28, 28, 3), dtype=torch.uint8)
    encoder.train()
    for _ in range(3):
        encoder(pixels)
    folded = export.fold_batch_norms(encoder)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in folded.modules())
    assert torch.allclose(folded(pixels), encoder.eval()(pixels), atol=1e-5)


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
    size = {"width": 28, "height": 28, "channels": 3}
    assert metadata["input"] == size | {"resize": "stretch", "interpolation": "bicubic"}
