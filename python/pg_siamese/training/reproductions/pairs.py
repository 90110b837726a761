"""What objectives on pairs have in common: distances of rows, and the Siamese head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pg_siamese.training.objectives.base import Objective


def distance(first: Tensor, second: Tensor, metric: str) -> Tensor:
    """Return the distances (N,) of rows: 1 - cosine for "cosine", Euclidean for "l2"."""
    if metric == "cosine":
        return 1 - F.cosine_similarity(first, second, dim=1)
    # The small number gives identical images a gradient that is not infinite.
    return torch.sqrt((first - second).square().sum(dim=1) + 1e-12)


def halves(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the second images of pairs."""
    first, second = batch.chunk(2)
    return first, second


class SiameseHead(Objective):
    """A linear layer from the distance of a pair to the logit of 'they are different'."""

    takes = "pairs"
    has_head = True

    def __init__(self, dimension: int, classes: int, metric: str) -> None:
        super().__init__(dimension, classes, metric)
        self.head = nn.Linear(1, 1)
        # The greater the distance, the likelier they differ, with even odds at a middling one.
        nn.init.constant_(self.head.weight, 4.0 if metric == "cosine" else 1.0)
        nn.init.constant_(self.head.bias, -2.0 if metric == "cosine" else -1.0)

    def logit(self, embeddings: Tensor) -> Tensor:
        """Return the logits (N / 2,) of 'different'."""
        apart = distance(*halves(embeddings), self.metric)
        logit: Tensor = self.head(apart[:, None])
        return logit[:, 0]

    def calibration(self) -> tuple[float, float]:
        """Return the head's weight and bias, turned from 'different' to 'match'."""
        return -float(self.head.weight.detach()), -float(self.head.bias.detach())
