"""Build a FAISS generation from the vector table."""

from __future__ import annotations

import shutil
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server import interrupts, vectors
from pg_siamese_server.catalog import (
    Collection,
    collection_by_name,
    is_standby,
    locked_collection,
    prepare,
)
from pg_siamese_server.errors import (
    OBJECT_NOT_IN_PREREQUISITE_STATE,
    READ_ONLY_SQL_TRANSACTION,
    SiameseError,
)
from pg_siamese_server.index import generations, graph, index_file
from pg_siamese_server.index.index_file import Rows
from pg_siamese_server.index.threads import allowed_threads
from pg_siamese_server.progress import Progress, reported

# Key space of the advisory locks of a collection's builds.
LOCK_CLASS = "hashtext('pg_siamese build')"
READ_VALUES = 1_500_000
MIN_READ_ROWS = 500
READ_IDS = 20_000
LONG_RUN = 1_000  # ids that one statement removes from the pending table, instead of one by one


def build_index(
    plpy: Any,
    name: str | None,
    m: int,
    ef_construction: int,
    target_recall: float,
    threads: int | None,
) -> int:
    """Build, publish and make current a new generation, and return its number.

    It runs concurrently with writes and searches. Builds of a collection wait for each other.
    """
    started = time.monotonic()
    options = graph.Options(m, ef_construction, target_recall, threads or default_threads(plpy))
    options.check()
    if is_standby(plpy):
        raise SiameseError(
            "a standby cannot build an index generation",
            sqlstate=READ_ONLY_SQL_TRANSACTION,
            hint="Make its own file of the current generation with rebuild_file.",
        )
    with reported(plpy, "build_index", collection_by_name(plpy, name)) as progress:
        return _build(plpy, name, options, progress, started)


def _build(
    plpy: Any, name: str | None, options: graph.Options, progress: Progress, started: float
) -> int:
    progress.enter("waiting for another build")
    collection = locked_collection(plpy, name, _lock_builds)
    before = plpy.execute(
        "SELECT generation, epoch FROM siamese.collections"
        f" WHERE collection_id = {collection.collection_id}"
    )[0]
    plpy.execute("SELECT siamese._check_local()")
    directory = generations.directory(plpy, collection.collection_id)
    _remove_orphans(plpy, collection, directory)

    poll = partial(interrupts.check, plpy)
    rows, matrix, levels = read(plpy, collection, options, progress, poll)
    built = graph.build(matrix, levels, options, progress, poll)
    rows.move(built.places)

    generation = int(plpy.execute("SELECT siamese._next_generation() AS n")[0]["n"])
    build_id = str(uuid.uuid4())
    identity = generations.identity(collection, generation, build_id)
    progress.enter("writing file")
    size = index_file.write(directory, identity, built.index, rows, poll)
    measured = built.measured
    recall, seconds = measured.recall if measured else 1.0, time.monotonic() - started
    counts = len(rows.embedding_ids), len(matrix)
    prepare(
        plpy,
        "INSERT INTO siamese.generations (generation, collection_id, build_id, bytes, seconds,"
        " rows, vectors, recall, index_type, m, ef_construction, ef_search_stored, ef_search,"
        " ef_search_many) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
        (
            *("bigint", "integer", "uuid", "bigint", "real"),
            *("bigint", "bigint", "real", "text", *("integer",) * 4, "integer[]"),
        ),
    ).execute(
        [
            *(generation, collection.collection_id, build_id, size, seconds),
            *(*counts, recall, *_graph_columns(options, measured)),
        ]
    )
    progress.enter("publishing")
    _make_current(plpy, collection, generation, before, rows.embedding_ids)
    # Only sessions with an older snapshot may still need the previous generation. This comes last.
    # In REPEATABLE READ ``before`` may be out of date, which only making this one current tells.
    index_file.remove_others(directory, {generation, before["generation"] or generation})
    _remove_abandoned(plpy)
    return generation


def _lock_builds(plpy: Any, collection_id: int) -> None:
    """Wait for the lock of a collection's builds, which ``drop_collection`` takes as well."""
    plpy.execute(f"SELECT pg_advisory_xact_lock({LOCK_CLASS}, {collection_id})")


def _graph_columns(options: graph.Options, measured: graph.Measured | None) -> tuple[Any, ...]:
    if measured is None:
        return "flat", *(None,) * 5
    found = measured.breadths
    many = list(found.many or ())
    return "hnsw", options.m, options.ef_construction, found.stored, found.new, many


def default_threads(plpy: Any) -> int:
    """Return how many threads a build uses by default."""
    return allowed_threads(plpy, "max_parallel_maintenance_workers")


