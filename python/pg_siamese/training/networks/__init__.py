"""The networks: each takes uint8 pixels (N, H, W, 3) and gives float32 embeddings (N, d).

Normalisation of the pixels is part of every network, so that nothing of it is left to do outside of
the exported graph. A new network is a new module with a class, and a line in `NETWORKS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from pg_siamese.training.experiments import ExperimentError
from pg_siamese.training.networks.conv3_gap import Conv3Gap
from pg_siamese.training.networks.conv5 import Conv5
from pg_siamese.training.networks.efficientnet import EfficientNetB0, EfficientNetLite0
from pg_siamese.training.networks.ensemble import Ensemble
from pg_siamese.training.networks.residual import ResidualEncoder
from pg_siamese.training.networks.siamese_cnn import SiameseCnn

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "siamese_cnn": SiameseCnn,
    "conv5": Conv5,
    "conv3_gap": Conv3Gap,
    "efficientnet_b0": EfficientNetB0,
    "efficientnet_lite0": EfficientNetLite0,
    "residual": ResidualEncoder,
    "ensemble": Ensemble,
}


def build_network(
    name: str,
    dimension: int,
    size: tuple[int, int],
    options: Mapping[str, Any],
    sets: Sequence[str] = (),
) -> nn.Module:
    """Make a network for images of `size` (height, width) of the data sets named.

    Raises `ExperimentError` for a network or an option that there isn't, and for a size that the
    network can't take.
    """
    build = NETWORKS.get(name)
    if build is None:
        raise ExperimentError(f'no network "{name}"; there are: {", ".join(NETWORKS)}')
    given = {"dimension": dimension, "size": size, "sets": tuple(sets)}
    takes = inspect.signature(build).parameters
    known = [key for key in takes if key not in given]
    for key in options:
        if key not in known:
            raise ExperimentError(
                f'network "{name}" has no option "{key}"; there are: {", ".join(known) or "none"}'
            )
    try:
        return build(**{key: given[key] for key in given if key in takes}, **options)
    except (TypeError, ValueError) as error:
        raise ExperimentError(f'network "{name}": {error}') from error
