"""What a new connection waits for its first answer, and what memory a session has of its own."""

from __future__ import annotations

import time

import numpy as np

from bench.report import Line
from bench.search import ours
from bench.session import Session, bigint, private_bytes
from bench.timing import Summary
from pg_siamese.dev.cluster import Cluster

FIRST = "first search of a new connection"
MEMORY = "private memory of a session"
BY_ID, BY_IMAGE = "by stored id", "by new image"


def first_searches(
    cluster: Cluster, collection: str, ids: list[int], files: list[bytes], count: int
) -> list[Line]:
    """Open connections and search once, by id and by image in turns; connecting counts."""
    seconds: dict[str, list[float]] = {BY_ID: [], BY_IMAGE: []}
    for number in range(count):
        for name, value in ((BY_ID, bigint(ids[number])), (BY_IMAGE, files[number])):
            began = time.perf_counter()
            with Session(cluster.dsn()) as session:
                answer = ours(session, collection, name == BY_IMAGE)(value)
                seconds[name].append(time.perf_counter() - began)
                assert answer.ntuples == 10 and not session.notices, session.notices
    return [
        Line(
            FIRST,
            name,
            Summary.of(np.asarray(values)),
            note=f"{count} connections, from connect on",
        )
        for name, values in seconds.items()
    ]


def memory(cluster: Cluster, collection: str, ids: list[int], files: list[bytes]) -> list[Line]:
    """Measure sessions that have searched; two at a time, since what two map is shared."""
    lines = []
    for name in (BY_ID, BY_IMAGE):
        values = [bigint(key) for key in ids] if name == BY_ID else files
        with Session(cluster.dsn()) as one, Session(cluster.dsn()) as other:
            idle = private_bytes(one.pid)
            for session in (one, other):
                search = ours(session, collection, name == BY_IMAGE)
                for value in values:
                    search(value)
            used = private_bytes(one.pid)
        lines.append(
            Line(
                MEMORY,
                f"after {len(values)} searches {name}",
                value=used / 1024**2,
                unit="MiB",
                note=f"{idle / 1024**2:.1f} MiB right after connecting",
            )
        )
    return lines
