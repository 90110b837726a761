"""Reading data sets: npz in MedMNIST's layout, IDX files, image folders; where they are found."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pg_siamese import datasets
from pg_siamese.datasets import (
    DataFormatError,
    DataNotFoundError,
    LabelledImages,
    list_image_folder,
    load_fashion_mnist,
    load_medical,
    load_medmnist,
    open_dataset,
    read_idx,
    read_idx_images,
    read_npz,
)
from tests.unit.datasets.files import idx_bytes


def write_npz(path: Path, splits: tuple[str, ...] = ("train", "val", "test"), **extra: object):
    random = np.random.default_rng(0)
    arrays: dict[str, object] = {}
    for number, split in enumerate(splits):
        arrays[f"{split}_images"] = random.integers(0, 256, (4 + number, 28, 28), np.uint8)
        arrays[f"{split}_labels"] = (np.arange(4 + number) % 2).astype(np.uint8)[:, None]
    np.savez_compressed(path, **(arrays | extra))  # type: ignore[arg-type]
    return path


@pytest.fixture
def only_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the only place where MedMNIST is looked for."""
    folder = tmp_path / "medmnist"
    folder.mkdir()
    monkeypatch.setattr(datasets, "medmnist_folders", lambda: [folder])
    monkeypatch.setenv("MEDMNIST_ROOT", str(folder))
    return folder


# --- LabelledImages ---------------------------------------------------------------------------


def test_grey_images_become_three_equal_channels() -> None:
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    part = LabelledImages("set", "train", images, np.array([0, 1]), ("a", "b"))
    assert part.rgb().shape == (2, 3, 4, 3)
    assert (part.rgb() == images[..., None]).all()
    assert part.class_of(1) == "b"


def test_select_keeps_images_and_labels_together() -> None:
    images = np.zeros((5, 2, 2, 3), np.uint8) + np.arange(5, dtype=np.uint8)[:, None, None, None]
    part = LabelledImages("set", "train", images, np.arange(5), tuple("abcde"))
    chosen = part.select([3, 1])
    assert chosen.labels.tolist() == [3, 1]
    assert chosen.images[:, 0, 0, 0].tolist() == [3, 1]
    assert len(part.select(part.labels > 1)) == 3
    assert len(part.select(slice(0, 2))) == 2


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 3, 3), np.float32), np.zeros(2, np.int64), "not uint8"),
        (np.zeros((2, 3, 3, 4), np.uint8), np.zeros(2, np.int64), "shape"),
        (np.zeros((2, 9), np.uint8), np.zeros(2, np.int64), "shape"),
        (np.zeros((2, 3, 3), np.uint8), np.zeros(3, np.int64), "2 images, but labels"),
        (np.zeros((2, 3, 3), np.uint8), np.array([0, 2]), "labels run from 0 to 2"),
        (np.zeros((2, 3, 3), np.uint8), np.array([-1, 0]), "labels run from -1"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    images: np.ndarray, labels: np.ndarray, message: str
) -> None:
    with pytest.raises(DataFormatError, match=message):
        LabelledImages("set", "train", images, labels, ("a", "b"))


# --- npz --------------------------------------------------------------------------------------


def test_npz_in_medmnist_layout(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "breastmnist.npz")
    part = read_npz(path, "val")
    assert (part.name, part.split, len(part)) == ("breastmnist", "val", 5)
    assert part.labels.dtype == np.int64
    assert part.labels.tolist() == [0, 1, 0, 1, 0]
    assert part.classes == ("malignant", "normal, benign")
    assert part.files == (path,)
    assert datasets.npz_splits(path) == ("train", "val", "test")


def test_npz_of_an_unknown_set_has_numbered_classes_of_the_whole_file(tmp_path: Path) -> None:
    labels = np.array([4, 0, 1, 1, 2], np.uint8)
    path = write_npz(tmp_path / "mine.npz", splits=("train", "test"), test_labels=labels)
    assert read_npz(path, "train").classes == ("0", "1", "2", "3", "4")
    assert read_npz(path, "train", classes=("a", "b", "c", "d", "e")).classes[4] == "e"
    assert datasets.npz_splits(path) == ("train", "test")
    with pytest.raises(DataFormatError, match='no split "val"; there are: train, test'):
        read_npz(path, "val")


def test_broken_npz_files_are_named(tmp_path: Path) -> None:
    for name, content in {"a.npz": b"", "b.npz": b"PK\3\4 rubbish", "c.npz": b"rubbish"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataFormatError, match=name):
            read_npz(tmp_path / name, "train")
    np.save(tmp_path / "d.npy", np.zeros(3))
    with pytest.raises(DataFormatError, match="not an npz file"):
        read_npz(tmp_path / "d.npy", "train")
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "none.npz", "train")


