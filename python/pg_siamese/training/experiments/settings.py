"""The settings of an experiment, as they stand in its TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct, field

from pg_siamese.training.experiments.errors import ExperimentError

Positive = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(gt=0)]
Labels = Annotated[str, Meta(pattern="^(class|set)$")]
Metric = Annotated[str, Meta(pattern="^(cosine|l2)$")]
Kind = Annotated[str, Meta(pattern="^(classes|per_class|pairs|triplets)$")]
OptimiserName = Annotated[str, Meta(pattern="^(adamw|adam)$")]
Schedule = Annotated[str, Meta(pattern="^(one_cycle|cosine|constant|plateau)$")]
Mode = Annotated[str, Meta(pattern="^(max|min)$")]
Keep = Annotated[str, Meta(pattern="^(best|last)$")]
Precision = Annotated[str, Meta(pattern="^(float32|bfloat16)$")]
Weights = Annotated[str, Meta(pattern="^(float32|float16|int8)$")]


class Augmentation(Struct, frozen=True, forbid_unknown_fields=True):
    """Ranges of random changes, each drawn uniformly in ± the value, per image.

    Rotation is in degrees, shift in pixels. Zoom, stretch and contrast are shares, brightness is a
    share of the full scale. Stretch changes the ratio of width to height. Flips are probabilities.
    So is ``small``: such an image is reduced to 28 pixels and enlarged again.
    """

    rotation: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0
    stretch: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    flip_horizontal: float = 0.0
    flip_vertical: float = 0.0
    small: float = 0.0


class ImageSize(Struct, frozen=True, forbid_unknown_fields=True):
    """The encoder's input, and how to resize an image (see the server's ``InputSpec``)."""

    width: int = 28
    height: int = 28
    resize: str = "stretch"
    interpolation: str = "bicubic"


class Network(Struct, frozen=True, forbid_unknown_fields=True):
    """Which network, and what its constructor takes (``training/networks/``)."""

    name: str = "residual"
    dimension: Positive = 64
    options: dict[str, Any] = field(default_factory=dict)


class ObjectiveChoice(Struct, frozen=True, forbid_unknown_fields=True):
    """Which objective, and what its constructor takes (``training/objectives/``)."""

    name: str = "cosface"
    options: dict[str, Any] = field(default_factory=dict)


class Sampling(Struct, frozen=True, forbid_unknown_fields=True):
    """Which images make a batch.

    Attributes:
        kind: ``classes``, ``per_class``, ``pairs`` or ``triplets``.
        balance: for ``classes``: a class of n images is drawn in proportion to n ** (1 - balance).
        shares: for ``classes``: how often images of a data set are drawn, by its name. The others
            have 1.
        per_class: for ``per_class``: images of each class in a batch.
        per_epoch: images, pairs or triplets in an epoch. 0 means as many as there are images.
    """

    kind: Kind = "classes"
    balance: float = 0.0
    shares: dict[str, Share] = field(default_factory=dict)
    per_class: Positive = 4
    per_epoch: int = 0


class Optimiser(Struct, frozen=True, forbid_unknown_fields=True):
    """How weights are learned.

    Attributes:
        name: ``adamw`` or ``adam``.
        learning_rate: the rate, or its maximum.
        weight_decay: decay of weights. Norms and biases have none.
        schedule: ``one_cycle``, ``cosine``, ``constant`` or ``plateau``.
        patience: for ``plateau``: validations without a better figure (``Validation.monitor``)
            until the rate is halved, each time again.
    """

    name: OptimiserName = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    schedule: Schedule = "one_cycle"
    patience: Positive = 3


class Validation(Struct, frozen=True, forbid_unknown_fields=True):
    """What is measured on validation data, and what follows from it.

    Attributes:
        every: epochs between two validations.
        monitor: the figure by which the best checkpoint is chosen.
        mode: ``max`` or ``min`` of that figure.
        keep: ``best`` exports the best checkpoint, ``last`` the final one.
        patience: validations without a better figure until training stops. 0 means never.
        gallery: most images of train in the gallery. 0 means all.
    """

    every: Positive = 1
    monitor: str = "val_map5"
    mode: Mode = "max"
    keep: Keep = "best"
    patience: int = 0
    gallery: int = 10_000


class Experiment(Struct, frozen=True, forbid_unknown_fields=True):
    """One encoder to train: data, network, objective and schedule.

    Attributes:
        name: its name.
        title: the card's title.
        data: texts that ``datasets.open_dataset`` takes.
        intended_use: what the encoder is for.
        limits: what it is not for.
        epochs: length of the training.
        labels: what matches: images of one ``class`` of one set, or of one ``set``.
        metric: how embeddings are compared, ``cosine`` or ``l2``.
        skip_missing: leave out data that is not available.
        outside: data sets of other kinds of images, to count the domain's errors by. Those that
            are not available are left out.
        batch_size: images, pairs or triplets in a batch.
        precision: ``float32``, or ``bfloat16`` for the products of training. That is twice as
            quick on processors that can. Validation and export are never affected.
        weights: how the exported file keeps them: ``float32``, ``float16`` or ``int8``. ``float16``
            halves the size, and they are computed with in float32. ``int8`` makes the convolutions
            integer ones, calibrated on validation images. It changes the embeddings a little.
        copies: if the network has frozen layers: of how many copies of each train image features
            are computed once. The first is the image itself, the others are changed at random.
        average_decay: decay of the moving average of the weights. 0 means none.
        snapshots: how many pictures to keep of a 2-d embedding of the validation images while it
            forms.
        seed: seed of everything random.
        input: the encoder's input.
        network: the network.
        objective: the objective.
        sampling: which images make a batch.
        optimiser: how weights are learned.
        validation: what is measured while it learns.
        augmentation: random changes by the data set's name, or ``default`` for all others.
    """

    name: str
    title: str
    data: tuple[str, ...]
    intended_use: str
    limits: str
    epochs: Positive
    labels: Labels = "class"
    metric: Metric = "cosine"
    skip_missing: bool = False
    outside: tuple[str, ...] = ()
    batch_size: Positive = 128
    precision: Precision = "float32"
    weights: Weights = "float32"
    copies: Positive = 1
    average_decay: float = 0.0
    snapshots: int = 0
    seed: int = 0
    input: ImageSize = field(default_factory=ImageSize)
    network: Network = field(default_factory=Network)
    objective: ObjectiveChoice = field(default_factory=ObjectiveChoice)
    sampling: Sampling = field(default_factory=Sampling)
    optimiser: Optimiser = field(default_factory=Optimiser)
    validation: Validation = field(default_factory=Validation)
    augmentation: dict[str, Augmentation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.snapshots and self.network.dimension != 2:
            raise ValueError("snapshots are of embeddings with network.dimension = 2 only")

    def augmentation_of(self, name: str) -> Augmentation:
        """Return the augmentation of one data set."""
        return self.augmentation.get(name) or self.augmentation.get("default") or Augmentation()

    def changed(self, **settings: Any) -> Experiment:
        """Return the same experiment with other settings."""
        return msgspec.structs.replace(self, **settings)

    def head_only(self) -> Experiment:
        """Return the same experiment in which the last layer alone learns.

        Raises:
            ExperimentError: its network has no layers to freeze.
        """
        options = dict(self.network.options)
        if "frozen_blocks" not in options:
            raise ExperimentError(f"{self.name} has no layers to freeze")
        del options["frozen_blocks"]  # by default all are frozen
        return self.changed(network=msgspec.structs.replace(self.network, options=options))

    def started_from(self, path: str) -> Experiment:
        """Return the same experiment that starts from the weights of an exported encoder."""
        options = self.network.options | {"start": path}
        return self.changed(network=msgspec.structs.replace(self.network, options=options))


def parse_experiment(table: Mapping[str, Any]) -> Experiment:
    """Make an experiment of nested tables, as TOML or a checkpoint has them.

    Keys of ``network`` and ``objective`` that are no settings are options of these.

    Raises:
        ExperimentError: a key is unknown or missing, or a value does not fit.
    """
    table = dict(table)
    for key, kind in (("network", Network), ("objective", ObjectiveChoice)):
        if isinstance(given := table.get(key), Mapping):
            known = {name: given[name] for name in kind.__struct_fields__ if name in given}
            options = {name: value for name, value in given.items() if name not in known}
            table[key] = known | {"options": known.get("options", {}) | options}
    try:
        return msgspec.convert(table, Experiment)
    except msgspec.ValidationError as error:
        raise ExperimentError(str(error)) from error
