"""The objectives of the shipped encoders: what is asked of the embeddings of a batch.

Each takes embeddings (N, d) and labels (N,) in an order that it shares with the sampler
(``takes``). It gives the loss and the share of right decisions. A new objective is a new module
with a class, and a line in ``OBJECTIVES``.
"""

from __future__ import annotations

from pg_siamese.training.objectives.base import Objective, Outcome
from pg_siamese.training.objectives.classes import CosFace, CosFaceParts

__all__ = ["OBJECTIVES", "Objective", "Outcome"]

OBJECTIVES: dict[str, type[Objective]] = {"cosface": CosFace, "cosface_parts": CosFaceParts}
