"""A baseline to compare trained encoders with: the pretrained EfficientNet-lite0, as it is.

Its mean features (1,280 dimensions, of unit length) of images enlarged to 224 pixels, by cosine. It
becomes an ONNX file like any other, so that ``pg_siamese evaluate`` measures it in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pg_siamese.training.export import to_onnx
from pg_siamese.training.files import write_model
from pg_siamese.training.networks.efficientnet import FEATURES, EfficientNetLite0

NAME = "efficientnet_lite0"
SIZE = 224  # what its weights were learned at


class _Features(nn.Module):
    """The mean features of EfficientNet-lite0, of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNetLite0(1, (SIZE, SIZE))

    def forward(self, image: Tensor) -> Tensor:
        """Embed uint8 pixels (N, 224, 224, 3): float32 (N, 1280)."""
        return F.normalize(self.network.features(image).flatten(1), dim=1)


def export_baseline(path: Path, specs: Sequence[str]) -> None:
    """Write the pretrained network as ONNX.

    ``specs`` are the data sets to evaluate it on.
    """
    torch.manual_seed(0)
    metadata = {
        "format": 1,
        "name": NAME,
        "dimension": FEATURES,
        "metric": "cosine",
        "labels": "class",
        "input": {
            "width": SIZE,
            "height": SIZE,
            "channels": 3,
            "resize": "stretch",
            "interpolation": "bicubic",
        },
        "training": {
            "experiment": NAME,
            "seed": 0,
            "command": "pg_siamese baseline",
            "data": [{"name": spec.rpartition(":")[2], "spec": spec} for spec in specs],
        },
    }
    write_model(to_onnx(_Features().eval(), (SIZE, SIZE)), path, metadata)
