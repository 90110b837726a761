"""Building a FAISS generation from the vector table."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pg_siamese_server import generations, index_file, interrupts, vectors
from pg_siamese_server.catalog import Collection, collection_by_name, prepare
from pg_siamese_server.errors import OBJECT_NOT_IN_PREREQUISITE_STATE, SiameseError
from pg_siamese_server.index_file import Rows
from pg_siamese_server.interrupts import PIECE_SECONDS, signals_blocked

# Key space of advisory locks that serialise builds of a collection.
LOCK_CLASS = "hashtext('pg_siamese build')"
READ_VALUES = 1_500_000
MIN_READ_ROWS = 500
READ_IDS = 20_000
FLAT_BELOW = 10_000  # a scan of so few takes no longer than a walk through a graph
NOTICE_SECONDS = 1.0
CALIBRATION_QUERIES = 500  # stored ones, and as many that the graph does not know
SEARCH_AT_ONCE = 50
TIMED_QUERIES = 30
TIMED_BELOW = 200_000  # from here on, a scan takes many times as long
NEIGHBOURS = 10
BREADTHS = (10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class Options:
    """Parameters of HNSW and of the build."""

    m: int
    ef_construction: int
    target_recall: float
    threads: int

    def check(self) -> None:
        """Refuse values out of range."""
        for name, value, low, high in (
            ("m", self.m, 4, 64),
            ("ef_construction", self.ef_construction, 8, 1000),
            ("target_recall", self.target_recall, 0.5, 1.0),
            ("threads", self.threads, 1, 64),
        ):
            if value is None or not low <= value <= high:
                raise SiameseError(f"{name} must be between {low} and {high}")


@dataclass(frozen=True)
class Breadths:
    """What searches of a graph need: efSearch for ten neighbours, and the recall at 10 with it.

    A stored vector is easier to find its neighbours for than one that the graph does not know.
    """

    stored: int
    new: int
    recall: float


@dataclass
class _Progress:
    plpy: Any
    name: str
    total: int
    noticed: float

    def report(self, done: int) -> None:
        now = time.monotonic()
        if now - self.noticed >= NOTICE_SECONDS:
            self.noticed = now
            self.plpy.notice(
                f'building index of collection "{self.name}":'
                f" {100 * done // self.total}% ({done} of {self.total} vectors)"
            )


def build_index(
    plpy: Any,
    name: str | None,
    m: int,
    ef_construction: int,
    target_recall: float,
    threads: int | None,
) -> int:
    """Build, publish and make current a new generation; returns its number.

    Runs beside inserts, updates, deletes and searches; builds of a collection wait for each other.
    """
    started = time.monotonic()
    options = Options(m, ef_construction, target_recall, threads or _default_threads(plpy))
    options.check()
    collection = collection_by_name(plpy, name)
    plpy.execute(f"SELECT pg_advisory_xact_lock({LOCK_CLASS}, {collection.collection_id})")
    before = plpy.execute(
        "SELECT generation, epoch FROM siamese.collections"
        f" WHERE collection_id = {collection.collection_id}"
    )[0]
    directory = generations.directory(plpy, collection.collection_id)
    index_file.remove_temporary(directory)

    poll = partial(interrupts.check, plpy)
    rows, matrix = _read(plpy, collection)
    matrix = vectors.prepare(matrix, collection.metric)
    matrix, slots = _share_equal_vectors(matrix, poll)
    levels = None
    if len(matrix) >= FLAT_BELOW:
        matrix, slots, levels = _from_top_to_bottom(matrix, slots, options.m)
    if slots is not None:
        rows.place(slots, len(matrix))
    progress = _Progress(plpy, collection.name, max(1, len(matrix)), started)
    index, breadths = _index(matrix, levels, options, progress, poll)

    generation = int(
        plpy.execute(
            "SELECT nextval(pg_get_serial_sequence('siamese.generations', 'generation')) AS n"
        )[0]["n"]
    )
    build_id = str(uuid.uuid4())
    identity = generations.identity(collection, generation, build_id)
    size = index_file.write(directory, identity, index, rows, poll)
    prepare(
        plpy,
        "INSERT INTO siamese.generations (generation, collection_id, build_id, rows, vectors,"
        " index_type, m, ef_construction, ef_search_stored, ef_search, recall, bytes, seconds)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
        (
            "bigint",
            "integer",
            "uuid",
            "bigint",
            "bigint",
            "text",
            *("integer",) * 4,
            "real",
            "bigint",
            "real",
        ),
    ).execute(
        [
            generation,
            collection.collection_id,
            build_id,
            len(rows.embedding_ids),
            len(matrix),
            "hnsw" if breadths else "flat",
            options.m if breadths else None,
            options.ef_construction if breadths else None,
            breadths.stored if breadths else None,
            breadths.new if breadths else None,
            breadths.recall if breadths else 1.0,
            size,
            time.monotonic() - started,
        ]
    )
    _make_current(plpy, collection, generation, before, rows.embedding_ids)
    # Sessions with an older snapshot may still want the generation before this one; no other. Not
    # earlier: in a transaction of REPEATABLE READ, what was current before may be out of date, and
    # only making this one current tells.
    index_file.remove_others(directory, {generation, before["generation"] or generation})
    _remove_abandoned(plpy)
    return generation


def _default_threads(plpy: Any) -> int:
    workers = int(
        plpy.execute("SELECT current_setting('max_parallel_maintenance_workers') AS n")[0]["n"]
    )
    return max(1, min(len(os.sched_getaffinity(0)), 1 + workers))


def _read(plpy: Any, collection: Collection) -> tuple[Rows, NDArray[np.float32]]:
    """Read all vectors, ascending by embedding_id.

    Each portion has its own snapshot. That is enough: what a portion does not see stays in the
    pending table, since only ids that were read are removed from it.
    """
    integer = collection.has_integer_keys
    key = "int8send(e.key::int8)" if integer else "convert_to(e.key::text, 'UTF8')"
    limit = max(MIN_READ_ROWS, READ_VALUES // collection.dimension)
    # One row a portion: building Python objects for each vector would take ten times as long.
    plan = prepare(
        plpy,
        "SELECT count(*) AS n, max(i) AS last, string_agg(int8send(i), '') AS ids,"
        " string_agg(k, '') AS keys, string_agg(int4send(octet_length(k)), '') AS lengths,"
        " string_agg(v, '') AS vectors"
        f" FROM (SELECT e.embedding_id AS i, {key} AS k,"
        f" {collection.vector_schema}.vector_send(e.embedding) AS v"
        f" FROM {collection.embeddings} AS e WHERE e.embedding_id > $1"
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
        rows.keys = np.frombuffer(data, dtype=">i8").astype(np.int64)
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
        The distinct vectors, float32 (distinct, dimension), and which of them each row has, int32
        (rows,), or None where all are distinct.
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


def _from_top_to_bottom(
    matrix: NDArray[np.float32], slots: NDArray[np.int32] | None, m: int
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]:
    """Draw each vector's level in the graph, and put the vectors in the order of their levels.

    FAISS inserts the highest levels of a call first, which makes a better graph than insertion by
    chance. Since we insert in many calls, to be able to leave in between, we sort beforehand.

    Returns:
        The vectors, which of them each row has, and their levels, counted from 1 as FAISS does.
    """
    # Geometric with ratio 1/m: Malkov and Yashunin, arXiv 1603.09320, section 4.1.
    uniform = 1 - np.random.default_rng(0).random(len(matrix))
    levels = np.floor(-np.log(uniform) / np.log(m)).astype(np.int32) + 1
    order = np.argsort(uniform)  # of one level, in the order of chance
    place = np.empty(len(order), dtype=np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    return matrix[order], place if slots is None else place[slots], levels[order]


def _index(
    matrix: NDArray[np.float32],
    levels: NDArray[np.int32] | None,
    options: Options,
    progress: _Progress,
    poll: index_file.Poll,
) -> tuple[Any, Breadths | None]:
    """Return an index, and how to search it; None for a flat one, which is exact."""
    if levels is None:
        return _flat(matrix), None
    index = faiss.IndexHNSWFlat(matrix.shape[1], options.m)
    index.hnsw.efConstruction = options.ef_construction
    levels = np.minimum(levels, index.hnsw.assign_probas.size())

    def add(first: int, last: int) -> None:
        for start, end in _portions(first, last):
            faiss.copy_array_to_vector(levels[:end], index.hnsw.levels)
            with _threads(options.threads):
                index.add(matrix[start:end])
            poll()
            progress.report(end)

    # The last ones are of the lowest level, drawn by chance: what they find, while the graph does
    # not know them, is what new images will find.
    known = len(matrix) - min(CALIBRATION_QUERIES, len(matrix) // 20)
    add(0, known)
    breadths = _calibrate(index, matrix[:known], matrix[known:], options, poll)
    add(known, len(matrix))
    if breadths.recall >= options.target_recall:
        is_quicker = _is_quicker(index, matrix, breadths.new)
        return (index, breadths) if is_quicker else (_flat(matrix), None)
    progress.plpy.notice(
        f'graph index of collection "{progress.name}" reaches a recall of'
        f" {breadths.recall:.3f} only",
        detail="A flat index takes its place: exact, but the slower the more vectors there are.",
        hint="Build with a larger m and ef_construction, or a lower target_recall.",
    )
    return _flat(matrix), None


def _is_quicker(index: Any, matrix: NDArray[np.float32], ef_search: int) -> bool:
    """Whether the graph answers in less time than a scan of all vectors takes."""
    if len(matrix) > TIMED_BELOW:
        return True
    parameters = faiss.SearchParametersHNSW()
    parameters.efSearch = ef_search
    rivals = {True: partial(index.search, params=parameters), False: _flat(matrix).search}
    seconds: dict[bool, list[float]] = {is_graph: [] for is_graph in rivals}
    for place in np.random.default_rng(0).choice(len(matrix), TIMED_QUERIES).tolist():
        for is_graph, search in rivals.items():
            started = time.perf_counter()
            search(matrix[place : place + 1], NEIGHBOURS)
            seconds[is_graph].append(time.perf_counter() - started)
    return float(np.median(seconds[True])) < float(np.median(seconds[False]))


def _flat(matrix: NDArray[np.float32]) -> Any:
    index = faiss.IndexFlatL2(matrix.shape[1])
    index.add(matrix)
    return index


def _portions(start: int, last: int) -> Iterator[tuple[int, int]]:
    """Cut a build into portions of about PIECE_SECONDS, measuring as it goes."""
    size = 200
    while start < last:
        end = min(last, start + size)
        began = time.monotonic()
        yield start, end
        seconds = max(1e-6, time.monotonic() - began)
        size = int(max(50, min(2 * size, 20_000, (end - start) * PIECE_SECONDS / seconds)))
        start = end


def _calibrate(
    index: Any,
    stored: NDArray[np.float32],
    unknown: NDArray[np.float32],
    options: Options,
    poll: index_file.Poll,
) -> Breadths:
    """Choose the narrowest searches that reach the recall, on queries from this very data.

    Args:
        index: the graph of ``stored``.
        stored: float32 (vectors, dimension).
        unknown: further vectors, which the graph does not hold.
        options: of the build.
        poll: called between pieces of work, may raise to leave.
    """
    places = np.random.default_rng(0).choice(len(stored), len(unknown), replace=False)
    reached = []
    for queries in (stored[places], unknown):
        truth = _exact(stored, queries, options, poll)
        best = (BREADTHS[-1], 0.0)
        for breadth in BREADTHS:
            found = _search(index, queries, NEIGHBOURS, breadth, options, poll)
            recall = float((found[:, :, None] == truth[:, None, :]).any(axis=2).mean())
            if recall > best[1]:
                best = (breadth, recall)
            if recall >= options.target_recall:
                break
        reached.append(best)
    (for_stored, recall_stored), (for_new, recall_new) = reached
    return Breadths(for_stored, for_new, min(recall_stored, recall_new))


def _search(
    index: Any,
    queries: NDArray[np.float32],
    count: int,
    breadth: int,
    options: Options,
    poll: index_file.Poll,
) -> NDArray[np.int64]:
    """Return the neighbours that the graph finds; int64 (queries, count)."""
    parameters = faiss.SearchParametersHNSW()
    parameters.efSearch = breadth
    found = []
    for start in range(0, len(queries), SEARCH_AT_ONCE):
        with _threads(options.threads):
            part = queries[start : start + SEARCH_AT_ONCE]
            found.append(index.search(part, count, params=parameters)[1])
        poll()
    return np.concatenate(found)


def _exact(
    matrix: NDArray[np.float32],
    queries: NDArray[np.float32],
    options: Options,
    poll: index_file.Poll,
) -> NDArray[np.int64]:
    """Return the true nearest neighbours of queries; int64 (queries, NEIGHBOURS)."""
    block = max(1_000, 1_000_000 // matrix.shape[1])
    distances, places = [], []
    for start in range(0, len(matrix), block):
        part = matrix[start : start + block]
        with _threads(options.threads):
            near, where = faiss.knn(queries, part, min(NEIGHBOURS, len(part)))
        distances.append(near)
        places.append(where + start)
        poll()
    order = np.argsort(np.concatenate(distances, axis=1), axis=1)[:, :NEIGHBOURS]
    return np.take_along_axis(np.concatenate(places, axis=1), order, axis=1)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let FAISS use threads, for builds only; they never handle PostgreSQL's signals."""
    with signals_blocked():
        faiss.omp_set_num_threads(count)
        try:
            yield
        finally:
            faiss.omp_set_num_threads(1)


