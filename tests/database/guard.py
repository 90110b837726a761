"""The kernel's own record of what processes did: whom they called, and what they wrote.

``strace`` sees every system call of a process and of all that it starts, whatever library makes it,
and also what fails: a connection into a network that isn't there is a connection attempted.
"""

from __future__ import annotations

import codecs
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

_NETWORK = ("bind", "connect", "sendto", "sendmsg", "sendmmsg")
_OPENING = ("open", "openat", "openat2", "creat")
_NAMING = ("mkdir", "mkdirat", "mknod", "mknodat", "symlink", "symlinkat", "link", "linkat")
_RENAMING = ("rename", "renameat", "renameat2")
_CALLS = (*_NETWORK, *_OPENING, *_NAMING, *_RENAMING)
_STRACE = ["strace", "-f", "-y", "-qq", "-s", "4096", "-e", f"trace={','.join(_CALLS)}"]
_TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")
# Talks to nobody but the kernel, or to this machine's user and host names.
_LOCAL_FAMILIES = ("AF_NETLINK", "AF_UNSPEC")
_NAME_SERVICE = ("/run/nscd/socket", "/var/run/nscd/socket")
_ATTACH_SECONDS = 30

_UNFINISHED = re.compile(r"^(\d+) +(.*?) ?<unfinished \.\.\.>$")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. \w+ resumed>(.*)$")
_CALL = re.compile(r"^(\d+) +(\w+)\((.*)$")
_RESULT = re.compile(r" = (-?\d+)(?:<(.*?)>)?(?: (E\w+) .*)?$")
_PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<((?:[^>\\]|\\.)*)>, )?"((?:[^"\\]|\\.)*)"')
_FAMILY = re.compile(r"sa_family=(AF_\w+)")
_UNIX = re.compile(r'sun_path=@?"([^"]*)"')


@dataclass
class Record:
    """What was seen: addresses called or listened at, and paths made or opened for writing."""

    contacts: set[str] = field(default_factory=set)
    written: set[Path] = field(default_factory=set)

    def strangers(self, sockets: Path) -> list[str]:
        """Return the addresses that are not sockets in the folder of a PostgreSQL server."""
        return sorted(each for each in self.contacts if Path(each).parent != sockets)

    def strays(self, *places: Path) -> list[str]:
        """Return what was written outside `places`, but for temporary files that are gone."""
        return [
            str(path)
            for path in sorted(self.written)
            if not any(path.is_relative_to(place) for place in places)
            and not _is_temporary(path)
            and not _is_device(path)
        ]


def _is_temporary(path: Path) -> bool:
    return any(path.is_relative_to(each) for each in _TEMPORARY) and not os.path.lexists(path)


def _is_device(path: Path) -> bool:
    return path.parts[1] in ("dev", "proc") and not path.is_relative_to("/dev/shm")


def _text(quoted: str) -> str:
    return os.fsdecode(codecs.escape_decode(quoted.encode())[0])


def _whole_lines(text: str) -> Iterator[str]:
    """Put together the calls that another thread's call came between."""
    begun: dict[str, str] = {}
    for line in text.splitlines():
        if found := _UNFINISHED.match(line):
            begun[found[1]] = f"{found[1]} {found[2]}"
        elif found := _RESUMED.match(line):
            yield begun.pop(found[1], "") + found[2]
        else:
            yield line
    # Calls that never came back: their process was killed, or the tracer stopped.
    yield from begun.values()


def parse(text: str, cwd: Path) -> Record:
    """Read strace's output. `cwd` is where paths without a folder are."""
    record = Record()
    for line in _whole_lines(text):
        found = _CALL.match(line)
        if not found or found[2] not in _CALLS:
            continue
        call, rest = found[2], found[3]
        result = _RESULT.search(rest)
        if call in _NETWORK:
            _note_contact(record, rest, result[3] if result else None)
        elif not result or int(result[1]) >= 0:
            _note_path(record, call, rest, result[2] if result else None, cwd)
    return record


def _note_contact(record: Record, rest: str, error: str | None) -> None:
    family = _FAMILY.search(rest)
    if not family or family[1] in _LOCAL_FAMILIES:
        return
    path = _UNIX.search(rest)
    if family[1] != "AF_UNIX":
        record.contacts.add(rest[rest.index("{") : rest.rindex("}") + 1])
    elif path and path[1] not in _NAME_SERVICE and error != "ENOENT":
        record.contacts.add(path[1])


def _note_path(record: Record, call: str, rest: str, opened: str | None, cwd: Path) -> None:
    reads = call.startswith("open") and not re.search(r"O_WRONLY|O_RDWR|O_CREAT", rest)
    if reads:
        return
    if call in _OPENING and opened:
        record.written.add(Path(_text(opened.removesuffix(" (deleted)"))))
        return
    folder, name = _PATH.findall(rest)[-1]
    record.written.add(Path(os.path.normpath(Path(cwd, _text(folder), _text(name)))))


def require_strace() -> None:
    """Skip the test where strace is missing or may not trace."""
    if not shutil.which("strace"):
        pytest.skip("strace is missing: install it to see what leaves the machine")
    tried = subprocess.run(["strace", "-qq", "-o", os.devnull, "true"], capture_output=True)
    if tried.returncode:
        pytest.skip(f"strace may not trace here: {tried.stderr.decode(errors='replace').strip()}")


def run(
    command: Sequence[str | Path], environment: dict[str, str], cwd: Path
) -> tuple[Record, subprocess.CompletedProcess[str]]:
    """Run a program to its end; return what it and its children did, and its output."""
    with tempfile.NamedTemporaryFile(prefix="strace-") as file:
        done = subprocess.run(
            [*_STRACE, "--seccomp-bpf", "-o", file.name, *command],
            env=environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        return parse(Path(file.name).read_text(errors="surrogateescape"), cwd), done


@contextmanager
def watched(pid: int, cwd: Path) -> Iterator[Record]:
    """Watch a running process, its children and all that they start; filled in at the end."""
    record = Record()
    family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    with tempfile.NamedTemporaryFile(prefix="strace-") as file, tempfile.TemporaryFile() as said:
        chosen = [word for each in family for word in ("-p", str(each))]
        tracer = subprocess.Popen([*_STRACE, "-o", file.name, *chosen], stderr=said)
        try:
            if not _attached(tracer, pid):
                said.seek(0)
                pytest.skip(f"strace may not attach here: {said.read().decode(errors='replace')}")
            yield record
        finally:
            tracer.send_signal(signal.SIGINT)  # it detaches, and the processes go on
            tracer.wait(timeout=60)
        seen = parse(Path(file.name).read_text(errors="surrogateescape"), cwd)
        record.contacts |= seen.contacts
        record.written |= seen.written


def _attached(tracer: subprocess.Popen[bytes], pid: int) -> bool:
    deadline = time.monotonic() + _ATTACH_SECONDS
    while tracer.poll() is None and time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/status").read_text()
        if f"TracerPid:\t{tracer.pid}\n" in status:
            return True
        time.sleep(0.02)
    return False
