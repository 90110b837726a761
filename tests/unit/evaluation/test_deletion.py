"""Similarity maps: to delete what they show costs more than to delete as much elsewhere."""

from __future__ import annotations

import numpy as np

from pg_siamese.datasets import load_fashion_mnist
from pg_siamese.evaluation.deletion import delete, hottest, same_class_pairs
from pg_siamese.evaluation.model import model_pixels, open_model
from tests.conftest import MODELS


def test_the_hot_tenth_matters() -> None:
    """Figures of more pairs are in bench/."""
    model = open_model(MODELS / "fashion_mnist.onnx")
    clothes = load_fashion_mnist("train").select(slice(1000))
    random = np.random.default_rng(1)
    pairs = same_class_pairs(model_pixels(clothes, model.spec), clothes.labels, 25, random)
    found = [delete(model.encoder, one, other, 125, random) for one, other in pairs]
    for way in ("blurred", "mean"):
        hot, elsewhere = np.array([getattr(each, way) for each in found]).T
        assert np.mean(hot > elsewhere) >= 0.7
        assert hot.mean() > 2 * elsewhere.mean()


def test_hottest() -> None:
    heat = np.arange(40.0).reshape(4, 10)
    assert hottest(heat).sum() == 4 and hottest(heat)[3, 6:].all()
    assert hottest(np.zeros((2, 2))).sum() == 1


def test_pairs_are_of_one_class() -> None:
    pixels = np.arange(6, dtype=np.uint8)[:, None, None, None]
    labels = np.array([0, 1, 0, 1, 0, 1])
    random = np.random.default_rng(0)
    for one, other in same_class_pairs(pixels, labels, 20, random):
        assert one != other and (int(one.item()) - int(other.item())) % 2 == 0
