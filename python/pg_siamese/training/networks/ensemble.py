"""Several small residual networks in one, whose embeddings are parts of one unit vector."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pg_siamese.training.networks.residual import ResidualEncoder


class ResidualEnsemble(nn.Module):
    """uint8 or float pixels in 0..255, (N, H, W, 3), to float32 unit vectors (N, dimension).

    The first `set_dimension` numbers say which data set an image is of; the rest is shared evenly
    by the `members`, networks of their own. A distance is then the members' mean, which is less a
    matter of chance than that of one network on a small data set (Lakshminarayanan et al. 2017,
    arXiv 1612.01474), plus that of the data sets: images of two sets are always far apart.

    `set_share` is the part of the squared length that `set_dimension` takes; `width` the channels
    of stem and first block, with twice and four times as many in the others.
    """

    def __init__(
        self,
        dimension: int = 64,
        members: int = 2,
        width: int = 20,
        set_dimension: int = 2,
        set_share: float = 0.5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if members < 1 or set_dimension < 1 or (dimension - set_dimension) % members:
            raise ValueError(
                f"dimension {dimension} without set_dimension {set_dimension} is not a multiple of"
                f" members {members}"
            )
        if not 0 < set_share < 1:
            raise ValueError(f"set_share is {set_share}: it must be between 0 and 1")
        own = (dimension - set_dimension) // members
        if own < 1:
            raise ValueError(f"dimension {dimension} leaves nothing for {members} members")
        self.dimension = dimension
        stages = ((width, 1), (2 * width, 2), (4 * width, 1))
        self.members = nn.ModuleList(
            ResidualEncoder(own, (width, 2), stages, dropout) for _ in range(members)
        )
        self.set_head = nn.Linear(4 * width * members, set_dimension)
        self.set_scale = math.sqrt(set_share)
        self.member_scale = math.sqrt((1 - set_share) / members)

    def forward(self, image: Tensor) -> Tensor:
        """Embed a batch."""
        features = [member.features(image) for member in self.members]  # type: ignore[operator]
        # The members learn classes; what they know of the sets comes with that.
        sets = self.set_head(torch.cat(features, dim=1).detach())
        parts = [self.set_scale * F.normalize(sets, dim=1)]
        for member, found in zip(self.members, features, strict=True):
            parts.append(self.member_scale * member.embedding(found))  # type: ignore[operator]
        return torch.cat(parts, dim=1)
