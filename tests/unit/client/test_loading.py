"""What can be loaded, and how batches go in, against a connection that is only pretended."""

from __future__ import annotations

import gzip
import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import psycopg
import pytest
from PIL import Image

from pg_siamese.client.connection import CommandError
from pg_siamese.client.loading import LoadReport, Target, batches, load_part, store
from pg_siamese.client.sources import (
    ImageRow,
    Part,
    SourceError,
    count_left_out,
    labelled_part,
    png,
    printable,
    read_source,
)
from pg_siamese.datasets import DataFormatError, DataNotFoundError, LabelledImages, LeftOut

TARGET = Target(
    "siamese.images", "image", {name: "text" for name in ("dataset", "split", "label", "source")}
)


class Server:
    """Takes INSERTs as a server would; rejects the images b'bad', fails where told to."""

    def __init__(self, stored: tuple[str, ...] = (), failure: BaseException | None = None) -> None:
        self.images: list[bytes] = []
        self.statements = 0
        self.stored = stored
        self.failure = failure

    @contextmanager
    def transaction(self) -> Iterator[None]:
        before = len(self.images)
        try:
            yield
        except BaseException:
            del self.images[before:]
            raise

    def execute(self, query: Any, values: Any = None) -> list[tuple[str]]:
        if values is None:
            return [(source,) for source in self.stored]
        self.statements += 1
        self.images += values[0]
        if self.failure is not None and self.statements == 3:
            raise self.failure
        if b"bad" in values[0]:
            raise psycopg.errors.InvalidBinaryRepresentation("image cannot be decoded")
        if b"huge" in values[0]:
            raise psycopg.errors.ProgramLimitExceeded("image is too large")
        return []

    @property
    def connection(self) -> psycopg.Connection[Any]:
        return cast("psycopg.Connection[Any]", self)


def images(*contents: bytes) -> list[ImageRow]:
    return [ImageRow(image, f"file {i}", f"source {i}") for i, image in enumerate(contents)]


def many(count: int, **special: bytes) -> list[ImageRow]:
    return images(*(special.get(f"at{i}", b"good") for i in range(count)))


def test_batches_keep_the_order_and_the_row_limit() -> None:
    rows = many(10)
    found = list(batches(rows, batch_rows=4))
    assert [len(batch) for batch in found] == [4, 4, 2]
    assert [row for batch in found for row in batch] == rows
    assert list(batches([])) == []


def test_batches_keep_the_byte_limit_but_never_split_a_row() -> None:
    rows = images(b"x" * 6, b"x" * 5, b"x" * 20, b"x")
    found = [[len(row.image) for row in batch] for batch in batches(rows, batch_bytes=10)]
    assert found == [[6], [5], [20], [1]]


def test_batches_read_no_further_than_they_must() -> None:
    read = []

    def rows() -> Iterator[ImageRow]:
        for row in many(100):
            read.append(row)
            yield row

    next(batches(rows(), batch_rows=5))
    assert len(read) == 6


def test_rows_before_a_broken_source_are_stored() -> None:
    def rows() -> Iterator[ImageRow]:
        yield from many(13)
        raise SourceError("the connection broke off")

    server = Server()
    message = "the connection broke off; 13 images stored by this command; run the same command"
    with pytest.raises(CommandError, match=message):
        store(server.connection, TARGET, rows(), batch_rows=10)
    assert len(server.images) == 13


def test_all_good_rows_go_in_a_few_statements() -> None:
    server = Server()
    steps: list[int] = []
    report = store(server.connection, TARGET, many(25), batch_rows=10, advance=steps.append)
    assert (report.stored, report.rejected) == (25, [])
    assert server.statements == 3
    assert steps == [10, 10, 5]


@pytest.mark.parametrize("fault", [b"bad", b"huge"])
def test_a_rejected_image_is_named_and_ends_the_load(fault: bytes) -> None:
    server = Server()
    with pytest.raises(CommandError, match=r"^file 7: image .* \(7 images stored") as caught:
        store(server.connection, TARGET, many(20, at7=fault), batch_rows=10)
    assert caught.value.exit_code == 1
    assert len(server.images) == 7


