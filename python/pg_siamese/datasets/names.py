"""Class names and licences of the data sets that the project knows by name."""

from __future__ import annotations

from collections.abc import Sequence

_DERMA = (
    "actinic keratoses and intraepithelial carcinoma",
    "basal cell carcinoma",
    "benign keratosis-like lesions",
    "dermatofibroma",
    "melanoma",
    "melanocytic nevi",
    "vascular lesions",
)
CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "breastmnist": ("malignant", "normal, benign"),
    "dermamnist": _DERMA,
    "ham10000_28": _DERMA,
    "pneumoniamnist": ("normal", "pneumonia"),
    "retinamnist": ("grade 0", "grade 1", "grade 2", "grade 3", "grade 4"),
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "cifar10": tuple(
        ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    ),
}
LICENCES: dict[str, str] = {
    "breastmnist": "CC BY 4.0",
    "cifar10": "none stated (Krizhevsky 2009): research use",
    "dermamnist": "CC BY-NC 4.0 (HAM10000): no commercial use",
    "fashion_mnist": "MIT (Zalando SE)",
    "ham10000_28": "CC BY-NC 4.0 (HAM10000): no commercial use",
    "imagenette": "photographs of ImageNet: non-commercial research only",
    "mnist": "CC BY-SA 3.0 (LeCun, Cortes, Burges)",
    "pneumoniamnist": "CC BY 4.0",
    "retinamnist": "CC BY 4.0",
}


def class_names(name: str, count: int, classes: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names of ``count`` classes: those given, the set's own, or their numbers."""
    if classes is not None:
        return tuple(classes)
    known = CLASS_NAMES.get(name, ())
    return known if len(known) >= count else tuple(str(i) for i in range(count))
