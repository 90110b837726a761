"""The first blocks of the pretrained EfficientNet-lite0, for small images."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pg_siamese.training.networks.efficientnet import (
    LITE_MEAN,
    LITE_SCALE,
    MOMENTUM,
    pretrained_lite0,
)
from pg_siamese.training.networks.pixels import channels_first


class LiteTrunk(nn.Module):
    """uint8 or float pixels in 0..255, (N, H, W, 3), to features (N, ``channels``) by each branch.

    Images are enlarged to ``size`` x ``size`` pixels, since the first filters were learned on
    photographs of 224 pixels. The first ``blocks`` of the 16 blocks follow, and their mean. What
    early layers have learned of edges, colours and textures serves other images as well (Yosinski
    et al. 2014, arXiv 1411.1792). The later layers, which know ImageNet's classes, hold most of the
    weights and are left out. The first ``frozen`` blocks stay as they were learned, batch norms
    included: they are as good for any image, and most of the work of training. All ``branches``
    share them. Each branch has its own copy of the other blocks.
    """

    def __init__(self, blocks: int = 8, size: int = 56, frozen: int = 0, branches: int = 1) -> None:
        super().__init__()
        network = pretrained_lite0(size)
        if not 1 <= blocks <= len(network._blocks):
            raise ValueError(f"blocks is {blocks}: there are {len(network._blocks)}")
        if not 0 <= frozen <= blocks:
            raise ValueError(f"frozen is {frozen}: there are {blocks} blocks")
        self.size = size
        self.channels: int = network._blocks[blocks - 1]._block_args.output_filters
        stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        first = [stem, *network._blocks[:frozen]] if frozen else []
        rest = [*([] if frozen else [stem]), *network._blocks[frozen:blocks]]
        self.frozen = nn.Sequential(*first).requires_grad_(False).eval()
        self.branches = nn.ModuleList(copy.deepcopy(nn.Sequential(*rest)) for _ in range(branches))
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = MOMENTUM

    def train(self, mode: bool = True) -> LiteTrunk:
        """Set the mode. Frozen layers, with their batch norms, stay in evaluation mode."""
        super().train(mode)
        self.frozen.eval()
        return self

    def shared(self, image: Tensor) -> Tensor:
        """Return what all branches begin with, for a batch."""
        pixels = (channels_first(image) - LITE_MEAN) / LITE_SCALE
        shape = (self.size, self.size)
        found = F.interpolate(pixels, size=shape, mode="bilinear", align_corners=False)
        # Depthwise convolutions are quicker so on a CPU.
        found = found.contiguous(memory_format=torch.channels_last)
        result: Tensor = self.frozen(found)
        return result

    def features(self, branch: int, shared: Tensor) -> Tensor:
        """Return one branch's features, of what ``shared`` gave."""
        found: Tensor = self.branches[branch](shared)
        return found.mean(dim=(2, 3))
