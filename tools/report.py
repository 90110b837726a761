"""Print the set-up's progress, and run other programs."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import ParamSpec

Arguments = ParamSpec("Arguments")


class SetupError(RuntimeError):
    """Something that the set-up can't do itself. The message says what failed and what to do."""


def say(text: str) -> None:
    """Print one line immediately, even to a pipe."""
    print(text, flush=True)


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Print what is being done, and at the end how long it took."""
    print(f"{what} …", end="", flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print(" failed", flush=True)
        raise
    print(f" {time.monotonic() - start:.1f} s", flush=True)


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment without what would leak into other programs' Python.

    That includes ``PYTHONPATH``, which the Makefile sets for the set-up alone.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return kept | dict(extra or {})


def run(
    command: Sequence[str | Path],
    *,
    failure: str,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    lines: int = 12,
) -> str:
    """Run a program and return its standard output, without output of its own unless it fails.

    Raises ``SetupError``, which starts with ``failure`` and ends with the program's last ``lines``.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env=dict(env) if env is not None else clean_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise SetupError(f"{failure}\n  {words[0]}: {error.strerror}") from None
    if done.returncode:
        last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        detail = "".join(f"\n  | {line}" for line in last[-lines:])
        raise SetupError(f"{failure}\n  command: {shlex.join(words)}{detail}")
    return done.stdout


def command(main: Callable[Arguments, int | None]) -> Callable[Arguments, int]:
    """Make a function return an exit status. Errors become the program's last line."""

    @wraps(main)
    def run_main(*arguments: Arguments.args, **named: Arguments.kwargs) -> int:
        try:
            return main(*arguments, **named) or 0
        except (SetupError, OSError) as error:
            sys.stdout.flush()
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1
        except KeyboardInterrupt:
            return 130

    return run_main
