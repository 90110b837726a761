"""From uint8 pixels to the input of a convolution, as a part of the exported graph."""

from __future__ import annotations

import torch
from torch import Tensor

# Pixel values are centred and brought near unit variance. The constants are the same for all
# data, so an encoder needs no preprocessing outside.
PIXEL_MEAN = 127.5
PIXEL_SCALE = 64.0


def channels_first(image: Tensor) -> Tensor:
    """Bring uint8 or float pixels (N, H, W, 3) to float32 (N, 3, H, W), still from 0 to 255."""
    return image.permute(0, 3, 1, 2).to(torch.float32)


def centred(image: Tensor) -> Tensor:
    """Bring pixels (N, H, W, 3) from 0 to 255 to float32 (N, 3, H, W) from -2 to 2."""
    return (channels_first(image) - PIXEL_MEAN) / PIXEL_SCALE
