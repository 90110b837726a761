"""Several networks in one, and a part for the data set: the shipped medical encoder."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pg_siamese.training.networks.lite_trunk import LiteTrunk
from pg_siamese.training.networks.residual import ResidualEncoder


class Ensemble(nn.Module):
    """uint8 or float pixels in 0..255, (N, H, W, 3), to float32 unit vectors (N, dimension).

    The first `set_dimension` numbers say which data set an image is of: a softmax, which for known
    kinds of images is next to one of the axes, so that it adds nothing to distances within a data
    set, and much to those between two. The members have as many numbers each: pretrained filters
    (`LiteTrunk` of `lite_blocks` blocks at `lite_size` pixels, of which `lite_frozen` don't learn)
    and `residuals` small residual networks (`width` channels in stem and first block, twice and
    four times as many in the others). A distance is then the members' mean, which is less a matter
    of chance than that of one network on a small data set (Lakshminarayanan et al. 2017, arXiv
    1612.01474); that of the pretrained filters counts `lite_share` times as much as another.

    That takes members which err on different images. So in training each has rows of the batch of
    its own, drawn and augmented for itself, in which the other members' numbers are 0: members
    that see the same batches come out too much alike. A residual network has as many rows as
    another; the pretrained one, which learns faster, has `lite_rows` times as many.

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
        lite_rows: float = 1.0,
        lite_share: float = 1.0,
    ) -> None:
        super().__init__()
        members = residuals + 1
        own = member_dimension(dimension, set_dimension, members)
        if not 0 < set_share < 1:
            raise ValueError(f"set_share is {set_share}: it must be between 0 and 1")
        for name, value in (("lite_rows", lite_rows), ("lite_share", lite_share)):
            if not value > 0:
                raise ValueError(f"{name} is {value}: it must be above 0")
        self.dimension = dimension
        self.rows = [1.0] * residuals + [lite_rows]
        stages = ((width, 1), (2 * width, 2), (4 * width, 1))
        self.residuals = nn.ModuleList(
            ResidualEncoder(own, (width, 2), stages) for _ in range(residuals)
        )
        self.lite = LiteTrunk(lite_blocks, lite_size, lite_frozen)
        self.lite_head = nn.Linear(self.lite.channels, own)
        channels = [4 * width] * residuals + [self.lite.channels]
        self.set_heads = nn.ModuleList(nn.Linear(count, set_dimension) for count in channels)
        self.set_scale = math.sqrt(set_share)
        shares = [1.0] * residuals + [lite_share]
        self.scales = [math.sqrt((1 - set_share) * share / sum(shares)) for share in shares]

    def forward(self, image: Tensor) -> Tensor:
        """Embed a batch; in training, each member rows of its own."""
        members = len(self.set_heads)
        if not self.training:
            all_logits, parts = zip(*(self._member(n, image) for n in range(members)), strict=True)
            return self._joined(torch.stack(all_logits).mean(dim=0), torch.cat(parts, dim=1))
        rows = []
        for number, own in enumerate(self._own_rows(image)):
            logits, part = self._member(number, own)
            before = number * part.shape[1]
            after = (members - 1 - number) * part.shape[1]
            rows.append(self._joined(logits, F.pad(part, (before, after))))
        return torch.cat(rows)

    def _member(self, number: int, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return one member's logits of the data sets, and its vectors."""
        if number < len(self.residuals):
            network: Any = self.residuals[number]
            features = network.features(image)
            part = network.embedding(features)
        else:
            features = self.lite(image)
            part = F.normalize(self.lite_head(features), dim=1)
        return self.set_heads[number](features), self.scales[number] * part

    def _joined(self, logits: Tensor, parts: Tensor) -> Tensor:
        sets = F.normalize(logits.softmax(dim=1), dim=1)
        return torch.cat([self.set_scale * sets, parts], dim=1)

    def _own_rows(self, batch: Tensor) -> tuple[Tensor, ...]:
        ends = [round(len(batch) * end / sum(self.rows)) for end in accumulate(self.rows)]
        parts = torch.tensor_split(batch, ends[:-1])
        if not all(len(part) for part in parts):
            raise ValueError(f"a batch of {len(batch)} is too small for {len(parts)} members")
        return parts


def member_dimension(dimension: int, set_dimension: int, members: int) -> int:
    """Return the dimensions of each member; raises `ValueError` where they can't be shared out."""
    own, rest = divmod(dimension - set_dimension, members) if members > 0 else (0, 0)
    if set_dimension < 1 or own < 1 or rest:
        raise ValueError(
            f"dimension {dimension} without set_dimension {set_dimension} cannot be shared by"
            f" {members} members"
        )
    return own
