"""The contrastive loss of the Siamese network on MedMNIST."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pg_siamese.training.objectives.base import Outcome
from pg_siamese.training.reproductions.pairs import SiameseHead, halves


class SigmoidContrastive(SiameseHead):
    """Contrastive loss on the sigmoid of the logit, as in the Siamese network on MedMNIST.

    mean((1 - y) p² + y max(margin - p, 0)²), p = sigmoid(logit), y = 1 for a pair of different
    labels.
    """

    summary = "Contrastive loss on the sigmoid of a linear layer on the distance"

    def __init__(self, dimension: int, classes: int, metric: str, margin: float = 1.0) -> None:
        super().__init__(dimension, classes, metric)
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Outcome:
        """Judge pairs."""
        first, second = halves(labels)
        different = first != second
        p = torch.sigmoid(self.logit(embeddings))
        loss = torch.where(different, F.relu(self.margin - p).square(), p.square()).mean()
        return Outcome(loss, ((p > 0.5) == different).float().mean())
