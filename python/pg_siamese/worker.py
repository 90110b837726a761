"""Deferred embedding in a process of its own: `pg_siamese worker`.

Several workers may run at once, on several machines. Each takes tickets that no other worker holds
(FOR UPDATE SKIP LOCKED), embeds their images with the server package's code, and stores the
vectors, all in one transaction. If a worker dies, its transaction is rolled back and its tickets
are free again. Over a second connection it records beforehand what it starts. So a ticket that
crashed workers is split into single rows, and a row that crashes every worker is given up.
"""

from __future__ import annotations

import hashlib
import logging
import random
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import psycopg
from psycopg.types.composite import CompositeInfo, register_composite

import pg_siamese_server
from pg_siamese.client.connection import CommandError, NoServerError, connect, describe_error
from pg_siamese_server.encoding.encoder import Encoder
from pg_siamese_server.encoding.open_encoders import OpenEncoders
from pg_siamese_server.encoding.specification import ModelSpec
from pg_siamese_server.errors import SiameseError, counted
from pg_siamese_server.limits import Limits
from pg_siamese_server.writing.deferred import Result, Results, Row, embed_batch

LOGGER = logging.getLogger(__name__)
CHANNEL = "pg_siamese_queue"
# Held during a batch. It tells siamese.progress whose batch it is.
LOCK_CLASS = "pg_catalog.hashtext('pg_siamese worker')"
# A batch ends after this, so that it releases its locks and others see its vectors.
BATCH_SECONDS = 2.0
# A hung worker must release its locks in time, and no table's lock is worth a long wait.
SETTINGS = {"idle_in_transaction_session_timeout": "5min", "lock_timeout": "5s"}
FIRST_RECONNECT_SECONDS, LAST_RECONNECT_SECONDS = 0.5, 30.0
# How long a collection is skipped after a failure that concerns all of its rows.
BUSY_SECONDS, BROKEN_SECONDS = 2.0, 60.0
REBUILD_SECONDS = 10.0

# Errors that pass.
BUSY = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
)
# Errors of a collection that was dropped meanwhile. It is not in the next list.
GONE = (psycopg.errors.UndefinedFunction, psycopg.errors.UndefinedTable, psycopg.errors.NoDataFound)

Connection = psycopg.Connection[Any]


class Stopped(BaseException):
    """A signal asked the worker to end. It is no ``Exception``, which is a bad image's."""


@dataclass(frozen=True)
class Options:
    """What a worker does.

    Attributes:
        dsn: libpq connection string, or None for the PG* variables.
        collections: names, or none for all that are deferred.
        batch: rows per batch.
        once: end when the queue is empty.
        idle_timeout: end after this many idle seconds, or None.
        poll: polling interval in seconds, if no notification comes.
        rebuild_pending: build the index at this many pending vectors, or None for never.
        rebuild_dead: build it at this fraction of dead vectors.
    """

    dsn: str | None = None
    collections: Sequence[str] = ()
    batch: int = 256
    once: bool = False
    idle_timeout: float | None = None
    poll: float = 2.0
    rebuild_pending: int | None = 20_000
    rebuild_dead: float = 0.2


@dataclass
class Totals:
    """What a worker has done."""

    stored: int = 0
    failed: int = 0
    builds: int = 0


class Signals:
    """SIGTERM and SIGINT as a flag that also ends a wait. A second SIGINT interrupts."""

    def __init__(self) -> None:
        self._stopping = False
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self.on_stop: Callable[[], None] | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals while the body runs, in the main thread only."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop()

    def stop(self) -> None:
        """Ask the worker to end."""
        self._stopping = True
        self._writer.send(b"x")
        if self.on_stop is not None:
            self.on_stop()

    def stopping(self) -> bool:
        """Return whether a signal came."""
        return self._stopping

    def check(self) -> None:
        """Raise :class:`Stopped` if a signal came."""
        if self._stopping:
            raise Stopped

    def wait(self, seconds: float, *files: int) -> None:
        """Wait for a signal, for something to read from ``files``, or for ``seconds``."""
        if not self._stopping:
            select.select([self._reader.fileno(), *files], [], [], seconds)


