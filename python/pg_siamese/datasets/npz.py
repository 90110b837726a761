"""Files in MedMNIST's layout: one npz with ``train_images``, ``train_labels`` and so on."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pg_siamese.datasets.base import SPLITS, DataFormatError, Groups, LabelledImages, Labels
from pg_siamese.datasets.names import class_names


def npz_splits(path: Path | str) -> tuple[str, ...]:
    """Return the splits that an npz file in MedMNIST's layout holds, in the order of ``SPLITS``."""
    with _open_npz(Path(path)) as file:
        return tuple(s for s in SPLITS if f"{s}_images" in file and f"{s}_labels" in file)


def read_npz(
    path: Path | str,
    split: str,
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
) -> LabelledImages:
    """Read one split of an npz file in MedMNIST's layout: ``train_images``, ``train_labels``, ….

    Labels may be (N,) or (N, 1). Groups (``train_groups``, …) are optional: integers or text (N,).
    Pickled arrays are refused.

    Args:
        path: the file.
        split: the split.
        name: the data set's name, by default that of the file.
        classes: names of the classes. By default those of a known set, or the label numbers.

    Raises:
        DataFormatError: the file isn't such an npz or lacks the split.
        OSError: the file can't be read.
    """
    path = Path(path)
    name = name or path.stem
    with _open_npz(path) as file:
        if f"{split}_images" not in file or f"{split}_labels" not in file:
            splits = [s for s in SPLITS if f"{s}_images" in file and f"{s}_labels" in file]
            raise DataFormatError(
                f'{path}: no split "{split}"; there are: {", ".join(splits) or "none"}'
            )
        try:
            images, labels = file[f"{split}_images"], file[f"{split}_labels"]
            groups = file.get(f"{split}_groups")
            everything = [file[f"{s}_labels"] for s in SPLITS if f"{s}_labels" in file]
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataFormatError(f"{path}: {error}") from error
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise DataFormatError(
            f"{path}: labels have shape {labels.shape}: one class an image is needed"
        )
    # The classes are those of the whole file, so that all its splits have the same ones.
    count = max((int(a.max()) + 1 for a in everything if a.size), default=0)
    return LabelledImages(
        name=name,
        split=split,
        images=images,
        labels=label_vector(labels, path),
        classes=class_names(name, count, classes),
        files=(path,),
        groups=None if groups is None else _group_vector(groups, path),
    )


def _group_vector(groups: npt.NDArray[Any], path: Path) -> Groups:
    if groups.dtype.kind not in "iuU":
        raise DataFormatError(f"{path}: groups are {groups.dtype}, neither integers nor text")
    return groups.reshape(-1).astype(np.str_)


def _open_npz(path: Path) -> np.lib.npyio.NpzFile:
    try:
        file = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataFormatError(f"{path}: not an npz file: {error}") from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise DataFormatError(f"{path}: one array, not an npz file")
    return file


def label_vector(labels: npt.NDArray[Any], path: Path) -> Labels:
    """Return labels as int64 (N,).

    Raises:
        DataFormatError: the labels are no integers.
    """
    if labels.dtype.kind not in "iu":
        raise DataFormatError(f"{path}: labels are {labels.dtype}, not integers")
    return labels.reshape(-1).astype(np.int64)