def _make_current(
    plpy: Any,
    collection: Collection,
    generation: int,
    before: dict[str, Any],
    embedding_ids: NDArray[np.int64],
) -> None:
    """Switch to the new generation, and take what it covers off the pending table."""
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
        # A deletion matters while the file holds the vector; an addition while it does not.
        covered = in_file != deleted
        delete.execute([ids[covered].tolist(), deleted[covered].tolist()])
        interrupts.check(plpy)
    _drop_dead_additions(plpy, collection)


def _drop_dead_additions(plpy: Any, collection: Collection) -> None:
    """Remove additions whose vector was deleted again before any build."""
    plpy.execute(
        f"DELETE FROM {collection.pending} AS p WHERE NOT p.deleted AND NOT EXISTS ("
        f"SELECT FROM {collection.embeddings} AS e WHERE e.embedding_id = p.embedding_id)"
    )


def _remove_abandoned(plpy: Any) -> None:
    """Remove the files of collections and databases that are no more.

    Dropping can't do it: a transaction may be rolled back, and DROP DATABASE never asks us. A
    collection that this transaction can't see may be one that another has made and not committed;
    then that other one holds the lock of its index build.
    """
    isolation = plpy.execute("SELECT current_setting('transaction_isolation') AS name")[0]["name"]
    if not isolation.startswith("read "):  # may not see what there is by now
        return
    own = generations.directory(plpy)
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
