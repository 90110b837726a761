"""The experiments: what is trained on what, and how. Declarations only, no torch.

Each is a TOML file, here, in a folder of ``reproductions/`` or at any other path. ``settings`` says
what it can hold, and needs the extra ``train``.
"""

from pg_siamese.training.experiments.errors import ExperimentError
from pg_siamese.training.experiments.files import experiment_names, load_experiment

__all__ = ["ExperimentError", "experiment_names", "load_experiment"]
