"""What one search did, for ``explain_search``: engine, rounds, rejections, seconds."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

NEAREST, QUALIFYING = "nearest rows, checked", "all rows that qualify, compared"

_untraced = nullcontext()


class Trace:
    """Notes of one search. A request without it pays nothing but a look.

    What is counted describes the last round, since each round begins again with more rows.

    Attributes:
        engine: which answered, or None if none was asked.
        reason: why it was this one.
        method: how FAISS answered.
        exact: whether no row can be missing.
        ef: breadth of the last walk through the graph, or None if there was none.
        rounds: how many times the index was asked.
        candidates: rows that were considered, without the query's own.
        pending, dead: changes that the index lacks, or None if they were not read.
        outside: candidates that the caller's list of keys left out.
        grouped: rows that their group had no room for.
        rejected: keys that the table did not confirm.
        seconds: time by phase.
    """

    def __init__(self) -> None:
        self.rounds = self.grouped = 0
        self.begin(None, "")
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the body to a phase, without that of phases inside."""
        self._inner.append(0.0)
        started = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - started
            self.seconds[name] += taken - self._inner.pop()
            if self._inner:
                self._inner[-1] += taken

    def begin(self, engine: str | None, reason: str) -> None:
        """Note which engine answers. Nothing remains of one that was tried before."""
        self.engine, self.reason = engine, reason
        self.method: str | None = None
        self.exact: bool | None = None
        self.ef: int | None = None
        self.candidates: int | None = None
        self.pending: int | None = None
        self.dead: int | None = None
        self.outside = 0
        self.rejected: list[Any] = []

    def begin_faiss(self, generation: int, pending: int, dead: int) -> None:
        """Note that FAISS answers, and the changes that its index lacks."""
        self.begin("faiss", f"Generation {generation}.")
        self.pending, self.dead = pending, dead

    def begin_round(self, method: str) -> None:
        """Note that the index is asked, and how."""
        self.method, self.exact, self.ef = method, True, None
        self.rounds += 1
        self.candidates, self.outside, self.rejected = 0, 0, []

    def walk(self, breadth: int | None) -> None:
        """Note that the graph was walked, which may miss rows."""
        self.exact, self.ef = False, breadth

    def consider(self, count: int, outside: int = 0) -> None:
        """Note candidates, some of which are not on the caller's list of keys."""
        self.candidates = (self.candidates or 0) + count
        self.outside += outside

    def reject(self, keys: Iterable[Any], own: int) -> None:
        """Note the candidates that the table did not confirm, and how many are the query's own."""
        self.rejected = list(keys)
        self.candidates = (self.candidates or 0) - own


def phase(trace: Trace | None, name: str) -> AbstractContextManager[None]:
    """Add the time of the body to a phase of a search, if it is traced."""
    return _untraced if trace is None else trace.phase(name)
