"""EfficientNet-b0 from scratch: the Siamese network on Imagenette."""

from __future__ import annotations

from efficientnet_lite_pytorch import EfficientNet

from pg_siamese.training.networks.efficientnet import EfficientNetEncoder


class EfficientNetB0(EfficientNetEncoder):
    """EfficientNet-b0 (Tan and Le 2019) with random weights."""

    summary = "EfficientNet-b0 with random initial weights, linear layer"

    def __init__(self, dimension: int, size: tuple[int, int], dropout: float = 0.2) -> None:
        network = EfficientNet.from_name("efficientnet-b0", image_size=size[0])
        network.set_swish(memory_efficient=False)  # the other one can't be exported
        super().__init__(network, dimension, dropout)
