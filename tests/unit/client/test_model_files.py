"""ONNX files whose weights lie in a file beside them: the client puts them inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from pg_siamese.client.connection import CommandError
from pg_siamese.client.models import read_model
from pg_siamese_server.encoding.registration import inspect_model
from tests.support import grid_encoder


def written(folder: Path, **about: str) -> Path:
    """A model with its one constant in a file; returns its path."""
    model = onnx.load_from_string(grid_encoder(("n", 3, 8, 8), pool=4, offset=0.5))
    tensor = model.graph.initializer[0]
    folder.mkdir(exist_ok=True)
    (folder / "m.onnx.data").write_bytes(b"??" + np.array([0.5], "<f4").tobytes() + b"!!")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "m.onnx.data", "offset": "2", "length": "4"} | about).items():
        if value:
            tensor.external_data.add(key=key, value=value)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_are_taken_in(tmp_path: Path) -> None:
    path = written(tmp_path)
    data = read_model(path)
    spec, dimension, _ = inspect_model(data, {})
    assert (spec.input.width, dimension) == (8, 12)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": np.zeros((1, 3, 8, 8), np.float32)})
    np.testing.assert_array_equal(found, np.full((1, 12), 0.5, np.float32))
    assert read_model(path) == data  # so that registering it again changes nothing


def test_files_without_any_stay_as_they_are(tmp_path: Path) -> None:
    for content in (grid_encoder(("n", 3, 8, 8), pool=4), b"", b"no model", b"\x89PNG"):
        path = tmp_path / "m.onnx"
        path.write_bytes(content)
        assert read_model(path) == content


def test_what_torch_writes(tmp_path: Path) -> None:
    torch: Any = pytest.importorskip("torch")
    layers = (torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    path = tmp_path / "m.onnx"
    options = {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
    net = torch.nn.Sequential(*layers).eval()
    torch.onnx.export(net, (torch.zeros(2, 3, 16, 16),), str(path), **options)
    assert (tmp_path / "m.onnx.data").exists()  # the reason for all this
    spec, dimension, _ = inspect_model(read_model(path), {})
    assert (spec.input.width, dimension) == (16, 8)


@pytest.mark.parametrize(
    "location", ["/etc/hostname", "../m.onnx.data", "sub/m.data", "..", ".", "", "a\\b", "a\0b"]
)
def test_only_files_beside_the_model_are_read(tmp_path: Path, location: str) -> None:
    path = written(tmp_path / "model", location=location)
    (tmp_path / "m.onnx.data").write_bytes(b"secret")
    with pytest.raises(CommandError, match="not a file beside the model"):
        read_model(path)


def test_links_that_lead_out(tmp_path: Path) -> None:
    path = written(tmp_path / "model")
    (tmp_path / "secret").write_bytes(b"x" * 100)
    (tmp_path / "model" / "m.onnx.data").unlink()
    (tmp_path / "model" / "m.onnx.data").symlink_to(tmp_path / "secret")
    with pytest.raises(CommandError, match="leads out of the model's folder"):
        read_model(path)


def test_missing_or_short(tmp_path: Path) -> None:
    path = written(tmp_path)
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(CommandError, match=r"m\.onnx\.data: no such file"):
        read_model(path)
    for about in ({"length": "400"}, {"offset": "99"}, {"offset": "-1"}, {"length": "-2"}):
        with pytest.raises(CommandError, match="too short"):
            read_model(written(tmp_path, **about))
    with pytest.raises(CommandError, match="no valid offset"):
        read_model(written(tmp_path, offset="x"))


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    size = path.stat().st_size
    for limit, message in ((size + 3, "bytes with its weights"), (size - 1, r"bytes$")):
        monkeypatch.setattr("pg_siamese.client.models.MAX_ONNX_BYTES", limit)
        with pytest.raises(CommandError, match=f"larger than {limit} {message}"):
            read_model(path)
