"""Embed the rows of tickets, inside the server or in a worker's own process.

A batch is one transaction at least. It takes (locks) tickets, and reads and embeds their images.
It stores the vectors of images that are still the same. If the transaction ends before its commit,
the tickets stay as they were.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pg_siamese_server import interrupts, vectors
from pg_siamese_server.catalog import (
    Collection,
    collection_by_id,
    lock_table,
    locked_collection,
    prepare,
)
from pg_siamese_server.encoding import batches, models
from pg_siamese_server.encoding.batches import FIRST_ROWS, MAX_ROWS_AT_ONCE, next_portion
from pg_siamese_server.errors import CANCELLED as CANCELLED
from pg_siamese_server.errors import (
    OBJECT_NOT_IN_PREREQUISITE_STATE,
    OUT_OF_MEMORY,
    ImageError,
    ModelError,
    SiameseError,
)
from pg_siamese_server.limits import MODELS_OWN, Limits
from pg_siamese_server.progress import EMBEDDING, Progress, reported

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pg_siamese_server.encoding.encoder import Encoder

Row = tuple[str, bytes | None]
# With all frames of images, a row can have as many alone. Then the others stay in their tickets.
MAX_RESULTS = 10_000


class Result(NamedTuple):
    """A row's vector, or else its failure: a ``siamese.embedding_result``.

    The key is text. The digest is the SHA-256 of the image. If all frames are embedded, each has a
    result, and one is representative.
    """

    key: str
    digest: bytes | None
    embedding: str | None = None
    sqlstate: str | None = None
    message: str | None = None
    may_retry: bool | None = None
    frame: int | None = None
    representative: bool | None = None


@dataclass
class Results:
    """Results of the rows of some tickets. Keys in ``seen`` may have none."""

    seen: list[str] = field(default_factory=list)
    rows: list[Result] = field(default_factory=list)

    def keys(self) -> set[str]:
        """Return the keys of rows that have a result."""
        return {row.key for row in self.rows}


class Database(Protocol):
    """The three functions of schema ``siamese`` that a batch calls, in one transaction."""

    def take(self, collection_id: int, max_rows: int) -> list[tuple[int, list[str]]]:
        """Return tickets that were free, with their keys."""

    def read(self, collection_id: int, keys: Sequence[str]) -> list[Row]:
        """Return keys and images of rows without a vector."""

    def store(self, collection_id: int, sha256: str, tickets: list[int], results: Results) -> int:
        """Store vectors and failures, and return the number of vectors."""


@dataclass(frozen=True)
class Outcome:
    """Counts of one batch: vectors stored, rows failed, rows that needed nothing."""

    stored: int = 0
    failed: int = 0
    settled: int = 0

    def __bool__(self) -> bool:
        """Return whether it did anything. If not, others are changing the rows that are left."""
        return bool(self.stored or self.failed or self.settled)


def embed_batch(
    database: Database,
    collection_id: int,
    sha256: str,
    encoder: Encoder,
    max_rows: int,
    poll: Callable[[], None],
    seconds: float | None = None,
    limits: Limits = MODELS_OWN,
    frames: str = "one",
) -> Outcome:
    """Take some tickets and embed their rows. The caller commits.

    Args:
        database: the functions that take, read and store.
        collection_id: of the collection.
        sha256: of the model that ``encoder`` was opened with.
        encoder: of the collection.
        max_rows: about how many.
        poll: called often, may raise to stop: plpy's errors, or what is no ``Exception``.
        seconds: stop after these, and leave the other rows in their tickets.
        limits: of the collection.
        frames: of the collection: ``one`` of an image, or ``all``.
    """
    tickets = database.take(collection_id, max_rows)
    if not tickets:
        return Outcome()
    # Sorted, so that two batches with the same rows can't wait for each other.
    keys = sorted(list(dict.fromkeys(key for _, ticket in tickets for key in ticket))[:max_rows])
    results = Results()
    started = time.monotonic()
    has_frames = frames == "all"
    place, count = 0, 1 if has_frames else FIRST_ROWS
    while place < len(keys):
        portion = keys[place : place + count]
        place += len(portion)
        rows = database.read(collection_id, portion)
        results.seen += portion
        results.rows += _embed(encoder, rows, poll, limits, frames)
        if rows and not has_frames:
            count = next_portion(len(rows), sum(len(image or b"") for _, image in rows))
        if seconds is not None and time.monotonic() - started >= seconds:
            break
        if has_frames and len(results.rows) >= MAX_RESULTS:
            break
    stored = database.store(collection_id, sha256, [ticket for ticket, _ in tickets], results)
    failed = sum(row.embedding is None for row in results.rows)
    return Outcome(stored, failed, len(results.seen) - len(results.keys()))


def _embed(
    encoder: Encoder, rows: list[Row], poll: Callable[[], None], limits: Limits, frames: str
) -> list[Result]:
    digests = {
        key: None if image is None else hashlib.sha256(image).digest() for key, image in rows
    }
    failed: list[Result] = []

    def fail(key: str, error: SiameseError) -> None:
        # The same bytes are not decoded another time either, but the graph may well run again.
        may_retry = not isinstance(error, ImageError)
        failed.append(Result(key, digests[key], None, error.sqlstate, error.message, may_retry))

    try:
        if frames == "all":
            good = [
                result
                for key, chosen, embeddings in batches.embed_frames(
                    encoder, rows, fail, poll, limits
                )
                for result in _of_frames(key, digests[key], chosen, embeddings, poll)
            ]
        else:
            keys, embeddings = batches.embed(encoder, rows, fail, poll, limits)
            good = [
                Result(key, digests[key], vectors.to_text(embedding))
                for key, embedding in zip(keys, embeddings, strict=True)
            ]
    except (ModelError, MemoryError) as error:
        if len(rows) == 1:
            fail(rows[0][0], _described(error))
            return failed
        # One by one, so that only the row at fault fails.
        return [result for row in rows for result in _embed(encoder, [row], poll, limits, frames)]
    return failed + good


def _of_frames(
    key: str,
    digest: bytes | None,
    representative: int,
    embeddings: NDArray[np.float32],
    poll: Callable[[], None],
) -> Iterator[Result]:
    for frame, embedding in enumerate(embeddings, 1):
        poll()
        text = vectors.to_text(embedding)
        yield Result(key, digest, text, frame=frame, representative=frame == representative)


def _described(error: ModelError | MemoryError) -> SiameseError:
    if isinstance(error, ModelError):
        message = f"{error.message}: {error.detail}" if error.detail else error.message
        return ModelError(message, sqlstate=error.sqlstate)
    return SiameseError("out of memory", sqlstate=OUT_OF_MEMORY)


class _Server:
    """The functions of a batch, called by PL/Python."""

    def __init__(self, plpy: Any) -> None:
        self.plpy = plpy

    def take(self, collection_id: int, max_rows: int) -> list[tuple[int, list[str]]]:
        rows = self._run(
            "SELECT ticket, keys FROM siamese._take_tickets($1, $2)",
            ("integer", "integer"),
            collection_id,
            max_rows,
        )
        return [(row["ticket"], row["keys"]) for row in rows]

    def read(self, collection_id: int, keys: Sequence[str]) -> list[Row]:
        rows = self._run(
            "SELECT key, image FROM siamese._read_images($1, $2)",
            ("integer", "text[]"),
            collection_id,
            list(keys),
        )
        return [(row["key"], row["image"]) for row in rows]

    def store(self, collection_id: int, sha256: str, tickets: list[int], results: Results) -> int:
        rows = self._run(
            "SELECT siamese._store_vectors($1, $2, $3, $4, $5) AS stored",
            ("integer", "text", "bigint[]", "text[]", "siamese.embedding_result[]"),
            collection_id,
            sha256,
            tickets,
            results.seen,
            results.rows,
        )
        return int(rows[0]["stored"])

    def _run(self, sql: str, types: tuple[str, ...], *values: Any) -> Any:
        return prepare(self.plpy, sql, types).execute(list(values))


def embed_pending(plpy: Any, name: str | None, max_rows: int | None) -> int:
    """Embed queued rows in the server, and return the number of vectors stored.

    If a collection can't be embedded, raise an error if it was named. Otherwise send a WARNING and
    continue with the others.
    """
    if max_rows is not None and max_rows < 1:
        raise SiameseError("max_rows must be positive")
    if name is not None:
        collection = locked_collection(plpy, name)
        if collection.embed != "deferred":
            raise SiameseError(
                f'collection "{collection.name}" is not deferred',
                hint="Rows of this collection are embedded as they are written; backfill embeds"
                " those that were not.",
            )
        with reported(plpy, "embed_pending", collection) as progress:
            return embed_collection(plpy, collection, max_rows, progress)
    stored = 0
    deferred = plpy.execute(
        "SELECT c.collection_id, c.name FROM siamese.collections AS c"
        " INNER JOIN pg_catalog.pg_class AS r ON r.oid = c.relation::oid"
        " WHERE c.embed = 'deferred' ORDER BY c.collection_id"
    )
    for row in deferred:
        left = None if max_rows is None else max_rows - stored
        if left is not None and left <= 0:
            break
        try:
            with plpy.subtransaction():
                # One queue at a time, since the lock of its table comes before it.
                number = row["collection_id"]
                if not (lock_table(plpy, number) and _has_tickets(plpy, number)):
                    continue
                collection = collection_by_id(plpy, number)
                with reported(plpy, "embed_pending", collection) as progress:
                    stored += embed_collection(plpy, collection, left, progress)
        except SiameseError as error:
            _warn(plpy, row["name"], error.message)
        except plpy.SPIError as error:
            if error.sqlstate in CANCELLED:
                raise
            _warn(plpy, row["name"], str(error))
    return stored


def _has_tickets(plpy: Any, collection_id: int) -> bool:
    due = "q.not_before IS NULL OR q.not_before <= clock_timestamp()"
    query = f"SELECT FROM siamese.queue_{collection_id} AS q WHERE {due} LIMIT 1"
    return bool(plpy.execute(query).nrows())


def _warn(plpy: Any, name: str, reason: str) -> None:
    plpy.warning(
        f'collection "{name}" was not embedded: {reason}',
        sqlstate=OBJECT_NOT_IN_PREREQUISITE_STATE,
        hint="Its rows stay queued.",
    )


def embed_collection(
    plpy: Any, collection: Collection, max_rows: int | None, progress: Progress
) -> int:
    """Embed queued rows of one collection, and return the number of vectors stored."""
    queued = f"SELECT coalesce(sum(cardinality(q.keys)), 0)::int8 AS n FROM {collection.queue} AS q"
    total = int(plpy.execute(queued)[0]["n"])
    progress.enter(EMBEDDING, total if max_rows is None else min(total, max_rows))
    encoder = models.encoder(plpy, collection.model_id)
    database = _Server(plpy)
    poll = partial(interrupts.check, plpy)
    stored = done = 0
    while max_rows is None or stored < max_rows:
        wanted = MAX_ROWS_AT_ONCE if max_rows is None else min(MAX_ROWS_AT_ONCE, max_rows - stored)
        outcome = embed_batch(
            database,
            collection.collection_id,
            collection.sha256,
            encoder,
            wanted,
            poll,
            limits=collection.limits,
            frames=collection.frames,
        )
        if not outcome:
            break
        stored += outcome.stored
        done += outcome.stored + outcome.failed + outcome.settled
        progress.report(done)
    return stored
