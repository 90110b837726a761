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
    """CosFace on each part of an embedding, cross-entropy on that of the data sets.

    An embedding begins with ``set_dimension`` numbers, if there are any: a softmax made a unit
    vector, as in ``Ensemble``. That is undone here. ``sets`` gives each class's data set, as a
    number. ``parts`` are the other parts' dimensions. Rows in which all numbers of a part are 0 do
    not judge it: they belong to others.
    """

    summary = (
        "Cosine-margin softmax (CosFace) on each part of the vector,"
        " cross-entropy on the part for the data set, if there is one"
    )

    def __init__(
        self,
        dimension: int,
        classes: int,
        metric: str,
        sets: Sequence[int],
        parts: Sequence[int],
        set_dimension: int = 0,
        margin: float = 0.2,
        scale: float = 16.0,
    ) -> None:
        super().__init__(dimension, classes, metric)
        if not parts or set_dimension + sum(parts) != dimension:
            raise ValueError(f"the network has no parts that make {dimension} dimensions")
        self.sizes = [set_dimension, *parts]
        self.register_buffer("sets", torch.tensor(sets), persistent=False)
        if 0 < set_dimension <= max(sets):
            raise ValueError(
                f"set_dimension is {set_dimension}: there are {max(sets) + 1} data sets"
            )
        self.losses = nn.ModuleList(
            CosFaceLoss(classes, own, margin=margin, scale=scale) for own in parts
        )

    def forward(self, embeddings: Tensor, labels: Tensor) -> Outcome:
        """Judge single images. Right is the class that most of the parts' logits speak for."""
        first, *parts = torch.split(embeddings, self.sizes, dim=1)
        loss = embeddings.new_zeros(())
        if self.sizes[0]:
            sets: Tensor = self.sets  # type: ignore[assignment]
            chances = first / first.sum(dim=1, keepdim=True)
            loss = F.nll_loss(chances.clamp_min(LEAST_CHANCE).log(), sets[labels])
        logits = 0
        for judge, part in zip(self.losses, parts, strict=True):
            own = part.detach().any(dim=1)
            loss = loss + judge(part[own], labels[own])
            logits = logits + judge.get_logits(part.detach())  # type: ignore[operator]
        right = logits.argmax(dim=1) == labels  # type: ignore[attr-defined]
        return Outcome(loss, right.float().mean())
