"""Keeping vectors in step with images: triggers and backfill.

Whatever the event, the table's present content decides, read in the statement's own transaction: a
row may have been changed again, by other triggers, before ours runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server import batches, deferred, interrupts, models, vectors
from pg_siamese_server.batches import FIRST_ROWS, next_portion
from pg_siamese_server.catalog import Collection, collection_by_id, collection_by_name, prepare
from pg_siamese_server.encoder import Encoder
from pg_siamese_server.errors import ImageError, SiameseError, counted

NOTICE_SECONDS = 2.0
# Text only: an exception would hold on to its frames, and so to an open cursor.
Failure = tuple[Any, str, str]


def on_change(plpy: Any, event: str, collection_id: int) -> None:
    """Follow one INSERT, UPDATE, DELETE or TRUNCATE statement on a collection's table."""
    collection = collection_by_id(plpy, collection_id)
    key, image = collection.key_column, collection.image_column
    if event == "INSERT":
        keys = _keys(plpy, f"SELECT array_agg(n.{key}) AS keys FROM new_rows AS n")
        _forget(plpy, collection, keys)
        embed_rows(plpy, collection, keys)
    elif event == "UPDATE":
        # Statement triggers can't tell which columns were set, so images are compared; a changed
        # key makes one row that is gone and one that is new.
        keys = _keys(
            plpy,
            f"SELECT array_agg(c.key) AS keys FROM (SELECT o.{key} AS key FROM old_rows AS o"
            f" LEFT JOIN new_rows AS n ON n.{key} = o.{key}"
            f" WHERE n.{key} IS NULL OR n.{image} IS DISTINCT FROM o.{image}"
            f" UNION SELECT n.{key} FROM new_rows AS n"
            f" WHERE NOT EXISTS (SELECT FROM old_rows AS o WHERE o.{key} = n.{key})) AS c",
        )
        _forget(plpy, collection, keys)
        embed_rows(plpy, collection, keys)
    elif event == "DELETE":
        keys = _keys(plpy, f"SELECT array_agg(o.{key}) AS keys FROM old_rows AS o")
        plan = prepare(
            plpy,
            "SELECT array_agg(o.key) AS keys FROM unnest($1) AS o (key) WHERE NOT EXISTS ("
            f"SELECT FROM {collection.row_function('present')}($1) AS p (key)"
            " WHERE p.key = o.key)",
            (collection.key_array,),
        )
        # One that is there again was inserted by the same statement, whose trigger sees to it.
        _forget(plpy, collection, plan.execute([keys])[0]["keys"] if keys else None)
    elif event == "TRUNCATE":
        _forget_all(plpy, collection)


def _keys(plpy: Any, sql: str) -> list[Any]:
    """Run a query of transition tables, planned for their size each time."""
    return plpy.execute(sql)[0]["keys"] or []


def _forget(plpy: Any, collection: Collection, keys: list[Any] | None) -> None:
    """Delete the vectors of some keys, and tell the searches that indexes still hold them."""
    if not keys:
        return
    types = (collection.key_array,)
    prepare(
        plpy,
        f"WITH gone AS (DELETE FROM {collection.embeddings} AS e USING unnest($1) AS k (key)"
        f" WHERE e.key = k.key RETURNING e.embedding_id)"
        f" INSERT INTO {collection.pending} (embedding_id, deleted)"
        f" SELECT embedding_id, true FROM gone",
        types,
    ).execute([keys])
    if collection.on_error == "quarantine":
        prepare(
            plpy,
            "DELETE FROM siamese.failures AS f USING unnest($1) AS k (key)"
            f" WHERE f.collection_id = {collection.collection_id} AND f.key = k.key::text",
            types,
        ).execute([keys])


def _forget_all(plpy: Any, collection: Collection) -> None:
    """Follow TRUNCATE. DELETE, since a TRUNCATE of ours could deadlock with searches and builds."""
    number = collection.collection_id
    plpy.execute(
        "UPDATE siamese.collections SET generation = NULL, epoch = epoch + 1"
        f" WHERE collection_id = {number}"
    )
    plpy.execute(f"DELETE FROM {collection.embeddings}")
    plpy.execute(f"DELETE FROM {collection.pending}")
    plpy.execute(f"DELETE FROM siamese.failures WHERE collection_id = {number}")


def _fetched(
    plpy: Any, collection: Collection, keys: list[Any], function: str
) -> Iterator[list[Any]]:
    """Yield rows in portions whose images take a bounded amount of memory."""
    plan = prepare(
        plpy,
        f"SELECT r.key, r.image FROM {collection.row_function(function)}($1) AS r",
        (collection.key_array,),
    )
    start, count = 0, FIRST_ROWS
    while start < len(keys):
        rows = list(plan.execute([keys[start : start + count]]))
        start += count
        if rows:
            yield rows
            count = next_portion(len(rows), sum(len(row["image"] or b"") for row in rows))


def embed_rows(
    plpy: Any, collection: Collection, keys: list[Any], is_backfill: bool = False
) -> int:
    """Embed the images of some keys, as the table has them now, and store their vectors.

    Args:
        plpy: PL/Python's module.
        collection: where they belong.
        keys: of the rows; those that have none are passed over.
        is_backfill: lock the rows, leave out those that others have locked, report progress.

    Returns:
        How many vectors were stored.

    Raises:
        SiameseError: a bad image, where the collection rejects them; it names the row.
    """
    encoder: Encoder | None = None
    poll = partial(interrupts.check, plpy)
    stored = seen = 0
    noticed = time.monotonic()
    for rows in _fetched(plpy, collection, keys, "locked_rows" if is_backfill else "rows"):
        encoder = encoder or models.encoder(plpy, collection.model_id)
        failures: list[Failure] = []
        done, embeddings = batches.embed(
            encoder,
            ((row["key"], row["image"]) for row in rows),
            partial(_fail, collection, failures),
            poll,
        )
        stored += _store(plpy, collection, done, embeddings, is_backfill)
        _note_failures(plpy, collection, failures)
        seen += len(rows)
        if is_backfill and time.monotonic() - noticed >= NOTICE_SECONDS:
            noticed = time.monotonic()
            plpy.notice(
                f'embedding collection "{collection.name}":'
                f" {100 * seen // len(keys)}% ({seen} of {len(keys)} rows)"
            )
    return stored


