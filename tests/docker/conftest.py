"""Containers of the image that `make docker-test` built; each test has its own."""

from __future__ import annotations

import functools
import itertools
import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pg_siamese.client.sources import png
from tests.conftest import Connection
from tests.server import DOCKER
from tests.support import one

IMAGE = os.environ.get("PG_SIAMESE_TEST_IMAGE", "")
PASSWORD = 'it\'s a "secret" $word'
QUICK = ("-c", "fsync=off")
PATIENCE = 120  # seconds, of a machine that has much else to do

_numbers = itertools.count(1)


def docker(*arguments: str | Path) -> str:
    """Run the docker client; return its output and errors, which is where servers log."""
    command, pipe = [DOCKER, *map(str, arguments)], subprocess.PIPE
    done = subprocess.run(command, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


@functools.cache
def described() -> dict[str, Any]:
    """What the engine says of the image."""
    found: dict[str, Any] = json.loads(docker("image", "inspect", IMAGE))[0]
    return found


def variable(name: str) -> str:
    """One of the image's environment variables."""
    return dict(str(each).split("=", 1) for each in described()["Config"]["Env"])[name]


def volume_at() -> str:
    """Where its volume belongs."""
    (place,) = described()["Config"]["Volumes"]
    return str(place)


class Container:
    """One container; its volume goes with it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def state(self) -> dict[str, Any]:
        """What the engine says of it: Running, ExitCode, Health."""
        found: dict[str, Any] = json.loads(docker("inspect", self.name))[0]["State"]
        return found

    def logs(self) -> str:
        return docker("logs", self.name)

    def exec(self, *arguments: str, user: str = "postgres") -> str:
        return docker("exec", "--user", user, self.name, *arguments)

    def healthy(self) -> Container:
        """Wait until the health check says so."""
        deadline = time.monotonic() + PATIENCE
        while (state := self.state())["Health"]["Status"] != "healthy":
            assert state["Running"], self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)
        return self

    def ended(self) -> int:
        """Wait until it has ended; return its exit status."""
        return int(docker("wait", self.name))

    def connect(self, **parameters: str) -> Connection:
        """Connect over TCP, from outside."""
        port = docker("port", self.name, "5432").splitlines()[0].rpartition(":")[2]
        usual = {"user": "postgres", "password": PASSWORD, "dbname": "siamese"}
        place = make_conninfo("", host="127.0.0.1", port=port, **(usual | parameters))
        return psycopg.connect(place, autocommit=True)

    def one(self, query: str, **parameters: str) -> Any:
        with self.connect(**parameters) as connection:
            return one(connection, query)


class Containers:
    """Makes containers, and removes them with their volumes at the end."""

    def __init__(self) -> None:
        self._made: list[str] = []
        self._volumes: list[str] = []
        self._run = secrets.token_hex(3)

    def create(
        self,
        *options: str,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = QUICK,
        files: Mapping[str, Path] | None = None,
    ) -> Container:
        """Make a container without starting it. `files` maps places in it to files or folders."""
        name = f"pg_siamese-test-{self._run}-{next(_numbers)}"
        chosen = {"POSTGRES_PASSWORD": PASSWORD, "POSTGRES_DB": "siamese"}
        chosen |= {"POSTGRES_INITDB_ARGS": "--no-sync"} | dict(environment or {})
        words = [f"--env={key}={value}" for key, value in chosen.items() if value]
        words += [f"--name={name}", "--publish=127.0.0.1::5432", "--health-interval=1s"]
        docker("create", *words, *options, IMAGE, *command)
        self._made.append(name)
        for place, path in (files or {}).items():
            # Copied, not mounted: the engine may be on another machine.
            docker("cp", f"{path}/." if path.is_dir() else path, f"{name}:{place}")
        return Container(name)

    def start(self, *options: str, **more: Any) -> Container:
        """Make a container and start it; the parameters are those of `create`."""
        container = self.create(*options, **more)
        docker("start", container.name)
        return container

    def volume(self) -> str:
        """Make a volume that outlives its containers, up to the end of the test."""
        name = f"pg_siamese-test-{self._run}-volume-{next(_numbers)}"
        self._volumes.append(docker("volume", "create", name))
        return name

    def remove(self) -> None:
        if self._made:
            docker("rm", "--force", "--volumes", *self._made)
        if self._volumes:
            docker("volume", "rm", "--force", *self._volumes)


@pytest.fixture(scope="session", autouse=True)
def image() -> str:
    if not IMAGE:
        pytest.skip("no image to test: make docker-test builds one")
    return IMAGE


@pytest.fixture
def containers() -> Iterator[Containers]:
    made = Containers()
    yield made
    made.remove()


@pytest.fixture(scope="module")
def usual() -> Iterator[Container]:
    """One container, as most people start it, for the tests of a file that change nothing."""
    made = Containers()
    try:
        yield made.start().healthy()
    finally:
        made.remove()


def picture(number: int) -> bytes:
    """Return an image file of random pixels."""
    random = np.random.default_rng(number)
    return png(random.integers(0, 256, (28, 28), dtype=np.uint8))