def test_pickles_and_multi_label_sets_are_refused(tmp_path: Path) -> None:
    pickled = write_npz(tmp_path / "a.npz", train_images=np.array([object()], dtype=object))
    with pytest.raises(DataFormatError, match=r"a\.npz"):
        read_npz(pickled, "train")
    several = write_npz(tmp_path / "b.npz", train_labels=np.zeros((4, 14), np.uint8))
    with pytest.raises(DataFormatError, match="one class an image"):
        read_npz(several, "train")
    floats = write_npz(tmp_path / "c.npz", train_labels=np.zeros(4, np.float32))
    with pytest.raises(DataFormatError, match="not integers"):
        read_npz(floats, "train")


# --- IDX --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_pair(tmp_path: Path, compressed: bool) -> None:
    images = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    labels = np.array([1, 0, 2], np.uint8)
    pack = gzip.compress if compressed else bytes
    (tmp_path / "images").write_bytes(pack(idx_bytes(images)))
    (tmp_path / "labels").write_bytes(pack(idx_bytes(labels)))
    part = read_idx_images(tmp_path / "images", tmp_path / "labels", name="mnist", split="train")
    assert (part.images == images).all()
    assert part.labels.tolist() == [1, 0, 2]
    assert part.classes == ("0", "1", "2")


def test_idx_of_wider_types_comes_in_native_byte_order(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(idx_bytes(np.array([1, -2, 300], ">i4"), 0x0C))
    array = read_idx(tmp_path / "f")
    assert array.tolist() == [1, -2, 300]
    assert array.dtype.isnative


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x07\1\0\0\0\1x", "not an IDX file"),
        (b"\0\0\x08\3\0\0\0\1", "header is cut short"),
        (b"\0\0\x08\1\0\0\0\5abc", "needs 5 bytes, the file has 3"),
        (b"\0\0\x08\1\0\0\0\2abc", "needs 2 bytes, the file has 3"),
        (gzip.compress(b"\0\0\x08\1\0\0\0\1x")[:-6], "broken gzip"),
        (b"\0\0\x08\4" + b"\xff" * 16, "needs"),
    ],
)
def test_broken_idx_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(DataFormatError, match=message):
        read_idx(tmp_path / "f")


# --- folders ----------------------------------------------------------------------------------


def save_image(path: Path, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 6), colour).save(path)


def test_image_folder_by_class_and_split(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        save_image(tmp_path / split / "red" / "1.png", (255, 0, 0))
        save_image(tmp_path / split / "blue" / "1.PNG", (0, 0, 255))
    save_image(tmp_path / "train" / ".hidden" / "1.png", (0, 0, 0))
    (tmp_path / "train" / "red" / "notes.txt").write_text("not an image")
    files = [f"{file.split} {file.label}" for file in list_image_folder(tmp_path)]
    assert files == ["train blue", "train red", "val blue", "val red"]


def test_image_folder_without_classes(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg", (1, 2, 3))
    (file,) = list_image_folder(tmp_path)
    assert (Path(file.name).name, file.label, file.split) == ("a.jpg", None, None)


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match="no image"):
        list_image_folder(tmp_path)
    with pytest.raises(DataNotFoundError, match="no such folder"):
        list_image_folder(tmp_path / "none")


def test_image_folder_decodes_as_the_server_does(tmp_path: Path) -> None:
    images = pytest.importorskip("pg_siamese_server.encoding.images")
    for split in ("train", "val"):
        save_image(tmp_path / split / "red" / "1.png", (255, 0, 0))
        save_image(tmp_path / split / "blue" / "1.png", (0, 0, 255))
    spec = images.InputSpec(width=28, height=28)
    part = open_dataset(f"folder:{tmp_path}", input_spec=spec).test
    assert part.images.shape == (2, 28, 28, 3)
    assert part.classes == ("blue", "red")
    assert part.labels.tolist() == [0, 1]
    assert (part.images[1] == (255, 0, 0)).all()
    expected = images.decode_image((tmp_path / "val" / "red" / "1.png").read_bytes(), spec)
    assert (part.images[1] == expected).all()
    (tmp_path / "val" / "red" / "2.png").write_bytes(b"rubbish")
    with pytest.raises(DataFormatError, match=r"2\.png"):
        open_dataset(f"folder:{tmp_path}", input_spec=spec)


# --- where data is found ----------------------------------------------------------------------


def test_medmnist_root_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PG_SIAMESE_DATA", raising=False)
    folders = datasets.medmnist_folders()
    assert folders[0] == tmp_path / "root"
    assert folders[1] == tmp_path / "home" / ".medmnist"
    assert folders[2].parts[-3:] == ("shared", "data", "medmnist")
    monkeypatch.delenv("MEDMNIST_ROOT")
    assert datasets.medmnist_folders() == folders[1:]


def test_the_stand_in_answers_only_where_the_set_itself_is_missing(only_here: Path) -> None:
    write_npz(only_here / "ham10000_28.npz")
    assert load_medmnist("dermamnist", "train", download=False).name == "ham10000_28"
    write_npz(only_here / "dermamnist.npz")
    assert load_medmnist("dermamnist", "train", download=False).name == "dermamnist"


def test_load_medical_takes_what_is_there(only_here: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"breastmnist\.npz"):
        load_medical(("train",), download=False)
    write_npz(only_here / "breastmnist.npz")
    write_npz(only_here / "ham10000_28.npz")
    found = load_medical(("train", "val"), download=False)
    assert list(found) == ["breastmnist", "ham10000_28"]
    assert list(found["breastmnist"]) == ["train", "val"]


def publish(monkeypatch: pytest.MonkeyPatch, file: Path, md5: str) -> None:
    """Let the package medmnist state this file as the address of breastmnist."""
    info = types.ModuleType("medmnist.info")
    info.INFO = {"breastmnist": {"url": file.as_uri(), "MD5": md5}}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "medmnist", types.ModuleType("medmnist"))
    monkeypatch.setitem(sys.modules, "medmnist.info", info)


