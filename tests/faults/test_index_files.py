"""Index files torn, emptied, swapped and with flipped bits: all detected, answers right, healed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.faults.checks import Connect, check_fallback, check_repair, put
from tests.scenarios.gallery import (
    DISTANCE_TOLERANCE,
    TIE_TOLERANCE,
    Connection,
    Gallery,
    filled_up,
    index_directory,
    insert,
)
from tests.support import notices_of, one

SUFFIXES = (".faiss", ".meta")


def current(db: Connection, suffix: str, number: int = 1) -> Path:
    """Return the path of a current index file of a collection."""
    query = "SELECT generation FROM siamese.collections WHERE collection_id = %s"
    return index_directory(db).with_name(str(number)) / f"{one(db, query, number)}{suffix}"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_torn(
    db: Connection, connect: Connect, images: Gallery, suffix: str, seed: int, is_long: bool
) -> None:
    """Cut at random lengths, of which none at all is one."""
    path = current(db, suffix)
    whole = path.read_bytes()
    lengths = np.random.default_rng(seed).integers(1, len(whole), 25 if is_long else 2)
    for length in (0, *lengths.tolist()):
        put(path, whole[:length])
        check_fallback(connect, images, "damaged" if length >= 8 else "index file")
    put(path, whole + whole[:64])
    check_fallback(connect, images, "damaged")
    check_repair(connect, images)


SWAPPED = pytest.mark.parametrize("suffixes", [(".faiss",), (".meta",), SUFFIXES], ids="+".join)


@SWAPPED
def test_swapped_with_another_generation(
    db: Connection, connect: Connect, images: Gallery, suffixes: tuple[str, ...]
) -> None:
    """One file of it, and a whole generation under another's names."""
    old = {suffix: current(db, suffix).read_bytes() for suffix in suffixes}
    insert(db, images.files[100:200])
    db.execute("DELETE FROM siamese.images WHERE image_id < 50")
    db.execute("SELECT build_index()")
    for suffix, data in old.items():
        put(current(db, suffix), data)
    check_fallback(connect, images, "another build" if ".meta" in suffixes else "damaged")
    check_repair(connect, images)


@SWAPPED
def test_swapped_with_another_collection(
    db: Connection, connect: Connect, images: Gallery, suffixes: tuple[str, ...]
) -> None:
    """Of as many rows with the same keys."""
    db.execute("CREATE TABLE t (id bigint PRIMARY KEY, image bytea)")
    db.execute("SELECT create_collection('t', 't')")
    db.execute(
        "INSERT INTO t SELECT * FROM unnest(%s::bigint[], %s::bytea[])",
        (list(range(1, 101)), images.files[100:200]),
    )
    db.execute("SELECT build_index('t')")
    for suffix in suffixes:
        put(current(db, suffix), current(db, suffix, 2).read_bytes())
    check_fallback(connect, images, "another build" if ".meta" in suffixes else "damaged")
    check_repair(connect, images)


def test_swapped_with_each_other(db: Connection, connect: Connect, images: Gallery) -> None:
    faiss, meta = (current(db, suffix) for suffix in SUFFIXES)
    there = faiss.read_bytes()
    put(faiss, meta.read_bytes())
    put(meta, there)
    check_fallback(connect, images, "not an index file of this version")
    check_repair(connect, images)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames:
        kinds = ["gone", "directory", "dangling link", "not readable"]
        cases = list(itertools.product(kinds, SUFFIXES))
        if not metafunc.config.getoption("--faults-long"):
            cases = list(zip(kinds, itertools.cycle(SUFFIXES[::-1]), strict=False))
        metafunc.parametrize(("kind", "suffix"), cases)


def test_not_a_readable_file(
    db: Connection, connect: Connect, images: Gallery, suffix: str, kind: str
) -> None:
    path = current(db, suffix)
    if kind == "not readable":
        path.chmod(0)
    else:
        path.unlink()
    if kind == "directory":
        path.mkdir()
        owner = path.parent.stat()
        os.chown(path, owner.st_uid, owner.st_gid)
        (path / "something").touch()
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    is_missing = kind in ("gone", "dangling link")
    check_fallback(connect, images, "is missing" if is_missing else "cannot be opened")
    state = one(db, "SELECT generation_file FROM collection_status")
    assert state == ("not readable" if kind == "not readable" else "missing")
    check_repair(connect, images)
    if kind == "directory":  # the generation before is kept; the build after removes it
        check_repair(connect, images)


KEYS: dict[str, Callable[[int], int | str]] = {
    "integer": lambda number: number,
    "bigint": lambda number: (number * 7919) % 1009 - 500 << 32,
    "text": lambda number: f"Bild {number} " + "ä" * (number % 9),
    "uuid": lambda number: f"00000000-0000-4000-8000-{number * 7919 % 1009:012x}",
}


