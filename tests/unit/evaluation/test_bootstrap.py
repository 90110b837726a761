"""Confidence intervals of means over queries."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pg_siamese.evaluation.bootstrap import DRAWS, drawn_means, interval


def width(bounds: np.ndarray) -> float:
    return float(bounds[0, 1] - bounds[0, 0])


def test_the_interval_of_a_share_is_that_of_the_normal_distribution() -> None:
    values = np.repeat([[0.0, 1.0]], 200, axis=1)
    drawn = drawn_means(values)
    assert drawn.shape == (DRAWS, 1)
    ((low, high),) = interval([drawn])
    deviation = math.sqrt(0.5 * 0.5 / 400)
    assert (low, high) == pytest.approx((0.5 - 1.96 * deviation, 0.5 + 1.96 * deviation), abs=0.005)


def test_figures_that_never_differ_have_no_width() -> None:
    values = np.array([[3.0] * 7, [0.0, 1.0] * 3 + [1.0]])
    (low, high), (lower, higher) = interval([drawn_means(values)])
    assert low == high == pytest.approx(3)
    assert lower < 4 / 7 < higher


def test_whole_groups_are_drawn() -> None:
    """Ten queries of a patient that all agree count as one, and large groups weigh more."""
    random = np.random.default_rng(0)
    of_groups = random.integers(0, 2, 40).astype(float)
    groups = np.repeat(np.arange(40) * 7, 10)
    together = interval([drawn_means(np.repeat(of_groups, 10)[None], groups)])
    alone = interval([drawn_means(of_groups[None])])
    assert together == pytest.approx(alone)
    apart = interval([drawn_means(np.repeat(of_groups, 10)[None])])
    assert width(apart) < 0.5 * width(together)
    values = np.arange(400.0)[None]
    # The names of groups make no difference.
    assert np.array_equal(drawn_means(values, -groups), drawn_means(values, groups))
    uneven = drawn_means(np.array([[0.0, 0, 0, 1]]), np.array([5, 5, 5, 9]))
    assert set(np.unique(uneven)) == {0, 0.25, 1}


def test_models_share_the_draws() -> None:
    random = np.random.default_rng(1)
    first, second = random.random((2, 3, 50))
    both = interval([drawn_means(first), drawn_means(second)])
    assert both == pytest.approx(interval([drawn_means((first + second) / 2)]))
    # Of opposite errors, the mean is certain. With draws of their own it would not be.
    assert width(interval([drawn_means(first), drawn_means(1 - first)])) == pytest.approx(0)
    assert width(interval([drawn_means(first), drawn_means(1 - first, seed=1)])) > 0.01
