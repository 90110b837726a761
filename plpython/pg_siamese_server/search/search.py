"""Find the nearest rows by FAISS and among the pending vectors, or by pgvector.

Every candidate is checked, as the invoker, against the collection's own table. There visibility,
row-level security and filters decide. An answer is complete once the k-th row that qualifies is
nearer than anything that FAISS has not returned yet.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pg_siamese_server import interrupts, vectors
from pg_siamese_server.catalog import (
    MAX_CHANGES,
    MAX_XACT_ID,
    Collection,
    collection_by_name,
    is_standby,
    no_image,
    no_table,
    prepare,
    session_cache,
)
from pg_siamese_server.encoding import models
from pg_siamese_server.errors import (
    OBJECT_NOT_IN_PREREQUISITE_STATE,
    UNDEFINED_OBJECT,
    IndexFileError,
    SiameseError,
    counted,
)
from pg_siamese_server.search import fast_path, groups
from pg_siamese_server.search.filters import Conditions, parse
from pg_siamese_server.search.request import Answer, Request
from pg_siamese_server.search.trace import phase

if TYPE_CHECKING:
    from pg_siamese_server.search.faiss_search import FaissSearch

# If a statement reads more changes than this at once, it is planned again.
REPLAN_ROWS = 1_000
# Purposes of the plans that read a collection's state, and the vector of a stored image.
STATE, STATE_BY_KEY, STATE_BY_FRAME = "state", "state by key", "state by frame"

_collections: dict[str, Collection] = session_cache({})
_changes: dict[int, Any] = session_cache({})
_noticed: set[tuple[int, int, str]] = set()


def search(plpy: Any, request: Request) -> Answer:
    """Answer a search."""
    if request.examples is not None or (request.region is not None and request.key is not None):
        from pg_siamese_server.search import queries

        collection = collection_by_name(plpy, request.collection_name)
        request.check_collection(collection)
        queries.settle(plpy, request, collection)
    if not (request.own_group or request.group_by):
        groups.leave_out_own(plpy, request)
    request.check()
    if request.group_by and request.engine != "pgvector":
        answer = groups.search(plpy, request, _search)
    else:
        found = _search_unchanged(plpy, request)
        if found is not None:
            return found
        answer = _search_ordinary(plpy, request)
    if answer.collection.embed == "deferred":
        notice_queued_rows(plpy, answer.collection, is_short=len(answer.keys) < (request.k or 0))
    return answer


def search_part(plpy: Any, request: Request) -> Answer:
    """Answer a checked search that is a part of a larger one, which sends the notices."""
    if request.group_by and request.engine != "pgvector":
        return groups.search(plpy, request, _search)
    return _search(plpy, request)


def _search(plpy: Any, request: Request) -> Answer:
    """Answer a search without groups, or by pgvector."""
    answer = _search_unchanged(plpy, request)
    return _search_ordinary(plpy, request) if answer is None else answer


def _search_ordinary(plpy: Any, request: Request) -> Answer:
    try:
        return _search_snapshot(plpy, request)
    except (plpy.spiexceptions.UndefinedFunction, plpy.spiexceptions.InvalidSchemaName):
        # pgvector may have moved to another schema.
        if _collections.pop(request.collection_name or "", None) is None:
            raise
        return _search_snapshot(plpy, request)


def _search_unchanged(plpy: Any, request: Request) -> Answer | None:
    collection = _collections.get(request.collection_name or "")
    changes = None if collection is None else _changes.get(collection.collection_id)
    if collection is None or changes is None:
        return None
    return fast_path.search(plpy, collection, request, changes)


def _search_snapshot(plpy: Any, request: Request) -> Answer:
    with phase(request.trace, "open"):
        collection, state = current_state(plpy, request)
    if request.key is not None and state["query_id"] is None:
        return _answer_without_vector(plpy, request, collection)
    request.embedding(plpy, collection)  # before filters: the first error is the image's
    conditions = parse(plpy, collection, request.filter, request.exclude)
    if request.left_out:
        left_out = conditions.parameter(collection.candidate_array, request.left_out)
        conditions.clauses.append(f"b.{collection.key_column} <> ALL({left_out})")
    if request.engine != "pgvector":
        finder = open_faiss(plpy, request, collection, state)
        if finder is not None and request.points is None:
            return finder.search(request, conditions)
        if finder is not None:
            from pg_siamese_server.search import queries

            answer = queries.search_best(finder, request, conditions)
            if answer is not None:
                return answer
            decline(request, "Too many candidates would be compared.")
    return _search_pgvector(plpy, request, collection, state, conditions)


def _answer_without_vector(plpy: Any, request: Request, collection: Collection) -> Answer:
    """Answer a search by a row without a vector: as far as is known, nothing is similar to it.

    So a query over all rows continues if one of these is quarantined or queued. A row that does not
    exist, or is not visible, is an error.
    """
    plan = prepare(
        plpy,
        f"SELECT FROM {collection.relation} AS b WHERE b.{collection.key_column} = $1",
        (_key_type(collection),),
    )
    if not plan.execute([request.key]).nrows():
        raise no_image(request.key, collection.name)
    _check_stored_frame(plpy, request, collection)
    told = (collection.collection_id, 0, "without vector")
    if told not in _noticed:
        _noticed.add(told)
        plpy.notice(
            f'image {request.key} of collection "{collection.name}" has no vector,'
            " so nothing is similar to it",
            detail="It is not embedded yet, could not be embedded, or is null.",
            hint="Such rows are listed in embedding_failures or wait in a queue. This is said"
            " once per session.",
        )
    if request.trace is not None:
        request.trace.begin(None, "The image has no vector.")
    return Answer(collection, [], [], None)


def _check_stored_frame(plpy: Any, request: Request, collection: Collection) -> None:
    """Refuse a frame that a stored image does not have."""
    if not request.frame:
        return
    from pg_siamese_server.encoding.opened import check_frame  # it loads an image library

    plan = prepare(
        plpy,
        f"SELECT pg_catalog.count(*) AS count FROM {collection.embeddings} AS e WHERE e.key = $1",
        (_key_type(collection),),
    )
    count = int(plan.execute([request.key])[0]["count"])
    if count:
        check_frame(request.frame, count)


def _key_type(collection: Collection) -> str:
    return "bigint" if collection.has_integer_keys else collection.key_type


def notice_queued_rows(plpy: Any, collection: Collection, *, is_short: bool) -> None:
    """Send a NOTICE of queued rows: once per session, and with every answer that is short."""
    told = (collection.collection_id, 0, "waiting")
    if told in _noticed and not is_short:
        return
    plan = prepare(plpy, "SELECT siamese._is_waiting($1) AS yes", ("integer",))
    if plan.execute([collection.collection_id])[0]["yes"]:
        _noticed.add(told)
        plpy.notice(
            f'collection "{collection.name}" has queued rows that were not searched',
            hint="They become searchable once pg_siamese worker or embed_pending has embedded"
            " them.",
        )


def _state_plan(plpy: Any, collection: Collection, purpose: str) -> Any:
    plan = collection.plans.get(purpose)
    if plan is not None:
        return plan
    stored = "NULL::bigint"
    types = ["text", "xid8"]
    if purpose != STATE:
        types.append(_key_type(collection))
        which = " AND e.representative" if collection.has_frames else ""
        if purpose == STATE_BY_FRAME:
            types.append("bigint")
            which = " AND e.frame = $4"
        stored = (
            f"(SELECT e.embedding_id FROM {collection.relation} AS b"
            f" INNER JOIN {collection.embeddings} AS e ON e.key = b.{collection.key_column}"
            f" WHERE b.{collection.key_column} = $3{which})"
        )
    plan = collection.plans[purpose] = plpy.prepare(
        f"SELECT {stored} AS query_id, c.generation, p.settled, p.opened,"
        " pg_catalog.pg_current_snapshot()::text AS snapshot,"
        " pg_catalog.row_security_active(c.relation) AS is_restricted"
        # The table's lock comes first, as in statements that write or drop.
        f" FROM siamese.collections AS c LEFT JOIN {collection.relation} AS l ON false"
        " LEFT JOIN LATERAL (SELECT"
        " pg_catalog.array_agg(x.change) FILTER (WHERE x.is_settled) AS settled,"
        " pg_catalog.array_agg(x.change) FILTER (WHERE NOT x.is_settled) AS opened"
        " FROM (SELECT CASE WHEN y.deleted THEN -y.embedding_id ELSE y.embedding_id END AS change,"
        " y.xact_id < pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot()) AS is_settled"
        # The upper bound excludes nothing, but planners take ranges for narrow and use the index.
        f" FROM {collection.pending} AS y WHERE y.xact_id >= $2"
        f" AND y.xact_id <= '{MAX_XACT_ID}'::pg_catalog.xid8 LIMIT {MAX_CHANGES + 1}) AS x"
        ") AS p ON c.generation IS NOT NULL"
        f" WHERE {collection.as_it_was(plpy)}",
        types,
    )
    return plan


def current_state(plpy: Any, request: Request) -> tuple[Collection, Any]:
    """Return the collection and its state in this snapshot.

    A collection is remembered by name, and looked up again if renamed, dropped or made again.
    """
    name = request.collection_name
    for _ in range(2):
        collection = _collections.get(name) if name is not None else None
        if collection is None:
            collection = collection_by_name(plpy, name)
            _collections[collection.name] = collection
        request.check_collection(collection)
        changes = _changes.get(collection.collection_id)
        purpose = STATE
        values = [collection.name, str(changes.horizon if changes else 0)]
        if request.key is not None:
            purpose = STATE_BY_KEY
            values.append(request.key)  # type: ignore[arg-type]
            if request.frame:
                purpose = STATE_BY_FRAME
                values.append(request.frame)  # type: ignore[arg-type]
        try:
            rows = _state_plan(plpy, collection, purpose).execute(values)
        except (
            plpy.spiexceptions.UndefinedTable,
            plpy.spiexceptions.UndefinedColumn,
            plpy.spiexceptions.InvalidSchemaName,
        ):
            rows = []
        if rows:
            state = rows[0]
            if len(state["settled"] or ()) + len(state["opened"] or ()) > REPLAN_ROWS:
                # Made while next to nothing was pending, the plan may scan the whole table.
                for each in (STATE, STATE_BY_KEY, STATE_BY_FRAME):
                    collection.plans.pop(each, None)
            return collection, state
        del _collections[collection.name]
    assert collection is not None
    _check_exists(plpy, collection)
    raise SiameseError(
        f'collection "{name}" no longer matches its table',
        sqlstate=OBJECT_NOT_IN_PREREQUISITE_STATE,
        detail="A column or table may have been renamed.",
        hint="Drop the collection and create it again.",
    )


def _check_exists(plpy: Any, collection: Collection) -> None:
    """Refuse a collection if it, or its table, was dropped while the search waited for it.

    The search's snapshot still has both. Names are looked up as they are now.
    """
    oid = collection.relation_oid
    found = plpy.execute(
        f"SELECT pg_catalog.to_regclass('{collection.embeddings}') IS NOT NULL AS has_vectors,"
        f" {oid}::pg_catalog.oid::pg_catalog.regclass::pg_catalog.text <> '{oid}' AS has_table"
    )[0]
    if not found["has_vectors"]:
        raise SiameseError(
            f'collection "{collection.name}" does not exist',
            sqlstate=UNDEFINED_OBJECT,
            detail="It was dropped while this statement waited.",
        )
    if not found["has_table"]:
        raise no_table(collection.name)


def open_faiss(
    plpy: Any, request: Request, collection: Collection, state: Any
) -> FaissSearch | None:
    """Prepare searches by FAISS. If it can't, return None, with a NOTICE if it should have."""
    generation = state["generation"]
    if generation is None:
        decline(request, "The collection has no index generation.")
        return None
    try:
        from pg_siamese_server.search.faiss_search import FaissSearch

        with phase(request.trace, "open"):
            finder = FaissSearch.open(plpy, collection, state, _changes)
    except (IndexFileError, ImportError) as error:
        decline(request, f"{error}.")
        if (collection.collection_id, generation, str(error)) not in _noticed:
            _noticed.add((collection.collection_id, generation, str(error)))
            plpy.notice(
                f'searching collection "{collection.name}" without its FAISS index: {error}',
                hint=f"Answers are exact, but slower. {_remedy(plpy, error)}",
            )
        return None
    if finder is None:
        decline(request, "Too many vectors are pending.")
    return finder


