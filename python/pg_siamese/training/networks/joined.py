"""Encoders that were trained by themselves, side by side in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pg_siamese.training.networks.base import Network
from pg_siamese.training.networks.pixels import channels_first


class Joined(Network):
    """Vectors of several encoders as one: each is a part of it, by its share.

    A distance is then the mean of the encoders' distances, weighted by the shares. Encoders of
    different kinds err on different images (Lakshminarayanan et al. 2017, arXiv 1612.01474). An
    encoder of fewer pixels gets the mean of those that one of its pixels covers.

    Args:
        dimension: dimensions in all.
        size: height and width of the images.
        encoders: the members. Their vectors have length one.
        sizes: height and width of their images.
        shares: how much they count. It can be a number for each data set by its name, and
            ``default`` for all others. That takes a member with a part for the data set.
        sets: names of the data sets, in the order of that part.

    Raises:
        ValueError: the members don't have ``dimension`` dimensions, one has more pixels, or none
            tells the data sets apart.
    """

    summary = "encoders that were trained by themselves, side by side"

    def __init__(
        self,
        dimension: int,
        size: tuple[int, int],
        encoders: Sequence[Network],
        sizes: Sequence[tuple[int, int]],
        shares: Sequence[float | Mapping[str, float]],
        sets: Sequence[str] = (),
    ) -> None:
        super().__init__()
        own = sum(encoder.dimension for encoder in encoders)
        if own != dimension:
            raise ValueError(f"dimension is {dimension}: the members have {own}")
        telling = [place for place, each in enumerate(encoders) if each.set_dimension]
        if not telling and any(isinstance(share, Mapping) for share in shares):
            raise ValueError("shares by data set need a member that tells data sets apart")
        self.dimension = dimension
        self.encoders = nn.ModuleList(encoders)
        self.reductions = nn.ModuleList(_Reduction(size, each) for each in sizes)
        self.telling = telling[0] if telling else None
        count = 1 if self.telling is None else encoders[self.telling].set_dimension
        names = [*sets, *[""] * count][:count]
        table = torch.tensor([[_share(share, name) for share in shares] for name in names])
        self.register_buffer("table", table / table.sum(dim=1, keepdim=True), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Embed uint8 or float pixels (N, H, W, 3)."""
        members = zip(self.encoders, self.reductions, strict=True)
        parts = [encoder(reduction(image)) for encoder, reduction in members]
        shares = self.get_buffer("table")
        if self.telling is not None:
            chances = parts[self.telling][:, : len(shares)]
            shares = chances / chances.sum(dim=1, keepdim=True) @ shares
        scales = shares.sqrt()
        return torch.cat([part * scales[:, n : n + 1] for n, part in enumerate(parts)], dim=1)


def _share(share: float | Mapping[str, float], name: str) -> float:
    if isinstance(share, Mapping):
        return float(share.get(name, share.get("default", 1.0)))
    return float(share)


class _Reduction(nn.Module):
    """Pixels (N, H, W, 3) to fewer ones: means of those that each covers."""

    def __init__(self, size: tuple[int, int], to: tuple[int, int]) -> None:
        super().__init__()
        if to[0] > size[0] or to[1] > size[1]:
            raise ValueError(
                f"a member has {to[1]} x {to[0]} pixels: the images have {size[1]} x {size[0]}"
            )
        self.is_same = size == to
        self.register_buffer("rows", _means(size[0], to[0]), persistent=False)
        self.register_buffer("columns", _means(size[1], to[1]).T, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        if self.is_same:
            return image
        rows, columns = self.get_buffer("rows"), self.get_buffer("columns")
        found = rows @ channels_first(image) @ columns
        return found.permute(0, 2, 3, 1)


def _means(many: int, few: int) -> Tensor:
    """Return the shares of ``many`` pixels of a row in each of ``few``, float32 (few, many)."""
    edges = np.linspace(0, many, few + 1)
    pixels = np.arange(many)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    shares = np.maximum(covered, 0)
    return torch.from_numpy(shares / shares.sum(axis=1, keepdims=True)).float()
