"""Fashion-MNIST, from Debian's package dataset-fashion-mnist."""

from __future__ import annotations

from pathlib import Path

from pg_siamese.datasets.base import DataNotFoundError, LabelledImages
from pg_siamese.datasets.idx import read_idx_folder

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def find_fashion_mnist() -> Path | None:
    """Return the folder of Debian's package dataset-fashion-mnist, or None."""
    file = FASHION_MNIST_FOLDER / "train-images-idx3-ubyte.gz"
    return FASHION_MNIST_FOLDER if file.is_file() else None


def load_fashion_mnist(split: str, folder: Path | str | None = None) -> LabelledImages:
    """Load one split of Fashion-MNIST: 28 x 28 grey.

    Args:
        split: ``train`` (60,000 images) or ``test`` (10,000). There is no validation split.
        folder: the four files' folder, by default that of Debian's package.

    Raises:
        DataNotFoundError: the files are missing. The message names the package to install.
        ValueError: the set has no such split.
    """
    if split not in ("train", "test"):
        raise ValueError(f'Fashion-MNIST has no split "{split}"')
    root = Path(folder) if folder else find_fashion_mnist()
    if root is None:
        raise DataNotFoundError(
            "Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist"
        )
    return read_idx_folder(root, split, name="fashion_mnist")
