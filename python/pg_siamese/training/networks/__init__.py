"""The networks of the shipped encoders, and of encoders for images of your own.

Each takes uint8 pixels (N, H, W, 3) and gives float32 embeddings (N, d). It normalises the pixels
itself, so that the exported graph needs nothing outside. A new network is a new module with a
class, and a line in ``NETWORKS``.
"""

from __future__ import annotations

from pg_siamese.training.networks.base import Network
from pg_siamese.training.networks.efficientnet import EfficientNetLite0
from pg_siamese.training.networks.ensemble import Ensemble
from pg_siamese.training.networks.residual import ResidualEncoder

__all__ = ["NETWORKS", "Network"]

NETWORKS: dict[str, type[Network]] = {
    "residual": ResidualEncoder,
    "ensemble": Ensemble,
    "efficientnet_lite0": EfficientNetLite0,
}
