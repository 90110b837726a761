"""The encoders in models/: what they say of themselves holds, in ONNX Runtime alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime
import pytest

from pg_siamese.datasets import (
    DataNotFoundError,
    LabelledImages,
    load_fashion_mnist,
    load_medmnist,
    sha256,
)
from pg_siamese.evaluation.retrieval import nearest, retrieval
from tests.conftest import MODELS

NAMES = ("medical", "clinical", "fashion_mnist")


def open_model(name: str) -> tuple[onnxruntime.InferenceSession, dict[str, Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(MODELS / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
    )
    return session, json.loads(session.get_modelmeta().custom_metadata_map["pg_siamese"])


def embed(session: onnxruntime.InferenceSession, images: LabelledImages) -> np.ndarray:
    portions = np.split(images.rgb(), range(256, len(images), 256))
    return np.concatenate([session.run(None, {"image": part})[0] for part in portions])


@pytest.mark.parametrize("name", NAMES)
def test_graph_and_metadata_agree(name: str) -> None:
    session, metadata = open_model(name)
    (image,), (embedding,) = session.get_inputs(), session.get_outputs()
    size = metadata["input"]
    assert (image.name, image.type) == ("image", "tensor(uint8)")
    assert image.shape[1:] == [size["height"], size["width"], size["channels"]]
    assert (embedding.name, embedding.type) == ("embedding", "tensor(float)")
    assert embedding.shape[1:] == [metadata["dimension"]]
    assert (metadata["format"], metadata["name"], metadata["metric"]) == (1, name, "cosine")
    assert metadata["calibration"]["weight"] < 0
    assert 0 < metadata["threshold"] < 2
    assert metadata["classes"]
    for batch in (1, 7):
        pixels = np.random.default_rng(0).integers(0, 256, (batch, *image.shape[1:]), np.uint8)
        vectors = session.run(None, {"image": pixels})[0]
        assert vectors.shape == (batch, metadata["dimension"])
        assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_file_is_small_and_its_card_is_of_this_file(name: str) -> None:
    path = MODELS / f"{name}.onnx"
    _, metadata = open_model(name)
    assert path.stat().st_size < (10_000_000 if name == "clinical" else 2_000_000)
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert sha256(path) in card
    assert metadata["training"]["command"] in card
    for item in metadata["training"]["data"]:
        assert item["sha256"] in card
    assert "/" not in "".join(item["file"] for item in metadata["training"]["data"])


@pytest.mark.parametrize("name", ["breastmnist", "retinamnist"])
def test_stated_medical_figures_are_found_again(name: str) -> None:
    session, metadata = open_model("medical")
    try:
        gallery, queries = (load_medmnist(name, s, download=False) for s in ("train", "test"))
    except DataNotFoundError as error:
        pytest.skip(str(error))
    if sha256(gallery.files[0]) not in {item["sha256"] for item in metadata["training"]["data"]}:
        pytest.skip(f"{gallery.files[0].name} is another file than the one trained on")
    found = nearest(embed(session, queries), embed(session, gallery), 5)
    score = retrieval(gallery.labels[found], queries.labels).as_dict()
    stated = metadata["training"]["metrics"]["test"]["retrieval"][name]
    assert score == pytest.approx(stated, abs=0.01)


def test_fashion_mnist_neighbours_are_of_one_kind() -> None:
    session, metadata = open_model("fashion_mnist")
    try:
        gallery, queries = load_fashion_mnist("train"), load_fashion_mnist("test")
    except DataNotFoundError as error:
        pytest.skip(str(error))
    gallery, queries = gallery.select(slice(0, 5000)), queries.select(slice(0, 1000))
    found = nearest(embed(session, queries), embed(session, gallery), 5)
    score = retrieval(gallery.labels[found], queries.labels)
    # A twelfth of the gallery costs a little against the stated figure.
    stated = metadata["training"]["metrics"]["test"]["retrieval"]["fashion_mnist"]
    assert score.map5 > stated["map5"] - 4
