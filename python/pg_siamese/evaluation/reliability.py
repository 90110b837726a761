"""Is the match probability right? Predicted and observed shares of matches."""

from __future__ import annotations

from typing import Any

import numpy as np

from pg_siamese.evaluation.bootstrap import DRAWS, TAILS
from pg_siamese.evaluation.pairs import Calibration, Flags, balanced_pairs
from pg_siamese.evaluation.retrieval import Embedded, Floats, Integers, distances

BINS = 10


def reliability(
    embedded: Embedded, calibration: Calibration, metric: str, *, pairs: int, seed: int
) -> dict[str, Any]:
    """Compare predicted probabilities of a match with shares of matches, in bins of equal size.

    Pairs are half and half, as ``balanced_pairs`` draws them. Intervals of 95 % come from a
    bootstrap over images, or over groups if these are known: a pair counts as often as both of its
    sides are drawn (Owen 2007, "The pigeonhole bootstrap"). Pairs share images, so drawing pairs
    would give intervals that are too narrow.

    Args:
        embedded: embeddings of the split.
        calibration: what gives the probabilities.
        metric: ``cosine`` or ``l2``.
        pairs: number of pairs.
        seed: seed of the pairs and of the bootstrap.

    Returns:
        ``expected_calibration_error``, the mean of |predicted - observed| over the pairs' bins, and
        ``bins`` with ``predicted``, ``observed``, ``low``, ``high`` and ``share`` of the pairs.

    Raises:
        ValueError: there is no pair of one kind.
    """
    first, second, match = balanced_pairs(
        embedded.labels, embedded.sets, pairs, seed, embedded.groups
    )
    apart = distances(embedded.vectors[first], embedded.vectors[second], metric)
    probability = np.exp(-np.logaddexp(0, -(calibration.weight * apart + calibration.bias)))
    bins = quantile_bins(probability)
    pairs_of_bin = np.bincount(bins)
    predicted = np.bincount(bins, probability) / pairs_of_bin
    observed = np.bincount(bins, match) / pairs_of_bin
    low, high = np.nanquantile(_drawn(embedded, (first, second), bins, match, seed), TAILS, axis=0)
    share = pairs_of_bin / len(match)
    columns = {
        "predicted": predicted,
        "observed": observed,
        "low": low,
        "high": high,
        "share": share,
    }
    return {
        "expected_calibration_error": float((share * np.abs(predicted - observed)).sum()),
        "bins": {
            str(number + 1): {key: float(column[number]) for key, column in columns.items()}
            for number in range(len(share))
        },
    }


def _drawn(
    embedded: Embedded, pairs: tuple[Integers, Integers], bins: Integers, match: Flags, seed: int
) -> Floats:
    """Return the shares of matches (draws, bins), NaN if no pair of a bin is drawn."""
    groups = np.arange(len(embedded.labels)) if embedded.groups is None else embedded.groups
    units = np.unique(groups, return_inverse=True)[1]
    first, second = (units[side] for side in pairs)
    count = int(units.max()) + 1
    random = np.random.default_rng(seed)
    shares = np.full((DRAWS, int(bins.max()) + 1), np.nan)
    for draw in shares:
        times = np.bincount(random.integers(0, count, count), minlength=count)
        weights = times[first] * times[second]
        total = np.bincount(bins, weights)
        np.divide(np.bincount(bins, weights * match), total, out=draw, where=total > 0)
    return shares


def quantile_bins(values: Floats) -> Integers:
    """Return the bin (N,) of each value."""
    edges = np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1])
    return np.unique(np.searchsorted(edges, values), return_inverse=True)[1]
