"""Neighbours of 10,000 stored rows: nearest, searches for each, and FAISS alone in one batch."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from bench.exact import K, Truth
from bench.report import Bar, Line
from bench.search import FaissAlone, PgVector, check_engine
from bench.session import Prepared, Session, bigint, connect, private_bytes
from bench.timing import Summary, one_core, round_robin
from tools.cluster import Cluster

SECTION = "neighbours of many stored rows"
OURS, EACH, FAISS = "nearest", "similar_images for each", "FAISS alone, in one batch"
EARLIER = "similar_images for each, of the other revision"
PGVECTOR = "pgvector HNSW for each"
MEMORY = "private memory of a session"
KEYS, ROUNDS = 10_000, 3
# Queries by which pgvector's breadth is chosen.
TUNED_BY = 1_000
MEBIBYTE = 1024 * 1024

WANTED = "SELECT image_id FROM bench.wanted"
CALLS = {
    OURS: f"SELECT key::bigint, neighbour::bigint, distance FROM siamese.nearest('large', k => {K},"
    f" keys => ARRAY({WANTED}))",
    EACH: f"SELECT w.image_id, s.image_id, s.distance FROM ({WANTED}) AS w CROSS JOIN LATERAL"
    f" siamese.similar_images(image_id => w.image_id, k => {K}, collection => 'large') AS s",
    PGVECTOR: f"SELECT w.image_id, s.image_id, s.distance FROM ({WANTED}) AS w"
    " INNER JOIN bench.vectors AS q USING (image_id) CROSS JOIN LATERAL ("
    "SELECT v.image_id, v.embedding <=> q.embedding AS distance FROM bench.vectors AS v"
    " WHERE v.image_id <> q.image_id ORDER BY v.embedding <=> q.embedding"
    f" LIMIT {K}) AS s",
}


def nearest(cluster: Cluster, truth: Truth, earlier: Cluster | None = None) -> list[Line]:
    """Time the contestants on the same keys, in turns.

    Args:
        cluster: with the collection and pgvector's index.
        truth: of the keys.
        earlier: of another revision, with the same collection.
    """
    assert truth.own is not None
    for each in (cluster, *([earlier] if earlier else [])):
        with connect(each.dsn()) as admin:
            admin.execute("CREATE TABLE bench.wanted (image_id bigint)")
            own = truth.own.tolist()
            admin.execute("INSERT INTO bench.wanted SELECT unnest(%s::bigint[])", (own,))
            admin.execute("VACUUM ANALYZE bench.wanted")
    alone = FaissAlone(cluster, "large", truth)
    with ExitStack() as stack:
        mine, theirs = (stack.enter_context(Session(cluster.dsn())) for _ in range(2))
        pids = [mine.pid, theirs.pid]
        check_engine(mine, "large")
        rival = PgVector(theirs, by_image=False)
        rival.tune([bigint(key) for key in truth.own[:TUNED_BY].tolist()], truth)
        calls: dict[str, Callable[[int], Any]] = {FAISS: lambda _: _search_at_once(alone)}
        for number, (name, statement) in enumerate(CALLS.items()):
            session = theirs if name == PGVECTOR else mine
            calls[name] = partial(_call, session.prepare(f"call_{number}", statement))
        if earlier:
            old = stack.enter_context(Session(earlier.dsn()))
            check_engine(old, "large")
            calls[EARLIER] = partial(_call, old.prepare("call", CALLS[EACH]))
            pids.append(old.pid)
        with one_core(pids):
            seconds, answers = round_robin(calls, ROUNDS, 1, warm_up=1)
        assert not mine.notices, mine.notices
    lines = []
    for name, times in seconds.items():
        found = answers[name][-1]
        ids = _ids(alone, found) if name == FAISS else _rows(found, truth.own)
        note = f"{len(truth.own):,} keys, k {K}"
        if name == PGVECTOR:
            note += f", ef_search {rival.breadth}"
        lines.append(Line(SECTION, name, Summary.of(times), recall=truth.recall(ids), note=note))
    with Session(cluster.dsn()) as session:
        session.run(f"SELECT count(*) FROM ({CALLS[OURS]}) AS n")
        used = private_bytes(session.pid) / MEBIBYTE
    return [*lines, Line(SECTION, MEMORY, value=round(used, 1), unit="MiB")]


def _call(prepared: Prepared, _: int) -> Any:
    return prepared()


def _search_at_once(alone: FaissAlone) -> NDArray[np.int64]:
    """Search for all queries in one call, as ``Generation.search`` does for one."""
    parameters = faiss.SearchParametersHNSW()
    parameters.efSearch = alone.generation.breadths.stored
    queries, count = alone.truth.queries, alone.count
    starts = np.array(alone.entries, np.int32), np.zeros(len(queries), np.float32)
    distances = np.empty((len(queries), count), np.float32)
    positions = np.empty((len(queries), count), np.int64)
    alone.index.search_level_0(
        len(queries),
        faiss.swig_ptr(queries),
        count,
        *map(faiss.swig_ptr, (*starts, distances, positions)),
        1,
        1,
        parameters,
    )
    return positions


def _ids(alone: FaissAlone, positions: NDArray[np.int64]) -> list[list[int]]:
    return [alone.ids((number, found[found >= 0])) for number, found in enumerate(positions)]


def _rows(result: Any, own: NDArray[np.int64]) -> list[list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for row in range(result.ntuples):
        key, neighbour = (
            struct.unpack(">q", bytes(result.get_value(row, column)))[0] for column in (0, 1)
        )
        found[key].append(neighbour)
    return [found[key] for key in own.tolist()]


def bars(lines: list[Line]) -> list[Bar]:
    """Return the promises on these figures."""
    by_name = {line.name: line for line in lines}
    ours = by_name[OURS]
    assert ours.recall is not None

    def times(name: str) -> float:
        return by_name[name].figure() / ours.figure()

    each = EARLIER if EARLIER in by_name else EACH
    return [
        Bar("nearest of 10,000 rows: recall", ours.recall, 0.99),
        Bar(f"times as fast as {each}", times(each), 6, "times"),
        Bar("times as fast as pgvector for each", times(PGVECTOR), 8, "times"),
        Bar("times FAISS alone", 1 / times(FAISS), 1.3, "times", is_most=True),
        Bar("memory of nearest", by_name[MEMORY].figure(), 200, "MiB", is_most=True),
    ]