def _remedy(plpy: Any, error: IndexFileError | ImportError) -> str:
    if isinstance(error, IndexFileError) and error.hint:
        return error.hint
    if is_standby(plpy):
        return "Make this standby's own file with rebuild_file."
    return "Build the index with build_index."


def decline(request: Request, reason: str) -> None:
    """Note why FAISS does not answer. Raise it if FAISS was asked for by name."""
    if request.engine == "faiss":
        raise SiameseError(
            "FAISS cannot answer this search",
            sqlstate=OBJECT_NOT_IN_PREREQUISITE_STATE,
            detail=reason,
            hint='Use engine "auto".',
        )
    if request.trace is not None:
        request.trace.reason = reason


def _search_pgvector(
    plpy: Any,
    request: Request,
    collection: Collection,
    state: Any,
    conditions: Conditions,
) -> Answer:
    if request.trace is not None:
        request.trace.begin("pgvector", request.trace.reason or "It was asked for by name.")
        request.trace.exact = True
    where = conditions.copy()
    embedding = request.embedding(plpy, collection)
    if request.points is not None:
        from pg_siamese_server.search import queries

        distance = queries.best_sql(request.points, collection, where)
    else:
        if embedding is not None:
            query = where.parameter(collection.vector_type, vectors.to_text(embedding[0]))
        else:
            place = where.parameter("bigint", state["query_id"])
            query = (
                f"(SELECT q.embedding FROM {collection.embeddings} AS q"
                f" WHERE q.embedding_id = {place})"
            )
        distance = f"(e.embedding {collection.distance_operator} {query})"
    key = f"b.{collection.key_column}"
    if request.candidates is not None:
        place = where.parameter(collection.candidate_array, request.candidates)
        where.clauses.append(f"{key} = ANY({place})")
    if request.key is not None:
        where.clauses.append(f"{key} <> {where.parameter(_key_type(collection), request.key)}")
    if request.max_distance is not None:
        # As real, which is what callers see.
        limit = where.parameter("real", request.max_distance)
        where.clauses.append(f"{distance}::real <= {limit}")
    shown, tie = key, key
    if not collection.has_integer_keys:
        shown = f"{key}::text"
        tie = f'{key}::text COLLATE "C"'
    order, column = f"{distance}, {tie}", ""
    if collection.has_frames:
        order, column = f"{order}, e.frame", "e.frame AS frame, "
    place = "1"
    if request.group_by:
        place = groups.place(plpy, collection, request, where, order)
    condition = f" WHERE {' AND '.join(where.clauses)}" if where.clauses else ""
    rows = (
        f"SELECT {shown} AS key, {column}{distance} AS distance, {tie} AS tie, {place} AS place"
        f" FROM {collection.relation} AS b"
        f" INNER JOIN {collection.embeddings} AS e ON e.key = {key}{condition}"
    )
    if request.group_by:
        limit = where.parameter("bigint", request.per_group)
        rows = f"SELECT r.* FROM ({rows}) AS r WHERE r.place <= {limit}"
    order = "distance, tie, frame" if collection.has_frames else "distance, tie"
    plan = prepare(plpy, f"{rows} ORDER BY {order} LIMIT {int(request.k or 0)}", tuple(where.types))
    with phase(request.trace, "scan"):
        rows = plan.execute(where.values)
    keys, distances = [row["key"] for row in rows], [row["distance"] for row in rows]
    prepared = None
    if embedding is not None:
        prepared = vectors.prepare(embedding, collection.metric)
    elif request.key is not None and models.spec(plpy, collection.model_id).domain is not None:
        prepared = vectors.stored(plpy, collection, state["query_id"])
    frames = [row["frame"] for row in rows] if collection.has_frames else None
    return Answer(collection, keys, distances, prepared, frames)


def warm_up(plpy: Any, name: str | None) -> list[tuple[str, str]]:
    """Open a collection's encoder and index in this session, and return what is ready."""
    request = Request(collection_name=name)
    collection, state = current_state(plpy, request)
    encoder = models.encoder(plpy, collection.model_id)
    spec = encoder.spec.input
    blank = np.zeros((1, spec.height, spec.width, spec.channels), dtype=np.uint8)
    encoder.embed(blank, partial(interrupts.check, plpy))
    result = [
        (
            "onnxruntime",
            f"{counted(collection.dimension, 'dimension')}, {spec.width} x {spec.height}",
        )
    ]
    if state["generation"] is None:
        return [*result, ("pgvector", "no index generation yet")]
    try:
        from pg_siamese_server.search.faiss_search import FaissSearch

        finder = FaissSearch.open(plpy, collection, state, _changes)
    except (IndexFileError, ImportError) as error:
        return [*result, ("pgvector", str(error))]
    if finder is None:
        return [*result, ("pgvector", "too many vectors are pending")]
    return [*result, ("faiss", f"generation {state['generation']}, {finder.describe()}")]
