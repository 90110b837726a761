"""Labelled images from files: npz in MedMNIST's layout, IDX files, image folders.

Used by the loader, the demo and the training code, so nothing here imports torch. Everything
comes back as `LabelledImages`: one split of one data set, as uint8 pixels with class labels.

MedMNIST is taken from `MEDMNIST_ROOT`, `~/.medmnist` or `../shared/data/medmnist` beside the
project, and else downloaded. `ham10000_28.npz` (HAM10000, the source of DermaMNIST, at
28 x 28) stands in for `dermamnist.npz` where only the former is found; it keeps its own name.
Fashion-MNIST is taken from Debian's package `dataset-fashion-mnist`.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import shutil
import struct
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pg_siamese_server.images import InputSpec

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SPLITS = ("train", "val", "test")
MEDICAL_SETS = ("breastmnist", "dermamnist", "pneumoniamnist", "retinamnist")
STAND_INS = {"dermamnist": "ham10000_28"}
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
)

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
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
}
LICENCES: dict[str, str] = {
    "breastmnist": "CC BY 4.0",
    "dermamnist": "CC BY-NC 4.0 (HAM10000): no commercial use",
    "ham10000_28": "CC BY-NC 4.0 (HAM10000): no commercial use",
    "pneumoniamnist": "CC BY 4.0",
    "retinamnist": "CC BY 4.0",
    "fashion_mnist": "MIT (Zalando SE)",
}

_IDX_DTYPES: dict[int, np.dtype[Any]] = {
    0x08: np.dtype("u1"),
    0x09: np.dtype("i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}


class DataNotFoundError(FileNotFoundError):
    """A data set is in none of the places where it is looked for, and can't be downloaded."""


class DataFormatError(ValueError):
    """A data file isn't what it should be: the message names the file and the fault."""


@dataclass(frozen=True)
class LabelledImages:
    """One split of one data set.

    `images` is uint8 of shape (N, H, W) for grey and (N, H, W, 3) for RGB images; `labels` is
    int64 of shape (N,), each an index into `classes`. `files` are the files it was read from.

    Raises `DataFormatError` where shapes, types or label numbers don't fit together.
    """

    name: str
    split: str
    images: Pixels
    labels: Labels
    classes: tuple[str, ...]
    files: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        where = f"{self.name} ({self.split})"
        if self.images.dtype != np.uint8:
            raise DataFormatError(f"{where}: images are {self.images.dtype}, not uint8")
        if self.images.ndim not in (3, 4) or (self.images.ndim == 4 and self.images.shape[3] != 3):
            raise DataFormatError(
                f"{where}: images have shape {self.images.shape}, not (N, H, W) or (N, H, W, 3)"
            )
        if self.labels.shape != (len(self.images),):
            raise DataFormatError(
                f"{where}: {len(self.images)} images, but labels of shape {self.labels.shape}"
            )
        if len(self.labels) and not (
            int(self.labels.min()) >= 0 and int(self.labels.max()) < len(self.classes)
        ):
            raise DataFormatError(
                f"{where}: labels run from {self.labels.min()} to {self.labels.max()}, "
                f"but there are {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.images)

    def rgb(self) -> Pixels:
        """Return the images as uint8 (N, H, W, 3), grey ones replicated to three channels."""
        if self.images.ndim == 4:
            return self.images
        return np.repeat(self.images[..., None], 3, axis=3)

    def class_of(self, index: int) -> str:
        """Return the class name of one image."""
        return self.classes[int(self.labels[index])]

    def select(self, indices: Sequence[int] | npt.NDArray[Any] | slice) -> LabelledImages:
        """Return the images at `indices` (numbers, a mask or a slice), in that order."""
        chosen: Any = indices if isinstance(indices, slice) else np.asarray(indices)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])


def sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- npz in MedMNIST's layout -----------------------------------------------------------------


def npz_splits(path: Path | str) -> tuple[str, ...]:
    """Return the splits that an npz file in MedMNIST's layout holds, in the order of `SPLITS`."""
    with _open_npz(Path(path)) as file:
        return tuple(s for s in SPLITS if f"{s}_images" in file and f"{s}_labels" in file)


def read_npz(
    path: Path | str,
    split: str,
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
) -> LabelledImages:
    """Read one split of an npz file in MedMNIST's layout: `train_images`, `train_labels`, ….

    `name` is the file's own name by default; class names are MedMNIST's where the name is one
    of its sets, else the label numbers. Labels may be (N,) or (N, 1).

    Raises `DataFormatError` where the file isn't such an npz or lacks the split, and `OSError`
    where it can't be read. Pickled arrays are refused.
    """
    path = Path(path)
    name = name or path.stem
    with _open_npz(path) as file:
        if f"{split}_images" not in file or f"{split}_labels" not in file:
            there = [s for s in SPLITS if f"{s}_images" in file and f"{s}_labels" in file]
            raise DataFormatError(
                f'{path}: no split "{split}"; there are: {", ".join(there) or "none"}'
            )
        try:
            images, labels = file[f"{split}_images"], file[f"{split}_labels"]
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
        labels=_label_vector(labels, path),
        classes=_class_names(name, count, classes),
        files=(path,),
    )


