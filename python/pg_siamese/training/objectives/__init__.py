"""The objectives: what is asked of the embeddings of a batch.

Each takes embeddings (N, d) and labels (N,) of a batch in an order that the sampler and it agree
upon (`takes`), and gives the loss and the share of right decisions. A new objective is a new module
with a class, and a line in `OBJECTIVES`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from pg_siamese.training.experiments import ExperimentError
from pg_siamese.training.objectives.base import Objective, Outcome
from pg_siamese.training.objectives.classes import CosFace, CosFaceParts
from pg_siamese.training.objectives.pairs import (
    HadsellContrastive,
    PairCrossEntropy,
    SigmoidContrastive,
)
from pg_siamese.training.objectives.triplets import Triplet, TripletCrossEntropy

__all__ = ["OBJECTIVES", "Objective", "Outcome", "build_objective"]

OBJECTIVES: dict[str, type[Objective]] = {
    "contrastive_sigmoid": SigmoidContrastive,
    "contrastive_hadsell": HadsellContrastive,
    "pair_cross_entropy": PairCrossEntropy,
    "triplet": Triplet,
    "triplet_cross_entropy": TripletCrossEntropy,
    "cosface": CosFace,
    "cosface_parts": CosFaceParts,
}


def build_objective(
    name: str,
    dimension: int,
    classes: int,
    metric: str,
    options: Mapping[str, Any],
    sets: Sequence[int] | None = None,
) -> Objective:
    """Make an objective; raises `ExperimentError` for one, or an option, that there isn't.

    `sets` gives the number of each class's data set; without it, all are of one.
    """
    build = OBJECTIVES.get(name)
    if build is None:
        raise ExperimentError(f'no objective "{name}"; there are: {", ".join(OBJECTIVES)}')
    given = ("dimension", "classes", "metric", "sets")
    known = [key for key in inspect.signature(build).parameters if key not in given]
    for key in options:
        if key not in known:
            raise ExperimentError(
                f'objective "{name}" has no option "{key}"; there are: {", ".join(known) or "none"}'
            )
    numbers = [0] * classes if sets is None else list(sets)
    place = {"sets": numbers} if "sets" in inspect.signature(build).parameters else {}
    try:
        return build(dimension=dimension, classes=classes, metric=metric, **place, **options)
    except (TypeError, ValueError) as error:
        raise ExperimentError(f'objective "{name}": {error}') from error
