"""Several networks in one, and a part for the data set: the shipped medical encoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pg_siamese.training.networks.base import Network
from pg_siamese.training.networks.lite_trunk import LiteTrunk
from pg_siamese.training.networks.residual import ResidualTrunk


class Ensemble(Network):
    """uint8 or float pixels in 0..255, (N, H, W, 3), to float32 unit vectors (N, dimension).

    The first ``set_dimension`` dimensions say which data set an image is of. They are a softmax,
    which is close to one of the axes for known kinds of images. So it adds nothing to distances
    within a data set, and much to those between two. The members have as many dimensions each:
    ``residuals`` small residual networks and ``lites`` branches of pretrained filters. A distance
    is then the members' mean. It depends less on chance than that of one network on a small data
    set (Lakshminarayanan et al. 2017, arXiv 1612.01474).

    That takes members which err on different images. So in training each has its own rows of the
    batch, drawn and augmented for itself, in which the other members' dimensions are 0. Members
    that see the same batches come out too much alike.

    Args:
        dimension: dimensions in all.
        set_dimension: dimensions of the softmax.
        set_share: its part of the squared length.
        residuals: number of residual networks.
        width: their channels in stem and first block. The others have twice and four times as many.
        lites: number of branches of pretrained filters.
        lite_blocks: their blocks (see ``LiteTrunk``).
        lite_size: pixels that images are enlarged to for them.
        lite_frozen: blocks that don't learn.
        lite_rows: rows of a pretrained member for one of a residual one: they learn faster.
        lite_share: how much a pretrained member counts for one of a residual one. It can be a
            number for each data set by its name, and 1 for those it doesn't name.
        sets: names of the data sets in the order of the softmax.

    Raises:
        ValueError: a value is out of range, or the dimensions can't be shared out.
    """

    summary = (
        "first blocks of EfficientNet-lite0, which began with weights learned on ImageNet,"
        " beside small residual CNNs, and a part of the vector for the data set"
    )

    def __init__(
        self,
        dimension: int = 64,
        set_dimension: int = 2,
        set_share: float = 0.5,
        residuals: int = 1,
        width: int = 16,
        lites: int = 1,
        lite_blocks: int = 8,
        lite_size: int = 56,
        lite_frozen: int = 0,
        lite_rows: float = 1.0,
        lite_share: float | Mapping[str, float] = 1.0,
        sets: Sequence[str] = (),
    ) -> None:
        super().__init__()
        members = residuals + lites
        own = _member_dimension(dimension, set_dimension, members)
        if not 0 < set_share < 1:
            raise ValueError(f"set_share is {set_share}: it must be between 0 and 1")
        shares = _by_set(lite_share, sets, set_dimension)
        if lites < 1:
            raise ValueError(f"lites is {lites}: it must be at least 1")
        for name, value in (("lite_rows", lite_rows), ("lite_share", min(shares))):
            if not value > 0:
                raise ValueError(f"{name} is {value}: it must be above 0")
        self.dimension = dimension
        self.rows = [1.0] * residuals + [lite_rows] * lites
        stages = ((width, 1), (2 * width, 2), (4 * width, 1))
        self.residuals = nn.ModuleList(ResidualTrunk((width, 2), stages) for _ in range(residuals))
        self.lite = LiteTrunk(lite_blocks, lite_size, lite_frozen, lites)
        channels = [4 * width] * residuals + [self.lite.channels] * lites
        self.heads = nn.ModuleList(nn.Linear(count, own) for count in channels)
        self.set_heads = nn.ModuleList(nn.Linear(count, set_dimension) for count in channels)
        self.register_buffer("lite_shares", torch.tensor(shares), persistent=False)
        self.set_share = set_share
        self.own = own
        self.set_dimension = set_dimension
        self.parts = (own,) * members

    def forward(self, image: Tensor) -> Tensor:
        """Embed a batch. In training, each member embeds its own rows."""
        members = len(self.heads)
        rows = self._own_rows(image) if self.training else [image] * members
        features = self._features(rows)
        logits = [head(part) for head, part in zip(self.set_heads, features, strict=True)]
        heads = zip(self.heads, features, strict=True)
        parts = [F.normalize(head(part), dim=1) for head, part in heads]
        if not self.training:
            return self._joined(torch.stack(logits).mean(dim=0), torch.cat(parts, dim=1))
        around = [(n * self.own, (members - 1 - n) * self.own) for n in range(members)]
        padded = [F.pad(part, place) for part, place in zip(parts, around, strict=True)]
        return torch.cat([self._joined(*each) for each in zip(logits, padded, strict=True)])

    def _features(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Return each member's features of its rows."""
        count = len(self.residuals)
        networks: Any = self.residuals
        found = [net.features(own) for net, own in zip(networks, rows[:count], strict=True)]
        if self.training:
            sizes = [len(own) for own in rows[count:]]
            shared = torch.split(self.lite.shared(torch.cat(list(rows[count:]))), sizes)
        else:
            shared = (self.lite.shared(rows[-1]),) * (len(rows) - count)
        return found + [self.lite.features(n, own) for n, own in enumerate(shared)]

    def _joined(self, logits: Tensor, parts: Tensor) -> Tensor:
        """Put a vector together: the softmax, and the members' parts by their shares."""
        chances = logits.softmax(dim=1)
        lite: Tensor = chances @ self.lite_shares[:, None]  # type: ignore[index]
        residuals = len(self.residuals)
        lites = len(self.heads) - residuals
        ones = torch.ones_like(lite).expand(-1, residuals * self.own)
        shares = torch.cat([ones, lite.expand(-1, lites * self.own)], dim=1)
        scales = ((1 - self.set_share) * shares / (residuals + lites * lite)).sqrt()
        return torch.cat(
            [math.sqrt(self.set_share) * F.normalize(chances, dim=1), scales * parts], dim=1
        )

    def _own_rows(self, batch: Tensor) -> tuple[Tensor, ...]:
        ends = [round(len(batch) * end / sum(self.rows)) for end in accumulate(self.rows)]
        parts = torch.tensor_split(batch, ends[:-1])
        if not all(len(part) for part in parts):
            raise ValueError(f"a batch of {len(batch)} is too small for {len(parts)} members")
        return parts


def _by_set(share: float | Mapping[str, float], sets: Sequence[str], count: int) -> list[float]:
    """Return the share for each of ``count`` data sets."""
    if not isinstance(share, Mapping):
        return [float(share)] * count
    found = [float(share.get(name, 1.0)) for name in sets]
    return found + [1.0] * (count - len(found))


def _member_dimension(dimension: int, set_dimension: int, members: int) -> int:
    """Return the dimensions of each member.

    Raises:
        ValueError: they can't be shared out.
    """
    own, rest = divmod(dimension - set_dimension, members) if members > 0 else (0, 0)
    if set_dimension < 1 or own < 1 or rest:
        raise ValueError(
            f"dimension {dimension} without set_dimension {set_dimension} cannot be shared by"
            f" {members} members"
        )
    return own
