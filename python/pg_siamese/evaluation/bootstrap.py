"""How sure a mean over queries is: the percentile bootstrap, over whole groups of queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pg_siamese.evaluation.retrieval import Floats, Integers

DRAWS = 2000
# Of the draws, an interval of 95 % lies between these quantiles.
TAILS = (0.025, 0.975)
# Draws x groups of one step: about 20 MB.
BLOCK_NUMBERS = 2_500_000


def drawn_means(values: Floats, groups: Integers | None = None, seed: int = 0) -> Floats:
    """Draw as many groups as there are, with replacement, and return the means of their queries.

    Args:
        values: figures of each query (F, Q).
        groups: groups of the queries (Q,), such as patients. By default each is one by itself.
        seed: seed of the draws.

    Returns:
        The means (DRAWS, F).
    """
    places = np.arange(values.shape[1])
    if groups is not None:
        # Numbered as they come, whatever their names, so that equal queries get equal draws.
        _, first, places = np.unique(groups, return_index=True, return_inverse=True)
        places = np.argsort(np.argsort(first))[places]
    sizes = np.bincount(places)
    sums = np.stack([np.bincount(places, weights=row) for row in values], axis=1)
    random, count = np.random.default_rng(seed), len(sizes)
    step = max(1, BLOCK_NUMBERS // count)
    means = np.empty((DRAWS, len(values)))
    for start in range(0, DRAWS, step):
        block = means[start : start + step]
        drawn = random.multinomial(count, np.full(count, 1 / count), size=len(block))
        block[:] = (drawn @ sums) / (drawn @ sizes)[:, None]
    return means


def interval(drawn: Sequence[Floats]) -> Floats:
    """Return the interval (F, 2) of the mean over models, from the draws (DRAWS, F) of each."""
    bounds: Floats = np.quantile(np.mean(drawn, axis=0), TAILS, axis=0).T
    return bounds