def read(
    plpy: Any,
    collection: Collection,
    options: graph.Options,
    progress: Progress,
    poll: index_file.Poll,
    condition: str = "true",
    is_graph: bool = True,
) -> tuple[Rows, NDArray[np.float32], NDArray[np.int32] | None]:
    """Read vectors and put them in order.

    Args:
        plpy: PL/Python's module.
        collection: of the vectors.
        options: of the build.
        progress: told of phases, and of each portion.
        poll: called between pieces of work, may raise to stop.
        condition: SQL on ``e``, a row of the vector table.
        is_graph: whether they may become a graph.

    Returns:
        The rows. Their distinct vectors, prepared, float32 (vectors, dimension). The levels of
        these as ``graph.in_order`` returns them, or None for a flat index.
    """
    progress.enter("reading vectors")
    rows, matrix = _read(plpy, collection, condition, progress)
    progress.enter("sorting vectors")
    matrix = vectors.prepare(matrix, collection.metric)
    matrix, slots = _share_equal_vectors(matrix, poll)
    levels = None
    if is_graph:
        matrix, slots, levels = graph.in_order(matrix, slots, options, poll)
    if slots is not None:
        rows.place(slots, len(matrix))
    return rows, matrix, levels


def _read(
    plpy: Any, collection: Collection, condition: str, progress: Progress
) -> tuple[Rows, NDArray[np.float32]]:
    """Read vectors, ascending by embedding_id.

    In a build each portion has its own snapshot. That is enough. What a portion does not see stays
    in the pending table, since only ids that were read leave it.
    """
    integer = collection.is_by_integer
    key = "int8send(e.key::int8)" if integer else f"convert_to({collection.label}, 'UTF8')"
    limit = max(MIN_READ_ROWS, READ_VALUES // collection.dimension)
    # One row per portion. Python objects for each vector would take ten times as long.
    plan = prepare(
        plpy,
        "SELECT count(*) AS n, max(i) AS last, string_agg(int8send(i), '') AS ids,"
        " string_agg(k, '') AS keys, string_agg(int4send(octet_length(k)), '') AS lengths,"
        " string_agg(v, '') AS vectors"
        f" FROM (SELECT e.embedding_id AS i, {key} AS k,"
        f" {collection.vector_schema}.vector_send(e.embedding) AS v"
        f" FROM {collection.embeddings} AS e WHERE e.embedding_id > $1 AND {condition}"
        f" ORDER BY e.embedding_id LIMIT {limit}) AS portion",
        ("bigint",),
    )
    ids: list[NDArray[np.int64]] = []
    matrices: list[NDArray[np.float32]] = []
    keys: list[bytes] = []
    sizes: list[NDArray[np.int64]] = []
    last = -(2**63)
    while True:
        portion = plan.execute([last])[0]
        count = int(portion["n"])
        if not count:
            break
        last = int(portion["last"])
        ids.append(np.frombuffer(portion["ids"], dtype=">i8").astype(np.int64))
        matrices.append(vectors.from_send(portion["vectors"], count))
        keys.append(portion["keys"])
        progress.report(sum(map(len, ids)))
        if not integer:
            sizes.append(np.frombuffer(portion["lengths"], dtype=">i4").astype(np.int64))
    matrix = (
        np.concatenate(matrices)
        if matrices
        else np.empty((0, collection.dimension), dtype=np.float32)
    )
    rows = Rows(np.concatenate(ids) if ids else np.empty(0, dtype=np.int64))
    data = b"".join(keys)
    if integer:
        rows.set_keys(np.frombuffer(data, dtype=">i8").astype(np.int64))
    else:
        lengths_all = np.concatenate(sizes) if sizes else np.empty(0, dtype=np.int64)
        rows.key_offsets = np.concatenate([[0], np.cumsum(lengths_all)]).astype(np.int64)
        rows.key_bytes = np.frombuffer(data, dtype=np.uint8)
    return rows, matrix


def _share_equal_vectors(
    matrix: NDArray[np.float32], poll: index_file.Poll
) -> tuple[NDArray[np.float32], NDArray[np.int32] | None]:
    """Keep one of each group of equal vectors.

    Copies of an image would fill each other's neighbour lists and cut the graph into islands.

    Returns:
        The distinct vectors, float32 (distinct, dimension). For each row its vector, int32 (rows,),
        or None if all are distinct.
    """
    if len(matrix) < 2:
        return matrix, None
    odd = np.random.default_rng(0).integers(1, 2**62, matrix.shape[1], dtype=np.uint64) * 2 + 1
    hashes = np.empty(len(matrix), dtype=np.uint64)
    block = max(1, READ_VALUES // matrix.shape[1])
    for start in range(0, len(matrix), block):
        words = matrix[start : start + block].view(np.uint32)
        hashes[start : start + block] = (words * odd).sum(axis=1, dtype=np.uint64)
        poll()
    order = np.argsort(hashes, kind="stable")
    same = np.zeros(len(matrix), dtype=bool)
    close = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]) + 1
    same[close] = (matrix[order[close]] == matrix[order[close - 1]]).all(axis=1)
    if not same.any():
        return matrix, None
    first = order[~same]  # of each group, in the order of hashes
    group = np.cumsum(~same) - 1
    rank = np.empty(len(first), dtype=np.int32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    slots = np.empty(len(matrix), dtype=np.int32)
    slots[order] = rank[group]
    return np.ascontiguousarray(matrix[np.sort(first)]), slots


def _make_current(
    plpy: Any,
    collection: Collection,
    generation: int,
    before: dict[str, Any],
    embedding_ids: NDArray[np.int64],
) -> None:
    """Switch to the new generation, and remove what it covers from the pending table."""
    switched = plpy.execute(
        f"UPDATE siamese.collections SET generation = {generation}"
        f" WHERE collection_id = {collection.collection_id} AND epoch = {before['epoch']}"
    )
    if not switched.nrows():
        raise SiameseError(
            f'collection "{collection.name}" was truncated or dropped while its index was built',
            sqlstate=OBJECT_NOT_IN_PREREQUISITE_STATE,
            hint="Build the index again.",
        )
    plpy.execute(
        "DELETE FROM siamese.generations"
        f" WHERE collection_id = {collection.collection_id}"
        f" AND generation NOT IN ({generation}, {before['generation'] or generation})"
    )
    delete_run = prepare(
        plpy,
        f"DELETE FROM {collection.pending} AS p"
        " WHERE p.embedding_id BETWEEN $1 AND $2 AND NOT p.deleted",
        ("bigint", "bigint"),
    )
    for first, last in _long_runs(embedding_ids):
        delete_run.execute([first, last])
    delete = prepare(
        plpy,
        f"DELETE FROM {collection.pending} AS p USING unnest($1, $2) AS d (embedding_id, deleted)"
        " WHERE p.embedding_id = d.embedding_id AND p.deleted = d.deleted",
        ("bigint[]", "boolean[]"),
    )
    cursor = plpy.cursor(f"SELECT embedding_id, deleted FROM {collection.pending}")
    while True:
        portion = list(cursor.fetch(READ_IDS))
        if not portion:
            break
        ids = np.array([row["embedding_id"] for row in portion], dtype=np.int64)
        deleted = np.array([row["deleted"] for row in portion], dtype=bool)
        in_file = np.isin(ids, embedding_ids, assume_unique=False)
        # A deletion matters while the file holds the vector, and an addition while it does not.
        covered = in_file != deleted
        delete.execute([ids[covered].tolist(), deleted[covered].tolist()])
        interrupts.check(plpy)
    _drop_dead_additions(plpy, collection)


def _long_runs(ids: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return first and last of each long run of consecutive ids, which ascend."""
    starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 2) != 1)
    ends = np.append(starts[1:], len(ids)) if len(ids) else starts
    return [
        (int(ids[start]), int(ids[end - 1]))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        if end - start >= LONG_RUN
    ]


def _drop_dead_additions(plpy: Any, collection: Collection) -> None:
    plpy.execute(
        f"DELETE FROM {collection.pending} AS p WHERE NOT p.deleted AND NOT EXISTS ("
        f"SELECT FROM {collection.embeddings} AS e WHERE e.embedding_id = p.embedding_id)"
    )


def _sees_all_commits(plpy: Any) -> bool:
    """Return whether each statement has its own snapshot, and so sees what others committed."""
    isolation = plpy.execute("SELECT current_setting('transaction_isolation') AS name")[0]["name"]
    return bool(isolation.startswith("read "))


def _remove_orphans(plpy: Any, collection: Collection, directory: str) -> None:
    """Remove the files of builds that were rolled back or killed, since this one may need the room.

    The lock of the collection's builds is held, so no other build runs. Files that are not in
    ``siamese.generations`` were never committed.
    """
    index_file.remove_temporary(directory)
    if _sees_all_commits(plpy):
        known = plpy.execute(
            "SELECT generation FROM siamese.generations"
            f" WHERE collection_id = {collection.collection_id}"
        )
        index_file.remove_others(directory, {row["generation"] for row in known})


def _remove_abandoned(plpy: Any) -> None:
    """Remove the files of collections and databases that no longer exist.

    Dropping can't do it. A transaction may be rolled back, and DROP DATABASE never asks us. A
    transaction that has not committed may have made a collection that this one can't see. Then it
    holds the lock of that collection's builds.
    """
    if not _sees_all_commits(plpy):
        return
    own = Path(generations.directory(plpy))
    for path in _numbered(own):
        lock = f"pg_try_advisory_xact_lock({LOCK_CLASS}, {int(path.name)})"
        known = f"SELECT FROM siamese.collections WHERE collection_id = {int(path.name)}"
        if (
            not plpy.execute(known).nrows()
            and plpy.execute(f"SELECT {lock} AS free")[0]["free"]
            and not plpy.execute(known).nrows()
        ):
            shutil.rmtree(path, ignore_errors=True)
    for path in _numbered(own.parent):
        known = f"SELECT FROM pg_catalog.pg_database WHERE oid = {int(path.name)}"
        if not plpy.execute(known).nrows():
            shutil.rmtree(path, ignore_errors=True)


def _numbered(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.name.isdigit()]
