"""Measure filtered and large searches: similar_images and pgvector at its best.

pgvector has two ways. Its HNSW index has iterative scans, and an index on the filtered column gives
rows for an exact scan. The rival is the better one with a recall of 0.99.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench import groups
from bench.exact import TIE, Vectors
from bench.report import Bar, Line
from bench.search import OURS, TARGET, check_engine
from bench.session import BIGINT, Prepared, Session, bigint, first_bigints
from bench.timing import Summary, one_core, round_robin
from tools.cluster import Cluster

JSONB, BIGINT_ARRAY, INTEGER = 3802, 1016, 23
PLANNED, EXACT = "pgvector, iterative scan", "pgvector, exact scan"
# hnsw.ef_search and hnsw.max_scan_tuples, quickest first.
SETTINGS = ((40, 20_000), (100, 20_000), (200, 20_000), (400, 100_000), (1_000, 1_000_000))
SECONDS, LEAST, TRIED = 2.0, 20, 40
CANDIDATES = (100, 10_000, 100_000)
LARGE_K = (1_000, 10_000)
_DISTANCE = "embedding <=> (SELECT embedding FROM bench.vectors WHERE image_id = $1)"


@dataclass(frozen=True)
class Case:
    """One kind of search, with its queries.

    Attributes:
        name: for the table.
        k: how many neighbours.
        own: int64 (queries,), ids of the query images.
        among: for each query, the rows that qualify, as places in the vectors, or None for all.
        argument, oid: argument of ``similar_images`` besides the query, if any: its SQL and type.
        condition: of pgvector's statement, the same.
        ours, theirs: values of these for each query, in binary.
        rival_oid: the type of the rival's value.
    """

    name: str
    k: int
    own: NDArray[np.int64]
    among: Callable[[int], NDArray[np.int64]] | None = None
    argument: str = ""
    oid: int = 0
    condition: str = ""
    rival_oid: int = 0
    ours: list[bytes] | None = None
    theirs: list[bytes] | None = None

    def farthest(self, vectors: Vectors, number: int) -> float:
        """Return the cosine distance of the k-th neighbour of a query."""
        place = int(np.searchsorted(vectors.ids, self.own[number]))
        rows = np.arange(len(vectors.ids)) if self.among is None else self.among(number)
        rows = rows[rows != place]
        query = vectors.matrix[place]
        near = rows
        if len(rows) > 4 * self.k:
            similar = vectors.matrix[rows] @ query
            near = rows[np.argpartition(-similar, self.k + 10)[: self.k + 10]]
        distances = 1 - vectors.matrix[near].astype(np.float64) @ query.astype(np.float64)
        return float(np.sort(distances)[: self.k][-1])

    def count(self, number: int) -> int:
        """Return how many neighbours a query must have."""
        return self.k if self.among is None else min(self.k, len(self.among(number)) - 1)


def cases(
    vectors: Vectors, columns: Mapping[str, NDArray[np.int32]], own: NDArray[np.int64]
) -> Iterator[Case]:
    """Yield all cases, for these query images."""
    places = np.searchsorted(vectors.ids, own)
    for count, share in groups.SHARES.items():
        for kind in (groups.RANDOM, groups.PLACE):
            name = groups.column(kind, count)
            values = columns[name]
            what = "by chance" if kind == groups.RANDOM else "the nearest"
            wanted = {f"{share}, {what}": values[places]}
            if kind == groups.PLACE:
                farthest = groups.farthest(vectors, values, vectors.matrix[places])
                wanted[f"{share}, the farthest"] = farthest
            order = np.argsort(values, kind="stable")
            starts = np.searchsorted(values[order], np.arange(count + 1))
            for title, chosen in wanted.items():
                yield _filtered(f"filter, {title}", own, name, chosen, order, starts)
    for count in CANDIDATES:
        generator = np.random.default_rng(count)
        lists = [
            np.sort(generator.choice(len(vectors.ids), min(count, len(vectors.ids)), replace=False))
            for _ in range(len(own) if count < 100_000 else LEAST)
        ]
        data = [_array(vectors.ids[item]) for item in lists]
        repeated = [data[number % len(data)] for number in range(len(own))]
        yield Case(
            f"candidates, {count:,} keys",
            10,
            own,
            lambda number, lists=lists: lists[number % len(lists)],  # type: ignore[misc]
            ", candidates => $2",
            BIGINT_ARRAY,
            "image_id = ANY($2)",
            BIGINT_ARRAY,
            repeated,
            repeated,
        )
    for k in LARGE_K:
        yield Case(f"all rows, k {k:,}", k, own)


def _filtered(
    title: str,
    own: NDArray[np.int64],
    name: str,
    chosen: NDArray[np.int32],
    order: NDArray[np.int64],
    starts: NDArray[np.int64],
) -> Case:
    return Case(
        title,
        10,
        own,
        lambda number: order[starts[chosen[number]] : starts[chosen[number] + 1]],
        ", filter => $2",
        JSONB,
        f"{name} = $2",
        INTEGER,
        [b"\1" + json.dumps({name: value}).encode() for value in chosen.tolist()],
        [struct.pack(">i", value) for value in chosen.tolist()],
    )


def _array(values: NDArray[np.int64]) -> bytes:
    """Return the binary form of a bigint[]."""
    elements = np.empty(len(values), dtype=[("length", ">i4"), ("value", ">i8")])
    elements["length"], elements["value"] = 8, values
    return struct.pack(">iiiii", 1, 0, BIGINT, len(values), 1) + elements.tobytes()


class Contest:
    """One case with its contestants, prepared in sessions of their own."""

    def __init__(self, cluster: Cluster, collection: str, vectors: Vectors, case: Case) -> None:
        self.vectors, self.case = vectors, case
        self.sessions = {name: Session(cluster.dsn()) for name in (OURS, PLANNED, EXACT)}
        check_engine(self.sessions[OURS], collection)
        types = [BIGINT, *([case.oid] if case.oid else [])]
        self.calls: dict[str, Prepared] = {
            OURS: self.sessions[OURS].prepare(
                "ours",
                "SELECT image_id, distance FROM siamese.similar_images(image_id => $1,"
                f" k => {case.k}, collection => '{collection}'{case.argument})",
                *types,
            )
        }
        where = "image_id <> $1" + (f" AND {case.condition}" if case.condition else "")
        types = [BIGINT, *([case.rival_oid] if case.rival_oid else [])]
        self.sessions[PLANNED].set("hnsw.iterative_scan", "relaxed_order")
        for name, ordering in ((PLANNED, _DISTANCE), (EXACT, f"({_DISTANCE}) + 0")):
            self.calls[name] = self.sessions[name].prepare(
                "theirs",
                f"SELECT image_id, {_DISTANCE} AS distance FROM bench.vectors WHERE {where}"
                f" ORDER BY {ordering} LIMIT {case.k}",
                *types,
            )

    def close(self) -> None:
        """Close the sessions."""
        for session in self.sessions.values():
            session.close()

    def call(self, name: str, number: int) -> object:
        """Run one query of one contestant."""
        values = self.case.ours if name == OURS else self.case.theirs
        more = [] if values is None else [values[number]]
        return self.calls[name](bigint(int(self.case.own[number])), *more)

    def recall(self, answers: list[object], bounds: list[float], first: int = 0) -> float:
        """Return the share of the k nearest that the answers hold, on average."""
        hits, total = 0, 0
        for number, answer in enumerate(answers, start=first):
            found = first_bigints(answer)
            assert len(set(found)) == len(found), "an answer holds a row twice"
            assert int(self.case.own[number]) not in found, "an answer holds the query itself"
            own = self.vectors.of(self.case.own[number : number + 1])[0].astype(np.float64)
            near = self.vectors.of(np.asarray(found, dtype=np.int64)).astype(np.float64)
            count = self.case.count(number)
            hits += min(count, int(((1 - near @ own) <= bounds[number] + TIE).sum()))
            total += count
        return hits / total

    def tune(self, count: int, bounds: list[float]) -> str | None:
        """Choose the quickest sufficient setting of iterative scans, or None if none suffices."""
        for breadth, tuples in SETTINGS:
            self.sessions[PLANNED].set("hnsw.ef_search", str(breadth))
            self.sessions[PLANNED].set("hnsw.max_scan_tuples", str(tuples))
            answers = [self.call(PLANNED, number) for number in range(count)]
            if self.recall(answers, bounds) >= TARGET:
                return f"ef_search {breadth}, max_scan_tuples {tuples}"
        return None

    def run(self) -> list[Line]:
        """Time similar_images and pgvector's better way, with one line each.

        Separate queries find out first which way is better. Otherwise the processor would have at
        hand what the first way has read.
        """
        tried = {name: self._median(name, range(TRIED)) for name in (OURS, EXACT)}
        bounds = [self.case.farthest(self.vectors, number) for number in range(len(self.case.own))]
        note = self.tune(TRIED, bounds)
        if note is not None:
            tried[PLANNED] = self._median(PLANNED, range(TRIED))
        rival = min((name for name in tried if name != OURS), key=tried.__getitem__)
        spent = tried[OURS] + tried[rival]
        count = int(np.clip(2 * SECONDS / spent, LEAST, len(self.case.own) - TRIED))
        calls = {
            name: (lambda number, name=name: self.call(name, TRIED + number))
            for name in (OURS, rival)
        }
        with one_core(session.pid for session in self.sessions.values()):
            seconds, answers = round_robin(calls, count, 5, 6)
        lines = []
        for name in calls:
            recall = self.recall(answers[name], bounds, TRIED)
            own_note = note or "" if name == PLANNED else ""
            times = Summary.of(seconds[name])
            lines.append(Line(self.case.name, name, times, recall=recall, note=own_note))
        return lines

    def _median(self, name: str, numbers: range) -> float:
        seconds = []
        for number in numbers:
            began = time.perf_counter()
            self.call(name, number)
            seconds.append(time.perf_counter() - began)
        return float(np.median(seconds))


def filtered(
    cluster: Cluster,
    collection: str,
    vectors: Vectors,
    columns: Mapping[str, NDArray[np.int32]],
    own: NDArray[np.int64],
) -> list[Line]:
    """Time all cases."""
    lines: list[Line] = []
    for case in cases(vectors, columns, own):
        with closing(Contest(cluster, collection, vectors, case)) as contest:
            lines += contest.run()
    return lines


def bars(lines: list[Line]) -> list[Bar]:
    """Return the bars of the cases that were timed."""
    result = []
    for section in dict.fromkeys(line.section for line in lines):
        own = [line for line in lines if line.section == section]
        mine = next(line for line in own if line.name == OURS)
        best = min(line.figure() for line in own if line.name != OURS)
        times = 3.0 if section.startswith(("filter, 1 %", "filter, 0.1 %")) else 1.0
        what = f"{section}: times as fast as pgvector's best"
        result.append(Bar(what, best / mine.figure(), times, "times"))
        assert mine.recall is not None and mine.time is not None
        result.append(Bar(f"{section}: recall", mine.recall, TARGET))
        spread = mine.time.p95_ms / mine.time.median_ms
        result.append(Bar(f"{section}: 95th percentile", spread, 3.0, "times", is_most=True))
    return result
