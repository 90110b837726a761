"""Describe the machine and the software of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from bench.session import connect, first_row
from tools.cluster import Cluster
from tools.project import ROOT

LIBRARIES = ("faiss-cpu", "numpy", "onnxruntime", "pillow", "psycopg")


def facts(cluster: Cluster) -> dict[str, object]:
    """Return the machine, the versions and the commit, without names of hosts or paths."""
    with connect(cluster.dsn()) as admin:
        extensions = dict(admin.execute("SELECT extname, extversion FROM pg_extension").fetchall())
        (server,) = first_row(admin, "SELECT current_setting('server_version')")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "cpu": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(_field("/proc/meminfo", "MemTotal").split()[0]) / 1024**2, 1),
        "load_average_before": [round(value, 2) for value in os.getloadavg()],
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "postgresql": server.split()[0],
        "pgvector": extensions["vector"],
        "pg_siamese": extensions["pg_siamese"],
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def commit() -> str:
    """Return the commit that is checked out, with a plus if files differ from it."""
    try:
        name = git("rev-parse", "--short", "HEAD")
        return name + ("+" if git("status", "--porcelain", "--", ":!bench/results") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(*arguments: str) -> str:
    """Return what git says of this repository. Raises ``CalledProcessError``."""
    command = ["git", "-c", "safe.directory=*", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
