"""All pairs within a distance, beside the build of the index."""

from __future__ import annotations

import numpy as np

from bench.exact import Vectors
from bench.report import Bar, Line
from bench.session import Session, private_bytes
from tools.cluster import Cluster

SECTION = "pairs of stored rows"
BUILD, OURS, MEMORY = "build_index", "similar_pairs", "private memory of a session"
THREADS, MEBIBYTE = 2, 1024 * 1024
# Neighbours that half of the rows have within the distance, and rows to learn it from.
NEIGHBOURS, SAMPLE = 5, 200


def pairs(cluster: Cluster, vectors: Vectors) -> list[Line]:
    """Time a build of the index, and the search for all pairs."""
    rng = np.random.default_rng(4)
    chosen = rng.choice(len(vectors.matrix), SAMPLE, replace=False)
    distances = 1 - vectors.matrix[chosen] @ vectors.matrix.T
    nearest = np.partition(distances, NEIGHBOURS, axis=1)[:, NEIGHBOURS]
    limit = round(float(np.median(nearest)), 5)
    with Session(cluster.dsn(), max_parallel_maintenance_workers=str(THREADS)) as session:
        build = session.timed(f"SELECT siamese.build_index('large', threads => {THREADS})")
    with Session(cluster.dsn()) as session:
        call = f"siamese.similar_pairs('large', {limit}, threads => {THREADS})"
        seconds = session.timed(f"SELECT count(*) FROM {call}")
        # It has read the whole index file, and alone.
        used = private_bytes(session.pid, with_files=False) / MEBIBYTE
    note = f"within {limit}, {THREADS} threads"
    return [
        Line(SECTION, BUILD, value=round(build, 1), unit="s", note=f"{THREADS} threads"),
        Line(SECTION, OURS, value=round(seconds, 1), unit="s", note=note),
        Line(SECTION, MEMORY, value=round(used, 1), unit="MiB"),
    ]


def bars(lines: list[Line]) -> list[Bar]:
    """Return the promise on these figures."""
    by_name = {line.name: line.figure() for line in lines}
    ratio = by_name[OURS] / by_name[BUILD]
    return [Bar("pairs: times an index build", ratio, 3, "times", is_most=True)]
