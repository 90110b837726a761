"""IDX files, MNIST's format."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pg_siamese.datasets.base import DataFormatError, DataNotFoundError, LabelledImages
from pg_siamese.datasets.names import class_names
from pg_siamese.datasets.npz import label_vector

_IDX_DTYPES: dict[int, np.dtype[Any]] = {
    0x08: np.dtype("u1"),
    0x09: np.dtype("i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}


def read_idx(path: Path | str) -> npt.NDArray[Any]:
    """Read one IDX file (MNIST's format), gzipped or not, as an array in native byte order.

    Source of the format: LeCun, Cortes, Burges, "The MNIST database of handwritten digits".

    Raises:
        DataFormatError: the header is wrong, or the data is short or too long.
    """
    path = Path(path)
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise DataFormatError(f"{path}: broken gzip file: {error}") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_DTYPES or not data[3]:
        raise DataFormatError(f"{path}: not an IDX file")
    dtype, dimensions = _IDX_DTYPES[data[2]], data[3]
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise DataFormatError(f"{path}: IDX header is cut short")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    size = dtype.itemsize
    for length in shape:
        size *= length
    if len(data) - start != size:
        raise DataFormatError(
            f"{path}: IDX data of shape {shape} needs {size} bytes, the file has "
            f"{len(data) - start}"
        )
    return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def read_idx_images(
    images: Path | str,
    labels: Path | str,
    *,
    name: str,
    split: str,
    classes: Sequence[str] | None = None,
) -> LabelledImages:
    """Read a pair of IDX files: images of shape (N, H, W) or (N, H, W, 3), and labels (N,).

    Raises:
        DataFormatError: as in ``read_idx``, or the two files don't fit together.
    """
    pixels, numbers = read_idx(images), label_vector(read_idx(labels), Path(labels))
    count = int(numbers.max()) + 1 if numbers.size else 0
    return LabelledImages(
        name=name,
        split=split,
        images=pixels,
        labels=numbers,
        classes=class_names(name, count, classes),
        files=(Path(images), Path(labels)),
    )


def read_idx_folder(
    folder: Path | str,
    split: str,
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
) -> LabelledImages:
    """Read one split of a folder with MNIST's four files (or two), gzipped or not.

    ``split`` is ``train`` (``train-…``) or ``test`` (``t10k-…``).

    Raises:
        DataFormatError: as in ``read_idx_images``.
        DataNotFoundError: a file is missing.
        ValueError: such folders have no such split.
    """
    folder = Path(folder)
    prefix = {"train": "train", "test": "t10k"}.get(split)
    if prefix is None:
        raise ValueError(f'IDX folders have no split "{split}"')
    files = []
    for stem in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
        path = next((p for p in (folder / f"{stem}.gz", folder / stem) if p.is_file()), None)
        if path is None:
            raise DataNotFoundError(f"{folder}: no {stem}.gz")
        files.append(path)
    name = name or folder.resolve().name.replace("-", "_")
    return read_idx_images(files[0], files[1], name=name, split=split, classes=classes)
