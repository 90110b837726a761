"""Three convolutions and a global average."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pg_siamese.training.networks.base import Network
from pg_siamese.training.networks.pixels import centred


class Conv3Gap(Network):
    """Three 3 x 3 convolutions of stride 2 with ReLU, global average pooling, a unit vector.

    After "Metric learning for image similarity search" of Keras's examples (Kelly 2020).
    """

    summary = "three convolutions of stride 2 with ReLU, global average pooling, linear layer"

    def __init__(self, dimension: int, channels: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        self.dimension = dimension
        first, second, third = channels
        self.features = nn.Sequential(
            nn.Conv2d(3, first, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(second, third, 3, stride=2),
            nn.ReLU(),
        )
        self.head = nn.Linear(third, dimension, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """Embed uint8 or float pixels (N, H, W, 3)."""
        x = self.features(centred(image)).mean(dim=(2, 3))
        return F.normalize(self.head(x), dim=1)
