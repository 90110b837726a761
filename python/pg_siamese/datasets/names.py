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


def class_names(name: str, count: int, classes: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names of ``count`` classes: those given, the set's own, or their numbers."""
    if classes is not None:
        return tuple(classes)
    known = CLASS_NAMES.get(name, ())
    return known if len(known) >= count else tuple(str(i) for i in range(count))