@dataclass
class Table:
    """A table with a collection of its name, and what is in it.

    Attributes:
        keys: of its rows, as text.
        places: of its rows' images in the gallery.
        paths: its two index files.
    """

    name: str
    keys: list[str]
    places: list[int]
    paths: tuple[Path, ...] = ()

    def check(self, session: Connection, images: Gallery, place: int, engine: str) -> None:
        """Search and compare with the distances of the vectors from outside."""
        k = 5
        found = session.execute(
            f"SELECT (item).id::text, distance FROM similar_rows(NULL::{self.name}, %s, %s,"
            " engine => %s)",
            (images.files[place], k, engine),
        ).fetchall()
        distances = 1 - images.vectors[self.places].astype(float) @ images.vectors[place]
        true = dict(zip(self.keys, distances.tolist(), strict=True))
        assert len({key for key, _ in found}) == len(found) == min(k, len(true)), self.name
        assert max(abs(true[key] - distance) for key, distance in found) < DISTANCE_TOLERANCE
        last = np.sort(distances)[len(found) - 1]
        assert max(true[key] for key, _ in found) <= last + TIE_TOLERANCE, self.name


def make_tables(db: Connection, images: Gallery, count: int) -> list[Table]:
    """Make tables with all kinds of keys, of different sizes, some with copies; build indexes."""
    tables = []
    for number in range(count):
        type_name = list(KEYS)[number % len(KEYS)]
        rows = (0, 1, 2, 50, 150)[number // len(KEYS) % 5] + number
        keys = [KEYS[type_name](place) for place in range(rows)]
        places = [(place if number % 3 else place // 2) % len(images) for place in range(rows)]
        table = Table(f"t{number}", [str(key) for key in keys], places)
        db.execute(f"CREATE TABLE {table.name} (id {type_name} PRIMARY KEY, image bytea)")
        db.execute("SELECT create_collection(%s, %s)", (table.name, table.name))
        db.execute(
            f"INSERT INTO {table.name} SELECT * FROM unnest(%s::{type_name}[], %s::bytea[])",
            (keys, [images.files[place] for place in places]),
        )
        db.execute("SELECT build_index(%s)", (table.name,))
        query = "SELECT collection_id FROM siamese.collections WHERE name = %s"
        identifier = one(db, query, table.name)
        table.paths = tuple(current(db, suffix, identifier) for suffix in SUFFIXES)
        tables.append(table)
    return tables


@pytest.mark.timeout(3600)
def test_flipped_bits(
    db: Connection, connect: Connect, images: Gallery, seed: int, is_long: bool
) -> None:
    """Twenty random flips in each of fifty files, each alone; in short, two in each of ten."""
    flips = 20 if is_long else 2
    # One that is empty has nothing to find.
    tables = [table for table in make_tables(db, images, 26 if is_long else 6) if table.keys]
    assert len(tables) == (25 if is_long else 5)
    random = np.random.default_rng(seed)
    detected = 0
    for turn in range(2 * flips):
        undamaged = {}
        for table in tables:
            path = table.paths[turn % 2]
            data = path.read_bytes()
            undamaged[path] = data
            # Headers are small: every fourth flip is in one.
            end = len(data) if turn % 8 < 6 else min(len(data), 512)
            place, bits = int(random.integers(end)), int(random.integers(1, 256))
            put(path, data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :])
        session = connect()
        notices = notices_of(session)
        for table in tables:
            table.check(session, images, int(random.integers(len(images))), "auto")
            expected = f'searching collection "{table.name}" without its FAISS index'
            assert expected in notices[-1], f"{table.name}, turn {turn}: not detected"
        assert len(notices) == len(tables)
        detected += len(notices)
        session.close()
        for path, data in undamaged.items():
            put(path, data)
    assert detected == flips * 2 * len(tables)
    session = connect()
    for table in tables:
        table.check(session, images, 0, "faiss")


def test_flips_in_a_large_file(
    db: Connection, connect: Connect, images: Gallery, seed: int
) -> None:
    """Also in a file of some megabytes, which is mapped and of which a search reads little."""
    random = np.random.default_rng(seed)
    vectors = filled_up(random.normal(size=(12_000, 64)).astype(np.float32))
    db.execute("TRUNCATE siamese.images RESTART IDENTITY")
    db.execute("SET session_replication_role = replica")  # vectors of no image
    db.execute(
        "INSERT INTO siamese.images (image) SELECT %s FROM generate_series(1, %s)",
        (images.files[0], len(vectors)),
    )
    with db.cursor().copy("COPY siamese.embedding_1 (key, embedding) FROM STDIN") as copy:
        for key, vector in enumerate(vectors, start=1):
            copy.write_row((key, str(vector.tolist())))
    db.execute("SELECT build_index()")
    path = current(db, ".faiss")
    whole = path.read_bytes()
    assert len(whole) > vectors.nbytes
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = (np.argsort(1 - unit @ unit[4999])[1:6] + 1).tolist()
    search = "SELECT image_id FROM similar_images(image_id => 5000, k => 5, engine => %s)"
    places = random.integers(len(whole), size=4).tolist()
    for place in (0, *places, len(whole) - 1):
        put(path, whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        session = connect()
        notices = notices_of(session)
        assert [row[0] for row in session.execute(search, ("auto",))] == expected
        assert len(notices) == 1 and "is damaged" in notices[0], f"flip at {place}: {notices}"
        session.close()
    put(path, whole)
    assert [row[0] for row in connect().execute(search, ("faiss",))] == expected
