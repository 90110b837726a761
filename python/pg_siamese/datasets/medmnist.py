"""MedMNIST: the places of its files, and their download."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import os
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pg_siamese.datasets.base import DataNotFoundError, LabelledImages
from pg_siamese.datasets.npz import read_npz
from pg_siamese.datasets.places import data_folders
from pg_siamese.files import write_whole

MEDICAL_SETS = ("breastmnist", "dermamnist", "pneumoniamnist", "retinamnist")
STAND_INS = {"dermamnist": "ham10000_28"}


def medmnist_folders() -> list[Path]:
    """Return the folders to look for MedMNIST files in, in order."""
    root = os.environ.get("MEDMNIST_ROOT")
    first = [Path(root).expanduser()] if root else []
    *own, beside = data_folders("medmnist")
    return [*first, *own, Path.home() / ".medmnist", beside]


def _folders() -> list[Path]:
    # By the package's name for it, so that a replacement of that one counts.
    from pg_siamese import datasets

    return datasets.medmnist_folders()


def find_medmnist(name: str) -> Path | None:
    """Return the local file of a MedMNIST set or of its stand-in, or None.

    The set itself, anywhere, goes before its stand-in.
    """
    for stem in (name, STAND_INS.get(name)):
        for folder in _folders() if stem else ():
            if (path := folder / f"{stem}.npz").is_file():
                return path
    return None


def medmnist_info() -> dict[str, dict[str, Any]] | None:
    """Return what the package ``medmnist`` knows of its sets, or None if it isn't installed."""
    # medmnist's own download() needs torchvision. If torch is missing, the package prints an advert
    # for its other dependencies. Only addresses, checksums and names are used of it.
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from medmnist.info import INFO
    except ImportError:
        return None
    info: dict[str, dict[str, Any]] = INFO
    return info


def download_medmnist(name: str, folder: Path | str | None = None, timeout: float = 20) -> Path:
    """Download a MedMNIST set at 28 x 28, and check it.

    The package ``medmnist`` states address and MD5. The file appears whole or not at all.

    Args:
        name: the set's name.
        folder: by default ``MEDMNIST_ROOT`` or else ``~/.medmnist``.
        timeout: seconds for each network operation.

    Returns:
        The file's path.

    Raises:
        DataNotFoundError: the package isn't installed or doesn't know the set, or the download
            fails.
    """
    info = medmnist_info()
    if info is None:
        raise DataNotFoundError(
            f"{name}.npz is in none of {', '.join(map(str, _folders()))}, and the package "
            "medmnist, which knows its address, is not installed"
        )
    if name not in info:
        raise DataNotFoundError(f'medmnist knows no data set "{name}"')
    root = folder or os.environ.get("MEDMNIST_ROOT") or Path.home() / ".medmnist"
    target = Path(root).expanduser() / f"{name}.npz"
    try:
        with urllib.request.urlopen(info[name]["url"], timeout=timeout) as response:
            content = response.read()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != info[name]["MD5"]:
            raise DataNotFoundError(f"{name}.npz: the download's MD5 is not that of MedMNIST")
        write_whole(target, content)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        if isinstance(error, DataNotFoundError):
            raise
        raise DataNotFoundError(f"{name}.npz could not be downloaded: {error}") from error
    return target


def load_medmnist(name: str, split: str, *, download: bool = True) -> LabelledImages:
    """Load one split of a MedMNIST set (or of its stand-in): local file first, else download.

    The result's name is the file's: ``ham10000_28`` if that stands in for ``dermamnist``.

    Raises:
        DataNotFoundError: the set is not available.
        DataFormatError: the file is broken.
    """
    return read_npz(medmnist_file(name, download=download), split)


def medmnist_file(name: str, *, download: bool = True) -> Path:
    """Return the file of a MedMNIST set or of its stand-in, downloaded if it is missing.

    Raises:
        DataNotFoundError: the set is not available.
    """
    path = find_medmnist(name)
    if path is None and not download:
        raise DataNotFoundError(f"{name}.npz is in none of {', '.join(map(str, _folders()))}")
    return path or download_medmnist(name)


def load_medical(
    splits: Iterable[str], *, download: bool = True
) -> dict[str, dict[str, LabelledImages]]:
    """Load breast, derma (or its stand-in), pneumonia and retina.

    Returns:
        The images by set and split. Sets that are not available are left out, so compare the keys
        with ``MEDICAL_SETS``.

    Raises:
        DataNotFoundError: no set is available.
    """
    splits = tuple(splits)
    found: dict[str, dict[str, LabelledImages]] = {}
    reasons = []
    for name in MEDICAL_SETS:
        try:
            parts = {split: load_medmnist(name, split, download=download) for split in splits}
        except DataNotFoundError as error:
            reasons.append(str(error))
            download = False  # one refusal is enough: no four time-outs
            continue
        found[next(iter(parts.values())).name] = parts
    if not found:
        raise DataNotFoundError("; ".join(reasons))
    return found
