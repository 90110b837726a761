"""Pairs of rows, by an index file in memory."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pg_siamese_server.search import cells, pairs
from pg_siamese_server.search.cells import Cells
from pg_siamese_server.search.pairs import IndexedPairs


def clusters(count: int, dimension: int = 8) -> NDArray[np.float32]:
    """Return vectors around some centres, some of them twice."""
    random = np.random.default_rng(3)
    centres = random.standard_normal((20, dimension))
    matrix = centres[random.integers(0, 20, count)]
    matrix += 0.1 * random.standard_normal((count, dimension))
    twice = count // 50
    matrix[count - twice :] = matrix[:twice]
    return matrix.astype(np.float32)


def search_of(matrix: NDArray[np.float32], limit: float, polls: list[None]) -> Any:
    """Return a search that holds all vectors but the last ten in its file."""
    search: Any = IndexedPairs.__new__(IndexedPairs)
    held = len(matrix) - 10
    search.index = SimpleNamespace(vectors=matrix[:held], slots_of=lambda rows: rows)
    search.rows, search.pending, search.total = np.arange(held), matrix[held:], len(matrix)
    search.labels, search.limit, search.thread_count = None, limit, 1
    search.collection = SimpleNamespace(metric="l2")
    search.poll = lambda: polls.append(None)
    return search


@pytest.mark.parametrize("reach", [0.0, 0.05, 0.4, math.inf])
def test_every_pair_once(monkeypatch: pytest.MonkeyPatch, reach: float) -> None:
    monkeypatch.setattr(cells, "SINGLE", 500)
    matrix = clusters(1_300)
    parts = list(search_of(matrix, reach * reach, []).find())
    found = {
        (min(pair), max(pair))
        for part in parts
        for pair in zip(part.first.tolist(), part.second.tolist(), strict=True)
    }
    assert len(found) == sum(len(part.first) for part in parts)
    exact = {
        (row, row + 1 + int(other))
        for row in range(len(matrix))
        for other in np.flatnonzero(
            np.square(matrix[row + 1 :] - matrix[row]).sum(axis=1) <= np.float32(reach * reach)
        )
    }
    assert len(exact) >= len(matrix) // 50
    # Apart from rounding at the limit.
    assert len(found ^ exact) <= 1e-5 * len(exact)


def test_few_are_compared() -> None:
    """Vectors that are out of reach are left out, or all would be compared with all."""
    matrix = clusters(10_000)
    compared = {
        reach: sum(
            len(cell.members) * (len(cell.members) / 2 + len(cell.others))
            for cell in Cells(lambda rows: matrix[rows], len(matrix), reach, 1, lambda: None)
        )
        for reach in (0.02, 0.2, 50.0)
    }
    every = len(matrix) ** 2 / 2
    assert compared[0.02] < 0.02 * every
    assert compared[0.2] < 0.08 * every
    assert compared[50.0] == pytest.approx(every)


def test_equal_vectors_come_in_parts() -> None:
    """However many there are, so that few are in memory and a cancel is seen."""
    count = 3_000
    polls: list[None] = []
    search = search_of(np.ones((count, 4), np.float32), 0.0, polls)
    parts = list(search.find())
    assert max(len(part.first) for part in parts) <= pairs.MAX_HITS
    assert sum(len(part.first) for part in parts) == count * (count - 1) // 2
    assert len(polls) >= count * count // pairs.MAX_HITS


def test_no_pairs() -> None:
    matrix = clusters(20)
    assert list(search_of(matrix[:11], -1.0, []).find()) == []
    assert list(search_of(matrix[:1], math.inf, []).find()) == []
