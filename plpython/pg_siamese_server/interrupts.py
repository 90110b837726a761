"""Look for PostgreSQL's interrupts, since C code under PL/Python never does.

A pending cancel is only a flag. If nobody looks at it, the statement succeeds, and the session's
*next* one is cancelled. So work is done in pieces of at most about 100 ms. ``check`` runs between
them, and at the end of every entry point.
"""

from __future__ import annotations

import ctypes
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Most seconds that one uninterruptible piece of work should take.
PIECE_SECONDS = 0.08


class Interrupted(Exception):
    """Raised in call-backs of C libraries, in which raising PostgreSQL's own error is not safe."""


def _variable(kind: Any, name: str) -> Any:
    try:
        return kind.in_dll(ctypes.CDLL(None), name)
    except ValueError:  # not inside a PostgreSQL backend: unit tests, clients
        return kind(0)


_flag = _variable(ctypes.c_int, "InterruptPending")
# PostgreSQL's setting ``jit``. A SET clause of a function costs as much as a tenth of a search.
_jit = _variable(ctypes.c_bool, "jit_enabled")

_isolation = _variable(ctypes.c_int, "XactIsoLevel")
READ_COMMITTED = 1


def keeps_snapshot() -> bool:
    """Return whether all statements of the transaction see what its first one saw."""
    return bool(_isolation.value > READ_COMMITTED)


def stop_jit() -> bool:
    """Switch JIT off, since it takes longer than our statements, and return the previous value."""
    before = bool(_jit.value)
    _jit.value = False
    return before


def resume_jit(before: bool) -> None:
    """Restore the setting that ``stop_jit`` returned."""
    _jit.value = before


def pending() -> bool:
    """Return whether an interrupt waits: a cancel, a time-out, a shutdown or another."""
    return bool(_flag.value)


def check(plpy: Any) -> None:
    """Let PostgreSQL handle a pending interrupt. A cancel raises its error (57014 or 57P01)."""
    if _flag.value:
        plpy.execute("SELECT 1")


def portions(
    start: int, last: int, *, size: int, least: int, most: int
) -> Iterator[tuple[int, int]]:
    """Divide work into portions of about PIECE_SECONDS, measuring as it goes."""
    while start < last:
        end = min(last, start + size)
        began = time.monotonic()
        yield start, end
        seconds = max(1e-6, time.monotonic() - began)
        size = int(max(least, min(2 * size, most, (end - start) * PIECE_SECONDS / seconds)))
        start = end


def raise_if_pending() -> None:
    """Raise ``Interrupted`` in a call-back of a C library if an interrupt waits."""
    if _flag.value:
        raise Interrupted


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block all signals in this thread, and so in the threads that the body starts.

    PostgreSQL's handlers must run in the main thread. OpenMP and BLAS start worker threads lazily.
    These inherit the mask of the thread that starts them.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
