"""Objectives on triplets: is the anchor nearer to its positive than to its negative?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import Tensor, nn

from pg_siamese.training.objectives.base import Objective, Outcome
from pg_siamese.training.reproductions.pairs import distance


class Triplet(Objective):
    """Triplet loss with a margin, of pytorch-metric-learning (Schroff et al. 2015).

    ``mining`` "none" takes the triplets that the sampler drew. "semihard", "hard" and "all" look
    for them in a batch of single images (the library's TripletMarginMiner).
    """

    summary = "Triplet loss"

    def __init__(
        self,
        dimension: int,
        classes: int,
        metric: str,
        margin: float = 0.2,
        mining: str = "none",
    ) -> None:
        super().__init__(dimension, classes, metric)
        if mining not in ("none", "semihard", "hard", "all"):
            raise ValueError(f'mining "{mining}" is none of none, semihard, hard, all')
        self.takes = "triplets" if mining == "none" else "classes"
        measure = (
            CosineSimilarity() if metric == "cosine" else LpDistance(normalize_embeddings=False)
        )
        self.loss = TripletMarginLoss(margin=margin, distance=measure)
        self.miner = (
            None
            if mining == "none"
            else TripletMarginMiner(margin=margin, type_of_triplets=mining, distance=measure)
        )

    def indices(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the places of anchors, positives and negatives in the batch."""
        if self.miner is not None:
            mined: tuple[Tensor, Tensor, Tensor] = self.miner(embeddings, labels)
            return mined
        first, second, third = torch.arange(len(labels), device=labels.device).chunk(3)
        return first, second, third

    def forward(self, embeddings: Tensor, labels: Tensor) -> Outcome:
        """Judge triplets. Right is one whose anchor is nearer to its positive."""
        anchor, positive, negative = chosen = self.indices(embeddings, labels)
        loss: Tensor = self.loss(embeddings, labels, chosen)
        if not len(anchor):
            return Outcome(loss)
        near = distance(embeddings[anchor], embeddings[positive], self.metric)
        far = distance(embeddings[anchor], embeddings[negative], self.metric)
        # Of mined triplets only the difficult ones are there: their share says nothing.
        right = (near < far).float().mean() if self.miner is None else None
        return Outcome(loss, right)


class TripletCrossEntropy(Triplet):
    """Triplet loss and the categorical cross entropy of a linear layer on the embedding.

    The layer's inputs are multiplied by ``scale``: those of a unit vector are too small for a
    softmax to become sure of anything. ``weight`` is that of the cross entropy.
    """

    summary = "Triplet loss and categorical cross entropy"

    def __init__(
        self,
        dimension: int,
        classes: int,
        metric: str,
        margin: float = 0.2,
        mining: str = "none",
        weight: float = 1.0,
        scale: float = 10.0,
    ) -> None:
        super().__init__(dimension, classes, metric, margin, mining)
        self.classifier = nn.Linear(dimension, classes)
        self.weight = weight
        self.scale = scale

    def forward(self, embeddings: Tensor, labels: Tensor) -> Outcome:
        """Judge triplets and classes. Right is a class that the linear layer tells."""
        logits = self.classifier(embeddings * self.scale)
        loss = super().forward(embeddings, labels).loss
        loss = loss + self.weight * F.cross_entropy(logits, labels)
        return Outcome(loss, (logits.argmax(dim=1) == labels).float().mean())
