"""Tell how far long work is: the caller by NOTICEs, other sessions in ``siamese.progress``.

Nobody sees the rows of a transaction that goes on. So a backend keeps a small file of what it does
in the data directory. The file names its transaction. Whoever reads it believes it while that
transaction runs, so what a killed backend leaves is never shown. If a file can't be written, the
work goes on without it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any

from pg_siamese_server.catalog import Collection, prepare

NOTICE_SECONDS = 1.0
FILE_SECONDS = 0.5
Entry = dict[str, Any]
# Phases that notices tell of, since they are long.
ADDING = "adding vectors"
EMBEDDING = "embedding"


class Progress:
    """How far one piece of work is.

    It has phases, one after the other. ``kind`` is the function that does it. ``path`` is that of
    its file, and ``entry`` is what the file says of the transaction. Without a path, there are only
    notices.
    """

    def __init__(
        self, plpy: Any, kind: str, name: str, path: str | None = None, **entry: Any
    ) -> None:
        self.plpy = plpy
        self.name = name
        self._path = path
        began = {"collection": name, "kind": kind, "started_at": time.time()}
        self._entry = began | entry
        self._total: int | None = None
        self._first = 0
        self._noticed = self._entered = self._written = time.monotonic()

    def enter(self, phase: str, total: int | None = None, done: int = 0) -> None:
        """Begin a phase.

        Args:
            phase: what others read.
            total: steps of the phase, or None if it is not known.
            done: those that are behind it already.
        """
        self._total, self._first = total, done
        self._entered = time.monotonic()
        self._entry["phase"] = phase
        self._write(done)

    def report(self, done: int) -> None:
        """Tell how many steps of the phase are done, if the previous report is a while ago."""
        now = time.monotonic()
        if self._total is not None:  # rows may have come meanwhile
            self._total = max(self._total, done)
        if now - self._written >= FILE_SECONDS:
            self._write(done)
        if self._total and now - self._noticed >= NOTICE_SECONDS:
            self._notice(done, self._total)

    def end(self) -> None:
        """Remove the file."""
        if self._path is not None:
            _remove(self._path)
            _remove(f"{self._path}.tmp")  # of a full disk

    def _notice(self, done: int, total: int) -> None:
        self._noticed = time.monotonic()
        percent = 100 * done // total
        if self._entry["phase"] == ADDING:
            self.plpy.notice(
                f'building index of collection "{self.name}":'
                f" {percent}% ({done} of {total} vectors)"
            )
        elif self._entry["phase"] == EMBEDDING:
            self.plpy.notice(
                f'embedding collection "{self.name}": {percent}% ({done} of {total} rows)'
            )

    def _write(self, done: int) -> None:
        self._written = time.monotonic()
        if self._path is None:
            return
        counts = {"done": done, "total": self._total, "ends_at": self._ends_at(done)}
        new = f"{self._path}.tmp"
        with contextlib.suppress(OSError):
            with open(new, "w") as file:
                json.dump(self._entry | counts, file)
            os.replace(new, self._path)

    def _ends_at(self, done: int) -> float | None:
        """Return when the phase will be done, if its steps take as long as they did so far."""
        if self._total is None or done <= self._first:
            return None
        seconds = (self._written - self._entered) / (done - self._first)
        return time.time() + (self._total - done) * seconds


@contextlib.contextmanager
def reported(plpy: Any, kind: str, collection: Collection) -> Iterator[Progress]:
    """Show others how far the body is."""
    row = prepare(
        plpy,
        "SELECT pg_catalog.pg_backend_pid() AS pid, d.oid::int8 AS database,"
        " (extract(epoch FROM pg_catalog.now()) * 1000000)::int8 AS transaction"
        " FROM pg_catalog.pg_database AS d WHERE d.datname = pg_catalog.current_database()",
    ).execute([])[0]
    folder = directory()
    _make_room(folder)
    progress = Progress(
        plpy,
        kind,
        collection.name,
        os.path.join(folder, str(row["pid"])),
        relation=collection.relation_oid,
        database=row["database"],
        transaction=row["transaction"],
    )
    try:
        yield progress
    finally:
        progress.end()


def directory() -> str:
    """Return the directory of the files, below the data directory, in which a backend runs."""
    return os.path.join(os.getcwd(), "pg_siamese", "progress")


def read(database: int) -> list[Entry]:
    """Return what backends of a database have written, each with its ``pid``.

    Some may be gone. So each entry counts only while its transaction runs.
    """
    found = []
    for name in filter(str.isdigit, _names(directory())):
        # A file may be gone by now. A power cut may have left another one empty.
        with contextlib.suppress(OSError, ValueError):
            with open(os.path.join(directory(), name)) as file:
                entry = json.load(file)
            if entry["database"] == database:
                found.append({"pid": int(name), **entry})
    return found


def _make_room(folder: str) -> None:
    """Make the directory, and remove the files of processes that are gone."""
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    for name in _names(folder):
        pid = name.removesuffix(".tmp")
        if pid.isdigit():
            try:
                os.kill(int(pid), 0)
            except OSError:  # none of this server's
                _remove(os.path.join(folder, name))


def _names(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
