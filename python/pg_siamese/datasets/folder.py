"""Folders of images by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pg_siamese.datasets.base import (
    SPLITS,
    DataFormatError,
    DataNotFoundError,
    Groups,
    LabelledImages,
    Pixels,
)

if TYPE_CHECKING:
    from pg_siamese_server.encoding.specification import InputSpec

# What Pillow knows the formats of the server's decoder by.
IMAGE_SUFFIXES = frozenset(
    (
        *(".apng", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png"),
        *(".tif", ".tiff", ".webp", ".dcm", ".dicom", ".ima"),
    )
)
# Pictures, too, but the server can't decode them: each is worth a line.
OTHER_IMAGE_SUFFIXES = frozenset(
    (
        *(".ai", ".arw", ".avif", ".cr2", ".cr3", ".dng", ".eps", ".exr"),
        *(".heic", ".heif", ".ico", ".j2k", ".jp2", ".jpx", ".jxl", ".nef", ".nii", ".orf"),
        *(".pbm", ".pdf", ".pgm", ".ppm", ".psd", ".raf", ".raw", ".rw2", ".svg", ".tga"),
    )
)
_SPLIT_FOLDERS = {split: split for split in SPLITS} | {"valid": "val", "validation": "val"}


@dataclass(frozen=True)
class LeftOut:
    """A file of a folder that is not taken.

    Attributes:
        path: the file.
        kind: groups it with others like it.
        reason: why it is not taken. None if nobody would take the file for a picture.
    """

    path: Path
    kind: str
    reason: str | None = None


@dataclass(frozen=True)
class Member:
    """One image by its path or its name in an archive.

    Its class is the sub-folder. Class and split are None if it has none.
    """

    name: str
    label: str | None
    split: str | None


def class_and_split(folders: Sequence[str]) -> tuple[str | None, str | None]:
    """Return class and split of an image that lies in these folders, outermost first."""
    above = list(folders)
    split = _SPLIT_FOLDERS[above.pop(0)] if above and above[0] in _SPLIT_FOLDERS else None
    return above[0] if above else None, split


def list_image_folder(
    folder: Path | str, leave_out: Callable[[LeftOut], object] = lambda file: None
) -> list[Member]:
    """List the images of a folder, in the order of their paths.

    Images may lie in the folder itself (no class), in ``class/`` or in ``split/class/``. Splits are
    ``train``, ``val`` (or ``valid``, ``validation``) and ``test``. A deeper path keeps its first
    folder (below the split) as the class. Hidden files and folders are left out.

    Args:
        folder: the folder.
        leave_out: called with each file that is left out.

    Raises:
        DataNotFoundError: there is no such folder or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataNotFoundError(f"{folder}: no such folder")
    files = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        parts = path.relative_to(folder).parts
        suffix = path.suffix.lower()
        if any(part.startswith(".") for part in parts):
            leave_out(LeftOut(path, "hidden"))
        elif suffix in IMAGE_SUFFIXES or _is_dicom(path):
            files.append(Member(str(path), *class_and_split(parts[:-1])))
        elif suffix in OTHER_IMAGE_SUFFIXES:
            leave_out(LeftOut(path, suffix, f"{suffix} files are not supported"))
        else:
            leave_out(LeftOut(path, suffix or "without a suffix"))
    if not files:
        raise DataNotFoundError(f"{folder}: no image in this folder")
    return files


def _is_dicom(path: Path) -> bool:
    """Return whether a file says so itself: archives name DICOM files by numbers, if at all."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM" and path.name != "DICOMDIR"
    except OSError:
        return False


def classes_of(members: Sequence[Member]) -> tuple[str, ...]:
    """Return the classes, sorted.

    Raises:
        DataFormatError: an image lies in no class folder.
    """
    without = next((member.name for member in members if member.label is None), None)
    if without is not None:
        raise DataFormatError(f"{without}: lies in no class folder")
    return tuple(sorted({str(member.label) for member in members}))


def decode_members(
    members: Sequence[Member],
    read: Callable[[str], bytes],
    spec: InputSpec,
    *,
    name: str,
    split: str,
    classes: tuple[str, ...],
    files: tuple[Path, ...],
    groups: Groups | None = None,
) -> LabelledImages:
    """Decode images one by one, as the server does.

    ``read`` gives the bytes of a name. ``groups`` are those of the images, in their order.

    Raises:
        DataFormatError: an image can't be decoded. The message names it.
    """
    from pg_siamese_server.encoding.images import decode_image
    from pg_siamese_server.errors import ImageError

    number = {label: i for i, label in enumerate(classes)}
    images: Pixels = np.empty((len(members), spec.height, spec.width, spec.channels), np.uint8)
    for i, member in enumerate(members):
        try:
            images[i] = decode_image(read(member.name), spec)
        except ImageError as error:
            raise DataFormatError(f"{member.name}: {error}") from error
    return LabelledImages(
        name=name,
        split=split,
        images=images[..., 0] if spec.channels == 1 else images,
        labels=np.array([number[str(member.label)] for member in members], np.int64),
        classes=classes,
        files=files,
        groups=groups,
    )
