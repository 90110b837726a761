"""Objectives on pairs of images: do they match?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pg_siamese.training.objectives.base import Objective, Outcome, distance, halves


class _SiameseHead(Objective):
    """A linear layer from the distance of a pair to the logit of 'they are different'."""

    takes = "pairs"

    def __init__(self, dimension: int, classes: int, metric: str) -> None:
        super().__init__(dimension, classes, metric)
        self.head = nn.Linear(1, 1)
        # The greater the distance, the likelier they differ; even odds at a middling one.
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


class SigmoidContrastive(_SiameseHead):
    """Contrastive loss on the sigmoid of the logit, as in the Siamese network on MedMNIST.

    mean((1 - y) p² + y max(margin - p, 0)²), p = sigmoid(logit), y = 1 for a pair of different
    labels.
    """

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


class PairCrossEntropy(_SiameseHead):
    """Binary cross entropy of the logit: do the two images have one label?"""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Outcome:
        """Judge pairs."""
        first, second = halves(labels)
        different = first != second
        logit = self.logit(embeddings)
        loss = F.binary_cross_entropy_with_logits(logit, different.float())
        return Outcome(loss, ((logit > 0) == different).float().mean())


class HadsellContrastive(Objective):
    """Contrastive loss of Hadsell, Chopra and LeCun 2006: ½ y d² + ½ (1 - y) max(0, margin - d)².

    y = 1 for a pair of one label, d their Euclidean distance. (The library's ContrastiveLoss has
    a square of the distance, but not of the hinge.)

    `angular` adds as much of a cross entropy over the classes' directions in the plane, which are
    fixed and evenly spaced (hyperspherical prototypes, Mettes et al. 2019): a softmax of `scale`
    times the cosine between the embedding and each. The contrastive loss alone only parts the
    classes in the plane, where one may lie around the origin; a search by cosine needs them parted
    by their direction from the origin. In more than two dimensions there is room enough without.

    `order` is that of the classes around the origin, else 0, 1, 2 …: what looks half like one
    class and half like another lies between them, so classes that look alike should be neighbours.
    """

    takes = "pairs"

    def __init__(
        self,
        dimension: int,
        classes: int,
        metric: str,
        margin: float = 1.0,
        angular: float = 0.0,
        scale: float = 30.0,
        order: Sequence[int] = (),
    ) -> None:
        super().__init__(dimension, classes, metric)
        if angular and dimension != 2:
            raise ValueError(f"angular is for two dimensions, not {dimension}")
        if order and sorted(order) != list(range(classes)):
            raise ValueError(f"order must name each of the {classes} classes once: {list(order)}")
        self.margin = margin
        self.angular = angular
        self.scale = scale
        # The inverse of the order: where each class has its place.
        places = torch.argsort(torch.tensor(order)) if order else torch.arange(classes)
        angles = places * (2 * math.pi / classes)
        directions = torch.stack([torch.cos(angles), torch.sin(angles)], dim=1)
        self.register_buffer("directions", directions, persistent=False)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Outcome:
        """Judge pairs."""
        first, second = halves(labels)
        match = first == second
        d = distance(*halves(embeddings), "l2")
        loss = 0.5 * torch.where(match, d.square(), F.relu(self.margin - d).square()).mean()
        if self.angular:
            directions: Tensor = self.get_buffer("directions")
            cosine = F.normalize(embeddings, dim=1) @ directions.T
            loss = loss + self.angular * F.cross_entropy(self.scale * cosine, labels)
        return Outcome(loss, ((d < self.margin / 2) == match).float().mean())
