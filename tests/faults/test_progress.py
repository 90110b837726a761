"""Servers and sessions killed while they work: what they left behind is not taken for work."""

from __future__ import annotations

from pathlib import Path

import psycopg

from tests.database.running import Running
from tests.faults.checks import Connect
from tests.faults.cluster import FaultyCluster
from tests.scenarios.gallery import Connection, index_directory
from tests.support import rows_of

WORK = "SELECT collection, kind, phase FROM siamese.progress"


def files(directory: Path) -> list[str]:
    return [path.name for path in (directory.parents[1] / "progress").iterdir()]


def test_killed_while_building(cluster: FaultyCluster, db: Connection, connect: Connect) -> None:
    """The session alone, and the whole server."""
    directory = index_directory(db)
    for victim in ("session", "server"):
        session = connect()
        holder = connect()
        holder.execute("BEGIN; LOCK TABLE siamese.embedding_1 IN ACCESS EXCLUSIVE MODE")
        build = Running(connect, "SELECT build_index()")
        pid = build.session.info.backend_pid
        assert build.start().waits()
        assert rows_of(session, WORK) == [("images", "build_index", "reading vectors")]
        assert files(directory) == [str(pid)]
        if victim == "session":
            cluster.kill_backend(pid)
        else:
            cluster.kill()
        assert isinstance(build.error_at_the_end(), psycopg.OperationalError)
        cluster.recover()
        assert rows_of(connect(), WORK) == []
        assert files(directory) == [str(pid)]
        connect().execute("SELECT build_index()")
        assert files(directory) == []
