"""Work that takes longer than an answer: it runs in a thread, and the page asks how far it is."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import psycopg

from pg_siamese.client.connection import PROGRESS_NOTICE
from pg_siamese.explore.failures import PageError, explain
from pg_siamese.explore.sessions import Connection, Session

MOST_JOBS, MOST_KEPT = 2, 8


class Job:
    """One piece of work.

    Attributes:
        name: random, for the page's address.
        title: what is done.
        back: address of the page that shows the outcome.
        state: running, done, failed or cancelled.
        done, total: how far it is, None if that is not known.
        outcome: what the work returned.
        error: why it failed.
    """

    def __init__(self, title: str, back: str, connection: Connection) -> None:
        self.name = secrets.token_hex(8)
        self.title = title
        self.back = back
        self.state: Literal["running", "done", "failed", "cancelled"] = "running"
        self.done: int | None = None
        self.total: int | None = None
        self.outcome: Any = None
        self.error: PageError | None = None
        self._connection = connection
        self._is_wanted = True

    def cancel(self) -> None:
        """Ask the server to stop."""
        self._is_wanted = False
        with suppress(psycopg.Error):
            self._connection.cancel_safe(timeout=5)

    def note(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        """Take the progress from a notice of the server."""
        found = PROGRESS_NOTICE.match(diagnostic.message_primary or "")
        if found is not None:
            self.done, self.total = int(found["done"]), int(found["total"])

    def run(self, work: Callable[[Connection], Any]) -> None:
        """Do it, and close the connection."""
        try:
            with self._connection as connection:
                connection.add_notice_handler(self.note)
                self.outcome = work(connection)
            self.state = "done"
        except Exception as error:
            self.error = explain(error)
            self.state = "failed" if self._is_wanted else "cancelled"


def start(
    session: Session,
    title: str,
    back: str,
    work: Callable[[Connection], Any],
    *,
    writes: bool = False,
) -> Job:
    """Begin some work on a connection of its own, without a time limit.

    Raises:
        PageError: too much is running already.
    """
    running = [job for job in session.jobs.values() if job.state == "running"]
    if len(running) >= MOST_JOBS:
        raise PageError(429, f"{running[0].title} is still running.", "Wait, or cancel it.")
    connection = session.open()
    connection.execute("SET statement_timeout = 0")
    connection.execute("SET client_min_messages = notice")
    if writes:
        connection.execute("SET default_transaction_read_only = off")
    job = Job(title, back, connection)
    session.jobs[job.name] = job
    while len(session.jobs) > MOST_KEPT:
        oldest = next(name for name, each in session.jobs.items() if each.state != "running")
        del session.jobs[oldest]
    threading.Thread(target=job.run, args=(work,), name=job.title, daemon=True).start()
    return job
