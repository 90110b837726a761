"""What all objectives have in common, and distances of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Outcome:
    """Loss (a scalar) and the share of right decisions from 0 to 1, where it makes any."""

    loss: Tensor
    accuracy: Tensor | None = None


class Objective(nn.Module, ABC):
    """A loss with its own parameters; `takes` is the order of its batches.

    - "classes": single images in any order;
    - "pairs": the first images of all pairs, then their second ones;
    - "triplets": all anchors, then their positives, then their negatives.
    """

    takes = "classes"

    def __init__(self, dimension: int, classes: int, metric: str) -> None:
        super().__init__()
        self.metric = metric

    @abstractmethod
    def forward(self, embeddings: Tensor, labels: Tensor) -> Outcome:
        """Judge a batch: embeddings (N, d) with labels (N,)."""

    def calibration(self) -> tuple[float, float] | None:
        """Return weight and bias of P(match) = sigmoid(weight * distance + bias), or None."""
        return None


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