def test_download_checks_what_it_got(
    tmp_path: Path, only_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_npz(tmp_path / "source.npz")
    publish(monkeypatch, source, "0" * 32)
    with pytest.raises(DataNotFoundError, match="MD5"):
        load_medmnist("breastmnist", "train")
    assert list(only_here.iterdir()) == []
    publish(monkeypatch, source, hashlib.md5(source.read_bytes()).hexdigest())
    assert len(load_medmnist("breastmnist", "train")) == 4
    assert [file.name for file in only_here.iterdir()] == ["breastmnist.npz"]
    with pytest.raises(DataNotFoundError, match='no data set "other"'):
        load_medmnist("other", "train")


def test_download_that_fails_says_so_and_leaves_nothing(
    tmp_path: Path, only_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, tmp_path / "none.npz", "0" * 32)
    with pytest.raises(DataNotFoundError, match="could not be downloaded"):
        load_medmnist("breastmnist", "train")
    assert list(only_here.iterdir()) == []


def test_download_without_the_package_medmnist(
    only_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its module too: one that is loaded is found without the package.
    for module in ("medmnist", "medmnist.info"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataNotFoundError, match="not installed"):
        load_medmnist("breastmnist", "train")


def test_fashion_mnist_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((3, 28, 28), np.uint8)
    labels = np.array([9, 0, 4], np.uint8)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    part = load_fashion_mnist("test", tmp_path)
    assert [part.class_of(i) for i in range(3)] == ["Ankle boot", "T-shirt/top", "Coat"]
    with pytest.raises(DataNotFoundError, match="train-images-idx3-ubyte"):
        load_fashion_mnist("train", tmp_path)
    with pytest.raises(ValueError, match='no split "val"'):
        load_fashion_mnist("val", tmp_path)
    monkeypatch.setattr(datasets.fashion_mnist, "FASHION_MNIST_FOLDER", tmp_path / "none")
    with pytest.raises(DataNotFoundError, match="dataset-fashion-mnist"):
        load_fashion_mnist("test")


def test_real_data_where_it_is_installed() -> None:
    if datasets.find_fashion_mnist() is None:
        pytest.skip("dataset-fashion-mnist is not installed")
    part = load_fashion_mnist("test")
    assert part.images.shape == (10_000, 28, 28)
    assert np.bincount(part.labels).tolist() == [1000] * 10


@pytest.mark.parametrize(
    ("name", "counts", "channels"),
    [
        ("breastmnist", (546, 78, 156), 1),
        ("pneumoniamnist", (4708, 524, 624), 1),
        ("retinamnist", (1080, 120, 400), 3),
    ],
)
def test_real_medmnist_where_it_is_found(name: str, counts: tuple[int, ...], channels: int) -> None:
    if datasets.find_medmnist(name) is None:
        pytest.skip(f"{name}.npz is not here")
    parts = [load_medmnist(name, split) for split in datasets.SPLITS]
    assert tuple(len(part) for part in parts) == counts
    assert all(part.images.ndim == (4 if channels == 3 else 3) for part in parts)
    assert len({part.classes for part in parts}) == 1


def test_importing_datasets_imports_no_torch() -> None:
    code = "import sys, pg_siamese.datasets, pg_siamese.cli.training; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_dicom_files_of_any_name(tmp_path: Path) -> None:
    data = bytes(128) + b"DICM" + bytes(20)
    for name in ("a/1.dcm", "a/IM_0001", "b/1.2.840.113619", "DICOMDIR"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "b" / "README").write_text("no picture")
    left_out: list[datasets.LeftOut] = []
    found = datasets.list_image_folder(tmp_path, left_out.append)
    assert [(Path(file.name).name, file.label) for file in found] == [
        ("1.dcm", "a"),
        ("IM_0001", "a"),
        ("1.2.840.113619", "b"),
    ]
    assert sorted(file.path.name for file in left_out) == ["DICOMDIR", "README"]
