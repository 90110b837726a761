"""What all networks have in common."""

from __future__ import annotations

from torch import nn


class Network(nn.Module):
    """Take uint8 pixels (N, H, W, 3) and return float32 embeddings (N, ``dimension``).

    Attributes:
        summary: what the network is, for the model card.
        unit_vectors: whether embeddings have length one.
        set_dimension: dimensions of the vector's first part, a softmax over data sets, if any.
        parts: dimensions of the other parts, if they are judged separately.
        frozen: layers that don't learn, at its beginning, if there are any. A network that has
            them splits into ``features``, from pixels to what they give, and ``head``, the rest.
    """

    summary = ""
    unit_vectors = True
    set_dimension: int = 0
    parts: tuple[int, ...] = ()
    frozen: nn.Module
    dimension: int
