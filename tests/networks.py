"""Networks as other projects have them, with random weights: of any size, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pg_siamese.training.networks.pixels import centred


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.layers = nn.Sequential(
            _convolution(inputs, width, 1),
            nn.ReLU(),
            _convolution(width, width, 3, stride),
            nn.ReLU(),
            _convolution(width, outputs, 1),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = F.relu(self.layers(x) + self.shortcut(x))
        return maps


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """torchvision's ResNet of bottlenecks. The defaults are those of ResNet-50."""

    def __init__(self, depths: Sequence[int] = (3, 4, 6, 3), width: int = 64) -> None:
        super().__init__()
        layers = [_convolution(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        inputs = width
        for stage, depth in enumerate(depths):
            for block in range(depth):
                stride = 2 if stage and not block else 1
                layers.append(_Bottleneck(inputs, width << stage, stride))
                inputs = 4 * (width << stage)
        self.layers = nn.Sequential(*layers)
        self.fc: nn.Module = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.layers(x)
        classes: Tensor = self.fc(maps.mean((2, 3)))
        return classes


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, quick: bool) -> None:
        super().__init__()
        self.heads, self.quick = heads, quick
        self.before_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.before_layers = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.before_attention(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        found = F.scaled_dot_product_attention(query, key, value)
        x = x + self.attended(found.transpose(1, 2).flatten(2))
        inner = self.up(self.before_layers(x))
        inner = inner * torch.sigmoid(1.702 * inner) if self.quick else F.gelu(inner)
        result: Tensor = x + self.down(inner)
        return result


class VisionTransformer(nn.Module):
    """DINOv2's transformer with a class token, or CLIP's: quick GELU and a projection.

    Names are those of DINOv2, which makes its position embeddings for 518 pixels.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        patch_size: int,
        size: int,
        quick: bool = False,
        projection: int = 0,
    ) -> None:
        super().__init__()
        self.patch_size, self.embed_dim = patch_size, width
        self.patches = nn.Conv2d(3, width, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (size // patch_size) ** 2, width))
        self.blocks = nn.Sequential(*(_Block(width, heads, quick) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, projection, bias=False) if projection else nn.Identity()

    def interpolate_pos_encoding(self, tokens: Tensor, width: int, height: int) -> Tensor:
        """Return position embeddings for an image of so many pixels."""
        known = int((self.pos_embed.shape[1] - 1) ** 0.5)
        if tokens.shape[1] == self.pos_embed.shape[1] and width == height:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, known, known, -1).permute(0, 3, 1, 2)
        scales = [(side // self.patch_size + 0.1) / known for side in (width, height)]
        grid = F.interpolate(grid, scale_factor=scales, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), tokens], 1)
        tokens = tokens + self.interpolate_pos_encoding(tokens, x.shape[2], x.shape[3])
        embedding: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return embedding


class PixelEncoder(nn.Module):
    """uint8 pixels (batch, height, width, 3) to the unit vectors of a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return F.normalize(self.network(centred(image)), dim=1)
