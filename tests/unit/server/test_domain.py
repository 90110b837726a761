"""The domain of an encoder: which images its match probability holds for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pg_siamese.datasets import DataNotFoundError, open_dataset
from pg_siamese.evaluation.domain import (
    domain_errors,
    false_matches,
    fit_domain,
    other_images,
    refused,
)
from pg_siamese_server.encoding.domain import Domain
from pg_siamese_server.encoding.encoder import Encoder
from pg_siamese_server.encoding.registration import inspect_model
from pg_siamese_server.encoding.specification import InputSpec, ModelSpec
from pg_siamese_server.errors import ModelError
from tests.conftest import MODELS
from tests.support import Array, grid_encoder

# At 0 0, 1 0 and 0 -10; nothing is shrunk.
BALLS = Domain(bytes([0, 0, 10, 0, 0, 156]), 0.1, (0.25, 0.01, 4.0))


def test_vectors_in_a_ball_are_inside() -> None:
    points = np.array([[0, 0.4], [0, 0.6], [1, 0.05], [1, 0.15], [0, -11.9], [3, -10]], np.float32)
    assert BALLS.contains(points).tolist() == [True, False, True, False, True, False]


def test_shrunk_balls_are_longer() -> None:
    # By three quarters along 3 4, whatever the length of that.
    shrunk = Domain(bytes([0, 0]), 0.1, (1.0,), bytes([30, 40]), (0.75,))
    points = np.array([[2.3, 3.1], [-2.3, -3.1], [2.5, 3.3], [0.79, -0.59], [0.81, -0.61]])
    assert shrunk.contains(points).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("length", [1.0, 1000.0])
def test_balls_are_what_they_say(length: float) -> None:
    random = np.random.default_rng(0)
    centres = random.integers(-127, 128, (20, 16), np.int8)
    scale = length / 127
    axes = np.rint(np.linalg.qr(random.normal(size=(16, 5))).Q.T * 127).astype(np.int8)
    exact = np.linalg.qr(axes.T.astype(float)).Q
    shrink = random.uniform(0, 0.9, 5)
    stretched = np.eye(16) - exact @ np.diag(shrink) @ exact.T
    limits = tuple((random.uniform(8, 12, 20) * length**2).tolist())
    points = (random.normal(size=(500, 16)) * length).astype(np.float32)
    squares = (((points[:, None] - centres * scale) @ stretched) ** 2).sum(axis=2)
    expected = (squares <= np.array(limits)).any(axis=1)
    assert 0 < expected.sum() < len(points)
    domain = Domain(centres.tobytes(), scale, limits, axes.tobytes(), tuple(shrink.tolist()))
    assert (domain.contains(points) == expected).all()
    np.testing.assert_allclose(domain.squares(points), squares / np.array(limits), rtol=1e-6)


def test_domain_survives_json() -> None:
    size = InputSpec(8, 8)
    spec = ModelSpec(size, weight=-2.0, bias=1.0, domain=BALLS)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    # A model registered by a version without domains is the same as before.
    assert "domain" not in ModelSpec(size).to_json()
    assert ModelSpec.from_json(ModelSpec(size).to_json()).domain is None
    assert ModelSpec(size).is_inside(np.ones((3, 2), np.float32)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"centres": "not base64!"},
        {"centres": ""},
        {"centres": "AAAA", "limits": [1.0, 1.0]},
        {"centres": None},
        {"scale": 0},
        {"scale": "1"},
        {"limits": []},
        {"limits": 3},
        {"limits": [1.0, -1.0, 1.0]},
        {"limits": [1.0, True, 1.0]},
        {"limits": [1.0, float("inf"), 1.0]},
        {"directions": "AQE="},
        {"shrink": [0.5]},
        {"directions": "AQE=", "shrink": [1.0]},
        {"directions": "AQE=", "shrink": [-0.1]},
        {"directions": "AQEBAQEB", "shrink": [0.1, 0.1, 0.1]},
    ],
    ids=str,
)
def test_domain_that_is_none(change: dict[str, Any]) -> None:
    missing = {key: value for key, value in BALLS.to_json().items() if key not in change}
    described: tuple[Any, ...] = (BALLS.to_json() | change, [], missing)
    for each in described:
        with pytest.raises(ModelError, match="domain is not understood"):
            Domain.from_json(each)


def test_domain_of_another_dimension_is_refused() -> None:
    described = json.dumps({"domain": BALLS.to_json()})
    model = grid_encoder(("n", 3, 8, 16), pool=4, metadata=described)
    with pytest.raises(ModelError, match="domain is not understood") as caught:
        inspect_model(model, {})
    assert caught.value.detail == "Its centres have 2 dimensions, the embeddings 24."


def test_foreign_models_have_a_domain_by_their_metadata() -> None:
    domain = Domain(bytes(24), 0.1, (0.5,))
    described = json.dumps({"domain": domain.to_json()})
    spec, _, _ = inspect_model(grid_encoder(("n", 3, 8, 16), pool=4, metadata=described), {})
    assert spec.domain == domain


def clusters(count: int, seed: int, length: float = 1.0) -> Array:
    """Points around three places, in eight dimensions."""
    random = np.random.default_rng(seed)
    places = np.eye(8)[:3] * length
    return (places[np.arange(count) % 3] + random.normal(0, 0.05 * length, (count, 8))).astype("f4")


@pytest.mark.parametrize(("metric", "length"), [("cosine", 1.0), ("l2", 30.0)])
def test_fitted_domain_holds_the_known_and_no_other(metric: str, length: float) -> None:
    domain = fit_domain(clusters(900, 0, length), clusters(300, 1, length), metric)
    assert refused(domain, clusters(300, 1, length), metric) <= 1.0
    assert refused(domain, clusters(300, 2, length), metric) <= 3.0
    others = (-np.eye(8) * length).astype("f4")
    assert refused(domain, others, metric) == 100
    # What lies between two kinds is of neither.
    between = (np.array([[1, 1, 0, 0, 0, 0, 0, 0]]) * (length / 2**0.5)).astype("f4")
    assert refused(domain, between, metric) == 100
    ours = {"test": {"ours": clusters(300, 2, length)}}
    found = domain_errors(domain, metric, ours, {"theirs": others})
    assert found["refused"]["test"]["ours"] <= 3.0
    assert found["accepted"] == {"theirs": 0.0}
    assert len(json.dumps(domain.to_json())) < 2000


@pytest.mark.parametrize("count", [1, 5, 40])
def test_few_images_or_the_same_ones_make_a_domain(count: int) -> None:
    same = np.tile(np.array([[0.6, 0.8]], "f4"), (count, 1))
    domain = fit_domain(same, same, "cosine")
    # 8 bits of a centre are not all of it: the ball is wide enough for its own images.
    assert domain.contains(same).all()
    assert not domain.contains(-same).any()


def test_other_images_are_of_the_size_asked_for() -> None:
    said: list[str] = []
    size = InputSpec(40, 24)
    found = dict(other_images(["zip:/nowhere.zip"], size, said.append))
    assert list(found) == ["pages of text", "noise", "plain colours"]
    assert {images.shape[1:] for images in found.values()} == {(24, 40, 3)}
    assert found["pages of text"].mean() > 150
    assert found["pages of text"].std(axis=(1, 2, 3)).min() > 5
    assert len(said) == 1
    assert "nowhere.zip" in said[0]


def test_a_false_match_is_inside_and_near() -> None:
    gallery = np.array([[0, 0.4], [3, -10]], np.float32)
    # Inside and near, inside only, near only, neither.
    found = np.array([[0, 0.3], [0, -0.4], [4, -10.2], [8, 8]], np.float32)
    with_domain = ModelSpec(InputSpec(8, 8), metric="l2", domain=BALLS)
    figures = false_matches(with_domain, 0.5, gallery, {"all": found, "two": found[:2]})
    assert figures["all"] == {"images": 4, "accepted": 50, "near": 25, "false_match": 25}
    assert figures["two"] == {"images": 2, "accepted": 100, "near": 50, "false_match": 50}
    anything = ModelSpec(InputSpec(8, 8), metric="l2")
    figures = false_matches(anything, 1.1, gallery, {"all": found})
    assert figures["all"] == {
        "images": 4,
        "accepted": 100,
        "near": 75,
        "false_match": 75,
    }


SHIPPED = pytest.mark.parametrize("name", ["medical", "clinical", "fashion_mnist"])


@SHIPPED
def test_shipped_models_know_their_own_images_and_no_pages(name: str) -> None:
    """The figures in the file and its card are found again, on images not chosen by."""
    model = (MODELS / f"{name}.onnx").read_bytes()
    spec, _, metadata = inspect_model(model, {})
    encoder, domain, metric = Encoder(model, spec), spec.domain, spec.metric
    assert domain
    stated = metadata["training"]["domain"]
    for kind, images in other_images((), spec.input):
        share = 100 - refused(domain, encoder.embed(images), metric)
        assert share == pytest.approx(stated["accepted"][kind], abs=1.0)
        assert share <= 5
    for source in metadata["training"]["data"]:
        try:
            test = open_dataset(source["spec"], input_spec=spec.input).test
        except (DataNotFoundError, OSError):
            continue
        if test.name in stated["refused"]["test"]:
            found = refused(domain, encoder.embed(test.rgb()[:400]), metric)
            assert found <= 5
            assert found == pytest.approx(stated["refused"]["test"][test.name], abs=2.5)


@SHIPPED
def test_card_states_the_errors(name: str) -> None:
    card = (MODELS / f"{name}.md").read_text(encoding="utf-8")
    _, _, metadata = inspect_model((MODELS / f"{name}.onnx").read_bytes(), {})
    stated = metadata["training"]["domain"]
    assert f"`{stated['command']}`" in card
    for kind, share in stated["accepted"].items():
        assert f"| {kind} | {share:.1f} |" in card
    for kind in stated["refused"]["test"]:
        shares = " | ".join(f"{part[kind]:.1f}" for part in stated["refused"].values())
        assert f"| {kind} | {shares} |" in card
