"""Objectives on single images with their classes."""

from __future__ import annotations

from pytorch_metric_learning.losses import CosFaceLoss
from torch import Tensor

from pg_siamese.training.objectives.base import Objective, Outcome


class CosFace(Objective):
    """Cosine-margin softmax (CosFace, Wang et al. 2018), of pytorch-metric-learning.

    Its class vectors are thrown away after training.
    """

    def __init__(
        self,
        dimension: int,
        classes: int,
        metric: str,
        margin: float = 0.2,
        scale: float = 16.0,
    ) -> None:
        super().__init__(dimension, classes, metric)
        self.loss = CosFaceLoss(classes, dimension, margin=margin, scale=scale)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Outcome:
        """Judge single images; right is the class whose vector is nearest, without the margin."""
        loss: Tensor = self.loss(embeddings, labels)
        right = self.loss.get_logits(embeddings.detach()).argmax(dim=1) == labels
        return Outcome(loss, right.float().mean())
