"""The command itself: its link, its address, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.explore.conftest import Ward
from tests.support import wait_until


@contextmanager
def explore(ward: Ward, *options: str, **environment: str) -> Iterator[tuple[str, Iterator[str]]]:
    """Run the command on a free port; give its address and the lines that it prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", "-m", "pg_siamese", "explore", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--dsn", ward.dsn, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    assert process.stdout is not None and process.stderr is not None
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, process.stderr and process.stderr.read()
        try:
            return httpx2.get(address).status_code == 303
        except httpx2.TransportError:
            return False

    wait_until(answers, "the page does not answer")
    try:
        yield address, iter(process.stdout)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


def test_each_link_opens_one_session(ward: Ward) -> None:
    with explore(ward) as (address, lines):
        first = next(lines).removeprefix("open ").strip()
        assert first.startswith(f"{address}/start?token=")
        with httpx2.Client() as client:
            assert client.get(first).status_code == 200
            assert "scans" in client.get(address).text
        second = next(lines).removeprefix("open ").strip()
        assert second != first and httpx2.get(first).status_code == 403
        assert httpx2.get(second).status_code == 200


def test_it_listens_on_this_machine_only(ward: Ward) -> None:
    with explore(ward, "--login") as (address, lines):
        assert next(lines).strip() == f"open {address}/login"
        port = int(address.rpartition(":")[2])
        table = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        bound = {line.split()[1] for line in table.splitlines() if line.split()[3] == "0A"}
        assert {each for each in bound if each.endswith(f":{port:04X}")} == {f"0100007F:{port:04X}"}


def test_the_link_is_not_among_the_arguments_of_the_browser(ward: Ward, tmp_path: Path) -> None:
    """All users see arguments. The browser gets a file that only this user may read."""
    script, seen = tmp_path / "browser", tmp_path / "seen"
    script.write_text(f'#!/bin/sh\ncp "${{1#file://}}" {seen}.html; echo "$1" > {seen}\n')
    script.chmod(0o755)
    with explore(ward, "--open", BROWSER=str(script)) as (_, lines):
        link = next(lines).removeprefix("open ").strip()
        wait_until(seen.exists, "the browser was not opened")
        wait_until(seen.read_text)
        opened = seen.read_text().strip()
        assert "token" not in opened and opened.startswith("file://")
        file = Path(opened.removeprefix("file://"))
        assert file.parent.stat().st_mode & 0o077 == 0
        found = re.search('url=([^"]*)', Path(f"{seen}.html").read_text())
        assert found is not None and found[1] == link
    assert not file.exists()


def test_a_database_that_is_not_there(ward: Ward) -> None:
    with pytest.raises(AssertionError, match="error: "), explore(ward, "--dsn", "dbname=nowhere"):
        pass