@dataclass
class Database:
    """The functions of a batch over one connection. Another one keeps what this one rolls back."""

    connection: Connection
    notes: Connection

    @contextmanager
    def batch(self, collection_id: int) -> Iterator[None]:
        """Run one transaction. If it fails, its tickets do not count as those of a dead worker."""
        taken: list[int] = []
        self._taken = taken
        try:
            with self.connection.transaction():
                yield
        except BaseException:
            if taken and not (self.notes.closed or self.notes.broken):
                with suppress(psycopg.Error):  # what ended the batch tells more
                    self.notes.execute(
                        "SELECT siamese._end_tickets(%s, %s)", (collection_id, taken)
                    )
            raise

    def take(self, collection_id: int, max_rows: int) -> list[tuple[int, list[str]]]:
        """Return tickets that were free, with their keys, and record their start."""
        rows = self.connection.execute(
            "SELECT ticket, keys FROM siamese._take_tickets(%s, %s)", (collection_id, max_rows)
        ).fetchall()
        if rows:
            self.connection.execute(
                f"SELECT pg_catalog.pg_try_advisory_xact_lock_shared({LOCK_CLASS}, %s)",
                (collection_id,),
            )
            self._taken += [ticket for ticket, _ in rows]
            self.notes.execute(
                "SELECT siamese._begin_tickets(%s, %s)", (collection_id, self._taken)
            )
        return rows

    def read(self, collection_id: int, keys: Sequence[str]) -> list[Row]:
        """Return keys and images of rows without a vector."""
        return self.connection.execute(
            "SELECT key, image FROM siamese._read_images(%s, %s::text[])",
            (collection_id, list(keys)),
            binary=True,
        ).fetchall()

    def store(self, collection_id: int, sha256: str, tickets: list[int], results: Results) -> int:
        """Store vectors and failures; return how many vectors."""
        # In binary: as text, vectors would be escaped twice, for the row and for the array.
        info = CompositeInfo.fetch(self.connection, "siamese.embedding_result")
        if info and self.connection.adapters.types.get(info.oid) is None:
            register_composite(info, self.connection, Result)
        row = self.connection.execute(
            "SELECT siamese._store_vectors("
            "%s, %s, %s::bigint[], %s::text[], %b::siamese.embedding_result[])",
            (collection_id, sha256, tickets, results.seen, results.rows),
        ).fetchone()
        assert row is not None
        return int(row[0])


