"""Keep vectors in step with images, by triggers and backfill.

Whatever the event, the table's present content decides, read in the statement's own transaction.
Other triggers may have changed a row again before ours runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server import interrupts, vectors
from pg_siamese_server.catalog import Collection, collection_of_trigger, locked_collection, prepare
from pg_siamese_server.encoding import batches, models
from pg_siamese_server.encoding.batches import FIRST_ROWS, next_portion
from pg_siamese_server.errors import ImageError, SiameseError, counted
from pg_siamese_server.progress import EMBEDDING, Progress, reported
from pg_siamese_server.writing import deferred

if TYPE_CHECKING:
    from pg_siamese_server.encoding.encoder import Encoder

HASHES_AT_ONCE = 1000
FRAMES_AT_ONCE = 500
# Distance of another run of the same model from a vector of length one: a cosine of 0.9999.
SAME_VECTOR = 0.014
# Text only, since an exception would keep its frames, and so an open cursor.
Failure = tuple[Any, str, str]
_key_and_image = itemgetter("key", "image")


def on_change(
    plpy: Any,
    event: str,
    collection_id: int,
    relation_oid: int,
    keys: list[str],
    versions: str | None,
) -> None:
    """Follow one INSERT, UPDATE, DELETE or TRUNCATE statement on a collection's table.

    Keys are text. The trigger found them in its transition tables, which only it sees.
    """
    collection = collection_of_trigger(plpy, collection_id, relation_oid, versions)
    if event == "INSERT":
        embed_rows(plpy, collection, keys, are_new=True)
    elif event == "UPDATE":
        _forget_vectors(plpy, collection, keys)
        embed_rows(plpy, collection, keys)
    elif event == "DELETE":
        if not keys:
            return
        _let_owner_read(plpy, collection)
        plan = prepare(
            plpy,
            "SELECT array_agg(o.key) AS keys FROM unnest($1) AS o (key) WHERE NOT EXISTS ("
            f"SELECT FROM {collection.row_function('present')}($1) AS p (key)"
            " WHERE p.key = o.key)",
            (collection.key_array,),
        )
        # The same statement inserted those that exist again. Its trigger handles them.
        _forget_vectors(plpy, collection, plan.execute([keys])[0]["keys"])
    elif event == "TRUNCATE":
        prepare(plpy, "SELECT siamese._forget_all($1)", ("integer",)).execute([collection_id])


def _let_owner_read(plpy: Any, collection: Collection, for_lock: bool = False) -> None:
    """Make sure that the row functions run as the table's owner, who can read the table."""
    if collection.is_ready and not for_lock:
        return
    prepare(plpy, "SELECT siamese._let_owner_read($1, $2)", ("integer", "boolean")).execute(
        [collection.collection_id, for_lock]
    )


def _keys(plpy: Any, sql: str) -> list[Any]:
    """Run a query of keys, planned for the size of its tables each time."""
    return plpy.execute(sql)[0]["keys"] or []


def _delete_vectors(plpy: Any, collection: Collection, keys: list[Any] | None) -> None:
    """Delete the vectors of keys, and tell searches that indexes still hold them."""
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
    _delete_failures(plpy, collection, keys)


def _forget_vectors(plpy: Any, collection: Collection, keys: list[Any] | None) -> None:
    """Delete the vectors of changed rows, or fail if the transaction's snapshot misses some.

    A backfill may have stored them since. It leaves the rows themselves unchanged, so PostgreSQL
    raises no error.
    """
    if not keys:
        return
    if interrupts.keeps_snapshot():
        prepare(plpy, "SELECT siamese._forget_vectors($1, $2)", ("integer", "text[]")).execute(
            [collection.collection_id, keys]
        )
    else:
        _delete_vectors(plpy, collection, keys)


def _delete_failures(plpy: Any, collection: Collection, keys: list[Any]) -> None:
    if collection.keeps_failures:
        prepare(
            plpy,
            "DELETE FROM siamese.failures AS f USING unnest($1) AS k (key)"
            f" WHERE f.collection_id = {collection.collection_id} AND f.key = k.key::text",
            (collection.key_array,),
        ).execute([keys])


