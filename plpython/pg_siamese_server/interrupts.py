"""Cancelling: C code under PL/Python never looks at PostgreSQL's interrupts, so we do.

A pending cancel is only a flag; without a look at it, the statement ends well and the *next* one of
the session is cancelled in its place. So work is done in pieces of at most about 100 ms, with
:func:`check` between them, and every entry point ends with one.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Seconds that one uninterruptible piece of work should take at most.
PIECE_SECONDS = 0.08


class Interrupted(Exception):
    """Raised inside foreign call-backs, where raising PostgreSQL's own error is not safe."""


def _find_flag() -> ctypes.c_int:
    try:
        return ctypes.c_int.in_dll(ctypes.CDLL(None), "InterruptPending")
    except ValueError:  # not inside a PostgreSQL backend: unit tests, clients
        return ctypes.c_int(0)


_flag = _find_flag()


def _find_jit() -> ctypes.c_bool:
    try:
        return ctypes.c_bool.in_dll(ctypes.CDLL(None), "jit_enabled")
    except ValueError:
        return ctypes.c_bool(False)


# What PostgreSQL's setting ``jit`` sets. A SET clause of a function costs as much as a tenth of a
# search.
_jit = _find_jit()


def stop_jit() -> bool:
    """Plan without JIT from now on, which takes longer than our statements; returns what was."""
    before = bool(_jit.value)
    _jit.value = False
    return before


def resume_jit(before: bool) -> None:
    """Plan as before :func:`stop_jit`."""
    _jit.value = before


def pending() -> bool:
    """Whether PostgreSQL has an interrupt waiting (a cancel, a time-out, a shutdown, or others)."""
    return bool(_flag.value)


def check(plpy: Any) -> None:
    """Let PostgreSQL handle a pending interrupt; a cancel raises its error (57014, 57P01)."""
    if _flag.value:
        plpy.execute("SELECT 1")


def raise_if_pending() -> None:
    """Leave a call-back of a C library when an interrupt waits."""
    if _flag.value:
        raise Interrupted


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block all signals in this thread, and so in the threads that the body starts.

    PostgreSQL's handlers expect to run in the main thread. OpenMP and BLAS start worker threads
    lazily; they inherit the mask of the thread that starts them.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
