"""Data sets by a text, in three splits: every kind, and what is wrong with them."""

from __future__ import annotations

import gzip
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pg_siamese.client.sources import png
from pg_siamese.datasets import (
    DataFormatError,
    DataNotFoundError,
    LabelledImages,
    open_dataset,
    split_at_random,
)
from pg_siamese.datasets.base import Groups
from pg_siamese.datasets.groups import read_groups
from pg_siamese_server.encoding.images import decode_image
from pg_siamese_server.encoding.specification import InputSpec
from tests.unit.datasets.files import idx_bytes
from tools.project import ROOT


def picture(value: int, width: int = 12, height: int = 10) -> bytes:
    return png(np.random.default_rng(value).integers(0, 256, (height, width, 3), np.uint8))


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def by_class(count: int, prefix: str = "") -> dict[str, bytes]:
    return {
        f"{prefix}{name}/{i:02}.png": picture(100 * number + i)
        for number, name in enumerate(("cat", "dog"))
        for i in range(count)
    }


def write_folder(root: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def sizes(spec: str, **options: object) -> list[int]:
    opened = open_dataset(spec, **options)  # type: ignore[arg-type]
    return [len(part) for part in (opened.train, opened.val, opened.test)]


def seen(part: LabelledImages) -> set[bytes]:
    return {image.tobytes() for image in part.images}


# --- folders and zips -------------------------------------------------------------------------


def test_a_folder_is_split_by_class_and_seed(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets", by_class(20))
    opened = open_dataset(f"folder:{tmp_path / 'pets'}", seed=1)
    parts = (opened.train, opened.val, opened.test)
    assert opened.name == "pets"
    assert opened.spec == f"folder:{tmp_path / 'pets'}"
    assert [part.split for part in parts] == ["train", "val", "test"]
    assert [np.bincount(part.labels).tolist() for part in parts] == [[14, 14], [3, 3], [3, 3]]
    assert len(seen(parts[0]) | seen(parts[1]) | seen(parts[2])) == 40
    assert opened.train.classes == ("cat", "dog")
    again, other = (open_dataset(f"folder:{tmp_path / 'pets'}", seed=seed) for seed in (1, 2))
    assert (again.val.images == opened.val.images).all()
    assert seen(other.test) != seen(opened.test)


def test_a_class_with_one_image_is_trained_on(tmp_path: Path) -> None:
    write_folder(tmp_path, by_class(10) | {"yak/1.png": picture(999)})
    opened = open_dataset(f"folder:{tmp_path}")
    assert np.bincount(opened.train.labels).tolist()[2] == 1
    assert opened.val.classes == opened.train.classes == ("cat", "dog", "yak")


def test_a_zip_equals_its_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets", by_class(10))
    write_zip(tmp_path / "pets.zip", by_class(10))
    write_zip(tmp_path / "around.zip", by_class(10, "pets/"))
    folder = open_dataset(f"folder:{tmp_path / 'pets'}", seed=4)
    for name in ("pets", "around"):
        zipped = open_dataset(f"zip:{tmp_path / name}.zip", seed=4)
        assert (zipped.train.images == folder.train.images).all()
        assert (zipped.test.labels == folder.test.labels).all()
        assert zipped.train.files == (tmp_path / f"{name}.zip",)


def test_splits_of_a_folder_are_kept(tmp_path: Path) -> None:
    members = by_class(10, "train/") | by_class(2, "validation/") | by_class(3, "test/")
    write_folder(tmp_path, members)
    assert sizes(f"folder:{tmp_path}") == [20, 4, 6]


def test_validation_is_the_test_where_there_is_no_other(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", by_class(20, "train/") | by_class(4, "val/"))
    assert sizes(f"zip:{tmp_path / 'a.zip'}") == [36, 4, 8]
    write_zip(tmp_path / "b.zip", by_class(20, "test/"))
    with pytest.raises(DataFormatError, match="no split train; there are: test"):
        open_dataset(f"zip:{tmp_path / 'b.zip'}")


def test_images_come_to_the_size_as_in_the_server(tmp_path: Path) -> None:
    members = by_class(3, "train/") | {"test/cat/x.png": picture(7, 40, 30)}
    write_folder(tmp_path, members | {"val/dog/x.png": picture(8)})
    with pytest.raises(DataFormatError, match=r"has 40 x 30 pixels and .* 12 x 10: say the size"):
        open_dataset(f"folder:{tmp_path}")
    spec = InputSpec(width=16, height=14, resize="pad")
    opened = open_dataset(f"folder:{tmp_path}", input_spec=spec)
    assert opened.test.images.shape == (1, 14, 16, 3)
    assert (opened.test.images[0] == decode_image(picture(7, 40, 30), spec)).all()


@pytest.mark.parametrize(
    "name", ["../cat/1.png", "/etc/1.png", "cat/../../1.png", "C:/cat/1.png", "cat\\..\\1.png"]
)
def test_zips_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "a.zip", by_class(2))
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("x")
        info.filename = name
        archive.writestr(info, picture(1))
    with pytest.raises(DataFormatError, match="leads out of the archive"):
        open_dataset(f"zip:{path}")


def test_broken_zips_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK rubbish")
    with pytest.raises(DataFormatError, match=r"a\.zip: not a zip file"):
        open_dataset(f"zip:{tmp_path / 'a.zip'}")
    write_zip(tmp_path / "b.zip", {"notes.txt": b"x"})
    with pytest.raises(DataNotFoundError, match="no image in this zip"):
        open_dataset(f"zip:{tmp_path / 'b.zip'}")
    path = write_zip(tmp_path / "c.zip", by_class(3))
    data = bytearray(path.read_bytes())
    data[data.index(b"IHDR") + 6] ^= 0xFF  # the member's own checksum no longer fits
    path.write_bytes(data)
    with pytest.raises(DataFormatError, match=r"c\.zip: cat/00\.png"):
        open_dataset(f"zip:{path}")
    with pytest.raises(DataNotFoundError, match="no such file"):
        open_dataset(f"zip:{tmp_path / 'none.zip'}")


def test_large_members_and_no_images_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", by_class(3))
    with pytest.raises(DataFormatError, match="larger than the limit of 100 bytes"):
        open_dataset(f"zip:{path}", input_spec=InputSpec(width=8, height=8, max_bytes=100))
    path = write_zip(tmp_path / "b.zip", by_class(3) | {"cat/x.png": b"rubbish"})
    with pytest.raises(DataFormatError, match=r"cat/x\.png"):
        open_dataset(f"zip:{path}", input_spec=InputSpec(width=8, height=8))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.png": picture(1)}, "lies in no class folder"),
        ({"cat/1.png": picture(1)}, "one class only"),
        (by_class(2, "train/") | by_class(2), "lies beside the split folders train"),
    ],
)
def test_folders_without_classes(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    write_folder(tmp_path, members)
    with pytest.raises(DataFormatError, match=message):
        open_dataset(f"folder:{tmp_path}")


# --- arrays -----------------------------------------------------------------------------------


def test_npz_without_validation(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8), np.uint8)
    labels = np.repeat([0, 1], [80, 20]).astype(np.uint8)
    arrays: dict[str, Any] = {"train_images": images, "train_labels": labels}
    arrays |= {"test_images": images[:10], "test_labels": labels[:10]}
    np.savez(tmp_path / "a.npz", **arrays)
    opened = open_dataset(f"npz:{tmp_path / 'a.npz'}")
    assert np.bincount(opened.val.labels).tolist() == [8, 2]
    assert len(opened.train) == 90
    with pytest.raises(DataNotFoundError, match="no such file"):
        open_dataset(f"npz:{tmp_path / 'b.npz'}")