def _fetch_portions(
    plpy: Any, collection: Collection, keys: list[Any], function: str
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield keys and rows in portions whose images take a bounded amount of memory."""
    plan = collection.plans.get(function)
    if plan is None:
        plan = collection.plans[function] = prepare(
            plpy,
            f"SELECT r.key, r.image FROM {collection.row_function(function)}($1) AS r",
            (collection.key_array,),
        )
    start, count = 0, FIRST_ROWS
    while True:
        portion = keys[start : start + count]
        start += count
        rows = list(plan.execute([portion]))
        yield portion, rows
        if start >= len(keys):
            return
        if rows:
            count = next_portion(len(rows), sum(len(row["image"]) for row in rows))


def embed_rows(
    plpy: Any,
    collection: Collection,
    keys: list[Any],
    progress: Progress | None = None,
    are_new: bool = False,
) -> int:
    """Embed the images of some keys, as the table has them now, and store their vectors.

    Args:
        plpy: PL/Python's module.
        collection: of the rows.
        keys: of the rows. Missing rows are skipped.
        progress: of a backfill, which locks the rows, and skips those that others have locked.
        are_new: the rows are inserted, so they have no vectors but left-over ones.

    Returns:
        Of how many rows vectors were stored.

    Raises:
        SiameseError: a bad image, if the collection rejects them. It names the row.
    """
    if not keys:
        return 0
    is_backfill = progress is not None
    _let_owner_read(plpy, collection, for_lock=is_backfill)
    encoder: Encoder | None = None
    poll = partial(interrupts.check, plpy)
    stored = seen = 0
    store = _replace if is_backfill else _add if are_new else _store
    function = "locked_rows" if is_backfill else "rows"
    for portion, rows in _fetch_portions(plpy, collection, keys, function):
        if are_new and len(rows) < len(portion):
            # Rows without an image, and those that are gone again, get no vector.
            _delete_vectors(plpy, collection, portion)
        if not rows:
            continue
        encoder = encoder or models.encoder(plpy, collection.model_id, collection.sha256)
        failures: list[Failure] = []
        work = (
            encoder,
            map(_key_and_image, rows),
            partial(_fail, collection, failures),
            poll,
            collection.limits,
        )
        hashes = {row["key"]: batches.image_hash(row["image"]) for row in rows}
        if collection.has_frames:
            for key, representative, embeddings in batches.embed_frames(*work):
                frames = store(plpy, collection, [key], embeddings, [hashes[key]], representative)
                stored += frames > 0
        else:
            done, embeddings = batches.embed(*work)
            stored += store(plpy, collection, done, embeddings, [hashes[key] for key in done])
        if failures and (is_backfill or are_new):
            _delete_vectors(plpy, collection, [key for key, _, _ in failures])
        _note_failures(plpy, collection, failures)
        seen += len(rows)
        if progress is not None:
            progress.report(seen)
    return stored


def _fail(collection: Collection, failures: list[Failure], key: Any, error: ImageError) -> None:
    if collection.keeps_failures:
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
    hashes: list[bytes],
    representative: int = 0,
    is_wary: bool = False,
) -> int:
    """Store one vector of each key, or of one key the vectors of all frames.

    If it ``is_wary``, what is there already stays.
    """
    if not keys:
        return 0
    if representative:
        return _store_frames(plpy, collection, keys, embeddings, hashes, representative, is_wary)
    purpose = "store", is_wary
    plan = collection.plans.get(purpose)
    if plan is None:
        plan = collection.plans[purpose] = prepare(
            plpy,
            f"WITH added AS (INSERT INTO {collection.embeddings} (key, embedding, image_hash)"
            f" SELECT * FROM unnest($1, $2, $3){_on_conflict(collection, is_wary)}"
            " RETURNING embedding_id)"
            f" INSERT INTO {collection.pending} (embedding_id) SELECT embedding_id FROM added",
            _vector_types(collection),
        )
    texts = list(map(vectors.to_text, embeddings))
    return int(plan.execute([keys, texts, hashes]).nrows())


def _on_conflict(collection: Collection, is_wary: bool) -> str:
    target = "key, frame" if collection.has_frames else "key"
    return f" ON CONFLICT ({target}) DO NOTHING" if is_wary else ""


def _store_frames(
    plpy: Any,
    collection: Collection,
    keys: list[Any],
    embeddings: NDArray[np.float32],
    hashes: list[bytes],
    representative: int,
    is_wary: bool,
) -> int:
    plan = prepare(
        plpy,
        f"WITH added AS (INSERT INTO {collection.embeddings}"
        " (key, image_hash, embedding, frame, representative)"
        " SELECT ($1)[1], ($2)[1], v.embedding, $4 + v.place, $4 + v.place = $5"
        " FROM unnest($3) WITH ORDINALITY AS v (embedding, place) ORDER BY v.place"
        f"{_on_conflict(collection, is_wary)} RETURNING embedding_id)"
        f" INSERT INTO {collection.pending} (embedding_id) SELECT embedding_id FROM added",
        (
            *(collection.key_array, "bytea[]", f"{collection.vector_type}[]"),
            *("integer", "integer"),
        ),
    )
    stored = 0
    for start in range(0, len(embeddings), FRAMES_AT_ONCE):
        interrupts.check(plpy)
        texts = list(map(vectors.to_text, embeddings[start : start + FRAMES_AT_ONCE]))
        stored += plan.execute([keys, hashes, texts, start, representative]).nrows()
    return stored


def _add(
    plpy: Any,
    collection: Collection,
    keys: list[Any],
    embeddings: NDArray[np.float32],
    hashes: list[bytes],
    representative: int = 0,
) -> int:
    """Store the vectors of new rows, in place of vectors that changes without triggers left over.

    These are rare, so the unique index finds them. To look for them before each insert takes longer
    than to store a vector.
    """
    stored = _store(plpy, collection, keys, embeddings, hashes, representative, is_wary=True)
    if stored < len(embeddings):
        _delete_vectors(plpy, collection, keys)
        return _store(plpy, collection, keys, embeddings, hashes, representative)
    _delete_failures(plpy, collection, keys)
    return stored


def _vector_types(collection: Collection) -> tuple[str, ...]:
    return (collection.key_array, f"{collection.vector_type}[]", "bytea[]")


def _replace(
    plpy: Any,
    collection: Collection,
    keys: list[Any],
    embeddings: NDArray[np.float32],
    hashes: list[bytes],
    representative: int = 0,
) -> int:
    """Store the vectors of locked rows, in place of those of other images."""
    if not keys:
        return 0
    verified = 0 if representative else _add_hashes(plpy, collection, keys, embeddings, hashes)
    prepare(
        plpy,
        f"WITH gone AS (DELETE FROM {collection.embeddings} AS e"
        " USING unnest($1, $2) AS n (key, image_hash)"
        " WHERE e.key = n.key AND e.image_hash IS DISTINCT FROM n.image_hash"
        " RETURNING e.embedding_id)"
        f" INSERT INTO {collection.pending} (embedding_id, deleted)"
        " SELECT embedding_id, true FROM gone",
        (collection.key_array, "bytea[]"),
    ).execute([keys, hashes])
    # A row that was changed after a backfill began has its vector from the trigger.
    stored = _store(plpy, collection, keys, embeddings, hashes, representative, is_wary=True)
    return stored + verified


def _add_hashes(
    plpy: Any,
    collection: Collection,
    keys: list[Any],
    embeddings: NDArray[np.float32],
    hashes: list[bytes],
) -> int:
    """Complete vectors from before there were hashes. If such a vector is right, it lacks its hash.

    Collections of all frames came later.
    """
    schema = collection.vector_schema
    return int(
        prepare(
            plpy,
            f"UPDATE {collection.embeddings} AS e SET image_hash = n.image_hash"
            " FROM unnest($1, $2, $3) AS n (key, embedding, image_hash)"
            " WHERE e.key = n.key AND e.image_hash IS NULL"
            f" AND {schema}.l2_distance(e.embedding, n.embedding)"
            f" <= {SAME_VECTOR} * {schema}.vector_norm(n.embedding)",
            _vector_types(collection),
        )
        .execute([keys, [vectors.to_text(vector) for vector in embeddings], hashes])
        .nrows()
    )


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
    """Embed rows without the vector of their image, and drop vectors without a row.

    Rows that other transactions have locked are skipped, so that backfill never takes part in a
    deadlock. A NOTICE tells how many remain.

    Returns:
        How many rows were embedded.
    """
    if max_rows is not None and max_rows < 1:
        raise SiameseError("max_rows must be positive")
    collection = locked_collection(plpy, name)
    with reported(plpy, "backfill", collection) as progress:
        return _backfill(plpy, collection, max_rows, progress)


def _backfill(plpy: Any, collection: Collection, max_rows: int | None, progress: Progress) -> int:
    progress.enter("looking for rows")
    _let_owner_read(plpy, collection, for_lock=True)
    _delete_vectors(
        plpy, collection, _keys(plpy, abandoned_query(collection, "array_agg(e.key) AS keys"))
    )
    if collection.embed == "deferred":
        stored = _backfill_deferred(plpy, collection, max_rows, progress)
        keys = []
    else:
        stored = 0
        # Rows that failed before come last, so that they never keep others out.
        wanted = "array_agg(k.key ORDER BY f.key IS NOT NULL, k.key) AS keys"
        keys = _keys(plpy, missing_query(collection, wanted))
    space = None if max_rows is None else max_rows - stored
    if space is None or len(keys) < space:
        keys = [*stale_keys(plpy, collection, space, progress), *keys]
    keys = keys[:space]
    progress.enter(EMBEDDING, len(keys))
    stored += embed_rows(plpy, collection, keys, progress)
    _delete_old_failures(plpy, collection)
    if max_rows is None and collection.embed == "sync":
        _notice_skipped_rows(plpy, collection)
    return stored


def _notice_skipped_rows(plpy: Any, collection: Collection) -> None:
    left = plpy.execute(missing_query(collection, "count(*) AS n") + " AND f.key IS NULL")[0]["n"]
    if left:
        plpy.notice(
            f'{counted(left, "row")} of collection "{collection.name}" left out,'
            " because other transactions were changing them",
            hint="Call backfill again.",
        )


def _backfill_deferred(
    plpy: Any, collection: Collection, max_rows: int | None, progress: Progress
) -> int:
    """Queue missing rows, end all waits for another try, and embed here and now."""
    plpy.execute(
        f"UPDATE {collection.queue} SET not_before = NULL, attempts = 0"
        " WHERE not_before IS NOT NULL"
    )
    plpy.execute(f"SELECT siamese._queue_missing({collection.collection_id})")
    return deferred.embed_collection(plpy, collection, max_rows, progress)


def stale_keys(
    plpy: Any, collection: Collection, max_rows: int | None, progress: Progress | None = None
) -> list[Any]:
    """Return keys whose vector is not known to be that of their image. This reads all images.

    Vectors from before there were hashes come first, without a look at their images.

    Args:
        plpy: PL/Python's module.
        collection: to check.
        max_rows: stop after about this number, or None.
        progress: of a backfill.
    """
    unknown = f"SELECT array_agg(e.key) AS keys FROM {collection.embeddings} AS e"
    condition = f"WHERE {collection.one_per_image} AND e.image_hash"
    found = _keys(plpy, f"{unknown} {condition} IS NULL")
    keys = _keys(plpy, f"{unknown} {condition} IS NOT NULL")
    if progress is not None:
        progress.enter("comparing images", len(keys))
    for start in range(0, len(keys), HASHES_AT_ONCE):
        if max_rows is not None and len(found) >= max_rows:
            break
        if progress is not None:
            progress.report(start)
        found += compared(plpy, collection, keys[start : start + HASHES_AT_ONCE])[1]
    return found


def compared(
    plpy: Any, collection: Collection, keys: list[Any], max_bytes: int = 2**62
) -> tuple[int, list[Any]]:
    """Compare images with the hashes beside their vectors.

    Args:
        plpy: PL/Python's module.
        collection: to check.
        keys: of the rows to compare. Those without a vector are skipped.
        max_bytes: skip the rest once their images have this number of bytes.

    Returns:
        How many were compared, and the keys of those whose vector is of another image.
    """
    plan = prepare(
        plpy,
        "SELECT count(*) AS n,"
        " array_agg(e.key) FILTER (WHERE e.image_hash IS DISTINCT FROM h.image_hash) AS stale"
        f" FROM {collection.row_function('hashes')}($1, $2) AS h"
        f" INNER JOIN {collection.embeddings} AS e ON e.key = h.key"
        f" AND {collection.one_per_image}",
        (collection.key_array, "bigint"),
    )
    row = plan.execute([keys, max_bytes])[0]
    return int(row["n"]), row["stale"] or []


def missing_query(collection: Collection, wanted: str) -> str:
    """Return a query of rows ``k`` without a vector. ``f`` is the failure of such a row."""
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


def _delete_old_failures(plpy: Any, collection: Collection) -> None:
    """Remove failures of rows that have a vector now, or are gone."""
    plpy.execute(
        f"DELETE FROM siamese.failures AS f WHERE f.collection_id = {collection.collection_id}"
        f" AND NOT EXISTS (SELECT FROM {collection.row_function('keys')}() AS k (key)"
        " WHERE k.key::text = f.key AND NOT EXISTS"
        f" (SELECT FROM {collection.embeddings} AS e WHERE e.key = k.key))"
    )
