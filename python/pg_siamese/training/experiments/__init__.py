"""The experiments: what is trained on what, and how. Declarations only, no torch.

Each is a TOML file in this folder; a new experiment is a new file, here or anywhere.
"""

from __future__ import annotations

from pg_siamese.training.experiments.files import (
    experiment_names,
    load_experiment,
    parse_experiment,
)
from pg_siamese.training.experiments.settings import (
    Augmentation,
    Experiment,
    ExperimentError,
    ImageSize,
    Network,
    ObjectiveChoice,
    Optimiser,
    Sampling,
    Validation,
)

__all__ = [
    "Augmentation",
    "Experiment",
    "ExperimentError",
    "ImageSize",
    "Network",
    "ObjectiveChoice",
    "Optimiser",
    "Sampling",
    "Validation",
    "experiment_names",
    "load_experiment",
    "parse_experiment",
]
