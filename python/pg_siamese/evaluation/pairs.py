"""Do two images match? Pairs half and half, their distances, a calibration, and its scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pg_siamese.evaluation.retrieval import Embedded, Floats, Integers, distances

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Calibration:
    """P(match) = sigmoid(weight * distance + bias), and a match up to ``threshold``.

    Distance is that of the model's metric: 1 - cosine, from 0 to 2, or the Euclidean one.
    """

    weight: float
    bias: float
    threshold: float


@dataclass(frozen=True)
class PairScores:
    """How well distances tell matching pairs: shares from 0 to 1, and mean losses.

    ``contrastive_loss`` is mean((1 - y) p² + y max(1 - p, 0)²) with p = P(different) and y = 1 for
    a pair that doesn't match. Since p is never above 1 it is the Brier score of p.
    """

    accuracy: float
    auc: float
    log_loss: float
    contrastive_loss: float


def balanced_pairs(
    labels: Integers, sets: Integers, count: int, seed: int, groups: Integers | None = None
) -> tuple[Integers, Integers, Flags]:
    """Draw ``count`` pairs of images, half of which match (same label).

    The first image comes from each set equally often. Of the pairs that don't match, half are of
    one set (if there are other classes in it) and half of two sets (if there are other sets). So
    neither the easy nor the hard ones are all there is.

    Args:
        labels: joined labels (N,).
        sets: set numbers (N,).
        count: number of pairs.
        seed: seed of the draw.
        groups: groups (N,), such as patients, or None. Matching pairs are of two groups: those of
            one are too easy.

    Returns:
        First and second index (count,), and whether they match (count,).

    Raises:
        ValueError: there is no pair of one kind.
    """
    random = np.random.default_rng(seed)
    if len(np.unique(labels)) < 2:
        raise ValueError("no pair of different classes among these images")
    apart = np.arange(len(labels)) if groups is None else groups
    _, kinds, sizes = np.unique(
        np.stack([labels, apart]), axis=1, return_inverse=True, return_counts=True
    )
    shared = np.bincount(labels)[labels] > sizes[kinds.reshape(-1)]
    members = {int(s): np.flatnonzero(sets == s) for s in np.unique(sets)}
    paired = {s: found for s, i in members.items() if len(found := i[shared[i]])}
    if not paired:
        raise ValueError(
            f"no pair of one class among these images{'' if groups is None else ' in two groups'}"
        )
    first = np.empty(count, np.int64)
    second = np.empty(count, np.int64)
    match = np.arange(count) % 2 == 0
    for i in range(count):
        anchors = paired if match[i] else members
        anchor = int(random.choice(anchors[int(random.choice(list(anchors)))]))
        same_set, same_label = sets == sets[anchor], labels == labels[anchor]
        if match[i]:
            pool = same_label & (apart != apart[anchor])
        else:
            pool = same_set & ~same_label if i % 4 == 1 else ~same_set
            if not pool.any():
                pool = ~same_label
        first[i], second[i] = anchor, random.choice(np.flatnonzero(pool))
    return first, second, match


def pair_distances(
    embedded: Embedded, count: int, seed: int, metric: str = "cosine"
) -> tuple[Floats, Flags]:
    """Draw pairs, half and half, and return their distances and whether they match."""
    first, second, match = balanced_pairs(
        embedded.labels, embedded.sets, count, seed, embedded.groups
    )
    return distances(embedded.vectors[first], embedded.vectors[second], metric), match


def calibrate(distances: Floats, match: Flags) -> Calibration:
    """Fit the logistic regression, and choose the threshold of best balanced accuracy."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e6).fit(distances[:, None], match)
    threshold = best_threshold(distances, match)
    return Calibration(float(model.coef_[0, 0]), float(model.intercept_[0]), threshold)


def best_threshold(distances: Floats, match: Flags) -> float:
    """Return the distance up to which a pair counts as a match for the best balanced accuracy."""
    from sklearn.metrics import roc_curve

    false, true, thresholds = roc_curve(match, -distances, drop_intermediate=False)
    best = 1 + int(np.argmax((true - false)[1:]))  # the first one is infinite
    at = -float(thresholds[best])
    beyond = distances[distances > at]
    # Half way to the next distance seen, so that no pair lies on the threshold.
    return (at + float(beyond.min())) / 2 if len(beyond) else at


def score_pairs(distances: Floats, match: Flags, calibration: Calibration) -> PairScores:
    """Score a calibration on pairs that it was not fitted on."""
    from sklearn.metrics import roc_auc_score

    logit = calibration.weight * distances + calibration.bias
    log_loss = np.logaddexp(0, np.where(match, -logit, logit)).mean()
    accuracy = ((distances <= calibration.threshold) == match).mean()
    return PairScores(
        accuracy=float(accuracy),
        auc=float(roc_auc_score(match, -distances)),
        log_loss=float(log_loss),
        contrastive_loss=contrastive_loss(logit, match),
    )


def contrastive_loss(logit: Floats, match: Flags) -> float:
    """Return mean((1 - y) p² + y max(1 - p, 0)²): p = sigmoid(-logit) = P(different), y = ~match.

    ``logit`` (N,) is that of a match.
    """
    different = np.exp(-np.logaddexp(0, logit))
    loss = np.where(match, different**2, np.maximum(1 - different, 0) ** 2)
    return float(loss.mean())
