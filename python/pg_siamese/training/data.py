"""Data sets joined for training: tensors, joined labels and augmentation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from pg_siamese.datasets import LabelledImages
from pg_siamese.training.experiments import Augmentation

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class DataSplits:
    """The three splits of one data set."""

    train: LabelledImages
    val: LabelledImages
    test: LabelledImages

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.train.name


def hold_out(
    images: LabelledImages, count: int, seed: int
) -> tuple[LabelledImages, LabelledImages]:
    """Split off about `count` images as a validation part, stratified by class.

    For data sets without a validation split. Returns (train, val); the same seed gives the same
    parts.
    """
    random = np.random.default_rng(seed)
    share = count / len(images)
    held = np.zeros(len(images), bool)
    for label in np.unique(images.labels):
        members = np.flatnonzero(images.labels == label)
        held[random.permutation(members)[: round(share * len(members))]] = True
    return images.select(~held), replace(images.select(held), split="val")


class JoinedImages(Dataset[Batch]):
    """Several data sets in a row; the label is 'which class of which set'.

    Holds `pixels` uint8 (N, H, W, 3), `labels` int64 (N,) with an index into `classes`
    ("set: class"), and `sets` int64 (N,) with an index into `names`.
    """

    def __init__(self, parts: Sequence[LabelledImages]) -> None:
        sizes = {part.images.shape[1:3] for part in parts}
        if len(sizes) != 1:
            raise ValueError(f"the data sets have images of different sizes: {sorted(sizes)}")
        self.names = tuple(part.name for part in parts)
        self.classes = tuple(f"{part.name}: {name}" for part in parts for name in part.classes)
        starts = np.cumsum([0] + [len(part.classes) for part in parts])
        self.pixels = torch.from_numpy(np.concatenate([part.rgb() for part in parts]))
        self.labels = torch.from_numpy(
            np.concatenate(
                [part.labels + start for part, start in zip(parts, starts[:-1], strict=True)]
            )
        )
        self.sets = torch.from_numpy(
            np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Batch:
        return self.pixels[index], self.labels[index], self.sets[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        # A whole batch in three gathers, instead of one Python call per image.
        chosen = torch.as_tensor(indices)
        return self.pixels[chosen], self.labels[chosen], self.sets[chosen]


class Augmenter:
    """Random flips, rotation, shift, zoom, brightness and contrast, drawn per image on a batch.

    Each data set has its own `Augmentation`: a chest X-ray has no upside-down.
    """

    def __init__(self, names: Sequence[str], settings: Mapping[str, Augmentation]) -> None:
        rows = [settings[name] for name in names]
        self.table = {
            field: torch.tensor([float(getattr(row, field)) for row in rows])
            for field in Augmentation.__dataclass_fields__
        }

    def __call__(self, pixels: Tensor, sets: Tensor) -> Tensor:
        """Take uint8 (N, H, W, 3) pixels and their set numbers (N,); return float32 in 0..255."""
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
        rows = (
            (cosine * across, -sine * down, uniform() * of["shift"] * 2 / width),
            (sine * across, cosine * down, uniform() * of["shift"] * 2 / height),
        )
        matrix = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
        images = pixels.permute(0, 3, 1, 2).float()
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        contrast = (1 + uniform() * of["contrast"]).view(-1, 1, 1, 1)
        brightness = (uniform() * of["brightness"] * 255).view(-1, 1, 1, 1)
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        images = (images - mean) * contrast + mean + brightness
        return images.clamp(0, 255).permute(0, 2, 3, 1)
