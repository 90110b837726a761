"""Predicted and observed shares of matches, and their intervals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from pg_siamese.evaluation.pairs import Calibration, balanced_pairs, calibrate, pair_distances
from pg_siamese.evaluation.reliability import reliability
from pg_siamese.evaluation.retrieval import Embedded, distances
from tests.unit.evaluation.embeddings import embedded


def points(count: int = 120, seed: int = 0) -> Embedded:
    """Two classes that overlap, in three dimensions."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    middle = np.array([[1.0, 0, 0], [0, 1, 0]])[labels]
    vectors = middle + random.normal(0, 0.5, (count, 3))
    return embedded(vectors.astype(np.float32), labels.tolist())


def fitted(images: Embedded) -> Calibration:
    return calibrate(*pair_distances(images, 4000, 5, "l2"))


def columns(figures: dict[str, Any], *keys: str) -> list[np.ndarray]:
    bins = figures["bins"].values()
    return [np.array([each[key] for each in bins]) for key in keys]


def test_bins_are_those_of_scikit_learn() -> None:
    images = points()
    calibration = fitted(images)
    figures = reliability(images, calibration, "l2", pairs=3000, seed=1)
    first, second, match = balanced_pairs(images.labels, images.sets, 3000, 1)
    apart = distances(images.vectors[first], images.vectors[second], "l2")
    probability = 1 / (1 + np.exp(-(calibration.weight * apart + calibration.bias)))
    observed, predicted = calibration_curve(match, probability, n_bins=10, strategy="quantile")
    found = columns(figures, "predicted", "observed", "share")
    assert np.allclose(found[0], predicted)
    assert np.allclose(found[1], observed)
    assert np.allclose(found[2], 0.1, atol=0.01)
    error = np.sum(found[2] * np.abs(predicted - observed))
    assert figures["expected_calibration_error"] == pytest.approx(error)


def test_a_calibration_that_is_too_sure_has_a_greater_error() -> None:
    images = points()
    calibration = fitted(images)
    sure = replace(calibration, weight=10 * calibration.weight, bias=10 * calibration.bias)
    good, bad = (
        reliability(images, each, "l2", pairs=3000, seed=1)["expected_calibration_error"]
        for each in (calibration, sure)
    )
    assert good < 0.05 < 0.1 < bad


def test_intervals_are_around_what_is_observed_and_narrow_with_more_images() -> None:
    widths = []
    for count in (60, 960):
        images = points(count)
        figures = reliability(images, fitted(images), "l2", pairs=8000, seed=1)
        low, observed, high = columns(figures, "low", "observed", "high")
        assert (low <= observed).all() and (observed <= high).all()
        widths.append(float((high - low).mean()))
    assert widths[1] < 0.5 * widths[0]


def test_groups_are_drawn_whole() -> None:
    # Of each image eight copies: no more is known than by one.
    images = points(60)
    copies = embedded(
        np.repeat(images.vectors, 8, axis=0), np.repeat(images.labels, 8).astype(int).tolist()
    )
    grouped = replace(copies, groups=np.repeat(np.arange(60), 8))
    widths = {}
    for name, each in (("single", images), ("copies", copies), ("grouped", grouped)):
        figures = reliability(each, fitted(images), "l2", pairs=8000, seed=1)
        low, high = columns(figures, "low", "high")
        widths[name] = float((high - low).mean())
    assert widths["grouped"] == pytest.approx(widths["single"], rel=0.25)
    assert widths["copies"] < 0.6 * widths["grouped"]


def test_equal_probabilities_share_a_bin() -> None:
    images = embedded(np.repeat(np.eye(2, dtype=np.float32), 20, axis=0), [0] * 20 + [1] * 20)
    figures = reliability(images, Calibration(-4, 2, 0.5), "cosine", pairs=400, seed=0)
    predicted, observed, share = columns(figures, "predicted", "observed", "share")
    assert predicted == pytest.approx([1 / (1 + np.exp(2)), 1 / (1 + np.exp(-2))])
    assert observed.tolist() == [0, 1]
    assert share.tolist() == [0.5, 0.5]
    assert list(figures["bins"]) == ["1", "2"]
