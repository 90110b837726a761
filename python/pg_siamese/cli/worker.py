"""The command that embeds the rows of deferred collections."""

from __future__ import annotations

from typing import Annotated

import typer

from pg_siamese.cli.options import Dsn
from pg_siamese.cli.terminal import output, worker_display
from pg_siamese.client.connection import CommandError
from pg_siamese_server.errors import counted


def worker(
    collection: Annotated[
        list[str] | None,
        typer.Option(
            "--collection",
            "-c",
            help="Embed only this collection. Repeatable. Default: all that are deferred.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Rows per batch.")] = 256,
    once: Annotated[bool, typer.Option("--once", help="Exit when the queue is empty.")] = False,
    idle_timeout: Annotated[
        float | None, typer.Option(min=0, help="Exit after this many idle seconds.")
    ] = None,
    poll: Annotated[float, typer.Option(min=0.1, help="Polling interval in seconds.")] = 2.0,
    rebuild_pending: Annotated[
        int, typer.Option(min=1, help="Build the index at this many pending vectors.")
    ] = 20_000,
    rebuild_dead: Annotated[
        float, typer.Option(min=0, help="Build the index at this fraction of dead vectors.")
    ] = 0.2,
    rebuild: Annotated[
        bool, typer.Option("--rebuild/--no-rebuild", help="Whether to build indexes.")
    ] = True,
    dsn: Dsn = None,
) -> None:
    """Embed the queued rows of deferred collections.

    The worker runs until SIGTERM or Ctrl-C. Start any number of workers, on any machine that can
    reach the server. Each uses one core, and claims rows that no other worker holds. The role
    needs siamese.grant_worker.
    """
    from pg_siamese.worker import Options, Worker

    options = Options(
        dsn=dsn,
        collections=tuple(collection or ()),
        batch=batch,
        once=once,
        idle_timeout=idle_timeout,
        poll=poll,
        rebuild_pending=rebuild_pending if rebuild else None,
        rebuild_dead=rebuild_dead,
    )
    with worker_display() as show:
        running = Worker(options, progress=show)
        with running.signals.handled():
            totals = running.run()
    failed = f", {totals.failed:,} failed" if totals.failed else ""
    output().print(f"{counted(totals.stored, 'row')} embedded{failed}")
    if once and running.failures:
        name, reason = next(iter(running.failures.items()))
        raise CommandError(f'collection "{name}" could not be embedded: {reason}')
