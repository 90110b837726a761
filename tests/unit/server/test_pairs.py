"""Pairs of rows that share their vectors."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from pg_siamese_server.index.generations import Generation
from pg_siamese_server.search import pairs
from pg_siamese_server.search.pairs import IndexedPairs


def test_rows_of_one_vector_come_in_parts() -> None:
    """However many there are, so that few are in memory and a cancel is seen."""
    count = 3_000
    index: Any = SimpleNamespace(
        rows=SimpleNamespace(by_slot=np.arange(count), slot_starts=np.array([0, count]))
    )
    index.expand = partial(Generation.expand, index)
    search: Any = IndexedPairs.__new__(IndexedPairs)
    polls: list[None] = []
    search.index, search.rows, search.labels = index, np.arange(count), None
    search.collection = SimpleNamespace(metric="cosine")
    search.poll = lambda: polls.append(None)
    first = np.arange(count)
    parts = list(search._found(first, np.zeros(count, np.int64), np.zeros(count, np.float32)))
    assert max(len(part.first) for part in parts) <= pairs.MAX_HITS
    assert len(polls) >= count * count // pairs.MAX_HITS
    found = np.concatenate([part.first * count + part.second for part in parts])
    assert len(np.unique(found)) == len(found) == count * (count - 1) // 2
    assert (found // count < found % count).all()
