"""The server that the database tests use: a throw-away cluster, or one elsewhere, over TCP.

PG_SIAMESE_TEST_DSN names the one elsewhere, as a superuser with a password. Where it runs in a
container of this machine, PG_SIAMESE_TEST_CONTAINER names that: some tests damage the server's
files or measure its processes, reached through /proc of the container's first process.
"""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

DSN = os.environ.get("PG_SIAMESE_TEST_DSN", "")
CONTAINER = os.environ.get("PG_SIAMESE_TEST_CONTAINER", "")
DOCKER = os.environ.get("PG_SIAMESE_TEST_DOCKER", "docker")


class ExternalServer:
    """A server that runs already; what the tests use of `Cluster`."""

    def dsn(self, database: str) -> str:
        """Return a connection string, with the password."""
        return make_conninfo(DSN, dbname=database)


def login_role(name: str) -> sql.Composed:
    """Return the statement that makes a login role; its password, if needed, is the superuser's.

    So it is enough to change the user in a test's connection string.
    """
    create = sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name))
    password = conninfo_to_dict(DSN).get("password") if DSN else None
    if password is None:
        return create
    return create + sql.SQL(" PASSWORD {}").format(sql.Literal(password))


def pg_environment(dsn: str) -> dict[str, str]:
    """Return the variables of libpq that mean a connection string."""
    known = {"dbname": "database"}
    return {
        f"PG{known.get(name, name).upper()}": str(value)
        for name, value in conninfo_to_dict(dsn).items()
    }


def path_of(path: str) -> Path:
    """Return where a path of the server is on this machine; skips the test where it is not."""
    if not DSN:
        return Path(path)
    return Path(f"/proc/{_first_process()}/root{path}")


def pid_of(pid: int) -> int:
    """Return the number that a process of the server has here; skips the test where it has none."""
    return _pid_here(pid) if DSN else pid


@functools.cache
def _first_process() -> int:
    if not CONTAINER:
        pytest.skip("the server's files and processes are out of reach (PG_SIAMESE_TEST_CONTAINER)")
    done = subprocess.run(
        [DOCKER, "inspect", "--format", "{{.State.Pid}}", CONTAINER],
        capture_output=True,
        text=True,
        check=True,
    )
    pid = int(done.stdout)
    # Another user's, or in Docker Desktop's virtual machine.
    if not os.access(f"/proc/{pid}/root/", os.R_OK):
        pytest.skip("only root, on the engine's own machine, reaches files in a container")
    return pid


@functools.cache
def _pid_here(pid: int) -> int:
    space = os.readlink(f"/proc/{_first_process()}/ns/pid")
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "ns" / "pid") != space:
                continue
            lines = (entry / "status").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        numbers = next(line for line in lines if line.startswith("NSpid:")).split()
        if int(numbers[-1]) == pid:
            return int(entry.name)
    raise ProcessLookupError(f"no process {pid} in container {CONTAINER}")
