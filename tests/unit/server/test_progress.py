"""What long work reports of itself: notices, and the file that other sessions read."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pg_siamese_server import progress
from pg_siamese_server.catalog import Collection
from pg_siamese_server.progress import Progress, read, reported

PETS = Collection(
    *(3, "pets", 77, "public.pets", "id", "bigint", "image", "reject", "sync", 1, 8, "", "l2"),
    *("public", 1),
)


class Server:
    """In place of plpy: knows the process and the transaction, and keeps the notices."""

    def __init__(self, pid: int = os.getpid()) -> None:
        self.pid = pid
        self.notices: list[str] = []

    def prepare(self, sql: str, types: list[str]) -> Server:
        return self

    def execute(self, values: list[Any]) -> list[dict[str, int]]:
        return [{"pid": self.pid, "database": 5, "transaction": 1234567}]

    def notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """A clock that stands still, in a data directory."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(progress, "prepare", lambda plpy, sql: plpy)
    monkeypatch.chdir(tmp_path)
    return clock


def test_notices_come_now_and_then(now: list[float]) -> None:
    build = Progress(Server(), "build_index", "pets")
    build.enter("reading vectors")
    now[0] += 60
    build.report(500)
    assert build.plpy.notices == []
    build.enter("adding vectors", 1000)
    build.report(400)
    build.report(401)
    assert build.plpy.notices == ['building index of collection "pets": 40% (400 of 1000 vectors)']


def test_a_total_that_was_too_low(now: list[float]) -> None:
    late = Progress(Server(), "backfill", "pets")
    for total, done in ((0, 0), (0, 10), (5, 10)):
        now[0] += 60
        late.enter("embedding", total)
        late.report(done)
    assert late.plpy.notices == ['embedding collection "pets": 100% (10 of 10 rows)'] * 2


def test_the_file(now: list[float]) -> None:
    with reported(Server(), "build_index", PETS) as build:
        build.enter("reading vectors")
        (entry,) = read(5)
        assert entry == {
            "pid": os.getpid(),
            "database": 5,
            "transaction": 1234567,
            "relation": 77,
            "collection": "pets",
            "kind": "build_index",
            "phase": "reading vectors",
            "started_at": 1000.0,
            "done": 0,
            "total": None,
            "ends_at": None,
        }
        assert read(6) == []  # another database
        build.enter("adding vectors", 1000, 200)
        now[0] += 0.1
        build.report(300)  # too early
        assert read(5)[0]["done"] == 200
        now[0] += 9.9
        build.report(400)
        (entry,) = read(5)
        assert [entry[name] for name in ("phase", "done", "total")] == ["adding vectors", 400, 1000]
        assert entry["ends_at"] == pytest.approx(1040.0)  # 200 in ten seconds, 600 to come
    assert read(5) == []
    assert os.listdir(progress.directory()) == []


def test_the_file_goes_when_the_work_fails(now: list[float]) -> None:
    with pytest.raises(ZeroDivisionError), reported(Server(), "build_index", PETS) as build:
        build.enter("reading vectors")
        raise ZeroDivisionError
    assert os.listdir(progress.directory()) == []


@pytest.mark.parametrize("text", ["", "{", "\0\0"])
def test_damaged_files_are_passed_over(now: list[float], text: str) -> None:
    with reported(Server(), "build_index", PETS) as build:
        build.enter("reading vectors")
        Path(progress.directory(), "17").write_text(text)
        Path(progress.directory(), "note.txt").write_text(text)
        assert [entry["pid"] for entry in read(5)] == [os.getpid()]


def test_files_of_dead_processes_are_removed(now: list[float]) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    own = Progress(
        Server(), "build_index", "pets", os.path.join(progress.directory(), str(process.pid))
    )
    os.makedirs(progress.directory())
    own.enter("reading vectors")
    Path(progress.directory(), f"{process.pid}.tmp").touch()
    assert len(os.listdir(progress.directory())) == 2
    with reported(Server(), "build_index", PETS):
        assert os.listdir(progress.directory()) == []


def test_work_goes_on_without_its_file(now: list[float], tmp_path: Path) -> None:
    (tmp_path / "pg_siamese").write_text("no directory")
    with reported(Server(), "build_index", PETS) as build:
        build.enter("adding vectors", 10)
        now[0] += 5
        build.report(5)
        assert read(5) == []
    assert (tmp_path / "pg_siamese").read_text() == "no directory"


def test_work_goes_on_when_its_directory_vanishes(now: list[float]) -> None:
    with reported(Server(), "build_index", PETS) as build:
        build.enter("adding vectors", 10)
        os.unlink(os.path.join(progress.directory(), str(os.getpid())))
        os.rmdir(progress.directory())
        now[0] += 5
        build.report(5)
        build.enter("publishing")
