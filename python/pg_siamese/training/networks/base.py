"""What all networks have in common."""

from __future__ import annotations

from torch import nn


class Network(nn.Module):
    """Take uint8 pixels (N, H, W, 3) and return float32 embeddings (N, ``dimension``).

    Attributes:
        summary: what the network is, for the model card.
        unit_vectors: whether embeddings have length one.
        parts: dimensions of the parts of a vector that are judged separately, if there are any.
    """

    summary = ""
    unit_vectors = True
    parts: tuple[int, ...] = ()
    dimension: int
