"""Index files: written once, published whole, and refused when anything about them is wrong."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import faiss
import numpy as np
import pytest

from pg_siamese_server.errors import IndexFileError
from pg_siamese_server.index import index_file
from pg_siamese_server.index.generations import Breadths, opened
from pg_siamese_server.index.index_file import Identity, Rows
from tests.support import Array
from tests.unit.server.common import CancelledError, cancel_at, flat, no_poll

DIMENSION = 8
IDENTITY = Identity(3, 5, "a2c0a0de-0000-4000-8000-000000000000", "ab" * 32, DIMENSION, "cosine")


@pytest.fixture(scope="module")
def matrix() -> Array:
    return np.random.default_rng(0).normal(size=(60, DIMENSION)).astype(np.float32)


def integer_rows(count: int) -> Rows:
    return Rows(np.arange(10, 10 + count), keys=np.arange(count) * 7 - 3)


def write(directory: Path, matrix: Array, rows: Rows | None = None) -> int:
    """Publish a flat index of vectors."""
    rows = rows or integer_rows(len(matrix))
    return index_file.write(directory, IDENTITY, flat(matrix), rows, no_poll)


def read(directory: Path) -> index_file.IndexFile:
    return index_file.read(directory, IDENTITY, no_poll)


@pytest.fixture
def directory(tmp_path: Path, matrix: Array) -> Path:
    """A directory with one published generation."""
    write(tmp_path / "3", matrix)
    return tmp_path / "3"


@pytest.mark.parametrize("made_for", [None, "7:9:8"])
def test_round_trip(tmp_path: Path, matrix: Array, made_for: str | None) -> None:
    rows = integer_rows(60)
    size = index_file.write(tmp_path, IDENTITY, flat(matrix), rows, no_poll, made_for)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5.faiss", "5.meta"]
    assert size == sum(path.stat().st_size for path in tmp_path.iterdir())
    file = read(tmp_path)
    assert file.made_for == made_for
    np.testing.assert_array_equal(file.index.reconstruct_n(0, 60), matrix)
    np.testing.assert_array_equal(file.rows.embedding_ids, np.arange(10, 70))
    assert [file.rows.key(row) for row in (0, 1, 59)] == [-3, 4, 410]


def test_only_older_generations_are_removed(directory: Path, matrix: Array) -> None:
    for generation in (4, 10):
        identity = replace(IDENTITY, generation=generation)
        index_file.write(directory, identity, flat(matrix), integer_rows(60), no_poll)
    index_file.remove_before(directory, 5)
    assert {path.stem for path in directory.iterdir()} == {"5", "10"}


def test_hnsw_round_trip(tmp_path: Path, matrix: Array) -> None:
    index = faiss.IndexHNSWFlat(DIMENSION, 16)
    index.add(matrix)
    index_file.write(tmp_path, IDENTITY, index, integer_rows(60), no_poll)
    file = read(tmp_path)
    generation = opened(file.index, file.rows, False, Breadths(40, 40))
    np.testing.assert_array_equal(generation.vectors, matrix)
    for query in (7, 31):
        truth = ((matrix - matrix[query]) ** 2).sum(axis=1)
        for entry in (None, query):
            positions, squared = generation.search(matrix[query : query + 1], 5, entry)
            np.testing.assert_array_equal(positions, np.argsort(truth)[:5])
            np.testing.assert_allclose(squared, np.sort(truth)[:5], atol=1e-5)


@pytest.mark.parametrize(
    "keys",
    [
        ["", "a", "Ä€𝄞", "with 'quotes\" and\nlines", "x" * 1000],
        [str(UUID(int=number)) for number in range(5)],
    ],
    ids=["text", "uuid"],
)
def test_text_keys(keys: list[str], tmp_path: Path, matrix: Array) -> None:
    data = [key.encode() for key in keys]
    offsets = np.concatenate([[0], np.cumsum([len(item) for item in data])])
    text = np.frombuffer(b"".join(data), dtype=np.uint8)
    write(tmp_path, matrix[:5], Rows(np.arange(5), key_offsets=offsets, key_bytes=text))
    found = read(tmp_path).rows
    assert [found.key(row) for row in range(5)] == keys


def rows_of(keys: list[int]) -> Rows:
    rows = Rows(np.arange(len(keys), dtype=np.int64))
    rows.set_keys(np.array(keys, dtype=np.int64))
    return rows


@pytest.mark.parametrize("keys", [[-9, 3, 4, 2**62], [3, -9, 2**62, 4], []])
def test_rows_by_integer_key(keys: list[int], tmp_path: Path, matrix: Array) -> None:
    write(tmp_path, matrix[: len(keys)], rows_of(keys))
    found = read(tmp_path).rows
    assert [found.row_of_key(key) for key in keys] == list(range(len(keys)))
    assert [found.row_of_key(key) for key in (-10, 0, 2**63 - 1)] == [None] * 3


def test_shared_vectors(tmp_path: Path, matrix: Array) -> None:
    rows = Rows(np.arange(5), keys=np.arange(5) * 10)
    rows.place(np.array([0, 1, 0, 2, 0], dtype=np.int32), 3)
    write(tmp_path, matrix[:3], rows)
    file = read(tmp_path)
    generation = opened(file.index, file.rows, True)
    positions, squared = generation.search(matrix[:1], 2, None)
    found, distances = generation.expand(positions, squared)
    assert found.tolist()[:3] == [0, 2, 4] and len(found) == 4
    assert distances.tolist()[:3] == [0.0] * 3
    assert [generation.slot_of(row) for row in range(5)] == [0, 1, 0, 2, 0]


def test_empty(tmp_path: Path) -> None:
    write(tmp_path, np.empty((0, DIMENSION), np.float32))
    file = read(tmp_path)
    generation = opened(file.index, file.rows, True)
    assert file.index.ntotal == 0
    assert generation.row_of(1) is None
    assert len(generation.rows_of(np.array([1, 2]))) == 0


def test_rows_by_embedding_id(matrix: Array) -> None:
    dense = opened(flat(matrix), integer_rows(60), True)
    sparse = opened(flat(matrix[:3]), Rows(np.array([2, 5, 9]), keys=np.arange(3)), True)
    assert [dense.row_of(number) for number in (9, 10, 69, 70)] == [None, 0, 59, None]
    assert [sparse.row_of(number) for number in (1, 2, 3, 9, 10)] == [None, 0, None, 2, None]
    assert sparse.rows_of(np.array([9, 4, 2, 99])).tolist() == [2, 0]


@pytest.mark.law(6)
def test_files_are_new_ones_each_time(directory: Path, matrix: Array) -> None:
    """A published file is never changed: a backend may have it mapped."""
    before = read(directory)
    inodes = {path.name: path.stat().st_ino for path in directory.iterdir()}
    write(directory, -matrix)
    assert all(path.stat().st_ino != inodes[path.name] for path in directory.iterdir())
    np.testing.assert_array_equal(before.index.reconstruct_n(0, 60), matrix)
    np.testing.assert_array_equal(read(directory).index.reconstruct_n(0, 60), -matrix)


@pytest.mark.law(6)
def test_failed_write_publishes_nothing(
    tmp_path: Path, matrix: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, matrix)
    assert not list(tmp_path.iterdir())


@pytest.mark.law(6)
def test_no_room_for_the_second_file(
    tmp_path: Path, matrix: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one must not stay: it may be what fills the disk."""
    replaced: list[str] = []
    replace_file = os.replace

    def full(source: str, target: str) -> None:
        replaced.append(Path(target).name)
        if len(replaced) == 2:
            raise OSError(28, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space") as caught:
        write(tmp_path, matrix)
    assert replaced == ["5.faiss", "5.meta"]
    assert caught.value.filename == str(tmp_path / "5.meta")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("level", ["pg_siamese", "pg_siamese/1", "pg_siamese/1/3"])
def test_a_file_in_place_of_a_directory(level: str, tmp_path: Path, matrix: Array) -> None:
    directory = tmp_path / "pg_siamese" / "1" / "3"
    (tmp_path / level).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / level).write_text("not a directory")
    refuse(directory, "cannot be opened")
    write(directory, matrix)
    read(directory)


