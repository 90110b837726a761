"""Data sets joined for training: tensors, joined labels and augmentation."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from pg_siamese.datasets import LabelledImages, join_labels
from pg_siamese.training.experiments.settings import Augmentation

SMALL = 28  # pixels, MedMNIST's

Batch = tuple[Tensor, Tensor, Tensor]


class JoinedImages(Dataset[Batch]):
    """Several data sets in a row.

    The label is "which class of which set", or "which set".

    Attributes:
        pixels: uint8 (N, H, W, 3).
        labels: int64 (N,), each an index into ``classes``.
        classes: "set: class", or the set's name.
        sets: int64 (N,), each an index into ``names``.
        names: names of the sets.
        groups: int64 (N,), equal for images of one group, or None if no set has groups.

    Raises:
        ValueError: the data sets have images of different sizes.
    """

    def __init__(self, parts: Sequence[LabelledImages], labels: str = "class") -> None:
        sizes = {part.images.shape[1:3] for part in parts}
        if len(sizes) != 1:
            raise ValueError(f"the data sets have images of different sizes: {sorted(sizes)}")
        self.names = tuple(part.name for part in parts)
        self.pixels = torch.from_numpy(np.concatenate([part.rgb() for part in parts]))
        joined = join_labels(parts)
        by_set = labels == "set"
        self.classes = self.names if by_set else joined.classes
        self.sets = torch.from_numpy(joined.sets)
        self.labels = torch.from_numpy(joined.sets if by_set else joined.labels).clone()
        self.groups = None if joined.groups is None else torch.from_numpy(joined.groups)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int | list[int]) -> Batch:
        """Return one image, or a whole batch in three gathers instead of one call per image."""
        chosen = torch.as_tensor(index)
        return self.pixels[chosen], self.labels[chosen], self.sets[chosen]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a batch."""
        return self[indices]

    def some(self, count: int, seed: int) -> JoinedImages:
        """Return ``count`` of the images, drawn at random.

        Return all of them if ``count`` is 0 or there are no more.
        """
        if not 0 < count < len(self):
            return self
        generator = torch.Generator().manual_seed(seed)
        return self._with(torch.randperm(len(self), generator=generator)[:count].sort().values)

    def with_pixels(self, pixels: Tensor, times: int = 1) -> JoinedImages:
        """Return a copy with other pixels, ``times`` as many as before."""
        copied = self._with(torch.arange(len(self)).repeat(times), pixels=False)
        copied.pixels = pixels
        return copied

    def _with(self, chosen: Tensor, pixels: bool = True) -> JoinedImages:
        copied = copy.copy(self)
        if pixels:
            copied.pixels = self.pixels[chosen]
        copied.labels, copied.sets = self.labels[chosen], self.sets[chosen]
        copied.groups = None if self.groups is None else self.groups[chosen]
        return copied


class Augmenter:
    """Random flips, rotation, shift, zoom, stretch, brightness and contrast, and few pixels.

    All are drawn per image on a batch.

    Each data set has its own ``Augmentation``: a chest X-ray has no upside-down.
    """

    def __init__(self, names: Sequence[str], settings: Mapping[str, Augmentation]) -> None:
        rows = [settings[name] for name in names]
        self.idle = all(row == Augmentation() for row in rows)
        self.table = {
            field: torch.tensor([float(getattr(row, field)) for row in rows])
            for field in Augmentation.__struct_fields__
        }

    def __call__(self, pixels: Tensor, sets: Tensor) -> Tensor:
        """Change a batch at random. If nothing is to be changed, return it as it is.

        Args:
            pixels: uint8 (N, H, W, 3).
            sets: the images' set numbers (N,).

        Returns:
            float32 (N, H, W, 3) in 0..255.
        """
        if self.idle:
            return pixels
        count, height, width, _ = pixels.shape
        device = pixels.device
        of = {field: values.to(device)[sets] for field, values in self.table.items()}

        def uniform() -> Tensor:
            return torch.rand(count, device=device) * 2 - 1

        def flip(chance: Tensor) -> Tensor:
            return 1 - 2 * (torch.rand(count, device=device) < chance).float()

        angle = uniform() * of["rotation"] * (math.pi / 180)
        zoom = 1 + uniform() * of["zoom"]
        cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        across, down = flip(of["flip_horizontal"]), flip(of["flip_vertical"])
        wide = (1 + uniform() * of["stretch"]) * across
        rows = (
            (cosine * wide, -sine * down, uniform() * of["shift"] * 2 / width),
            (sine * wide, cosine * down, uniform() * of["shift"] * 2 / height),
        )
        matrix = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
        images = pixels.permute(0, 3, 1, 2).float()
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        contrast = (1 + uniform() * of["contrast"]).view(-1, 1, 1, 1)
        brightness = (uniform() * of["brightness"] * 255).view(-1, 1, 1, 1)
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        images = ((images - mean) * contrast + mean + brightness).clamp(0, 255)
        small = torch.rand(count, device=device) < of["small"]
        if small.any():
            images[small] = enlarged(images[small])
        return images.permute(0, 2, 3, 1)


def enlarged(images: Tensor) -> Tensor:
    """Return images (N, 3, H, W) as if they had come with ``SMALL`` pixels."""
    few = F.interpolate(images, size=(SMALL, SMALL), mode="bicubic", antialias=True)
    stored = few.clamp(0, 255).round()
    return F.interpolate(stored, size=images.shape[2:], mode="bicubic").clamp(0, 255)
