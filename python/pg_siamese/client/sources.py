"""What can be loaded: image folders, npz files in MedMNIST's layout and IDX files, in parts.

A part is one split of one data set. Its images are read (and turned into PNG) on demand. Image
files keep their own bytes.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pg_siamese.client.connection import CommandError
from pg_siamese.datasets import (
    SPLITS,
    LabelledImages,
    LeftOut,
    Member,
    list_image_folder,
    npz_splits,
    read_idx_images,
    read_npz,
)
from pg_siamese_server.errors import counted


class SourceError(CommandError):
    """The rest of a source can't be read. Those who load it add how many images are stored."""


@dataclass(frozen=True)
class ImageRow:
    """One image to store: the bytes of an image file, and where it is from.

    ``source`` identifies the image ('medmnist:breastmnist/train/17'). A second load leaves out the
    sources that are stored. ``name`` is for error messages. ``tags`` has values of further columns.
    """

    image: bytes
    name: str
    source: str
    dataset: str | None = None
    split: str | None = None
    label: str | None = None
    tags: Mapping[str, str | None] = field(default_factory=dict)

    def value(self, column: str) -> str | None:
        """Return what a column of the table gets."""
        return self.tags[column] if column in self.tags else getattr(self, column, None)


@dataclass(frozen=True)
class Part:
    """One split of one data set: ``sources`` names its images, ``row(i)`` reads one of them.

    ``split`` is None if the images have none.
    """

    dataset: str
    split: str | None
    sources: Sequence[str]
    row: Callable[[int], ImageRow]

    def __len__(self) -> int:
        return len(self.sources)

    def __str__(self) -> str:
        return f"{self.dataset} {self.split}" if self.split else self.dataset


def read_source(
    path: Path,
    *,
    splits: Sequence[str] | None = None,
    labels: Path | None = None,
    dataset: str | None = None,
    leave_out: Callable[[LeftOut], object] = lambda file: None,
) -> list[Part]:
    """Find out what ``path`` is, and return its parts.

    Args:
        path: a folder, an npz file or an IDX file.
        splits: to read. All by default.
        labels: IDX file of the labels.
        dataset: name of the data set, instead of that of ``path``.
        leave_out: called with each file of a folder that can't be loaded.

    Raises:
        CommandError: ``path`` can't be loaded.
        DataFormatError: a file is broken.
    """
    if path.is_dir():
        return folder_parts(path, splits=splits, dataset=dataset, leave_out=leave_out)
    if not path.exists():
        raise CommandError(f"{path}: no such file or folder")
    if labels is not None:
        split = _one_split(path, splits)
        images = read_idx_images(path, labels, name=dataset or _idx_name(path), split=split)
        return [labelled_part(images, "idx")]
    if path.suffix.lower() == ".npz":
        return [
            labelled_part(read_npz(path, split, name=dataset or path.stem), "medmnist")
            for split in (splits or npz_splits(path) or SPLITS[:1])
        ]
    if "idx" in path.name:
        raise CommandError(f"{path}: IDX images need their labels: --labels FILE")
    raise CommandError(
        f"{path}: neither a folder, nor an npz file, nor an IDX file with --labels, nor DICOM"
    )


def labelled_part(images: LabelledImages, origin: str) -> Part:
    """Return the images of a data set as PNG files. ``origin`` begins their sources."""

    def row(index: int) -> ImageRow:
        source, label = sources[index], images.class_of(index)
        image = png(images.images[index])
        return ImageRow(image, source, source, images.name, images.split, label)

    sources = [f"{origin}:{images.name}/{images.split}/{index}" for index in range(len(images))]
    return Part(images.name, images.split, sources, row)


def folder_parts(
    folder: Path,
    *,
    splits: Sequence[str] | None = None,
    dataset: str | None = None,
    leave_out: Callable[[LeftOut], object] = lambda file: None,
) -> list[Part]:
    """Return the images of a folder, one part per split; see ``datasets.list_image_folder``."""
    folder = folder.resolve()
    name = dataset or folder.name
    if not is_text(name):
        raise CommandError(
            f"{printable(folder)}: its name is not UTF-8, specify one with --dataset"
        )
    files: dict[str | None, list[Member]] = {}
    for file in list_image_folder(folder, leave_out):
        path = Path(file.name)
        if splits is not None and file.split not in splits:
            continue
        if is_text(str(path.relative_to(folder))):
            files.setdefault(file.split, []).append(file)
        else:
            leave_out(LeftOut(path, "of a name that is not UTF-8", "its name is not UTF-8"))
    if not files:
        wanted = f"of split {' or '.join(splits)}" if splits else "that can be loaded"
        raise CommandError(f"{printable(folder)}: no image {wanted}")
    return [_folder_part(folder, name, split, group) for split, group in files.items()]


def is_text(name: str) -> bool:
    """Return whether a file name is UTF-8, as PostgreSQL needs it. Others have lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(path: Path) -> str:
    """Return a path for messages, whatever its bytes are."""
    return os.fsencode(path).decode(errors="backslashreplace")


def count_left_out(left_out: Iterable[LeftOut]) -> str:
    """Return how many files were left out, by kind: '3 files left out: 2 .heic, 1 hidden'."""
    return count_kinds(Counter(file.kind for file in left_out))


def count_kinds(kinds: Counter[str]) -> str:
    """Return how many files were left out, from their numbers by kind."""
    if not kinds:
        return ""
    each = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    return f"{counted(kinds.total(), 'file')} left out: {each}"


def _folder_part(folder: Path, dataset: str, split: str | None, files: list[Member]) -> Part:
    paths = [Path(file.name) for file in files]

    def row(index: int) -> ImageRow:
        path, label = paths[index], files[index].label
        return ImageRow(path.read_bytes(), printable(path), sources[index], dataset, split, label)

    sources = [f"file:{dataset}/{path.relative_to(folder).as_posix()}" for path in paths]
    return Part(dataset, split, sources, row)


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return a PNG file, which is lossless, of uint8 pixels (H, W) or (H, W, 3)."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _one_split(path: Path, splits: Sequence[str] | None) -> str:
    if splits and len(splits) > 1:
        raise CommandError(f"{path}: an IDX file is one split, not {len(splits)}")
    if splits:
        return splits[0]
    # The file names of MNIST and its followers: train-images-…, t10k-images-….
    return "test" if path.name.startswith(("t10k", "test")) else "train"


def _idx_name(path: Path) -> str:
    return path.resolve().parent.name.replace("-", "_")
