"""Data sets by a short text: ``medmnist:breastmnist``, ``folder:photos``, ``mnist``, …"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from pg_siamese.datasets.base import (
    SPLITS,
    DataFormatError,
    DataNotFoundError,
    DataSplits,
    LabelledImages,
    hold_out,
    split_at_random,
)
from pg_siamese.datasets.cifar import find_cifar10, read_cifar10
from pg_siamese.datasets.clinical import find_clinical
from pg_siamese.datasets.fashion_mnist import load_fashion_mnist
from pg_siamese.datasets.folder import Member, classes_of, decode_members, list_image_folder
from pg_siamese.datasets.groups import GROUPS_FILE, groups_of, read_groups
from pg_siamese.datasets.idx import read_idx_folder
from pg_siamese.datasets.medmnist import medmnist_file, medmnist_info
from pg_siamese.datasets.names import CLASS_NAMES
from pg_siamese.datasets.npz import npz_splits, read_npz
from pg_siamese.datasets.places import data_folders, find_data
from pg_siamese.datasets.resizing import resized
from pg_siamese.datasets.zipped import groups_name, list_image_zip, open_zip, read_member

if TYPE_CHECKING:
    from pg_siamese_server.encoding.specification import InputSpec

# What is held out of train if only the validation split is missing.
MISSING_VAL_SHARE = 0.1
MISSING_VAL_MOST = 5000
_MAX_BYTES = 32 * 1024 * 1024
# Published with splits that have groups in common.
_PUBLISHED = frozenset({"clinical"})


def open_dataset(spec: str, *, seed: int = 0, input_spec: InputSpec | None = None) -> DataSplits:
    """Open the data set that a text names, in its three splits.

    - ``medmnist:FLAG``: any 2-D set of MedMNIST with one label per image (local file, else
      download). ``medmnist:ham10000_28`` is a local-only stand-in for ``medmnist:dermamnist``.
    - ``npz:PATH``: a file in MedMNIST's layout.
    - ``idx:FOLDER``: MNIST's four files. ``mnist`` and ``fashion_mnist`` are those sets.
    - ``cifar10``: as npz or as the folder of its python or binary archive.
    - ``imagenette``: a zip or folder of it by class.
    - ``clinical:NAME``: ``breast_224``, ``pneumonia_224`` or ``ham10000_224``, in their published
      splits. ``pneumonia_224/official`` has only those test images that PneumoniaMNIST has, too.
    - ``folder:PATH``, ``zip:PATH``: images by class in sub-folders, below ``train``, ``val`` and
      ``test`` if there are such.
    - ``collection:NAME/COLUMN``: the images of a collection, with the classes of a column. The
      ``PG*`` variables name the server. ``collection:NAME/COLUMN/GROUP`` names the column of the
      groups, too.

    A data set without splits is split 70 / 15 / 15. A missing validation split is held out of
    train. If there are only ``train`` and ``val``, nobody trains on the latter, so it becomes
    ``test``. All of this is stratified by class and seeded.

    Images of one group, such as a patient, are in one split, but for those of ``clinical:NAME``. A
    folder or zip names groups in ``groups.csv``, with columns ``file`` and ``group``. An npz does
    in ``train_groups`` and so on. Those of a collection are the values of its group column, if no
    other is named.

    Args:
        spec: the text.
        seed: seed of the splits.
        input_spec: an encoder's input. Images of any size are brought to it, exactly as the server
            does it. Without one they keep their size, which must be the same for all.

    Raises:
        DataNotFoundError: the data is not available. The message says what to do.
        DataFormatError: the text names no data set, or a file isn't what it should be.
    """
    kind, _, argument = spec.partition(":")
    opener = _OPENERS.get(kind)
    if opener is None:
        raise DataFormatError(f'no data set "{spec}"; there are: {", ".join(SPECS)}')
    if (kind in _WITH_ARGUMENT) != bool(argument):
        takes = "needs something after a colon" if kind in _WITH_ARGUMENT else "stands alone"
        raise DataFormatError(f'data set "{spec}": "{kind}" {takes}; see: {", ".join(SPECS)}')
    parts = opener(argument, input_spec)
    parts = {split: _resized(part, input_spec) for split, part in parts.items()}
    opened = replace(_fill(parts, seed, spec, kind in _PUBLISHED), spec=spec)
    if not len(opened.train):
        raise DataFormatError(f"{spec}: no image to train on")
    return opened


def _fill(parts: Mapping[str, LabelledImages], seed: int, spec: str, published: bool) -> DataSplits:
    """Make the missing splits out of those that are there."""
    train, val, test = (parts.get(split) for split in SPLITS)
    if train is None:
        raise DataFormatError(f"{spec}: no split train; there are: {', '.join(parts) or 'none'}")
    if test is None and val is not None:
        test, val = replace(val, split="test"), None
    if test is None:
        return split_at_random(train, seed)
    if val is not None:
        return DataSplits(train, val, test, published=published)
    count = min(round(MISSING_VAL_SHARE * len(train)), MISSING_VAL_MOST)
    train, val = hold_out(train, count, seed)
    return DataSplits(train, val, test, drawn=True)


def _resized(images: LabelledImages, spec: InputSpec | None) -> LabelledImages:
    if spec is None or images.images.shape[1:3] == (spec.height, spec.width):
        return images
    grey = images.images.ndim == 3
    wanted = replace(spec, channels=1 if grey else 3)
    pixels = resized(images.images, wanted, f"{images.name} ({images.split})")
    return replace(images, images=pixels[..., 0] if grey else pixels)


# --- one opener for each kind -----------------------------------------------------------------

Parts = dict[str, LabelledImages]


def _medmnist(name: str, spec: InputSpec | None) -> Parts:
    info = (medmnist_info() or {}).get(name, {})
    task = str(info.get("task", ""))
    if name.endswith("3d") or "multi-label" in task:
        raise DataFormatError(f"medmnist:{name}: only 2-D sets with one label per image will do")
    path = medmnist_file(name)
    names = info.get("label", {})
    known = [str(names[key]) for key in sorted(names, key=int)] if path.stem == name else []
    classes = None if path.stem in CLASS_NAMES else known or None
    return {split: read_npz(path, split, classes=classes) for split in SPLITS}


def _npz(path: str, spec: InputSpec | None) -> Parts:
    if not Path(path).is_file():
        raise DataNotFoundError(f"npz:{path}: no such file")
    return {split: read_npz(path, split) for split in npz_splits(path)}


def _idx(folder: str, spec: InputSpec | None) -> Parts:
    return {split: read_idx_folder(folder, split) for split in ("train", "test")}


def _mnist(_: str, spec: InputSpec | None) -> Parts:
    file = find_data("mnist", "train-images-idx3-ubyte.gz", "train-images-idx3-ubyte")
    return {split: read_idx_folder(file.parent, split, name="mnist") for split in ("train", "test")}


def _fashion_mnist(_: str, spec: InputSpec | None) -> Parts:
    return {split: load_fashion_mnist(split) for split in ("train", "test")}


def _cifar10(_: str, spec: InputSpec | None) -> Parts:
    path = find_cifar10()
    return {split: read_cifar10(path, split) for split in ("train", "test")}


def _imagenette(_: str, spec: InputSpec | None) -> Parts:
    folders = data_folders("imagenette")
    for folder in folders:
        if archives := sorted(folder.glob("imagenette*.zip")):
            return _zip(str(archives[0]), spec, name="imagenette")
        for inner in (folder, *sorted(folder.glob("imagenette*"))):
            if (inner / "train").is_dir():
                return _folder(str(inner), spec, name="imagenette")
    raise DataNotFoundError(
        f"imagenette: neither imagenette*.zip nor a folder with train/ is in "
        f"{' or '.join(map(str, folders))}: put it there, or into the folder imagenette of one "
        "that PG_SIAMESE_DATA names"
    )


def _folder(path: str, spec: InputSpec | None, name: str | None = None) -> Parts:
    table = Path(path) / GROUPS_FILE
    groups = read_groups(table.read_bytes(), table) if table.is_file() else None
    return _decoded(
        name or Path(path).resolve().name,
        list_image_folder(path),
        lambda member: Path(member).read_bytes(),
        spec,
        lambda chosen: tuple(Path(member.name) for member in chosen),
        groups,
    )


def _zip(path: str, spec: InputSpec | None, name: str | None = None) -> Parts:
    if not Path(path).is_file():
        raise DataNotFoundError(f"zip:{path}: no such file")
    limit = spec.max_bytes if spec else _MAX_BYTES
    with open_zip(path) as archive:
        members = list_image_zip(path, archive)
        table = groups_name(archive, members)
        groups = None
        if table is not None:
            groups = read_groups(read_member(path, archive, table, limit), PurePosixPath(table))
        return _decoded(
            name or Path(path).stem,
            members,
            lambda member: read_member(path, archive, member, limit),
            spec,
            lambda chosen: (Path(path),),
            groups,
        )


def _clinical(name: str, spec: InputSpec | None) -> Parts:
    found = find_clinical(name)
    limit = spec.max_bytes if spec else _MAX_BYTES
    with open_zip(found.archive) as archive:
        return _decoded(
            found.name,
            found.members,
            lambda member: read_member(found.archive, archive, member, limit),
            spec,
            lambda chosen: (found.archive, found.table),
            found.groups,
            found.classes,
        )


def _collection(argument: str, spec: InputSpec | None) -> Parts:
    from pg_siamese.datasets.collection import read_collection  # it needs a database driver

    name, *columns = argument.split("/")
    if not (name and all(columns) and 1 <= len(columns) <= 2):
        raise DataFormatError(f"collection:{argument}: name the column of the classes: NAME/COLUMN")
    if spec is None:
        raise DataFormatError(f"collection:{argument}: say the size that images are brought to")
    group = columns[1] if len(columns) == 2 else None
    return {"train": read_collection(name, columns[0], group, spec)}


def _decoded(
    name: str,
    members: list[Member],
    read: Callable[[str], bytes],
    spec: InputSpec | None,
    files: Callable[[list[Member]], tuple[Path, ...]],
    groups: dict[str, str] | None,
    classes: tuple[str, ...] | None = None,
) -> Parts:
    classes = classes or classes_of(members)
    if len(classes) < 2:
        raise DataFormatError(
            f"{name}: one class only ({classes[0]}): each class needs a sub-folder of its own"
        )
    parts: dict[str, list[Member]] = {}
    for member in members:
        parts.setdefault(member.split or "train", []).append(member)
    outside = [member.name for member in members if not member.split]
    if 0 < len(outside) < len(members):
        folders = sorted({member.split for member in members if member.split})
        raise DataFormatError(
            f"{outside[0]}: lies beside the split folders {', '.join(folders)}: all images or none "
            "must be in such folders"
        )
    spec = spec or _common_size(members, read)
    return {
        split: decode_members(
            part,
            read,
            spec,
            name=name,
            split=split,
            classes=classes,
            files=files(part),
            groups=groups_of(part, groups),
        )
        for split, part in parts.items()
    }


def _common_size(members: list[Member], read: Callable[[str], bytes]) -> InputSpec:
    from pg_siamese_server.encoding.specification import InputSpec

    sizes: dict[tuple[int, int], str] = {}
    for member in members:
        try:
            with Image.open(io.BytesIO(read(member.name))) as image:
                sizes.setdefault(image.size, member.name)
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise DataFormatError(f"{member.name}: cannot be decoded: {error}") from error
        if len(sizes) > 1:
            (a, first), (b, second) = sizes.items()
            raise DataFormatError(
                f"{first} has {a[0]} x {a[1]} pixels and {second} {b[0]} x {b[1]}: say the size "
                "that they are to be brought to"
            )
    ((width, height),) = sizes
    return InputSpec(width=width, height=height)


_OPENERS: dict[str, Callable[[str, InputSpec | None], Parts]] = {
    "medmnist": _medmnist,
    "npz": _npz,
    "idx": _idx,
    "mnist": _mnist,
    "fashion_mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "imagenette": _imagenette,
    "clinical": _clinical,
    "folder": _folder,
    "zip": _zip,
    "collection": _collection,
}
_PATHS = dict.fromkeys(("npz", "folder", "zip"), "PATH")
_WITH_ARGUMENT = _PATHS | {
    "medmnist": "FLAG",
    "idx": "FOLDER",
    "clinical": "NAME",
    "collection": "NAME/COLUMN",
}
SPECS = tuple(
    f"{kind}:{_WITH_ARGUMENT[kind]}" if kind in _WITH_ARGUMENT else kind for kind in _OPENERS
)