def test_rejected_images_can_be_skipped() -> None:
    server = Server()
    steps: list[int] = []
    rows = many(40, at0=b"bad", at7=b"bad", at8=b"huge", at39=b"bad")
    options: Any = {"batch_rows": 10, "skip_rejected": True, "advance": steps.append}
    report = store(server.connection, TARGET, rows, **options)
    assert report.stored == len(server.images) == 36
    names = [rejection.name for rejection in report.rejected]
    assert names == ["file 0", "file 7", "file 8", "file 39"]
    assert sum(steps) == 40
    # Found by halving, not one by one.
    assert server.statements < 25


def test_other_errors_end_the_load_at_once_and_say_what_is_stored() -> None:
    server = Server(failure=psycopg.errors.InsufficientPrivilege("permission denied"))
    with pytest.raises(CommandError, match=r"permission denied \(20 images stored") as caught:
        store(server.connection, TARGET, many(50), batch_rows=10, skip_rejected=True)
    assert server.statements == 3
    assert caught.value.exit_code == 1


def test_ctrl_c_says_what_is_stored() -> None:
    server = Server(failure=KeyboardInterrupt())
    message = r"20 images stored.*run the same command to continue"
    with pytest.raises(CommandError, match=message) as caught:
        store(server.connection, TARGET, many(50), batch_rows=10)
    assert caught.value.exit_code == 130
    assert len(server.images) == 20


def part_of(count: int) -> Part:
    pixels, labels = np.zeros((count, 4, 4), np.uint8), np.zeros(count, np.int64)
    return labelled_part(LabelledImages("set", "train", pixels, labels, ("only",)), "medmnist")


def test_what_is_stored_is_left_out() -> None:
    server = Server(stored=("medmnist:set/train/0", "medmnist:set/train/3"))
    steps: list[int] = []
    report = LoadReport(stored=100)
    load_part(server.connection, TARGET, part_of(5), report=report, advance=steps.append)
    assert (report.stored, report.stored_before) == (103, 2)
    assert sum(steps) == 5


def test_without_a_source_column_everything_goes_in() -> None:
    server = Server(stored=("medmnist:set/train/0",))
    bare = Target("pictures", "picture", {})
    assert load_part(server.connection, bare, part_of(3)).stored == 3


@pytest.mark.parametrize("shape", [(28, 28), (7, 5), (28, 28, 3)])
def test_png_keeps_the_pixels(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with Image.open(io.BytesIO(png(pixels))) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), pixels)


def npz(path: Path) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.full((count, 1), count % 2, np.uint8)
    np.savez(path, **arrays)
    return path


def test_npz_files_give_a_part_for_each_split(tmp_path: Path) -> None:
    file = npz(tmp_path / "breastmnist.npz")
    parts = read_source(file)
    counts = {str(part).removeprefix("breastmnist "): len(part) for part in parts}
    assert counts == {"train": 3, "val": 2, "test": 1}
    row = parts[1].row(1)
    assert row.source == "medmnist:breastmnist/val/1"
    assert (row.dataset, row.split, row.label) == ("breastmnist", "val", "malignant")
    with np.load(file) as arrays:
        stored = np.asarray(Image.open(io.BytesIO(row.image)))
        assert np.array_equal(stored, arrays["val_images"][1])


def test_npz_files_by_split_and_name(tmp_path: Path) -> None:
    parts = read_source(npz(tmp_path / "x.npz"), splits=["test"], dataset="other")
    assert [part.sources for part in parts] == [["medmnist:other/test/0"]]
    with pytest.raises(DataFormatError, match='no split "extra"'):
        read_source(tmp_path / "x.npz", splits=["extra"])


