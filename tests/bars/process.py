"""Memory of a server process, as the kernel counts it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MEGABYTE = 1024 * 1024
SAMPLE_SECONDS = 0.002


def _kilobytes(path: Path, *names: str) -> int:
    total = 0
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in names:
            total += int(rest.split()[0])
    return total


def private_bytes(pid: int) -> int:
    """Return the memory that a process shares with none.

    Raises:
        PermissionError: the process is another user's.
    """
    path = Path(f"/proc/{pid}/smaps_rollup")
    return 1024 * _kilobytes(path, "Private_Clean", "Private_Dirty")


def anonymous_bytes(pid: int) -> int:
    """Return the memory that a process has allocated; quick to read."""
    return 1024 * _kilobytes(Path(f"/proc/{pid}/status"), "RssAnon")


@dataclass
class Peak:
    """Memory before, and the most that was seen since."""

    before: int
    most: int

    @property
    def growth(self) -> int:
        """Bytes between the two."""
        return self.most - self.before


@contextmanager
def watched(pid: int) -> Iterator[Peak]:
    """Watch a process's allocated memory, every two milliseconds."""
    before = anonymous_bytes(pid)
    peak = Peak(before, before)
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peak.most = max(peak.most, anonymous_bytes(pid))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
