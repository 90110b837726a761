"""The twin encoder of the Siamese network on MedMNIST."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pg_siamese.training.networks.base import Network
from pg_siamese.training.networks.pixels import channels_first


class SiameseCnn(Network):
    """Batch norm, two 5 x 5 convolutions with tanh and average pooling, a linear layer.

    After the "Siamese network with a contrastive loss" of Keras's examples (Singh Saluja 2021),
    whose channels are 4 and 16. Embeddings are compared by their Euclidean distance, so they are
    not normalised. The linear layer fixes the image's size (height, width).
    """

    summary = "batch norm, two 5 x 5 convolutions with tanh and average pooling, linear layer"
    unit_vectors = False

    def __init__(
        self, dimension: int, size: tuple[int, int], channels: Sequence[int] = (4, 16)
    ) -> None:
        super().__init__()
        self.dimension = dimension
        first, second = channels
        self.features = nn.Sequential(
            nn.BatchNorm2d(3),
            nn.Conv2d(3, first, 5),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(first, second, 5),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
        )
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in size)
        if min(rows, columns) < 1:
            raise ValueError(f"images of {size[1]} x {size[0]} pixels are too small: 16 at least")
        self.head = nn.Linear(second * rows * columns, dimension)

    def forward(self, image: Tensor) -> Tensor:
        """Embed uint8 or float pixels (N, H, W, 3)."""
        embedding: Tensor = self.head(self.features(channels_first(image) / 255))
        return embedding
