"""The contrastive loss of Hadsell, Chopra and LeCun, with directions for the search by cosine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pg_siamese.training.objectives.base import Objective, Outcome
from pg_siamese.training.reproductions.pairs import distance, halves


class HadsellContrastive(Objective):
    """Contrastive loss of Hadsell, Chopra and LeCun 2006: ½ y d² + ½ (1 - y) max(0, margin - d)².

    y = 1 for a pair of one label, d their Euclidean distance. (The library's ContrastiveLoss has a
    square of the distance, but not of the hinge.)

    ``angular`` adds as much of a cross entropy over the classes' directions in the plane, which are
    fixed and evenly spaced (hyperspherical prototypes, Mettes et al. 2019): a softmax of ``scale``
    times the cosine between the embedding and each. The contrastive loss alone only parts the
    classes in the plane, in which one may lie around the origin. A search by cosine needs them
    parted by their direction from the origin. In more than two dimensions there is room enough
    without.

    ``order`` is that of the classes around the origin, else 0, 1, 2 …. What looks half like one
    class and half like another lies between them, so classes that look alike should be neighbours.
    """

    summary = "Contrastive loss of Hadsell, Chopra and LeCun"
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
        # The inverse of the order: each class's place.
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