def test_arrays_are_resized_as_in_the_server(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    labels = (np.arange(20) % 2).astype(np.uint8)
    np.savez(tmp_path / "a.npz", train_images=grey, train_labels=labels)
    spec = InputSpec(width=16, height=12)
    opened = open_dataset(f"npz:{tmp_path / 'a.npz'}", input_spec=spec)
    assert opened.train.rgb().shape[1:] == (12, 16, 3)
    place = int(np.flatnonzero((grey == grey[3]).all(axis=(1, 2)))[0])
    expected = decode_image(png(grey[place]), spec)
    parts = np.concatenate([part.rgb() for part in (opened.train, opened.val, opened.test)])
    assert (parts == expected).all(axis=(1, 2, 3)).any()


def test_idx_folders_and_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {}
    for prefix, count in (("train", 40), ("t10k", 10)):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        members[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(idx_bytes(images))
        members[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(idx_bytes(labels))
    write_folder(tmp_path / "mnist", members)
    opened = open_dataset(f"idx:{tmp_path / 'mnist'}")
    assert (opened.name, len(opened.test), len(opened.train) + len(opened.val)) == ("mnist", 10, 40)
    monkeypatch.setenv("PG_SIAMESE_DATA", str(tmp_path))
    assert open_dataset("mnist").train.files[0].parent == tmp_path / "mnist"
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataNotFoundError, match="no t10k-labels-idx1-ubyte"):
        open_dataset("mnist")


BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def test_cifar10_in_both_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planes = np.random.default_rng(0).integers(0, 256, (20, 3072), np.uint8)
    labels = np.arange(20) % 10
    batch = pickle.dumps({b"data": planes, b"labels": labels.tolist()}, protocol=2)
    rows = np.concatenate([labels[:, None].astype(np.uint8), planes], axis=1).tobytes()
    write_folder(tmp_path / "p" / "cifar10", dict.fromkeys(BATCHES, batch))
    write_folder(tmp_path / "b" / "cifar10", {f"{name}.bin": rows for name in BATCHES})
    for folder in "pb":
        monkeypatch.setenv("PG_SIAMESE_DATA", str(tmp_path / folder))
        opened = open_dataset("cifar10")
        assert len(opened.test) == 20
        assert opened.test.labels.tolist() == labels.tolist()
        assert (opened.test.images[0, 0, :32, 1] == planes[0, 1024:1056]).all()
        assert opened.train.classes[9] == "truck"


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1/0",)


def test_a_pickle_that_runs_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harmful = pickle.dumps({b"data": Harmful()}, protocol=2)
    folder = write_folder(tmp_path / "cifar10", dict.fromkeys(BATCHES, harmful))
    monkeypatch.setenv("PG_SIAMESE_DATA", str(tmp_path))
    with pytest.raises(DataFormatError, match=r"data_batch_1: .*eval is not allowed"):
        open_dataset("cifar10")
    (folder / "data_batch_1").write_bytes(b"rubbish")
    with pytest.raises(DataFormatError, match="data_batch_1"):
        open_dataset("cifar10")


# --- texts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none", 'no data set "none"; there are: medmnist:FLAG'),
        ("folder", "needs something after a colon"),
        ("mnist:x", "stands alone"),
        ("medmnist:organmnist3d", "only 2-D sets"),
        ("medmnist:chestmnist", "one label per image"),
    ],
)
def test_texts_that_name_nothing(spec: str, message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        open_dataset(spec)


def test_sets_that_are_not_there_say_where_they_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("PG_SIAMESE_DATA", str(tmp_path / "own"))
    for name in ("mnist", "cifar10", "imagenette"):
        with pytest.raises(DataNotFoundError, match=f"{tmp_path / 'own' / name}"):
            open_dataset(name)


def test_imagenette_as_zip_and_as_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_SIAMESE_DATA", str(tmp_path))
    members = by_class(20, "train/") | by_class(3, "val/")
    write_folder(tmp_path / "imagenette" / "imagenette2-160", members)
    assert sizes("imagenette") == [36, 4, 6]
    write_zip(tmp_path / "imagenette" / "imagenette_small.zip", members)
    opened = open_dataset("imagenette")
    assert opened.name == "imagenette"
    assert opened.train.files[0].suffix == ".zip"


def test_the_same_seed_never_lets_an_image_into_two_splits() -> None:
    images = np.arange(200, dtype=np.uint8)[:, None, None] + np.zeros((1, 2, 2), np.uint8)
    labels = np.arange(200) % 7
    whole = LabelledImages("set", "all", images, labels, tuple("abcdefg"))
    parts = split_at_random(whole, seed=3)
    together = [part.images[:, 0, 0] for part in (parts.train, parts.val, parts.test)]
    assert sorted(np.concatenate(together).tolist()) == list(range(200))


# --- groups -----------------------------------------------------------------------------------


def with_groups(members: dict[str, bytes], prefix: str = "") -> dict[str, bytes]:
    """Put images of each class into groups of three, by a table beside them."""
    names = [name.removeprefix(prefix) for name in members]
    rows = [f"{name},{name[:3]} {place // 3}" for place, name in enumerate(names)]
    return members | {f"{prefix}groups.csv": "\n".join(["file,group", *rows]).encode()}


def groups_in(part: LabelledImages) -> Groups:
    assert part.groups is not None
    return part.groups


def test_groups_of_a_folder_and_its_zip(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets", with_groups(by_class(30)))
    folder = open_dataset(f"folder:{tmp_path / 'pets'}", seed=2)
    parts = (folder.train, folder.val, folder.test)
    assert folder.has_groups
    groups = [groups_in(part).tolist() for part in parts]
    assert sum(len(set(names)) for names in groups) == len(set().union(*groups)) == 20
    for part, names in zip(parts, groups, strict=True):
        assert len(part) == len(names) > 0
        assert [name[:3] for name in names] == [part.class_of(i) for i in range(len(part))]
    for name, prefix in (("pets", ""), ("around", "pets/")):
        write_zip(tmp_path / f"{name}.zip", with_groups(by_class(30, prefix), prefix))
        zipped = open_dataset(f"zip:{tmp_path / name}.zip", seed=2)
        assert np.array_equal(groups_in(zipped.test), groups_in(folder.test))
        assert (zipped.test.images == folder.test.images).all()


def test_the_documentation_of_groups() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    (table,) = re.findall(r"^```csv\n(.*?)^```", text, re.M | re.S)
    assert read_groups(table.encode(), Path("photos/groups.csv")) == {
        "photos/cat/001.png": "patient 17",
        "photos/cat/002.png": "patient 17",
        "photos/dog/001.png": "patient 4",
    }


def test_groups_of_splits_are_checked(tmp_path: Path) -> None:
    members = by_class(4, "train/") | by_class(3, "val/") | by_class(3, "test/")
    rows = [f"{name},{name.split('/')[0]}" for name in members]
    rows[0] = rows[0].replace(",train", ",test")
    members["groups.csv"] = "\n".join(["file,group", *rows]).encode()
    write_folder(tmp_path, members)
    message = r'group "test" is in train \(1 image\) and in test \(6 images\)'
    with pytest.raises(DataFormatError, match=message):
        open_dataset(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"file,group\ncat/00.png,a\n", r"cat/01\.png: has no group in groups\.csv"),
        (b"image,patient\ncat/00.png,a\n", r"lacks the columns file and .* row: image, patient$"),
        (b"file;group\ncat/00.png;a\n", r"lacks the columns file and group; .* row: file;group$"),
        (b"", r"groups\.csv: lacks the columns file and group"),
        (b"file,group\ncat/00.png,\n", r"groups\.csv: row 2 lacks a value of file or group"),
        (b"file,group\ncat/00.png\n", r"groups\.csv: row 2 lacks a value of file or group"),
        (
            b"file,group\ncat/00.png,a\ncat/00.png,b\n",
            r'row 3 puts "cat/00\.png" into another group',
        ),
        (b"\xff\xfe\x00", r"groups\.csv: not a CSV file in UTF-8"),
        (b'file,group\n"cat/00.png,a\n', r"groups\.csv: not a CSV file in UTF-8"),
    ],
)
def test_tables_of_groups_that_are_wrong(tmp_path: Path, table: bytes, message: str) -> None:
    write_folder(tmp_path, by_class(3) | {"groups.csv": table})
    with pytest.raises(DataFormatError, match=message):
        open_dataset(f"folder:{tmp_path}")


