"""What the terminal shows: results as tables, progress bars, and the server's notices."""

from __future__ import annotations

import re
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

from pg_siamese_server.errors import counted

if TYPE_CHECKING:
    import psycopg

    from pg_siamese.client.queries import Answer, Collection
    from pg_siamese.worker import Totals

# 'building index of collection "images": 40% (28000 of 70000 vectors)'
PROGRESS_NOTICE = re.compile(r"^(?P<what>.+): \d+% \((?P<done>\d+) of (?P<total>\d+) \w+\)")


def output() -> Console:
    """The console for results; made anew, since tests exchange ``sys.stdout``."""
    console = Console(highlight=False)
    # A file or a pipe has no width of its own to wrap at.
    return console if console.is_terminal else Console(highlight=False, width=200)


def errors() -> Console:
    """The console for progress, notices and errors: stderr."""
    return Console(stderr=True, highlight=False)


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; yields a function that moves it on by so many steps."""
    with _progress(errors()) as progress:
        task = progress.add_task(escape(description), total=total)
        yield lambda count: progress.advance(task, count)


@contextmanager
def notice_bar(connection: psycopg.Connection[Any], description: str) -> Iterator[None]:
    """A bar that the server moves by its progress notices; other notices are printed above it."""
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
        # The server reports now and then, not at the end; of short work it reports nothing.
        total = progress.tasks[task].total or 1
        progress.update(task, completed=total, total=total)


class WorkerLine:
    """What a worker shows: lines on what happens, and what it has done, on stderr.

    On a terminal the latter is one line that moves; else, for a log, a line a minute at most.
    """

    LOG_SECONDS = 60.0

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("waiting for rows", total=None)
        self._began = self._logged = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line."""
        self._progress.console.print(escape(text), soft_wrap=True)

    def show(self, totals: Totals) -> None:
        """Show what is done so far."""
        now = time.monotonic()
        rate = totals.stored / max(now - self._began, 1e-3)
        failed = f", {totals.failed:,} failed" if totals.failed else ""
        text = f"{counted(totals.stored, 'row')} embedded ({rate:,.0f}/s){failed}"
        self._progress.update(self._task, description=text)
        if not self._progress.console.is_terminal and now - self._logged >= self.LOG_SECONDS:
            self._logged = now
            self.say(text)


@contextmanager
def worker_line() -> Iterator[WorkerLine]:
    """Show what a worker does, while the body runs."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    console = errors()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as p:
        yield WorkerLine(p)


class _Count(ProgressColumn):
    """How many of how many, where that is known."""

    def render(self, task: Task) -> Text:
        """The text for a task."""
        if task.total is None or task.total <= 1:
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
    """The neighbours as a table for the terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("rank", justify="right")
    table.add_column(collection.key_name, justify="right")
    table.add_column("distance", justify="right")
    # A model without calibration has no match probability to show.
    calibrated = any(answer.similarity is not None for answer in answers)
    if calibrated:
        table.add_column("similarity", justify="right")
    for name in collection.shown_columns:
        table.add_column(name, overflow="fold")
    for answer in answers:
        cells = [str(answer.rank), escape(answer.key), f"{answer.distance:.4f}"]
        if calibrated:
            cells.append("" if answer.similarity is None else f"{answer.similarity:.3f}")
        cells += [escape(value or "") for value in answer.values.values()]
        table.add_row(*cells)
    return table
