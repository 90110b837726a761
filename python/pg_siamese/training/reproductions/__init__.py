"""Other systems, trained and measured as the shipped encoders are: one folder per system.

A folder holds the system's own network and objective, and its experiments as TOML files. The
shipped encoders need nothing of it.
"""

from __future__ import annotations

from pg_siamese.training.networks import Network
from pg_siamese.training.objectives import Objective
from pg_siamese.training.reproductions.cifar10.network import Conv3Gap
from pg_siamese.training.reproductions.cifar10.objective import Triplet, TripletCrossEntropy
from pg_siamese.training.reproductions.imagenette.network import EfficientNetB0
from pg_siamese.training.reproductions.imagenette.objective import PairCrossEntropy
from pg_siamese.training.reproductions.medmnist_siamese.network import SiameseCnn
from pg_siamese.training.reproductions.medmnist_siamese.objective import SigmoidContrastive
from pg_siamese.training.reproductions.mnist.network import Conv5
from pg_siamese.training.reproductions.mnist.objective import HadsellContrastive

NETWORKS: dict[str, type[Network]] = {
    "siamese_cnn": SiameseCnn,
    "conv5": Conv5,
    "conv3_gap": Conv3Gap,
    "efficientnet_b0": EfficientNetB0,
}
OBJECTIVES: dict[str, type[Objective]] = {
    "contrastive_sigmoid": SigmoidContrastive,
    "contrastive_hadsell": HadsellContrastive,
    "pair_cross_entropy": PairCrossEntropy,
    "triplet": Triplet,
    "triplet_cross_entropy": TripletCrossEntropy,
}
