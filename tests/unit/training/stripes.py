"""Data that trains in seconds: stripes, across or down."""

from __future__ import annotations

import numpy as np

from pg_siamese.datasets import LabelledImages
from pg_siamese.training.experiments.settings import Experiment, parse_experiment

PARTS = (("train", 96), ("val", 24), ("test", 24))
STAGES = [[16, 2], [32, 2]]


def striped(name: str, split: str, count: int, seed: int, grey: bool) -> LabelledImages:
    """Noisy stripes, across or down: two classes that need a convolution to tell them apart."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    wave = np.sin(np.arange(28) * (0.8 if grey else 1.6)) * 60 + 128
    images = np.where(labels[:, None, None] == 0, wave[None, :, None], wave[None, None, :])
    images = images + random.normal(0, 20, (count, 28, 28))
    pixels = images.clip(0, 255).astype(np.uint8)
    if not grey:
        pixels = np.repeat(pixels[..., None], 3, axis=3)
    return LabelledImages(name, split, pixels, labels, ("across", "down"))


def tiny(**changes: object) -> Experiment:
    """Return an experiment of some seconds, with other settings than usual."""
    table = {
        "name": "tiny",
        "title": "A tiny encoder",
        "data": [],
        "augmentation": {"grey": {"shift": 1}, "colour": {"brightness": 0.1}},
        "intended_use": "Tests.",
        "limits": "Knows nothing but stripes.",
        "epochs": 4,
        "batch_size": 32,
        "average_decay": 0.9,
        "network": {"name": "residual", "dimension": 16, "stem": [8, 2], "stages": STAGES},
        "sampling": {"balance": 1.0},
        "validation": {"every": 2, "keep": "last"},
    }
    return parse_experiment(table | changes)
