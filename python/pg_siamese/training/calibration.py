"""From a distance to a decision: match probability and threshold, fitted on pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve

from pg_siamese.training.evaluation import Embedded
from pg_siamese.training.sampling import balanced_pairs


@dataclass(frozen=True)
class Calibration:
    """P(match) = sigmoid(weight * distance + bias); a match below `threshold`.

    Distance is the cosine distance, 1 - cosine, from 0 to 2.
    """

    weight: float
    bias: float
    threshold: float


@dataclass(frozen=True)
class PairScores:
    """How well distances tell matching pairs: shares from 0 to 1, and the mean log loss."""

    accuracy: float
    auc: float
    log_loss: float


def pair_distances(
    embedded: Embedded, count: int, seed: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Draw pairs, half and half, and return their cosine distances and whether they match."""
    first, second, match = balanced_pairs(embedded.labels, embedded.sets, count, seed)
    cosine = np.einsum("nd,nd->n", embedded.vectors[first], embedded.vectors[second])
    return 1.0 - cosine.astype(np.float64), match


def calibrate(distances: npt.NDArray[np.float64], match: npt.NDArray[np.bool_]) -> Calibration:
    """Fit the logistic regression, and choose the threshold of best balanced accuracy."""
    model = LogisticRegression(C=1e6).fit(distances[:, None], match)
    false, true, thresholds = roc_curve(match, -distances, drop_intermediate=False)
    best = int(np.argmax(true - false))
    at = -float(thresholds[best])
    beyond = distances[distances > at]
    # Half way to the next distance seen, so that no pair lies on the threshold.
    threshold = (at + float(beyond.min())) / 2 if len(beyond) else at
    return Calibration(float(model.coef_[0, 0]), float(model.intercept_[0]), threshold)


def score_pairs(
    distances: npt.NDArray[np.float64], match: npt.NDArray[np.bool_], calibration: Calibration
) -> PairScores:
    """Score a calibration on pairs that it was not fitted on."""
    logit = calibration.weight * distances + calibration.bias
    loss = np.logaddexp(0, np.where(match, -logit, logit)).mean()
    accuracy = ((distances <= calibration.threshold) == match).mean()
    return PairScores(float(accuracy), float(roc_auc_score(match, -distances)), float(loss))
