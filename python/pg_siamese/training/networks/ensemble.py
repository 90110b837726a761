"""Several networks in one, and a part for the data set: the shipped medical encoder."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pg_siamese.training.networks.lite_trunk import LiteTrunk
from pg_siamese.training.networks.residual import ResidualEncoder


class Ensemble(nn.Module):
    """uint8 or float pixels in 0..255, (N, H, W, 3), to float32 unit vectors (N, dimension).

    The first `set_dimension` numbers say which data set an image is of: a softmax, which for known
    kinds of images is next to one of the axes, so that it adds nothing to distances within a data
    set, and much to those between two. The members share the rest evenly: pretrained filters
    (`LiteTrunk` of `lite_blocks` blocks at `lite_size` pixels, of which `lite_frozen` don't learn)
    and `residuals` small residual networks (`width` channels in stem and first block, twice and
    four times as many in the others). A distance is then the members' mean, which is less a matter
    of chance than that of one network on a small data set (Lakshminarayanan et al. 2017, arXiv
    1612.01474).

    `set_share` is the part of the squared length that `set_dimension` takes.
    """

    def __init__(
        self,
        dimension: int = 64,
        set_dimension: int = 2,
        set_share: float = 0.5,
        residuals: int = 1,
        width: int = 16,
        lite_blocks: int = 8,
        lite_size: int = 56,
        lite_frozen: int = 0,
    ) -> None:
        super().__init__()
        members = residuals + 1
        own = member_dimension(dimension, set_dimension, members)
        if not 0 < set_share < 1:
            raise ValueError(f"set_share is {set_share}: it must be between 0 and 1")
        self.dimension = dimension
        stages = ((width, 1), (2 * width, 2), (4 * width, 1))
        self.residuals = nn.ModuleList(
            ResidualEncoder(own, (width, 2), stages) for _ in range(residuals)
        )
        self.lite = LiteTrunk(lite_blocks, lite_size, lite_frozen)
        self.lite_head = nn.Linear(self.lite.channels, own)
        self.set_head = nn.Linear(residuals * 4 * width + self.lite.channels, set_dimension)
        self.set_scale = math.sqrt(set_share)
        self.member_scale = math.sqrt((1 - set_share) / members)

    def forward(self, image: Tensor) -> Tensor:
        """Embed a batch."""
        features = [member.features(image) for member in self.residuals]  # type: ignore[operator]
        features.append(self.lite(image))
        sets = self.set_head(torch.cat(features, dim=1)).softmax(dim=1)
        heads = [*(member.embedding for member in self.residuals), self._lite_embedding]
        parts = [head(part) for head, part in zip(heads, features, strict=True)]  # type: ignore[operator]
        return torch.cat(
            [self.set_scale * F.normalize(sets, dim=1), *(self.member_scale * p for p in parts)],
            dim=1,
        )

    def _lite_embedding(self, features: Tensor) -> Tensor:
        return F.normalize(self.lite_head(features), dim=1)


def member_dimension(dimension: int, set_dimension: int, members: int) -> int:
    """Return the dimensions of each member; raises `ValueError` where they can't be shared out."""
    own, rest = divmod(dimension - set_dimension, members) if members > 0 else (0, 0)
    if set_dimension < 1 or own < 1 or rest:
        raise ValueError(
            f"dimension {dimension} without set_dimension {set_dimension} cannot be shared by"
            f" {members} members"
        )
    return own
