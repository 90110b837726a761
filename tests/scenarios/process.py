"""Memory of a server process, as the kernel counts it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.server import pid_of

MEGABYTE = 1024 * 1024
SAMPLE_SECONDS = 0.002


def _kilobytes(line: str) -> int:
    return int(line.split()[1])


def private_bytes(pid: int) -> int:
    """Return the memory that a process shares with none.

    Without mappings that are shared by their kind: the kernel counts pages of PostgreSQL's shared
    memory, and of index files, as private while only one process has touched them.

    Raises:
        PermissionError: the process is another user's.
    """
    total, is_shared = 0, False
    for line in Path(f"/proc/{pid_of(pid)}/smaps").read_text().splitlines():
        name = line.split(maxsplit=1)[0]
        if not name.endswith(":"):  # address range, permissions, …
            is_shared = line.split()[1].endswith("s")
        elif name in ("Private_Clean:", "Private_Dirty:") and not is_shared:
            total += _kilobytes(line)
    return 1024 * total


def anonymous_bytes(pid: int) -> int:
    """Return the memory that a process has allocated, 0 once it has ended; quick to read."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next((_kilobytes(line) for line in lines if line.startswith("RssAnon:")), 0)


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process of this machine, whatever else runs there."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Peak:
    """Memory before, and the most that was seen since."""

    before: int
    most: int

    @property
    def growth(self) -> int:
        return self.most - self.before


@contextmanager
def watched(pid: int) -> Iterator[Peak]:
    """Watch the allocated memory of a process of this machine, every two milliseconds."""
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
