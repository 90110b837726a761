"""The first blocks of the pretrained EfficientNet-lite0, for small images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pg_siamese.training.networks.efficientnet import LITE_MEAN, LITE_SCALE, pretrained_lite0
from pg_siamese.training.networks.pixels import channels_first

# Small data sets: the running statistics must follow within an epoch (the package's own is 0.01).
MOMENTUM = 0.1


class LiteTrunk(nn.Module):
    """uint8 or float pixels in 0..255, (N, H, W, 3), to features (N, `channels`).

    Images are enlarged to `size` x `size` pixels, since the first filters were learned on
    photographs of 224 pixels; the first `blocks` of the 16 blocks follow, and their mean. What
    early layers have learned of edges, colours and textures serves other images as well (Yosinski
    et al. 2014, arXiv 1411.1792); the later ones, which know ImageNet's classes, hold most of the
    weights and are left out. The first `frozen` blocks stay as they were learned, batch norms
    included: they are as good for any image, and most of the work of training.
    """

    def __init__(self, blocks: int = 8, size: int = 56, frozen: int = 0) -> None:
        super().__init__()
        network = pretrained_lite0(size)
        if not 1 <= blocks <= len(network._blocks):
            raise ValueError(f"blocks is {blocks}: there are {len(network._blocks)}")
        if not 0 <= frozen <= blocks:
            raise ValueError(f"frozen is {frozen}: there are {blocks} blocks")
        self.size = size
        self.stem = network._conv_stem
        self.norm = network._bn0
        self.blocks = network._blocks[:blocks]
        self.channels: int = self.blocks[-1]._block_args.output_filters
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = MOMENTUM
        self._frozen = [self.stem, self.norm, *self.blocks[:frozen]] if frozen else []
        for part in self._frozen:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> LiteTrunk:
        """Set the mode; frozen layers stay in evaluation mode, and so do their batch norms."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Return the features of a batch."""
        pixels = (channels_first(image) - LITE_MEAN) / LITE_SCALE
        shape = (self.size, self.size)
        found = F.interpolate(pixels, size=shape, mode="bilinear", align_corners=False)
        # Depthwise convolutions are quicker so on a CPU.
        found = found.contiguous(memory_format=torch.channels_last)
        found = F.relu6(self.norm(self.stem(found)))
        for block in self.blocks:
            found = block(found)
        return found.mean(dim=(2, 3))
