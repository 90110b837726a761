"""Do two photographs match? The loss of the Siamese network on Imagenette."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pg_siamese.training.objectives.base import Outcome
from pg_siamese.training.reproductions.pairs import SiameseHead, halves


class PairCrossEntropy(SiameseHead):
    """Binary cross entropy of the logit: do the two images have one label?"""

    summary = "Binary cross entropy of a linear layer on the distance"

    def forward(self, embeddings: Tensor, labels: Tensor) -> Outcome:
        """Judge pairs."""
        first, second = halves(labels)
        different = first != second
        logit = self.logit(embeddings)
        loss = F.binary_cross_entropy_with_logits(logit, different.float())
        return Outcome(loss, ((logit > 0) == different).float().mean())
