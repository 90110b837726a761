"""Class names and licences of the data sets that the project knows by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_DERMA = (
    "actinic keratoses and intraepithelial carcinoma",
    "basal cell carcinoma",
    "benign keratosis-like lesions",
    "dermatofibroma",
    "melanoma",
    "melanocytic nevi",
    "vascular lesions",
)
_BREAST = ("malignant", "normal, benign")
_PNEUMONIA = ("normal", "pneumonia")
CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "breast_224": _BREAST,
    "breastmnist": _BREAST,
    "dermamnist": _DERMA,
    "ham10000_224": _DERMA,
    "ham10000_28": _DERMA,
    "pneumonia_224": _PNEUMONIA,
    "pneumonia_224_official": _PNEUMONIA,
    "pneumoniamnist": _PNEUMONIA,
    "retinamnist": ("grade 0", "grade 1", "grade 2", "grade 3", "grade 4"),
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "cifar10": tuple(
        ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    ),
}
_HAM10000 = "CC BY-NC 4.0 (HAM10000): no commercial use"
LICENCES: dict[str, str] = {
    "breast_224": "CC BY 4.0",
    "breastmnist": "CC BY 4.0",
    "cifar10": "none stated (Krizhevsky 2009): research use",
    "dermamnist": _HAM10000,
    "fashion_mnist": "MIT (Zalando SE)",
    "ham10000_224": _HAM10000,
    "ham10000_28": _HAM10000,
    "imagenette": "photographs of ImageNet: non-commercial research only",
    "mnist": "CC BY-SA 3.0 (LeCun, Cortes, Burges)",
    "pneumonia_224": "CC BY 4.0",
    "pneumonia_224_official": "CC BY 4.0",
    "pneumoniamnist": "CC BY 4.0",
    "retinamnist": "CC BY 4.0",
}


class Source(NamedTuple):
    """The pictures that a data set was made from, and the width that it has them in."""

    pictures: str
    pixels: int


# Sets that have pictures in common.
SOURCES: dict[str, Source] = {
    "breast_224": Source("BUSI", 224),
    "breastmnist": Source("BUSI", 28),
    "dermamnist": Source("HAM10000", 28),
    "ham10000_224": Source("HAM10000", 224),
    "ham10000_28": Source("HAM10000", 28),
    "pneumonia_224": Source("Kermany", 224),
    "pneumonia_224_official": Source("Kermany", 224),
    "pneumoniamnist": Source("Kermany", 28),
}


def parts_by_size(names: Sequence[str]) -> dict[int | None, list[int]]:
    """Part data sets, so that no two of one part show the same pictures.

    Sets that share their pictures are parted by their size. Of two of one size, the first counts.
    All others are in each part.

    Returns:
        The numbers of the sets in each part, by its size in pixels. If there is one part only, its
        size is None.
    """
    sources = [SOURCES.get(name, Source(name, 0)) for name in names]
    pictures = [source.pictures for source in sources]
    shared = {source for source in sources if pictures.count(source.pictures) > 1}
    sizes = dict.fromkeys(source.pixels for source in sources if source in shared)
    first = {source: sources.index(source) for source in sources}
    parts = {
        size: [n for s, n in first.items() if s not in shared or s.pixels == size] for size in sizes
    }
    if len(parts) > 1:
        return {size: sorted(numbers) for size, numbers in parts.items()}
    return {None: sorted(first.values())}


def class_names(name: str, count: int, classes: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names of ``count`` classes: those given, the set's own, or their numbers."""
    if classes is not None:
        return tuple(classes)
    known = CLASS_NAMES.get(name, ())
    return known if len(known) >= count else tuple(str(i) for i in range(count))