def _open_npz(path: Path) -> np.lib.npyio.NpzFile:
    try:
        file = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataFormatError(f"{path}: not an npz file: {error}") from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise DataFormatError(f"{path}: one array, not an npz file")
    return file


def _label_vector(labels: npt.NDArray[Any], path: Path) -> Labels:
    if labels.dtype.kind not in "iu":
        raise DataFormatError(f"{path}: labels are {labels.dtype}, not integers")
    return labels.reshape(-1).astype(np.int64)


def _class_names(name: str, count: int, classes: Sequence[str] | None) -> tuple[str, ...]:
    if classes is not None:
        return tuple(classes)
    known = CLASS_NAMES.get(name, ())
    return known if len(known) >= count else tuple(str(i) for i in range(count))


# --- IDX files --------------------------------------------------------------------------------


def read_idx(path: Path | str) -> npt.NDArray[Any]:
    """Read one IDX file (MNIST's format), gzipped or not, as an array in native byte order.

    Source of the format: LeCun, Cortes, Burges, "The MNIST database of handwritten digits".
    Raises `DataFormatError` where the header is wrong or the data is short or too long.
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

    Raises as `read_idx`, and `DataFormatError` where the two files don't fit together.
    """
    pixels, numbers = read_idx(images), _label_vector(read_idx(labels), Path(labels))
    count = int(numbers.max()) + 1 if numbers.size else 0
    return LabelledImages(
        name=name,
        split=split,
        images=pixels,
        labels=numbers,
        classes=_class_names(name, count, classes),
        files=(Path(images), Path(labels)),
    )


# --- folders of images ------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFile:
    """One file of an image folder: its class (the sub-folder) and split, where it has them."""

    path: Path
    label: str | None
    split: str | None