def test_idx_files(tmp_path: Path) -> None:
    folder = tmp_path / "my-digits"
    folder.mkdir()
    pixels = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    images_file = folder / "t10k-images-idx3-ubyte.gz"
    header = b"\0\0\x08\x03" + struct.pack(">3I", *pixels.shape)
    images_file.write_bytes(gzip.compress(header + pixels.tobytes()))
    labels_file = folder / "t10k-labels-idx1-ubyte"
    labels_file.write_bytes(b"\0\0\x08\x01" + struct.pack(">I", 2) + bytes([1, 0]))
    (part,) = read_source(images_file, labels=labels_file)
    row = part.row(0)
    assert (row.dataset, row.split, row.label) == ("my_digits", "test", "1")
    assert row.source == "idx:my_digits/test/0"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(row.image))), pixels[0])
    with pytest.raises(CommandError, match="--labels"):
        read_source(images_file)


def test_folders_keep_the_bytes_of_each_file(tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    for name in ("train/cat/a.png", "train/dog/b.jpg", "val/cat/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"the bytes of {name}".encode())
    train, val = read_source(folder)
    row = train.row(1)
    assert row.image == b"the bytes of train/dog/b.jpg"
    assert (row.dataset, row.split, row.label) == ("pets", "train", "dog")
    assert row.source == "file:pets/train/dog/b.jpg"
    assert row.name == str(folder / "train/dog/b.jpg")
    assert val.sources == ["file:pets/val/cat/c.png"]
    assert [str(part) for part in read_source(folder, splits=["val"])] == ["pets val"]
    with pytest.raises(CommandError, match="no image of split test"):
        read_source(folder, splits=["test"])


def test_what_is_no_source_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no such file"):
        read_source(tmp_path / "nothing.npz")
    with pytest.raises(DataNotFoundError, match="no image in this folder"):
        read_source(tmp_path)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(CommandError, match="neither a folder"):
        read_source(text)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK no zip")
    with pytest.raises(DataFormatError, match=r"broken\.npz"):
        read_source(broken)


def folder_of_all_kinds(folder: Path) -> Path:
    """Pictures, pictures that can't be decoded, other files, and names that are not UTF-8."""
    for name in ("cat/a.png", "cat/b.JFIF", "cat/c.jpe", "dog/d.jpeg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"picture")
    for name in ("cat/e.heic", "dog/f.HEIC", "dog/g.nii", "notes.txt", ".DS_Store", "LICENSE"):
        (folder / name).write_bytes(b"other")
    Path(os.fsdecode(os.fsencode(folder) + b"/cat/caf\xe9.png")).write_bytes(b"picture")
    latin = Path(os.fsdecode(os.fsencode(folder) + b"/b\xfcrste"))
    latin.mkdir()
    (latin / "h.png").write_bytes(b"picture")
    return folder


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    left_out: list[LeftOut] = []
    (part,) = read_source(folder_of_all_kinds(tmp_path / "pets"), leave_out=left_out.append)
    names = ["cat/a.png", "cat/b.JFIF", "cat/c.jpe", "dog/d.jpeg"]
    assert list(part.sources) == [f"file:pets/{name}" for name in names]
    reasons = {printable(file.path.relative_to(tmp_path)): file.reason for file in left_out}
    assert reasons == {
        "pets/cat/e.heic": ".heic files are not supported",
        "pets/dog/f.HEIC": ".heic files are not supported",
        "pets/dog/g.nii": ".nii files are not supported",
        "pets/notes.txt": None,
        "pets/.DS_Store": None,
        "pets/LICENSE": None,
        "pets/cat/caf\\xe9.png": "its name is not UTF-8",
        "pets/b\\xfcrste/h.png": "its name is not UTF-8",
    }
    assert count_left_out(left_out) == (
        "8 files left out: 2 .heic, 2 of a name that is not UTF-8, 1 hidden, 1 without a suffix,"
        " 1 .nii, 1 .txt"
    )
    assert count_left_out([]) == ""


def test_a_folder_of_no_text(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "a.png").write_bytes(b"picture")
    with pytest.raises(CommandError, match="--dataset"):
        read_source(folder)
    (part,) = read_source(folder, dataset="named")
    assert list(part.sources) == ["file:named/cat/a.png"]
    assert part.row(0).name.encode()  # it can be printed
    (folder / "cat" / "a.png").rename(folder / "cat" / os.fsdecode(b"\xff.png"))
    with pytest.raises(CommandError, match="no image that can be loaded"):
        read_source(folder, dataset="named")
