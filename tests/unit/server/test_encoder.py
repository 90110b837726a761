"""Running encoders: what goes into a graph, and what comes out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from pg_siamese_server.encoding import batches
from pg_siamese_server.encoding.encoder import Encoder, check_embedding
from pg_siamese_server.encoding.registration import inspect_model
from pg_siamese_server.encoding.specification import InputSpec, ModelSpec
from pg_siamese_server.errors import ImageError, ModelError
from tests.conftest import Pictures
from tests.support import Array, encode, graph, grid, grid_encoder
from tests.unit.server.common import CancelledError, cancel_at

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def noise() -> Array:
    return np.random.default_rng(1).integers(0, 256, (5, 8, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "shape", [("n", 3, 8, 16), (1, 3, 8, 16), (2, 3, 8, 16), ("n", 8, 16, 3)], ids=str
)
def test_float_input_is_normalised(shape: tuple[int | str, ...], noise: Array) -> None:
    model = grid_encoder(shape, pool=4)
    spec, _, _ = inspect_model(model, {"mean": list(MEAN), "std": list(STD)})
    found = Encoder(model, spec).embed(noise)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [grid(image, 4, MEAN, STD) for image in noise], atol=1e-4)


@pytest.mark.parametrize("shape", [("n", 8, 16, 3), ("n", 3, 8, 16), (4, 8, 16, 3)], ids=str)
def test_bytes_go_in_as_they_are(shape: tuple[int | str, ...], noise: Array) -> None:
    model = grid_encoder(shape, TensorProto.UINT8, pool=4)
    spec, _, _ = inspect_model(model, {})
    expected = [grid(image, 4, (0,) * 3, (1 / 255,) * 3) for image in noise]
    np.testing.assert_allclose(Encoder(model, spec).embed(noise), expected, rtol=1e-5)


def test_one_channel(noise: Array) -> None:
    grey = np.ascontiguousarray(noise[..., :1])
    model = grid_encoder(("n", 1, 8, 16), pool=4)
    spec, _, _ = inspect_model(model, {"mean": [0.5], "std": [0.25]})
    expected = [grid(image, 4, [0.5], [0.25]) for image in grey]
    np.testing.assert_allclose(Encoder(model, spec).embed(grey), expected, atol=1e-5)


@pytest.mark.law(8)
def test_equals_onnx_runtime_alone(onnx: bytes, pictures: Pictures) -> None:
    """The same pixels give the same vector."""
    spec, _, _ = inspect_model(onnx, {})
    pixels = pictures.pixels[:100]
    if pixels.ndim == 3:
        pixels = np.repeat(pixels[..., None], 3, axis=3)
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {session.get_inputs()[0].name: pixels})
    found = Encoder(onnx, spec).embed(pixels)
    assert (found * expected).sum(axis=1).min() >= 0.9999


@pytest.mark.law(5)
def test_batches_are_bounded_in_time_and_can_be_left(noise: Array) -> None:
    model = grid_encoder(("n", 3, 8, 16), pool=4)
    spec, _, _ = inspect_model(model, {})
    encoder = Encoder(model, spec)
    with pytest.raises(CancelledError):
        encoder.embed(noise, cancel_at(1))
    encoder = Encoder(model, spec)
    assert encoder.batch_size() == 1  # its speed is not known yet
    polls: list[int] = []
    encoder.embed(np.repeat(noise, 40, axis=0), lambda: polls.append(1))
    assert 1 < encoder.batch_size() <= 64
    assert 200 / 64 <= len(polls) <= 200


def test_the_file_is_not_kept() -> None:
    """ONNX Runtime's Python class keeps the bytes, next to the weights of the session."""
    data = grid_encoder(("n", 3, 8, 8), pool=4)
    before = sys.getrefcount(data)
    encoder = Encoder(data, ModelSpec(InputSpec(8, 8)))
    assert sys.getrefcount(data) == before
    assert encoder.run(np.zeros((1, 8, 8, 3), np.uint8)).shape == (1, 12)


@pytest.mark.parametrize(
    ("batch", "side", "most"), [("n", 28, 64), ("n", 144, 3), ("n", 512, 1), (8, 224, 8)]
)
def test_batches_of_larger_images_are_smaller(batch: int | str, side: int, most: int) -> None:
    """Unless the graph has a batch of its own."""
    model = grid_encoder((batch, 3, side, side), pool=side // 2)
    assert Encoder(model, ModelSpec(InputSpec(side, side))).max_batch == most


def test_few_batches_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the pixels of many large images are never in memory together."""
    read: list[int] = []
    when: list[tuple[int, int]] = []
    run = Encoder.run

    def noted(encoder: Encoder, pixels: Array, *more: Any) -> Array:
        when.append((len(read), len(pixels)))
        return run(encoder, pixels, *more)

    def rows() -> Iterator[tuple[int, bytes | None]]:
        for number in range(10):
            read.append(number)
            # A whole portion without a good image is among them.
            yield number, None if 3 < number < 8 else encode(np.full((9, 9), number + 1, np.uint8))

    monkeypatch.setattr(Encoder, "run", noted)
    model = grid_encoder(("n", 3, 400, 400), pool=200)
    failed: list[int] = []
    encoder = Encoder(model, ModelSpec(InputSpec(400, 400)))
    keys, embeddings = batches.embed(
        encoder, rows(), lambda key, _: failed.append(key), lambda: None
    )
    assert when == [(4, 1)] * 4 + [(10, 1)] * 2
    assert keys == [0, 1, 2, 3, 8, 9]
    assert failed == [4, 5, 6, 7]
    expected = grid(np.full((400, 400, 3), 10, np.uint8), 200, (0,) * 3, (1,) * 3)
    np.testing.assert_allclose(embeddings[-1], expected, atol=1e-4)
    assert len(embeddings) == 6
    assert batches.embed(encoder, iter(()), lambda *_: None, lambda: None)[0] == []


def test_graph_that_fails(noise: Array) -> None:
    table = np.zeros((1, 1), np.float32)
    nodes = [
        helper.make_node("ReduceMax", ["image"], ["most"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Cast", ["most"], ["place"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "place"], ["embedding"]),
    ]
    inputs = [("image", TensorProto.FLOAT, ("n", 3, 8, 16))]
    model = graph(nodes, inputs, constants={"table": table})
    encoder = Encoder(model, ModelSpec(InputSpec(16, 8), std=(1 / 255,) * 3))
    with pytest.raises(ModelError, match="cannot run") as caught:
        encoder.embed(noise)
    assert "\n" not in (caught.value.detail or "")


def test_embedding_without_distance() -> None:
    check_embedding(np.ones(3, np.float32), "cosine")
    check_embedding(np.zeros(3, np.float32), "l2")
    with pytest.raises(ImageError, match="length zero"):
        check_embedding(np.zeros(3, np.float32), "cosine")
    with pytest.raises(ImageError, match="not finite"):
        check_embedding(np.array([0, np.inf], np.float32), "l2")


def test_match_probability() -> None:
    size = InputSpec(8, 8)
    assert ModelSpec(size).match_probability(0.5) is None
    spec = ModelSpec(size, weight=-4.0, bias=2.0)
    assert spec.match_probability(0.5) == 0.5
    assert spec.match_probability(0.0) == pytest.approx(1 / (1 + np.exp(-2)))
    extreme = ModelSpec(size, weight=-1e30, bias=0.0)
    assert 0 <= (extreme.match_probability(1.0) or 0) < 1e-20
