"""What all objectives have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Outcome:
    """Loss (a scalar) and the share of right decisions from 0 to 1, if it makes any."""

    loss: Tensor
    accuracy: Tensor | None = None


class Objective(nn.Module, ABC):
    """A loss with its own parameters.

    Attributes:
        summary: what the objective is, for the model card.
        takes: the order of its batches. ``classes`` is single images in any order, ``pairs`` the
            first images of all pairs, then their second ones, and ``triplets`` all anchors, then
            their positives, then their negatives.
        has_head: whether it learns a calibration (see ``calibration``).
    """

    summary = ""
    has_head = False
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
