"""A small modern residual network, whose embedding is a unit vector: the shipped encoders."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pg_siamese.training.networks.base import Network
from pg_siamese.training.networks.pixels import centred


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution with batch norm, which is folded into it at export."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: (N, inputs, H, W) to (N, outputs, H / stride, W /
    stride).

    He et al. 2016. The average-pooled shortcut is that of ResNet-D (He et al. 2019).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, stride=stride)
        self.second = convolution(outputs, outputs)
        shortcut: list[nn.Module] = []
        if stride > 1:
            shortcut.append(nn.AvgPool2d(stride, ceil_mode=True))
        if inputs != outputs:
            shortcut.append(convolution(inputs, outputs, kernel=1))
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResidualTrunk(nn.Module):
    """uint8 or float pixels in 0..255, (N, H, W, 3), to features (N, ``channels``).

    ``stem`` is (channels, stride) of the first convolution, ``stages`` (channels, stride) of each
    residual block. Height and width can be any of which the strides leave something.
    """

    def __init__(
        self,
        stem: tuple[int, int] = (32, 2),
        stages: tuple[tuple[int, int], ...] = ((32, 1), (64, 2), (128, 1)),
    ) -> None:
        super().__init__()
        channels, stride = stem
        self.stem = convolution(3, channels, stride=stride)
        blocks = []
        for outputs, stride in stages:
            blocks.append(ResidualBlock(channels, outputs, stride))
            channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.channels = channels

    def features(self, image: Tensor) -> Tensor:
        """Return what an embedding is made of: the last block's mean over the image."""
        found: Tensor = self.blocks(F.relu(self.stem(centred(image))))
        return found.mean(dim=(2, 3))


class ResidualEncoder(ResidualTrunk, Network):
    """uint8 or float pixels in 0..255, (N, H, W, 3), to float32 unit vectors (N, dimension)."""

    summary = "small residual CNN with batch norm, mean over the image, linear layer"

    def __init__(
        self,
        dimension: int = 64,
        stem: tuple[int, int] = (32, 2),
        stages: tuple[tuple[int, int], ...] = ((32, 1), (64, 2), (128, 1)),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(stem, stages)
        self.dimension = dimension
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.channels, dimension)

    def forward(self, image: Tensor) -> Tensor:
        """Embed a batch."""
        return F.normalize(self.head(self.dropout(self.features(image))), dim=1)
