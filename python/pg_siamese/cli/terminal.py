"""What the terminal shows: results as tables, progress bars, the server's notices, the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from pg_siamese.client.connection import PROGRESS_NOTICE
from pg_siamese_server.errors import counted

if TYPE_CHECKING:
    import psycopg

    from pg_siamese.client.queries import Answer, Collection
    from pg_siamese.worker import Totals

LOGGER = logging.getLogger("pg_siamese")
LOG_SECONDS = 60.0


def output() -> Console:
    """Return the console for results. It is made anew, since tests exchange ``sys.stdout``."""
    console = Console(highlight=False)
    # A file or a pipe has no width of its own to wrap at.
    return console if console.is_terminal else Console(highlight=False, width=200)


def errors() -> Console:
    """Return the console for progress, notices, the log and errors: stderr."""
    return Console(stderr=True, highlight=False)


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr. Yield a function that moves it on by a number of steps."""
    with _progress(errors()) as progress:
        task = progress.add_task(escape(description), total=total)
        yield lambda count: progress.advance(task, count)


@contextmanager
def notice_bar(connection: psycopg.Connection[Any], description: str) -> Iterator[None]:
    """Show a bar that the server's progress notices move. Other notices are printed above it."""
    console = errors()
    with _progress(console) as progress:
        task = progress.add_task(escape(description), total=None)

        def show(diagnostic: psycopg.errors.Diagnostic) -> None:
            message = diagnostic.message_primary or ""
            if found := PROGRESS_NOTICE.match(message):
                progress.update(task, completed=int(found["done"]), total=int(found["total"]))
            else:
                severity = (diagnostic.severity or "NOTICE").lower()
                progress.console.print(f"{severity}: {escape(message)}", soft_wrap=True)

        connection.execute("SET client_min_messages = notice")
        connection.add_notice_handler(show)
        try:
            yield
        finally:
            connection.remove_notice_handler(show)
        # The server reports now and then, but not the end, and nothing of short work.
        total = progress.tasks[task].total or 1
        progress.update(task, completed=total, total=total)


class _ConsoleHandler(logging.Handler):
    """Prints records above what moves on a console: ``2026-01-31 12:00:00,123 WARNING …``."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), markup=False, soft_wrap=True)


@contextmanager
def log_to(console: Console) -> Iterator[None]:
    """Print the client's log on a console while the body runs, from level INFO on."""
    handler = _ConsoleHandler(console)
    before = LOGGER.level
    LOGGER.setLevel(logging.INFO)
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before)


@contextmanager
def worker_display() -> Iterator[Callable[[Totals], None]]:
    """Show a worker's log on stderr. Yield a function that shows what it has done so far.

    That is one line that moves, or at most one line per minute in a log.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    console = errors()
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = shown.add_task("waiting for rows", total=None)
    began = logged = time.monotonic()

    def show(totals: Totals) -> None:
        nonlocal logged
        now = time.monotonic()
        rate = totals.stored / max(now - began, 1e-3)
        failed = f", {totals.failed:,} failed" if totals.failed else ""
        text = f"{counted(totals.stored, 'row')} embedded ({rate:,.0f}/s){failed}"
        shown.update(task, description=text)
        if not console.is_terminal and now - logged >= LOG_SECONDS:
            logged = now
            LOGGER.info(text)

    with shown, log_to(console):
        yield show


class _Count(ProgressColumn):
    """How many, and of how many if that is known."""

    def render(self, task: Task) -> Text:
        """Return the text for a task."""
        if task.total is None:
            return Text(f"{task.completed:,.0f}" if task.completed else "")
        if task.total <= 1:
            return Text("")
        return Text(f"{task.completed:,.0f} of {task.total:,.0f}")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        _Count(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


def answer_table(collection: Collection, answers: list[Answer]) -> Table:
    """Return the neighbours as a table for the terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("rank", justify="right")
    table.add_column(collection.key_name, justify="right")
    if collection.has_frames:
        table.add_column("frame", justify="right")
    table.add_column("distance", justify="right")
    # A model without calibration has no match probability to show.
    calibrated = any(answer.similarity is not None for answer in answers)
    if calibrated:
        table.add_column("similarity", justify="right")
    for name in collection.shown_columns:
        table.add_column(name, overflow="fold")
    for answer in answers:
        cells = [str(answer.rank), escape(answer.key)]
        if collection.has_frames:
            cells.append(str(answer.frame))
        cells.append(f"{answer.distance:.4f}")
        if calibrated:
            cells.append("" if answer.similarity is None else f"{answer.similarity:.3f}")
        cells += [escape(value or "") for value in answer.values.values()]
        table.add_row(*cells)
    return table