@dataclass
class Worker:
    """One worker. :meth:`run` returns when it is done or a signal came.

    Attributes:
        options: what it does.
        progress: called after each batch, with the totals.
        signals: those that end it.
        totals: what it has done.
        failures: why the collections that it skips can't be embedded, by name.
    """

    options: Options
    progress: Callable[[Totals], None] = lambda totals: None
    signals: Signals = field(default_factory=Signals)
    totals: Totals = field(default_factory=Totals)
    failures: dict[str, str] = field(default_factory=dict)
    _held: dict[int, float] = field(default_factory=dict)
    _encoders: OpenEncoders = field(default_factory=OpenEncoders)
    _notified: bool = False
    _rebuilt_at: float = 0.0
    _busy_at: float = 0.0

    def run(self) -> Totals:
        """Work until there is a reason to end.

        Raises:
            CommandError: the worker can't go on.
        """
        attempt = 0
        connected = False
        while not self.signals.stopping():
            try:
                dsn = self.options.dsn
                with connect(dsn) as connection, connect(dsn) as notes:
                    connected, attempt = True, 0
                    self._serve(connection, notes)
                    break
            except Stopped:
                break
            except (psycopg.OperationalError, psycopg.InterfaceError, NoServerError) as error:
                if self.signals.stopping():
                    break
                if not connected:  # mistaken from the start, most likely
                    raise
                delay = min(FIRST_RECONNECT_SECONDS * 2**attempt, LAST_RECONNECT_SECONDS)
                delay *= random.uniform(0.8, 1.2)  # workers must not come back all at once
                attempt += 1
                reason = describe_error(error) if isinstance(error, psycopg.Error) else str(error)
                LOGGER.warning("no connection: %s; next try in %.1f s", reason, delay)
                self.signals.wait(delay)
        return self.totals

    def _serve(self, connection: Connection, notes: Connection) -> None:
        for each in (connection, notes):
            each.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            for name, value in SETTINGS.items():
                each.execute("SELECT pg_catalog.set_config(%s, %s, false)", (name, value))
        connection.add_notify_handler(self._on_notification)
        connection.execute(f"LISTEN {CHANNEL}")
        _check_collections(connection, self.options.collections)
        self._busy_at = time.monotonic()
        while True:
            self.signals.check()
            self._notified = False
            try:
                is_any = self._round(connection, notes)
                if is_any:
                    self._busy_at = time.monotonic()
                self._rebuild(connection, at_end=self.options.once and not is_any)
            except psycopg.Error as error:
                if connection.broken or notes.broken:
                    raise
                _check_version(connection)  # it may be gone
                if not isinstance(error, BUSY):
                    raise
                LOGGER.warning("paused for %.0f s: %s", BUSY_SECONDS, describe_error(error))
                self.signals.wait(BUSY_SECONDS)
                continue
            if is_any:
                continue
            if self.options.once:
                return
            idle = time.monotonic() - self._busy_at
            timeout = self.options.idle_timeout
            if timeout is not None and idle >= timeout:
                return
            if not self._notified:
                left = self.options.poll if timeout is None else timeout - idle
                self.signals.wait(min(self.options.poll, left), connection.fileno())

    def _on_notification(self, notification: psycopg.Notify) -> None:
        self._notified = True

    def _round(self, connection: Connection, notes: Connection) -> bool:
        """Do one batch of each collection that has tickets. Return whether anything was done."""
        _check_version(connection)  # each time: it may be upgraded meanwhile
        queued = connection.execute(
            "SELECT q.collection_id, q.name, q.model_id, q.sha256, c.frames,"
            " c.max_bytes, c.max_pixels, c.dicom_window"
            " FROM siamese._queued_collections() AS q"
            " INNER JOIN siamese.collections AS c USING (collection_id)"
        ).fetchall()
        is_any = False
        for collection_id, name, model_id, sha256, frames, *limits in queued:
            if self.options.collections and name not in self.options.collections:
                continue
            if self._held.get(collection_id, 0.0) > time.monotonic():
                continue
            self.signals.check()
            try:
                given_up = self._isolate(connection, collection_id, name)
                encoder = self._encoder(connection, model_id, sha256)
                database = Database(connection, notes)
                with database.batch(collection_id):
                    outcome = embed_batch(
                        database,
                        collection_id,
                        sha256,
                        encoder,
                        self.options.batch,
                        self.signals.check,
                        BATCH_SECONDS,
                        Limits(*limits),
                        frames,
                    )
            except SiameseError as error:
                self._hold(collection_id, name, error.message, BROKEN_SECONDS)
                continue
            except psycopg.Error as error:
                if connection.broken or notes.broken:
                    raise
                self._judge(collection_id, name, error)
                continue
            self.failures.pop(name, None)
            self.totals.stored += outcome.stored
            self.totals.failed += outcome.failed
            is_any = is_any or bool(outcome) or given_up > 0
            self.progress(self.totals)
        return is_any

    def _isolate(self, connection: Connection, collection_id: int, name: str) -> int:
        """Split tickets that crashed workers. Return how many rows were given up."""
        row = connection.execute("SELECT siamese._isolate_tickets(%s)", (collection_id,)).fetchone()
        given_up = int(row[0]) if row else 0
        if given_up:
            self.totals.failed += given_up
            LOGGER.error(
                'gave up on %s of "%s": each crashed its worker', counted(given_up, "row"), name
            )
        return given_up

    def _judge(self, collection_id: int, name: str, error: psycopg.Error) -> None:
        """Decide what an error of a batch means. The batch is rolled back."""
        if isinstance(error, psycopg.errors.InsufficientPrivilege):
            raise CommandError(
                f"{describe_error(error)}; grant the role siamese.grant_worker"
            ) from error
        if isinstance(error, BUSY + GONE):
            self._held[collection_id] = time.monotonic() + BUSY_SECONDS
        else:
            self._hold(collection_id, name, describe_error(error), BROKEN_SECONDS)

    def _hold(self, collection_id: int, name: str, reason: str, seconds: float) -> None:
        self._held[collection_id] = time.monotonic() + seconds
        self.failures[name] = reason
        LOGGER.error('collection "%s" skipped for %.0f s: %s', name, seconds, reason)

    def _encoder(self, connection: Connection, model_id: int, sha256: str) -> Encoder:
        """Return a model's encoder. Raise SiameseError if it is not what it should be."""
        row = connection.execute(
            "SELECT specification FROM siamese.models WHERE model_id = %s AND sha256 = %s",
            (model_id, sha256),
        ).fetchone()
        if row is None:
            raise SiameseError("its model no longer exists")
        specification = row[0]

        def read() -> tuple[bytes, ModelSpec]:
            data = connection.execute(
                "SELECT onnx FROM siamese.models WHERE model_id = %s", (model_id,), binary=True
            ).fetchone()
            if data is None or hashlib.sha256(data[0]).hexdigest() != sha256:
                raise SiameseError("the ONNX file of its model does not match its SHA-256")
            return data[0], ModelSpec.from_json(specification)

        return self._encoders.get(sha256, str(specification), read)

    def _rebuild(self, connection: Connection, at_end: bool = False) -> None:
        """Build indexes that have fallen behind, now and then. One worker at a time does."""
        pending = self.options.rebuild_pending
        now = time.monotonic()
        if pending is None or (now - self._rebuilt_at < REBUILD_SECONDS and not at_end):
            return
        self._rebuilt_at = now
        rows = connection.execute(
            "SELECT collection_id, name FROM siamese.collections WHERE embed = 'deferred'"
        ).fetchall()
        for collection_id, name in rows:
            if self.options.collections and name not in self.options.collections:
                continue
            self.signals.check()
            self.signals.on_stop = connection.cancel_safe
            try:
                row = connection.execute(
                    "SELECT siamese._build_if_needed(%s, %s, %s::real)",
                    (collection_id, pending, self.options.rebuild_dead),
                ).fetchone()
            except psycopg.errors.QueryCanceled:
                self.signals.check()
                raise
            except (*BUSY, *GONE, psycopg.errors.UndefinedObject):
                if connection.closed or connection.broken:
                    raise
                continue
            except psycopg.Error as error:
                if connection.closed or connection.broken:
                    raise
                LOGGER.error('index of "%s" was not built: %s', name, describe_error(error))
                self._rebuilt_at = now + BROKEN_SECONDS
                continue
            finally:
                self.signals.on_stop = None
            if row is not None and row[0] is not None:
                self.totals.builds += 1
                LOGGER.info('index of "%s" built: generation %s', name, row[0])


def _check_version(connection: Connection) -> None:
    row = connection.execute(
        "SELECT extversion FROM pg_catalog.pg_extension WHERE extname = 'pg_siamese'"
    ).fetchone()
    if row is None:
        raise CommandError("the database no longer has the extension pg_siamese")
    installed = row[0]
    if installed != pg_siamese_server.__version__:
        raise CommandError(
            f"this worker has version {pg_siamese_server.__version__}, but the database has "
            f"version {installed} of the extension: use a worker of the same version"
        )


def _check_collections(connection: Connection, names: Sequence[str]) -> None:
    try:
        known = dict(connection.execute("SELECT name, embed FROM siamese.collections").fetchall())
    except psycopg.errors.InsufficientPrivilege as error:
        raise CommandError(
            f"{describe_error(error)}; grant the role siamese.grant_worker"
        ) from error
    for name in names:
        if name not in known:
            raise CommandError(f'collection "{name}" does not exist')
        if known[name] != "deferred":
            raise CommandError(f'collection "{name}" is not deferred')
