"""The settings of an experiment, as they stand in its TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pg_siamese.client.connection import CommandError

SCHEDULES = ("one_cycle", "cosine", "constant", "plateau")


class ExperimentError(CommandError):
    """An experiment can't be run as it is written: the message says where and why."""


@dataclass(frozen=True)
class Augmentation:
    """Ranges of random changes, each drawn uniformly in ± the value, per image.

    Rotation in degrees, shift in pixels, zoom and contrast as a share, brightness as a share of
    the full scale; flips as probabilities.
    """

    rotation: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    flip_horizontal: float = 0.0
    flip_vertical: float = 0.0


@dataclass(frozen=True)
class ImageSize:
    """The encoder's input, and how an image comes to it (see the server's `InputSpec`)."""

    width: int = 28
    height: int = 28
    resize: str = "stretch"
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class Network:
    """Which network, and what its constructor takes (`training/networks/`)."""

    name: str = "residual"
    dimension: int = 64
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ObjectiveChoice:
    """Which objective, and what its constructor takes (`training/objectives/`)."""

    name: str = "cosface"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """Which images make a batch: `kind` is "classes", "per_class", "pairs" or "triplets".

    `balance` is for "classes": a class of n images is drawn in proportion to n ** (1 - balance).
    `per_class` images of each class are in a batch of "per_class". `per_epoch` is the number of
    images, pairs or triplets in an epoch; 0 means as many as there are images.
    """

    kind: str = "classes"
    balance: float = 0.0
    per_class: int = 4
    per_epoch: int = 0


@dataclass(frozen=True)
class Optimiser:
    """`name` is "adamw" or "adam", `schedule` "one_cycle", "cosine", "constant" or "plateau".

    "plateau" halves the rate after `patience` validations without a better figure (that of
    `validation.monitor`), each time anew.
    """

    name: str = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    schedule: str = "one_cycle"
    patience: int = 3


@dataclass(frozen=True)
class Validation:
    """What is measured on validation data, and what follows from it.

    Every `every` epochs; the gallery is at most `gallery` of the train images (0: all of them).
    `monitor` is the figure that the best checkpoint has the best of (`mode` "max" or "min");
    `keep` "best" exports that one, "last" the final one. Training stops early after `patience`
    validations without a better figure (0: never).
    """

    every: int = 1
    monitor: str = "val_map5"
    mode: str = "max"
    keep: str = "best"
    patience: int = 0
    gallery: int = 10_000


@dataclass(frozen=True)
class Experiment:
    """One encoder to train: data, network, objective and schedule.

    `data` are texts that `datasets.open_dataset` takes; with `skip_missing` those that can't be
    had are left out. `labels` says what matches: images of one "class" of one set, or of one
    "set". `metric` ("cosine" or "l2") is how embeddings are compared. `precision` is "float32", or
    "bfloat16" for the products of training alone: twice as quick on processors that can, and never
    what is validated or exported. `weights` is how the exported file keeps them: "float32", or
    "float16" for half the size; they are computed with in float32 either way. `average_decay` is
    that of the moving average of the weights (0: none). With `snapshots`, so many pictures of a 2-d
    embedding of the validation images are kept while it forms. `augmentation` is by the data set's
    name, "default" for all others. `outside` are data sets of other kinds of images, by which the
    errors of the domain are counted; those that can't be had are left out.
    """

    name: str
    title: str
    data: tuple[str, ...]
    intended_use: str
    limits: str
    epochs: int
    labels: str = "class"
    metric: str = "cosine"
    skip_missing: bool = False
    outside: tuple[str, ...] = ()
    batch_size: int = 128
    precision: str = "float32"
    weights: str = "float32"
    average_decay: float = 0.0
    snapshots: int = 0
    seed: int = 0
    input: ImageSize = field(default_factory=ImageSize)
    network: Network = field(default_factory=Network)
    objective: ObjectiveChoice = field(default_factory=ObjectiveChoice)
    sampling: Sampling = field(default_factory=Sampling)
    optimiser: Optimiser = field(default_factory=Optimiser)
    validation: Validation = field(default_factory=Validation)
    augmentation: Mapping[str, Augmentation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of(self.labels, ("class", "set"), "labels")
        _one_of(self.metric, ("cosine", "l2"), "metric")
        _one_of(self.sampling.kind, ("classes", "per_class", "pairs", "triplets"), "sampling.kind")
        _one_of(self.optimiser.name, ("adamw", "adam"), "optimiser.name")
        _one_of(self.optimiser.schedule, SCHEDULES, "optimiser.schedule")
        _one_of(self.precision, ("float32", "bfloat16"), "precision")
        _one_of(self.weights, ("float32", "float16"), "weights")
        _one_of(self.validation.mode, ("max", "min"), "validation.mode")
        _one_of(self.validation.keep, ("best", "last"), "validation.keep")
        positive = {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "network.dimension": self.network.dimension,
            "validation.every": self.validation.every,
            "sampling.per_class": self.sampling.per_class,
            "optimiser.patience": self.optimiser.patience,
        }
        for key, value in positive.items():
            if value < 1:
                raise ExperimentError(f"{key} is {value}: it must be at least 1")
        if self.snapshots and self.network.dimension != 2:
            raise ExperimentError("snapshots are of embeddings with network.dimension = 2 only")

    def augmentation_of(self, name: str) -> Augmentation:
        """Return the augmentation of one data set."""
        return self.augmentation.get(name) or self.augmentation.get("default") or Augmentation()


def _one_of(value: str, known: tuple[str, ...], key: str) -> None:
    if value not in known:
        raise ExperimentError(f'{key} is "{value}": it must be one of {", ".join(known)}')
