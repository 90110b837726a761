"""Find a Docker Engine that runs. As root on Debian, install and start one.

One is started only if none runs, and not as a system service. Only that one is stopped again.
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

_PACKAGES = ("docker.io", "docker-cli", "docker-buildx")  # the last two from Debian 13 on
_START_SECONDS = 60
_STOP_SECONDS = 60
_LAST_WITH_OWN_BUILDKIT = 22  # later clients build only with the plug-in buildx


class NoEngineError(SetupError):
    """No Docker Engine runs, and none can be installed or started."""


@dataclass(frozen=True)
class Engine:
    """A running engine. ``client`` is the docker program, ``builder`` the one that can build."""

    client: str
    builder: str

    def run(self, *arguments: str | Path, failure: str = "", lines: int = 12) -> str:
        """Run ``docker ARGUMENTS`` and return its output. Raises ``SetupError``."""
        what = failure or f"docker {arguments[0]} failed"
        return run([self.client, *arguments], failure=what, lines=lines).strip()

    def build(self, *arguments: str | Path) -> None:
        """Run ``docker build ARGUMENTS`` with BuildKit. Raises ``SetupError``."""
        run(
            [self.builder, "build", "--progress=plain", *arguments],
            env=clean_environment({"DOCKER_BUILDKIT": "1"}),
            failure="the image could not be built",
            lines=30,
        )

    def has(self, image: str) -> bool:
        """Return whether the engine has an image."""
        return _succeeds([self.client, "image", "inspect", image])

    def exists(self, container: str) -> bool:
        """Return whether a container of this name exists, running or not."""
        return _succeeds([self.client, "container", "inspect", container])


def _succeeds(command: Sequence[str], extra: Mapping[str, str] | None = None) -> bool:
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


def _find_client() -> str | None:
    for client in _clients():
        if _succeeds([client, "version", "--format", "{{.Server.Version}}"]):
            return client
    return None


def builds(client: str) -> bool:
    """Return whether a client can build with BuildKit."""
    if _succeeds([client, "buildx", "version"]):
        return True
    with contextlib.suppress(SetupError):
        text = run([client, "--version"], failure="docker --version failed")
        found = re.search(r"version (\d+)\.", text)
        return found is not None and int(found[1]) <= _LAST_WITH_OWN_BUILDKIT
    return False


def _builder() -> str | None:
    return next((client for client in _clients() if builds(client)), None)


def find() -> Engine | None:
    """Return the running engine, or None, without installing or starting anything."""
    client = _find_client()
    return Engine(client, _builder() or client) if client else None


def ensure() -> Engine:
    """Return a running engine with a client that can build.

    If none runs, root starts Debian's, and installs it if it is missing. If that is not possible,
    this raises ``NoEngineError`` with the reason.
    """
    client = _find_client()
    if client is None:
        if os.environ.get("DOCKER_HOST"):
            raise NoEngineError(f"no engine answers at DOCKER_HOST={os.environ['DOCKER_HOST']}")
        if os.geteuid() != 0:
            raise NoEngineError("no Docker Engine runs that you may use, and only root starts one")
        if not shutil.which("dockerd"):
            _install()
        # With systemd, the package has started it.
        client = _find_client() or _start()
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


def folder() -> Path:
    """Return the folder of the engine, and of the images' own files."""
    found = build_folder() / "docker"
    found.mkdir(exist_ok=True)
    return found


def _own_pid() -> int | None:
    """Return the process ID of the engine that an earlier run started, if it still runs."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((folder() / "dockerd.pid").read_text())
        if Path(f"/proc/{pid}/comm").read_text().strip() == "dockerd":
            return pid
    return None


def _start() -> str:
    log = folder() / "dockerd.log"
    with step("Starting Docker Engine"):
        with log.open("w") as output:
            # In its own session, it outlives this program and gets no Ctrl-C from here.
            process = subprocess.Popen(
                ["dockerd"],
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        (folder() / "dockerd.pid").write_text(f"{process.pid}\n")
        deadline = time.monotonic() + _START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            if client := _find_client():
                return client
            time.sleep(0.2)
        _terminate(process.pid)
    last = "".join(f"\n  | {line}" for line in log.read_text().splitlines()[-6:])
    raise NoEngineError(f"Docker Engine can't be started here; its log ends with{last}")


def stop() -> bool:
    """Stop the engine, if this project started it. Return whether it did."""
    pid = _own_pid()
    if pid is None:
        return False
    with step("Stopping Docker Engine"):
        _terminate(pid)
    return True


def _terminate(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # it may be this process's own
        if not _is_alive(pid):
            break
        time.sleep(0.1)
    else:
        raise SetupError(f"Docker Engine (process {pid}) doesn't stop")
    (folder() / "dockerd.pid").unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