def list_image_folder(folder: Path | str) -> list[ImageFile]:
    """List the images of a folder, in the order of their paths.

    Images may lie in the folder itself (no class), in `class/` or in `split/class/`, where the
    splits are `train`, `val` (or `valid`, `validation`) and `test`. A deeper path keeps its
    first folder (below the split) as the class. Hidden files and folders are left out.

    Raises `DataNotFoundError` where there is no such folder or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataNotFoundError(f"{folder}: no such folder")
    aliases = {"train": "train", "val": "val", "test": "test"} | dict.fromkeys(
        ("valid", "validation"), "val"
    )
    files = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if (
            path.suffix.lower() not in IMAGE_SUFFIXES
            or any(part.startswith(".") for part in parts)
            or not path.is_file()
        ):
            continue
        above = list(parts[:-1])
        split = aliases[above.pop(0)] if above and above[0] in aliases else None
        files.append(ImageFile(path, above[0] if above else None, split))
    if not files:
        raise DataNotFoundError(f"{folder}: no image in this folder")
    return files


def read_image_folder(
    folder: Path | str,
    spec: InputSpec,
    *,
    split: str | None = None,
    name: str | None = None,
) -> LabelledImages:
    """Decode an image folder by class (see `list_image_folder`) to one size.

    `spec` says size and resize mode: the pixels are exactly those that the server would give an
    encoder with this input specification. With `split`, only that split's files are read. The
    classes are those of the whole folder, sorted.

    Raises `DataNotFoundError` where there is no image, `DataFormatError` where an image has no
    class or can't be decoded (naming the file).
    """
    from pg_siamese_server.errors import ImageError
    from pg_siamese_server.images import decode_image

    folder = Path(folder)
    everything = list_image_folder(folder)
    files = [f for f in everything if split is None or f.split == split]
    if not files:
        raise DataNotFoundError(f'{folder}: no image of split "{split}"')
    without = next((f.path for f in everything if f.label is None), None)
    if without is not None:
        raise DataFormatError(f"{without}: lies in no class folder")
    classes = sorted({str(f.label) for f in everything})
    number = {label: i for i, label in enumerate(classes)}
    images = np.empty((len(files), spec.height, spec.width, spec.channels), np.uint8)
    for i, file in enumerate(files):
        try:
            images[i] = decode_image(file.path.read_bytes(), spec)
        except ImageError as error:
            raise DataFormatError(f"{file.path}: {error}") from error
    return LabelledImages(
        name=name or folder.name,
        split=split or "all",
        images=images[..., 0] if spec.channels == 1 else images,
        labels=np.array([number[str(f.label)] for f in files], np.int64),
        classes=tuple(classes),
        files=tuple(f.path for f in files),
    )


# --- MedMNIST ---------------------------------------------------------------------------------


def medmnist_folders() -> list[Path]:
    """Return the folders where MedMNIST files are looked for, in order."""
    root = os.environ.get("MEDMNIST_ROOT")
    project = Path(__file__).resolve().parents[2]
    folders = [Path(root).expanduser()] if root else []
    return [
        *folders,
        Path.home() / ".medmnist",
        project.parent / "shared" / "data" / "medmnist",
    ]


def find_medmnist(name: str) -> Path | None:
    """Return the local file of a MedMNIST set or of its stand-in, or None.

    The set itself, anywhere, goes before its stand-in.
    """
    for stem in (name, STAND_INS.get(name)):
        for folder in medmnist_folders() if stem else ():
            if (path := folder / f"{stem}.npz").is_file():
                return path
    return None


def download_medmnist(name: str, folder: Path | str | None = None, timeout: float = 20) -> Path:
    """Download a MedMNIST set at 28 x 28 from the address, and checked by the MD5, that the
    package `medmnist` states; return the file's path.

    `folder` is `MEDMNIST_ROOT` or else `~/.medmnist` by default; `timeout` is in seconds, for
    each network operation. The file gets its name only when it is whole.

    Raises `DataNotFoundError` where the package `medmnist` isn't installed or doesn't know the
    set, and where the download fails.
    """
    # medmnist's own download() needs torchvision, and its package prints an advert for its
    # other dependencies where torch is missing; address and checksum are all that it adds.
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from medmnist.info import INFO
    except ImportError:
        raise DataNotFoundError(
            f"{name}.npz is in none of {', '.join(map(str, medmnist_folders()))}, and the package "
            "medmnist, which knows its address, is not installed"
        ) from None
    if name not in INFO:
        raise DataNotFoundError(f'medmnist knows no data set "{name}"')
    root = folder or os.environ.get("MEDMNIST_ROOT") or Path.home() / ".medmnist"
    target = Path(root).expanduser() / f"{name}.npz"
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{name}-", dir=target.parent)
    try:
        with (
            os.fdopen(handle, "wb") as file,
            urllib.request.urlopen(INFO[name]["url"], timeout=timeout) as response,
        ):
            shutil.copyfileobj(response, file)
        with Path(temporary).open("rb") as file_:
            found = hashlib.file_digest(file_, lambda: hashlib.md5(usedforsecurity=False))
        if found.hexdigest() != INFO[name]["MD5"]:
            raise DataNotFoundError(f"{name}.npz: the download's MD5 is not that of MedMNIST")
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except (urllib.error.URLError, OSError) as error:
        if isinstance(error, DataNotFoundError):
            raise
        raise DataNotFoundError(f"{name}.npz could not be downloaded: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def load_medmnist(name: str, split: str, *, download: bool = True) -> LabelledImages:
    """Load one split of a MedMNIST set (or of its stand-in): local file first, else download.

    The result's name is the file's: `ham10000_28` where that stands in for `dermamnist`.

    Raises `DataNotFoundError` where it can't be had, `DataFormatError` where a file is broken.
    """
    path = find_medmnist(name)
    if path is None:
        if not download:
            raise DataNotFoundError(
                f"{name}.npz is in none of {', '.join(map(str, medmnist_folders()))}"
            )
        path = download_medmnist(name)
    return read_npz(path, split)


def load_medical(
    splits: Iterable[str], *, download: bool = True
) -> dict[str, dict[str, LabelledImages]]:
    """Load breast, derma (or its stand-in), pneumonia and retina: {set name: {split: images}}.

    Sets that can't be had are left out, so compare the result with `MEDICAL_SETS`; raises
    `DataNotFoundError` where none can be had.
    """
    splits = tuple(splits)
    found: dict[str, dict[str, LabelledImages]] = {}
    reasons = []
    for name in MEDICAL_SETS:
        try:
            parts = {split: load_medmnist(name, split, download=download) for split in splits}
        except DataNotFoundError as error:
            reasons.append(str(error))
            download = False  # one refusal is enough: don't wait for four time-outs
            continue
        found[next(iter(parts.values())).name] = parts
    if not found:
        raise DataNotFoundError("; ".join(reasons))
    return found


# --- Fashion-MNIST ----------------------------------------------------------------------------


def find_fashion_mnist() -> Path | None:
    """Return the folder of Debian's package dataset-fashion-mnist, or None."""
    file = FASHION_MNIST_FOLDER / "train-images-idx3-ubyte.gz"
    return FASHION_MNIST_FOLDER if file.is_file() else None


def load_fashion_mnist(split: str, folder: Path | str | None = None) -> LabelledImages:
    """Load Fashion-MNIST: 60,000 images in `train`, 10,000 in `test`, 28 x 28 grey.

    Raises `DataNotFoundError` where the files aren't there, naming the package to install, and
    `ValueError` for any other split: the set has no validation part of its own.
    """
    prefix = {"train": "train", "test": "t10k"}.get(split)
    if prefix is None:
        raise ValueError(f'Fashion-MNIST has no split "{split}"')
    root = Path(folder) if folder else find_fashion_mnist()
    if root is None:
        raise DataNotFoundError(
            "Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist"
        )
    files = []
    for stem in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
        path = next((p for p in (root / f"{stem}.gz", root / stem) if p.is_file()), None)
        if path is None:
            raise DataNotFoundError(f"{root}: no {stem}.gz")
        files.append(path)
    return read_idx_images(files[0], files[1], name="fashion_mnist", split=split)