def test_links_in_place_of_a_directory(tmp_path: Path, matrix: Array) -> None:
    (tmp_path / "pg_siamese").symlink_to(tmp_path / "disk")
    directory = tmp_path / "pg_siamese" / "1" / "3"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write(directory, matrix)
    assert [path.name for path in tmp_path.iterdir()] == ["pg_siamese"]
    (tmp_path / "disk").mkdir()
    write(directory, matrix)
    read(directory)
    assert (tmp_path / "disk" / "1" / "3" / "5.faiss").exists()


def refuse(directory: Path, message: str, identity: Identity = IDENTITY) -> None:
    with pytest.raises(IndexFileError) as caught:
        index_file.read(directory, identity, no_poll)
    assert message in caught.value.message
    assert caught.value.sqlstate == "55000"


@pytest.mark.parametrize(
    "other",
    [
        {"collection_id": 4},
        {"build_id": "b2c0a0de-0000-4000-8000-000000000000"},
        {"model_sha256": "cd" * 32},
        {"dimension": 16},
        {"metric": "l2"},
    ],
)
def test_foreign_file(directory: Path, other: dict[str, object]) -> None:
    refuse(directory, "another build", replace(IDENTITY, **other))  # type: ignore[arg-type]


def test_other_generation(directory: Path) -> None:
    refuse(directory, "missing", replace(IDENTITY, generation=6))
    for path in list(directory.iterdir()):
        path.rename(path.with_stem("6"))
    refuse(directory, "another build", replace(IDENTITY, generation=6))


