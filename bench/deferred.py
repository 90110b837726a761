"""Measure deferred embedding: what queueing adds to an insert, and a second worker to one."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np

from bench.data import create_table
from bench.report import Bar, Line
from bench.session import Prepared, Session, bytea_array, connect, first_row
from bench.timing import Summary, round_robin
from tools.cluster import Cluster

ROWS = 10_000
INSERT = "insert"
PLAIN, QUEUED = "without any trigger", "into a deferred collection"
WORKERS = "workers, from an insert's commit to the last vector's"
ONE, TWO = "one worker", "two workers"
QUEUE_BAR, WORKERS_BAR = 1.5, 1.6
WARM_UP_ROWS = 256
DEADLINE_SECONDS = 600.0


def create(cluster: Cluster) -> None:
    """Make two tables that differ only in the triggers of a deferred collection."""
    create_table(cluster, "plain")
    create_table(cluster, "deferred", embed="deferred")


def insert(cluster: Cluster, files: list[bytes], count: int) -> list[Line]:
    """Insert into both tables in turns, with a commit per statement."""
    rows = min(ROWS, len(files))
    value = bytea_array(files[:rows])
    with Session(cluster.dsn()) as session:
        calls: dict[str, Callable[[int], Any]] = {
            name: partial(_insert, session.prepare_insert(f"bench.{table}"), value)
            for name, table in ((PLAIN, "plain"), (QUEUED, "deferred"))
        }
        seconds, _ = round_robin(calls, count, 1, warm_up=2)
    note = f"{rows:,} rows per statement"
    return [Line(INSERT, name, Summary.of(seconds[name]), note=note) for name in (PLAIN, QUEUED)]


def _insert(insertion: Prepared, value: bytes, number: int) -> None:
    insertion(value)


def workers(cluster: Cluster, files: list[bytes], repeats: int) -> list[Line]:
    """Let one worker and two embed the same rows, in turns."""
    seconds: dict[str, list[float]] = {ONE: [], TWO: []}
    with connect(cluster.dsn()) as admin:
        for _ in range(repeats):
            for name, count in ((ONE, 1), (TWO, 2)):
                admin.execute("TRUNCATE bench.deferred")
                with ExitStack() as stack:
                    for _ in range(count):
                        stack.enter_context(_worker(cluster))
                    # Each has opened the encoder before the clock starts.
                    _await_idle(admin, count)
                    for _ in range(4):
                        _queue(admin, files[: WARM_UP_ROWS * count])
                        _await_empty(admin)
                    _queue(admin, files)
                    seconds[name].append(_await_empty(admin))
    lines = []
    for name, values in seconds.items():
        note = f"{len(files) / np.median(values):,.0f} rows/s, {len(files):,} rows"
        lines.append(Line(WORKERS, name, Summary.of(values), note=note))
    return lines


def _queue(admin: Any, files: list[bytes]) -> None:
    admin.execute("INSERT INTO bench.deferred (image) SELECT * FROM unnest(%b::bytea[])", (files,))


def _await_idle(admin: Any, count: int) -> None:
    idle = "application_name = 'pg_siamese' AND state = 'idle'"
    query = f"SELECT count(*) FROM pg_stat_activity WHERE {idle}"
    _await(lambda: first_row(admin, query) == (count,))


def _await_empty(admin: Any) -> float:
    """Wait until the queue is empty, and return the seconds that took."""
    began = time.perf_counter()
    query = "SELECT collection_id FROM siamese.collections WHERE name = 'deferred'"
    waiting = f"SELECT EXISTS (SELECT FROM siamese.queue_{first_row(admin, query)[0]})"
    _await(lambda: first_row(admin, waiting) == (False,))
    return time.perf_counter() - began


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the workers do not finish")
        time.sleep(0.01)


@contextmanager
def _worker(cluster: Cluster) -> Iterator[None]:
    command = [sys.executable, "-m", "pg_siamese.cli.main", "worker", "--dsn", cluster.dsn()]
    process = subprocess.Popen(
        [*command, "--no-rebuild"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def bars(lines: list[Line]) -> list[Bar]:
    """Return the bars of the two."""
    figure = {line.name: line.figure() for line in lines}
    return [
        Bar(
            f"{ROWS:,}-row insert into a deferred collection, times the same without any trigger",
            figure[QUEUED] / figure[PLAIN],
            QUEUE_BAR,
            "times",
            is_most=True,
        ),
        Bar("two workers, times as fast as one", figure[ONE] / figure[TWO], WORKERS_BAR, "times"),
    ]
