"""Threads of FAISS. Importable without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pg_siamese_server import interrupts
from pg_siamese_server.catalog import prepare

MAX_THREADS = 64


def allowed_threads(plpy: Any, setting: str) -> int:
    """Return how many threads a setting of PostgreSQL's parallel workers allows."""
    plan = prepare(plpy, "SELECT pg_catalog.current_setting($1)::integer AS workers", ("text",))
    workers = int(plan.execute([setting])[0]["workers"])
    return max(1, min(len(os.sched_getaffinity(0)), 1 + workers))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let FAISS use threads. They never handle PostgreSQL's signals."""
    import faiss

    if count == 1:  # which starts none
        faiss.omp_set_num_threads(1)
        yield
        return
    with interrupts.signals_blocked():
        faiss.omp_set_num_threads(count)
        try:
            yield
        finally:
            faiss.omp_set_num_threads(1)
