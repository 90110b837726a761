"""CIFAR-10: an npz of it, or the folder of its python or binary archive."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from pg_siamese.datasets.base import DataFormatError, LabelledImages, Labels, Pixels
from pg_siamese.datasets.names import CLASS_NAMES
from pg_siamese.datasets.npz import read_npz
from pg_siamese.datasets.places import find_data

_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_PLANES = (3, 32, 32)


def find_cifar10() -> Path:
    """Return the npz or the archive's folder.

    Raises:
        DataNotFoundError: there is none.
    """
    found = find_data("cifar10", "cifar10*.npz", "test_batch*", "cifar-10-batches-*/test_batch*")
    return found if found.suffix == ".npz" else found.parent


def read_cifar10(path: Path | str, split: str) -> LabelledImages:
    """Read one split of CIFAR-10: 32 x 32 RGB, ten classes.

    Args:
        path: an npz in MedMNIST's layout, or a folder with ``data_batch_1`` … ``test_batch`` (the
            python archive) or the same with the suffix .bin (the binary archive).
        split: ``train`` or ``test``.

    Raises:
        DataFormatError: a file isn't what it should be.
        OSError: a file can't be read.
        ValueError: the set has no such split.
    """
    path = Path(path)
    if split not in _BATCHES:
        raise ValueError(f'CIFAR-10 has no split "{split}"')
    if path.is_file():
        return read_npz(path, split, name="cifar10")
    binary = (path / "test_batch.bin").is_file()
    files = [path / (f"{stem}.bin" if binary else stem) for stem in _BATCHES[split]]
    parts = [_binary(file) if binary else _python(file) for file in files]
    return LabelledImages(
        name="cifar10",
        split=split,
        images=np.concatenate([images for images, _ in parts]),
        labels=np.concatenate([labels for _, labels in parts]),
        classes=CLASS_NAMES["cifar10"],
        files=tuple(files),
    )


def _images(planes: Pixels) -> Pixels:
    return np.ascontiguousarray(planes.reshape(-1, *_PLANES).transpose(0, 2, 3, 1))


def _binary(file: Path) -> tuple[Pixels, Labels]:
    data = np.frombuffer(file.read_bytes(), np.uint8)
    size = 1 + int(np.prod(_PLANES))
    if not len(data) or len(data) % size:
        raise DataFormatError(f"{file}: {len(data)} bytes are no whole number of {size}")
    rows = data.reshape(-1, size)
    return _images(rows[:, 1:]), rows[:, 0].astype(np.int64)


class _ArraysOnly(pickle.Unpickler):
    """Reads the python archive's pickles and nothing else: a pickle could run any code."""

    ALLOWED = frozenset(
        [
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.numeric", "_frombuffer"),
            ("_codecs", "encode"),
        ]
    )

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Give NumPy's arrays. Anything else isn't CIFAR-10."""
        if (module_name, global_name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not allowed")
        return super().find_class(module_name.replace("numpy.core", "numpy._core"), global_name)


def _python(file: Path) -> tuple[Pixels, Labels]:
    try:
        batch = _ArraysOnly(io.BytesIO(file.read_bytes()), encoding="bytes").load()
        planes = np.asarray(batch[b"data"], np.uint8)
        labels = np.asarray(batch[b"labels"], np.int64)
        return _images(planes), labels
    except OSError:
        raise
    except Exception as error:  # whatever a broken pickle makes of itself
        raise DataFormatError(f"{file}: no batch of CIFAR-10: {error}") from error