def _fail(collection: Collection, failures: list[Failure], key: Any, error: ImageError) -> None:
    if collection.on_error == "quarantine":
        failures.append((key, error.sqlstate, error.message))
        return
    raise ImageError(
        f"{error.message} (row {collection.key_column} = {key} of table {collection.relation})",
        sqlstate=error.sqlstate,
        detail=error.detail,
        hint=error.hint,
    )


def _store(
    plpy: Any,
    collection: Collection,
    keys: list[Any],
    embeddings: NDArray[np.float32],
    is_backfill: bool,
) -> int:
    if not keys:
        return 0
    # A row that was changed after a backfill began has got its vector from the trigger.
    conflict = " ON CONFLICT (key) DO NOTHING" if is_backfill else ""
    result = prepare(
        plpy,
        f"WITH added AS (INSERT INTO {collection.embeddings} (key, embedding)"
        f" SELECT * FROM unnest($1, $2){conflict} RETURNING embedding_id)"
        f" INSERT INTO {collection.pending} (embedding_id) SELECT embedding_id FROM added",
        (collection.key_array, f"{collection.vector_type}[]"),
    ).execute([keys, [vectors.to_text(vector) for vector in embeddings]])
    return int(result.nrows())


def _note_failures(plpy: Any, collection: Collection, failures: list[Failure]) -> None:
    for key, sqlstate, message in failures:
        prepare(
            plpy,
            "INSERT INTO siamese.failures (collection_id, key, sqlstate, message)"
            " VALUES ($1, $2, $3, $4) ON CONFLICT (collection_id, key) DO UPDATE"
            " SET sqlstate = excluded.sqlstate, message = excluded.message, failed_at = now()",
            ("integer", "text", "text", "text"),
        ).execute([collection.collection_id, str(key), sqlstate, message])


def backfill(plpy: Any, name: str | None, max_rows: int | None) -> int:
    """Embed rows without a vector, and drop vectors without a row.

    Rows that other transactions hold locked are left alone, so that backfill never takes part in a
    deadlock; a NOTICE tells how many remain.

    Returns:
        How many rows were embedded.
    """
    if max_rows is not None and max_rows < 1:
        raise SiameseError("max_rows must be positive")
    collection = collection_by_name(plpy, name)
    # The table may have a new owner.
    plpy.execute(f"SELECT siamese._give_to_owner({collection.collection_id})")
    _forget(plpy, collection, _keys(plpy, abandoned_query(collection, "array_agg(e.key) AS keys")))
    if collection.embed == "deferred":
        stored = _backfill_deferred(plpy, collection, max_rows)
        _forget_old_failures(plpy, collection)
        return stored
    # Rows that failed before come last, so that they never keep others out.
    wanted = "array_agg(k.key ORDER BY f.key IS NOT NULL, k.key) AS keys"
    keys = _keys(plpy, missing_query(collection, wanted))
    stored = embed_rows(plpy, collection, keys[:max_rows], is_backfill=True) if keys else 0
    _forget_old_failures(plpy, collection)
    left = plpy.execute(missing_query(collection, "count(*) AS n") + " AND f.key IS NULL")[0]["n"]
    if left and max_rows is None:
        plpy.notice(
            f'{counted(left, "row")} of collection "{collection.name}" left out,'
            " because other transactions were changing them",
            hint="Call backfill again.",
        )
    return stored


def _backfill_deferred(plpy: Any, collection: Collection, max_rows: int | None) -> int:
    """Queue what is not, end all waiting for another try, and embed here and now."""
    plpy.execute(
        f"UPDATE {collection.queue} SET not_before = NULL, attempts = 0"
        " WHERE not_before IS NOT NULL"
    )
    plpy.execute(f"SELECT siamese._queue_missing({collection.collection_id})")
    return deferred.embed_collection(plpy, collection, max_rows)


def missing_query(collection: Collection, wanted: str) -> str:
    """Return a query of rows ``k`` without a vector; ``f`` is the failure of such a row."""
    return (
        f"SELECT {wanted} FROM {collection.row_function('keys')}() AS k (key)"
        f" LEFT JOIN siamese.failures AS f"
        f" ON f.collection_id = {collection.collection_id} AND f.key = k.key::text"
        f" WHERE NOT EXISTS (SELECT FROM {collection.embeddings} AS e WHERE e.key = k.key)"
    )


def abandoned_query(collection: Collection, wanted: str) -> str:
    """Return a query of vectors ``e`` without a row."""
    return (
        f"SELECT {wanted} FROM {collection.embeddings} AS e WHERE NOT EXISTS ("
        f"SELECT FROM {collection.row_function('keys')}() AS k (key) WHERE k.key = e.key)"
    )


def _forget_old_failures(plpy: Any, collection: Collection) -> None:
    """Remove failures of rows that have a vector now, or are gone."""
    plpy.execute(
        f"DELETE FROM siamese.failures AS f WHERE f.collection_id = {collection.collection_id}"
        f" AND NOT EXISTS (SELECT FROM {collection.row_function('keys')}() AS k (key)"
        " WHERE k.key::text = f.key AND NOT EXISTS"
        f" (SELECT FROM {collection.embeddings} AS e WHERE e.key = k.key))"
    )
