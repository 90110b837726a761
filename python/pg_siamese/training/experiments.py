"""The experiments: what is trained on what, and how. Declarations only, no torch.

A new experiment is a new entry in `EXPERIMENTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pg_siamese.training.data import DataSplits


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
class Experiment:
    """One encoder to train: data, network, objective and schedule."""

    name: str
    title: str
    load: Callable[[int], list[DataSplits]]
    augmentation: Mapping[str, Augmentation]
    intended_use: str
    limits: str
    epochs: int
    dimension: int = 64
    stem: tuple[int, int] = (32, 2)
    stages: tuple[tuple[int, int], ...] = ((32, 1), (64, 2), (128, 1))
    dropout: float = 0.0
    margin: float = 0.2
    scale: float = 16.0
    balance: float = 1.0
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    average_decay: float = 0.998
    validate_every: int = 5
    seed: int = 0


def load_medical_splits(seed: int) -> list[DataSplits]:
    """Load breast, derma (or its stand-in), pneumonia and retina with their own splits."""
    from pg_siamese.datasets import SPLITS, load_medical
    from pg_siamese.training.data import DataSplits

    return [DataSplits(**parts) for parts in load_medical(SPLITS).values()]


def load_fashion_mnist_splits(seed: int) -> list[DataSplits]:
    """Load Fashion-MNIST; 5,000 of its 60,000 train images are held out for validation."""
    from pg_siamese.datasets import load_fashion_mnist
    from pg_siamese.training.data import DataSplits, hold_out

    train, val = hold_out(load_fashion_mnist("train"), 5000, seed)
    return [DataSplits(train, val, load_fashion_mnist("test"))]


_SKIN = Augmentation(
    rotation=180,
    shift=2,
    zoom=0.1,
    brightness=0.1,
    contrast=0.2,
    flip_horizontal=0.5,
    flip_vertical=0.5,
)

EXPERIMENTS: dict[str, Experiment] = {
    "medical": Experiment(
        name="medical",
        title="Encoder for small medical images (MedMNIST: breast, derma, pneumonia, retina)",
        load=load_medical_splits,
        augmentation={
            "breastmnist": Augmentation(10, 2, 0.1, 0.1, 0.2, flip_horizontal=0.5),
            "dermamnist": _SKIN,
            "ham10000_28": _SKIN,
            "pneumoniamnist": Augmentation(10, 2, 0.1, 0.1, 0.2, flip_horizontal=0.5),
            "retinamnist": Augmentation(
                20, 1, 0.05, 0.1, 0.2, flip_horizontal=0.5, flip_vertical=0.5
            ),
        },
        intended_use=(
            "Demonstration, tests and benchmarks of similar-image search: find images of the same "
            "kind among breast ultrasounds, dermatoscopic pictures, chest X-rays and fundus "
            "photographs of 28 x 28 pixels. Not for diagnosis or any other clinical use."
        ),
        limits=(
            "Trained on four small public data sets only, at 28 x 28 pixels, where much of what a "
            "physician looks at is gone: above all, retinopathy grades are told apart poorly. "
            "Images of other kinds get a vector too, but one that means nothing. The validation "
            "splits of breast (78 images) and retina (120) are small, so their figures move by "
            "several points from seed to seed. Chest X-rays: train and validation are parts of one "
            "pool, the test split is not, and its figures are clearly lower; 8 validation "
            "images also occur in train. `ham10000_28` has the source and the classes of "
            "DermaMNIST but is not DermaMNIST: its figures are not comparable with published "
            "ones.\n\n"
            "Licence: HAM10000 is CC BY-NC 4.0, so a model trained on it is for non-commercial "
            "use only; the other three data sets are CC BY 4.0 (MedMNIST v2, Yang et al., "
            "Scientific Data 10:41, 2023). Train without the HAM10000 file for a model that is "
            "free of this restriction."
        ),
        epochs=20,
    ),
    "fashion_mnist": Experiment(
        name="fashion_mnist",
        title="Encoder for Fashion-MNIST",
        load=load_fashion_mnist_splits,
        augmentation={"fashion_mnist": Augmentation(5, 1.5, 0.08, 0.05, 0.1, flip_horizontal=0.5)},
        intended_use=(
            "Demonstration, tests and benchmarks of similar-image search, where no medical data "
            "can be had: find clothes of the same kind."
        ),
        limits=(
            "Knows centred, grey 28 x 28 pictures of ten kinds of clothes on black, as in "
            "Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747); photographs need "
            "another encoder. Shirts are mistaken for T-shirts, pullovers and coats most often. "
            "The validation part is held out of the 60,000 train images, which are the gallery's "
            "source too."
        ),
        epochs=8,
        balance=0.0,
        batch_size=256,
        validate_every=4,
    ),
}
