"""Searches by group: the best of each patient, beside the search without groups."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.exact import TIE, K, Vectors
from bench.groups import PLACE, RANDOM, column
from bench.report import Bar, Line
from bench.search import BLOCK, check_engine, nth
from bench.session import BIGINT, Session, bigint, connect, first_bigints
from bench.timing import Summary, one_core, round_robin
from tools.cluster import Cluster

SECTION = "best of each group, by stored id"
WITHOUT = "without groups"
WARM_UP = 40


@dataclass(frozen=True)
class Case:
    """Groups of one kind.

    Attributes:
        name: of the contestant.
        column: the column to group by.
        groups: int64 (rows,), the group of each row.
        most: times of the search without groups that the median may take.
    """

    name: str
    column: str
    groups: NDArray[np.int64]
    most: float


def cases(vectors: Vectors, columns: dict[str, NDArray[np.int32]]) -> list[Case]:
    """Return groups of one, five and a thousand rows (of a million): by chance, and by place."""
    chance, place = (column(kind, 1_000) for kind in (RANDOM, PLACE))
    return [
        Case("groups of 1 row", "image_id", vectors.ids, 3),
        Case("groups of 5 rows", "five", vectors.ids // 5, 3),
        Case("1,000 groups, by chance", chance, columns[chance].astype(np.int64), 10),
        Case("1,000 groups, by place", place, columns[place].astype(np.int64), 10),
    ]


def grouped(
    cluster: Cluster,
    vectors: Vectors,
    columns: dict[str, NDArray[np.int32]],
    own: NDArray[np.int64],
) -> list[Line]:
    """Search for the best of K groups, and without groups, in turns."""
    with connect(cluster.dsn()) as admin:
        admin.execute(
            "ALTER TABLE bench.large ADD COLUMN five bigint"
            " GENERATED ALWAYS AS (image_id / 5) STORED"
        )
        admin.execute("VACUUM ANALYZE bench.large")
    values = [bigint(int(key)) for key in own]
    chosen = cases(vectors, columns)
    with Session(cluster.dsn()) as session:
        check_engine(session, "large")
        calls = {WITHOUT: partial(nth, _prepared(session, "without", ""), values)}
        for number, case in enumerate(chosen):
            search = _prepared(session, f"grouped_{number}", f", group_by => '{case.column}'")
            calls[case.name] = partial(nth, search, values)
        with one_core([session.pid]):
            seconds, answers = round_robin(calls, len(values), BLOCK, WARM_UP)
        assert not session.notices, session.notices
    lines = [Line(SECTION, WITHOUT, Summary.of(seconds[WITHOUT]))]
    for case in chosen:
        found = [first_bigints(answer) for answer in answers[case.name]]
        recall = _recall(vectors, case.groups, own, found)
        note = f"group_by {case.column}"
        lines.append(
            Line(SECTION, case.name, Summary.of(seconds[case.name]), recall=recall, note=note)
        )
    return lines


def bars(lines: list[Line], chosen: list[Case]) -> list[Bar]:
    """Return the promises on these figures."""
    by_name = {line.name: line for line in lines}
    result = []
    for case in chosen:
        line = by_name[case.name]
        assert line.recall is not None
        times = line.figure() / by_name[WITHOUT].figure()
        result.append(Bar(f"best of each, {case.name}: recall", line.recall, 0.99))
        name = f"best of each, {case.name}: times the search without"
        result.append(Bar(name, times, case.most, "times", is_most=True))
    return result


def _prepared(session: Session, name: str, more: str) -> Any:
    arguments = f"image_id => $1, k => {K}, collection => 'large'{more}"
    statement = f"SELECT image_id, distance FROM siamese.similar_images({arguments})"
    return session.prepare(name, statement, BIGINT)


def _recall(
    vectors: Vectors, groups: NDArray[np.int64], own: NDArray[np.int64], answers: list[list[int]]
) -> float:
    """Return the share of the K best groups that the answers hold, by distance, on average."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=groups[order[0]] - 1))
    hits = 0
    for key, answer in zip(own.tolist(), answers, strict=True):
        assert len(answer) == K, "an answer is short"
        places = np.searchsorted(vectors.ids, answer)
        assert len(set(groups[places].tolist())) == K, "an answer holds a group twice"
        query = vectors.of(np.asarray([key]))[0]
        distances = 1 - vectors.matrix @ query
        distances[np.searchsorted(vectors.ids, key)] = np.inf
        best = np.partition(np.minimum.reduceat(distances[order], starts), K - 1)[K - 1]
        hits += int((distances[places] <= best + TIE).sum())
    return hits / (K * len(answers))
