"""Time several contestants fairly on a machine that may be noisy."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Summary:
    """A distribution of seconds, in milliseconds."""

    count: int
    median_ms: float
    mean_ms: float
    p5_ms: float
    p95_ms: float
    p99_ms: float

    @classmethod
    def of(cls, seconds: NDArray[np.float64] | list[float]) -> Summary:
        """Summarise measured seconds."""
        values = np.asarray(seconds, dtype=np.float64) * 1000
        p5, median, p95, p99 = np.percentile(values, (5, 50, 95, 99))
        return cls(
            len(values), *(round(float(x), 5) for x in (median, values.mean(), p5, p95, p99))
        )


@contextmanager
def one_core(pids: Iterable[int]) -> Iterator[None]:
    """Keep this process and others on one core, so that none waits for an idle core to wake up.

    On virtual machines that takes as long as half a search, and happens irregularly.
    """
    everyone = {0, *pids}
    before = os.sched_getaffinity(0)
    try:
        for pid in everyone:
            os.sched_setaffinity(pid, {min(before)})
        yield
    finally:
        for pid in everyone:
            os.sched_setaffinity(pid, before)


def round_robin(
    calls: Mapping[str, Callable[[int], Any]], count: int, block: int, warm_up: int = 0
) -> tuple[dict[str, NDArray[np.float64]], dict[str, list[Any]]]:
    """Time ``count`` calls of each contestant, taking turns.

    In each turn a contestant gets the same ``block`` calls as the others, and the order rotates. So
    other load affects all alike, and none always comes first.

    Args:
        calls: name to a function of the number of the call, 0 to count - 1.
        count: timed calls per contestant.
        block: calls in a row.
        warm_up: calls per contestant beforehand that are not timed.

    Returns:
        Seconds, and what the calls returned, by name.
    """
    names = list(calls)
    seconds = {name: np.zeros(count) for name in names}
    answers: dict[str, list[Any]] = {name: [None] * count for name in names}
    for call in calls.values():
        for number in range(min(warm_up, count)):
            call(number)
    clock = time.perf_counter
    gc.collect()
    gc.disable()
    try:
        for turn, start in enumerate(range(0, count, block)):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                call, own, kept = calls[name], seconds[name], answers[name]
                for number in range(start, min(count, start + block)):
                    began = clock()
                    kept[number] = call(number)
                    own[number] = clock() - began
    finally:
        gc.enable()
    return seconds, answers
