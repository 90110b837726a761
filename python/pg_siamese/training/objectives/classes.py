"""Objectives on single images with their classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import CosFaceLoss
from torch import Tensor, nn

from pg_siamese.training.objectives.base import Objective, Outcome

LEAST_CHANCE = 1e-30  # its logarithm is finite


class CosFace(Objective):
    """Cosine-margin softmax (CosFace, Wang et al. 2018), of pytorch-metric-learning.

    Its class vectors are thrown away after training.
    """

    summary = "Cosine-margin softmax (CosFace)"

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
        """Judge single images. Right is the class whose vector is nearest, without the margin."""
        loss: Tensor = self.loss(embeddings, labels)
        right = self.loss.get_logits(embeddings.detach()).argmax(dim=1) == labels
        return Outcome(loss, right.float().mean())


class CosFaceParts(Objective):
    """Cross-entropy on an embedding's first part, the sets, and CosFace on the others, the classes.

    For ``Ensemble``, whose first part is a softmax made a unit vector. That is undone here. Rows in
    which all numbers of a member are 0 do not judge it: they belong to other members. ``sets``
    gives each class's data set, as a number. ``parts`` are the parts' dimensions.
    """

    summary = (
        "Cosine-margin softmax (CosFace) on each member's part of the vector,"
        " cross-entropy on that of the data sets"
    )

    def __init__(
        self,
        dimension: int,
        classes: int,
        metric: str,
        sets: Sequence[int],
        parts: Sequence[int],
        margin: float = 0.2,
        scale: float = 16.0,
    ) -> None:
        super().__init__(dimension, classes, metric)
        if len(parts) < 2 or sum(parts) != dimension:
            raise ValueError(f"the network has no parts that make {dimension} dimensions")
        self.sizes = list(parts)
        self.register_buffer("sets", torch.tensor(sets), persistent=False)
        if max(sets) >= parts[0]:
            raise ValueError(f"set_dimension is {parts[0]}: there are {max(sets) + 1} data sets")
        self.losses = nn.ModuleList(
            CosFaceLoss(classes, own, margin=margin, scale=scale) for own in parts[1:]
        )

    def forward(self, embeddings: Tensor, labels: Tensor) -> Outcome:
        """Judge single images. Right is the class that most of the members' logits speak for."""
        parts = torch.split(embeddings, self.sizes, dim=1)
        sets: Tensor = self.sets  # type: ignore[assignment]
        chances = parts[0] / parts[0].sum(dim=1, keepdim=True)
        loss = F.nll_loss(chances.clamp_min(LEAST_CHANCE).log(), sets[labels])
        logits = 0
        for judge, part in zip(self.losses, parts[1:], strict=True):
            own = part.detach().any(dim=1)
            loss = loss + judge(part[own], labels[own])
            logits = logits + judge.get_logits(part.detach())  # type: ignore[operator]
        right = logits.argmax(dim=1) == labels  # type: ignore[attr-defined]
        return Outcome(loss, right.float().mean())
