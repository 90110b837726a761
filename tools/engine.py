"""Docker Engine: finding one that runs; as root on Debian, installing and starting one.

Only where none runs is one started, by hand and not as a service of the system, and only that one
is stopped again.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools import apt
from tools.project import build_folder
from tools.report import SetupError, clean_environment, run, step

_PACKAGES = ("docker.io", "docker-cli", "docker-buildx")  # the latter two from Debian 13 on
_START_SECONDS = 60
_STOP_SECONDS = 60
_LAST_WITH_OWN_BUILDKIT = 22  # later clients build with the plug-in buildx only


class NoEngineError(SetupError):
    """There is no Docker Engine here, and none can be installed or started."""


@dataclass(frozen=True)
class Engine:
    """A running engine. `client` is the docker program, `builder` the one that can build."""

    client: str
    builder: str

    def run(self, *arguments: str | Path, failure: str = "", lines: int = 12) -> str:
        """Run `docker ARGUMENTS` and return what it prints. Raises `SetupError`."""
        what = failure or f"docker {arguments[0]} failed"
        return run([self.client, *arguments], failure=what, lines=lines).strip()

    def build(self, *arguments: str | Path) -> None:
        """Run `docker build ARGUMENTS` with BuildKit. Raises `SetupError`."""
        run(
            [self.builder, "build", "--progress=plain", *arguments],
            env=clean_environment({"DOCKER_BUILDKIT": "1"}),
            failure="the image could not be built",
            lines=30,
        )

    def has(self, image: str) -> bool:
        """Say whether the engine has an image."""
        return _works([self.client, "image", "inspect", image])

    def exists(self, container: str) -> bool:
        """Say whether there is a container of this name, running or not."""
        return _works([self.client, "container", "inspect", container])


def _works(command: Sequence[str], extra: Mapping[str, str] | None = None) -> bool:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            command,
            env=clean_environment(extra),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
        )
        return done.returncode == 0
    return False


def _clients() -> list[str]:
    """Return the docker programs of this machine: the first on the PATH, and Debian's."""
    found = [shutil.which("docker"), "/usr/bin/docker"]
    return list(dict.fromkeys(each for each in found if each and Path(each).exists()))


def _answering() -> str | None:
    """Return a client that reaches a running engine."""
    for client in _clients():
        if _works([client, "version", "--format", "{{.Server.Version}}"]):
            return client
    return None


def builds(client: str) -> bool:
    """Say whether a client can build with BuildKit."""
    if _works([client, "buildx", "version"]):
        return True
    with contextlib.suppress(SetupError):
        text = run([client, "--version"], failure="docker --version failed")
        found = re.search(r"version (\d+)\.", text)
        return found is not None and int(found[1]) <= _LAST_WITH_OWN_BUILDKIT
    return False


def _builder() -> str | None:
    return next((client for client in _clients() if builds(client)), None)


def find() -> Engine | None:
    """Return the running engine, or None; nothing is installed or started."""
    client = _answering()
    return Engine(client, _builder() or client) if client else None


def ensure() -> Engine:
    """Return a running engine with a client that can build.

    Where none runs, Debian's is installed, if it is missing, and started, by root.

    Raises `NoEngineError` where that is not possible; it says why.
    """
    client = _answering()
    if client is None:
        if os.environ.get("DOCKER_HOST"):
            raise NoEngineError(f"no engine answers at DOCKER_HOST={os.environ['DOCKER_HOST']}")
        if os.geteuid() != 0:
            raise NoEngineError("no Docker Engine runs that you may use, and only root starts one")
        if not shutil.which("dockerd"):
            _install()
        # Where there is systemd, the package has started it.
        client = _answering() or _start()
    builder = _builder()
    if builder is None:
        if os.geteuid() == 0:
            _install()
        builder = _builder()
    if builder is None:
        raise NoEngineError(f"{client} can't build with BuildKit: install docker-buildx")
    return Engine(client, builder)


def _install() -> None:
    try:
        packages = [name for name in _PACKAGES if apt.candidate(name)]
        if not packages:
            raise NoEngineError("no Docker Engine is installed, and apt has no package docker.io")
        apt.install(packages, "Docker Engine")
    except NoEngineError:
        raise
    except SetupError as error:
        raise NoEngineError(f"no Docker Engine is installed, and it can't be: {error}") from None


# --- the engine that this project started ---------------------------------------------------------


def _folder() -> Path:
    folder = build_folder() / "docker"
    folder.mkdir(exist_ok=True)
    return folder


def _own_pid() -> int | None:
    """Return the process id of the engine that an earlier run started and that still runs."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((_folder() / "dockerd.pid").read_text())
        if Path(f"/proc/{pid}/comm").read_text().strip() == "dockerd":
            return pid
    return None


def _start() -> str:
    """Start the engine; return a client that reaches it."""
    log = _folder() / "dockerd.log"
    with step("Starting Docker Engine"):
        with log.open("w") as output:
            # Its own session: it outlives this program, and Ctrl-C here doesn't reach it.
            process = subprocess.Popen(
                ["dockerd"],
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        (_folder() / "dockerd.pid").write_text(f"{process.pid}\n")
        deadline = time.monotonic() + _START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            if client := _answering():
                return client
            time.sleep(0.2)
        _end(process.pid)
    last = "".join(f"\n  | {line}" for line in log.read_text().splitlines()[-6:])
    raise NoEngineError(f"Docker Engine can't be started here; its log ends with{last}")


def stop() -> bool:
    """Stop the engine, if this project started it; return whether it did."""
    pid = _own_pid()
    if pid is None:
        return False
    with step("Stopping Docker Engine"):
        _end(pid)
    return True


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # it may be this process's own
        if not _alive(pid):
            break
        time.sleep(0.1)
    else:
        raise SetupError(f"Docker Engine (process {pid}) doesn't stop")
    (_folder() / "dockerd.pid").unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