@pytest.mark.parametrize("suffix", [".faiss", ".meta"])
def test_torn_file_and_none(directory: Path, suffix: str) -> None:
    path = directory / f"5{suffix}"
    data = path.read_bytes()
    for length in (0, 1, 7, 8, 20, 24, 30, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        refuse(directory, "index file")
    path.write_bytes(data + b"\0")
    refuse(directory, "damaged")
    path.unlink()
    refuse(directory, "missing")


@pytest.mark.parametrize("suffix", [".faiss", ".meta"])
def test_every_byte_counts(directory: Path, suffix: str) -> None:
    path = directory / f"5{suffix}"
    data = bytearray(path.read_bytes())
    for place in range(0, len(data), 7):
        data[place] ^= 0x40
        path.write_bytes(data)
        refuse(directory, "index file")
        data[place] ^= 0x40
    path.write_bytes(data)
    read(directory)


def test_directory_in_place_of_a_file(directory: Path) -> None:
    (directory / "5.meta").unlink()
    (directory / "5.meta").mkdir()
    refuse(directory, "cannot be opened")


def test_remove_others(directory: Path) -> None:
    for name in ("4.faiss", "4.meta", "6.faiss", "7.faiss.tmp", "strange"):
        (directory / name).touch()
    for name in ("8.faiss", "9.faiss.tmp"):
        (directory / name).mkdir()
        (directory / name / "something").touch()
    index_file.remove_temporary(directory)
    assert not list(directory.glob("*.tmp"))
    index_file.remove_others(directory, {5, 6})
    assert sorted(path.name for path in directory.iterdir()) == ["5.faiss", "5.meta", "6.faiss"]


@pytest.mark.law(5)
def test_reading_can_be_left(directory: Path) -> None:
    with pytest.raises(CancelledError):
        index_file.read(directory, IDENTITY, cancel_at(1))


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        ([1, 2, 3, 4], [0, 1, 3]),  # without a gap
        ([1, 2, 9, 4], [0, 1, 3]),  # not in order
        ([-5, 1, 2, 4], [1, 2, 3]),
        ([4, 1, 2, 1], [1, 3, 2, 0]),  # 1 was replaced during the build: both rows
    ],
)
def test_rows_of_integer_keys(keys: list[int], rows: list[int], matrix: Array) -> None:
    generation = opened(flat(matrix[: len(keys)]), rows_of(keys), True)
    wanted = np.array([-(2**63), 1, 2, 4, 2**62], dtype=np.int64)
    assert generation.rows_of_keys(wanted).tolist() == rows


def test_breadth_by_count() -> None:
    measured = Breadths(16, 32, (75, 200, 450, 1200))
    counts = [1, 10, 11, 50, 100, 300, 1000, 10_000]
    found = [measured.for_count(count) for count in counts]
    assert found[:2] == [32, 32] and found[4] == 200 and found[6:] == [1200, 12_000]
    assert found == sorted(found)
    assert all(breadth >= count for breadth, count in zip(found, counts, strict=True))
    # An index from before these were measured is searched more broadly.
    assert Breadths(16, 32).for_count(100) > 200
