"""A cluster to break: its processes can be killed, and Python packages taken away from it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tools.cluster import Cluster
from tools.report import SetupError

# Python runs it before anything else, in every session.
BLOCKER = '''\
"""Makes packages look as if they were not installed."""

import sys
from pathlib import Path

absent = Path(__file__).with_name("absent").read_text().split()


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocker())
'''
# What was committed must survive SIGKILL, unlike in the other throw-away clusters: commits wait for
# the file (though not for the disk), and a write of eight kilobytes may be cut in the middle.
SETTINGS = {"synchronous_commit": "on", "full_page_writes": "on", "restart_after_crash": "on"}
RESTART_SECONDS = 60


class FaultyCluster(Cluster):
    """A private cluster with a loose relation to life."""

    def init(self) -> None:
        """Make the data folder, and the one that Python looks into first."""
        super().init()
        python = self.folder / "python"
        python.mkdir(exist_ok=True)
        (python / "sitecustomize.py").write_text(BLOCKER)
        self._absent.write_text("")
        for path in (python, *python.iterdir()):
            path.chmod(0o755)

    @property
    def _absent(self) -> Path:
        return self.folder / "python" / "absent"

    def _environment(self) -> dict[str, str]:
        return super()._environment() | {"PYTHONPATH": str(self.folder / "python")}

    @contextmanager
    def without(self, *packages: str) -> Iterator[None]:
        """Take packages away from the sessions that begin meanwhile."""
        self._absent.write_text(" ".join(packages))
        try:
            yield
        finally:
            self._absent.write_text("")

    def kill(self) -> None:
        """Kill the postmaster and all its processes, in no time and without a chance to tidy up."""
        pid = self.pid()
        assert pid is not None
        postmaster = psutil.Process(pid)
        with suppress(psutil.NoSuchProcess):
            postmaster.suspend()  # else it might start more
            doomed = postmaster.children(recursive=True)
            for process in (postmaster, *doomed):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            psutil.wait_procs([postmaster, *doomed], timeout=10)

    def kill_backend(self, pid: int) -> None:
        """Kill one backend, upon which the postmaster restarts all others."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def recover(self) -> None:
        """Return once the server takes connections again, started anew where it is gone."""
        deadline = time.monotonic() + RESTART_SECONDS
        while True:
            try:
                if not self.running():
                    self.start()
                self.sql("SELECT 1", "postgres")
                return
            except SetupError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
