"""The private clusters: starting, stopping, crashing, and who may enter."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tools.cluster import Cluster, create_database
from tools.report import SetupError


@pytest.fixture(scope="module")
def own() -> Iterator[Cluster]:
    """A cluster of these tests' own, which they stop and break."""
    with Cluster.temporary({"work_mem": "5MB"}) as cluster:
        yield cluster
    assert not cluster.folder.exists()


@pytest.fixture
def up(own: Cluster) -> Cluster:
    own.start()
    return own


def test_start_and_stop_are_idempotent(up: Cluster) -> None:
    pid = up.pid()
    assert not up.start()
    assert up.pid() == pid
    assert up.stop()
    assert not up.running()
    assert not up.stop()
    assert up.start()
    assert up.pid() not in (None, pid)


def test_settings_and_safety(up: Cluster) -> None:
    assert up.sql("SHOW work_mem", "postgres") == "5MB"
    assert up.sql("SHOW data_checksums", "postgres") == "on"
    assert up.sql("SHOW server_encoding", "postgres") == "UTF8"
    # No TCP, and a socket that only the server's user (and root) can reach.
    assert up.sql("SHOW listen_addresses", "postgres") == ""
    for folder in (up.folder, up.socket_folder, up.data):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder.stat().st_uid != 0


def test_the_overlay_is_used_and_python_settings_do_not_reach_it(up: Cluster) -> None:
    query = "SELECT setting FROM pg_config WHERE name IN ('SHAREDIR', 'PKGLIBDIR') ORDER BY name"
    assert up.sql(query, "postgres").splitlines() == [
        str(up.installation.lib),
        str(up.installation.share),
    ]
    environment = Path(f"/proc/{up.pid()}/environ").read_bytes()
    assert b"PYTHON" not in environment
    assert b"PGDATABASE" not in environment


def test_a_stale_pid_file_does_not_count(up: Cluster) -> None:
    pid = up.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while up.running():
        time.sleep(0.05)
    assert (up.data / "postmaster.pid").exists()
    assert up.start()
    assert up.sql("SELECT 1", "postgres") == "1"
    up.stop()
    # The number may belong to another program by now: that is no server, and isn't touched.
    other = subprocess.Popen(["sleep", "60"])
    try:
        (up.data / "postmaster.pid").write_text(f"{other.pid}\n{up.data}\n")
        assert not up.running()
        assert not up.stop()
        assert up.start()
        assert other.poll() is None
    finally:
        other.terminate()
        other.wait()


def test_a_taken_socket_is_refused(up: Cluster, tmp_path: Path) -> None:
    class Neighbour(Cluster):
        """Another cluster that would listen in the same place."""

        @property
        def socket_folder(self) -> Path:
            return up.socket_folder

    with pytest.raises(SetupError, match="another server listens on"), Neighbour.temporary():
        pass
    assert up.sql("SELECT 1", "postgres") == "1"


def test_data_of_another_version_is_refused(up: Cluster) -> None:
    up.stop()
    mark = up.data / "PG_VERSION"
    there = mark.read_text()
    mark.write_text("9.6\n")
    try:
        with pytest.raises(SetupError, match=r"was made by PostgreSQL 9\.6"):
            up.start()
    finally:
        mark.write_text(there)


def test_a_server_that_does_not_start_says_why(up: Cluster) -> None:
    up.stop()
    broken = Cluster(up.folder, settings={"shared_buffers": "a lot"})
    with pytest.raises(SetupError, match='invalid value for parameter "shared_buffers"'):
        broken.start()


def test_the_database_is_made_once_and_never_remade(
    up: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    name = 'a "strange" na\'me'
    create_database(up, name)
    up.sql("CREATE TABLE public.mine AS SELECT 1 AS x", name)
    create_database(up, name)
    assert up.sql("SELECT x FROM mine", name) == "1"
    assert up.sql("SHOW search_path", name) == '"$user", public, siamese'
    # Sources that change under the same version are told of, and the data stay.
    capsys.readouterr()
    next(up.folder.glob("extension-a%20%22strange*")).write_text("another")
    create_database(up, name)
    assert "changed since" in capsys.readouterr().out
    assert up.sql("SELECT x FROM mine", name) == "1"
    with psycopg.connect(up.dsn(name)) as connection:
        row = connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
        assert row.fetchone() is not None


def test_errors_of_sql_are_told(up: Cluster) -> None:
    with pytest.raises(SetupError, match="division by zero"):
        up.sql("SELECT 1 / 0", "postgres")
