"""Five convolutions with pooling, down to a point in the plane."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pg_siamese.training.networks.base import Network
from pg_siamese.training.networks.pixels import centred
from pg_siamese.training.networks.residual import convolution


class Conv5(Network):
    """Five convolution layers, each followed by a 2 x 2 pooling. The last gives the embedding.

    The network of the many "Siamese MNIST" demonstrations of Hadsell, Chopra and LeCun 2006:
    kernels of 7, 5, 3, 1 and 1 pixels, ReLU between them, none at the end. Five poolings take 28
    pixels to one. If a larger image leaves more, their mean is the embedding. ``batch_norm`` puts
    one after each convolution but the last: the network then learns in a fraction of the epochs.
    """

    summary = "five convolutions, each followed by max pooling"
    unit_vectors = False

    def __init__(
        self,
        dimension: int,
        channels: Sequence[int] = (32, 64, 128, 256),
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.dimension = dimension
        outputs = [*channels, dimension]
        kernels = (7, 5, 3, 1, 1)
        if len(outputs) != len(kernels):
            raise ValueError(f"{len(channels)} numbers of channels, not {len(kernels) - 1}")
        layers: list[nn.Module] = []
        inputs = 3
        for number, (width, kernel) in enumerate(zip(outputs, kernels, strict=True)):
            last = number == len(kernels) - 1
            layers.append(
                nn.Conv2d(inputs, width, kernel, padding=kernel // 2)
                if last or not batch_norm
                else convolution(inputs, width, kernel)
            )
            if not last:
                layers.append(nn.ReLU())
            pool = nn.AvgPool2d if last else nn.MaxPool2d
            layers.append(pool(2, ceil_mode=True))
            inputs = width
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        """Embed uint8 or float pixels (N, H, W, 3)."""
        points: Tensor = self.layers(centred(image))
        return points.mean(dim=(2, 3))