def test_blanks_around_a_group_do_not_count(tmp_path: Path) -> None:
    images = by_class(12)
    names = [name for name in images if name.endswith(".png")]
    rows = [f"{name},p{number // 4}{' ' * (number % 2)}" for number, name in enumerate(names)]
    table = "\n".join(["file,group", *rows]).encode()
    write_folder(tmp_path, images | {"groups.csv": table})
    opened = open_dataset(f"folder:{tmp_path}")
    assert not set(groups_in(opened.train)) & set(groups_in(opened.test))
    assert all(group == group.strip() for group in groups_in(opened.train))


def test_groups_that_are_the_classes(tmp_path: Path) -> None:
    """Then nothing is left to be told apart."""
    images = np.zeros((30, 8, 8), np.uint8)
    labels = np.arange(30) % 3
    path = tmp_path / "same.npz"
    np.savez(path, train_images=images, train_labels=labels, train_groups=labels)
    with pytest.raises(DataFormatError, match="one class to train on"):
        open_dataset(f"npz:{path}")


def test_groups_of_an_npz(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)
    arrays: dict[str, Any] = {"train_images": images, "train_labels": np.arange(60) % 2}
    for name, groups in (
        ("numbers", np.arange(60) // 4),
        ("texts", [f"p{i // 4}" for i in range(60)]),
    ):
        np.savez(tmp_path / f"{name}.npz", train_groups=groups, **arrays)
        opened = open_dataset(f"npz:{tmp_path / name}.npz")
        assert not set(groups_in(opened.train)) & set(groups_in(opened.test))
    arrays |= {"test_images": images[:6], "test_labels": np.arange(6) % 2}
    np.savez(tmp_path / "both.npz", train_groups=np.arange(60), test_groups=np.arange(6), **arrays)
    with pytest.raises(DataFormatError, match=r'group "0" is in train .* and in test .* both: 6'):
        open_dataset(f"npz:{tmp_path / 'both.npz'}")
    np.savez(tmp_path / "wrong.npz", train_groups=np.arange(60) / 2, **arrays)
    with pytest.raises(DataFormatError, match="groups are float64, neither integers nor text"):
        open_dataset(f"npz:{tmp_path / 'wrong.npz'}")
