"""Failures that a user can act on, as one line without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import typer
from rich.markup import escape
from typer.core import TyperGroup

from pg_siamese import caches
from pg_siamese.cli.terminal import errors
from pg_siamese.client.connection import CommandError, describe_error, one_line

INTERRUPTED = 130


class Commands(TyperGroup):
    """Shows every failure that is not a bug as one line on stderr, with exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Expected errors end the process without a traceback."""
        caches.set_aside()
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            message = describe_failure(error)
            if message is None:
                raise
            code = error.exit_code if isinstance(error, CommandError) else 1
            code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else code
        errors().print(f"[bold red]error:[/] {escape(one_line(message))}", soft_wrap=True)
        raise typer.Exit(code)


@contextmanager
def extra_packages(extra: str) -> Iterator[None]:
    """Say which packages to install if the body can't import them."""
    try:
        yield
    except ImportError as error:
        raise CommandError(
            f"this needs the extra packages of pg_siamese[{extra}]: {error}"
        ) from error


def describe_failure(error: BaseException) -> str | None:
    """Return what to say of an error that a user can cause, None for one that is a bug."""
    from pg_siamese.datasets import DataFormatError

    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, CommandError | DataFormatError):
        return str(error)
    if isinstance(error, psycopg.Error):
        return describe_error(error)
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        named = error.filename is not None and error.strerror is not None
        return f"{error.filename}: {error.strerror}" if named else str(error)
    return None
