"""Searches of a collection with nothing pending: FAISS first, then one statement that confirms.

What a search must know of its snapshot, and which of the rows that FAISS found are there for the
caller, are two questions to the database. While a session knows of no change since the index was
built, it asks both at once, and takes the answer only where it is what was expected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server import vectors
from pg_siamese_server.catalog import MAX_XACT_ID, Collection
from pg_siamese_server.vectors import in_order, to_distances

if TYPE_CHECKING:
    from pg_siamese_server.pending import Changes
    from pg_siamese_server.search import Request


def may_serve(request: Request, changes: Changes) -> bool:
    """Whether it is worth a try: a plain search, integer keys, nothing pending when last seen."""
    return (
        changes.is_empty
        and not changes.is_restricted
        and changes.index.rows.keys is not None
        and changes.index.index.ntotal > 0
        and request.filter is None
        and request.candidates is None
        and request.max_distance is None
        and request.engine != "pgvector"
    )


def search(
    plpy: Any,
    collection: Collection,
    request: Request,
    changes: Changes,
    embedding: NDArray[np.float32] | None,
) -> tuple[list[int], list[float], NDArray[np.float32]] | None:
    """Find the k nearest rows.

    Args:
        plpy: of PL/Python.
        collection: as it was when last looked up.
        request: for which :func:`may_serve`.
        changes: what this session knows of the collection's pending table: nothing.
        embedding: of the image to search for, float32 (1, dimension), or None to search by key.

    Returns:
        Keys, distances and the prepared query, or None where anything is not as expected: then the
        ordinary way.
    """
    assert request.k is not None
    index = changes.index
    assert index.rows.keys is not None
    entry = None
    if embedding is not None:
        query = vectors.prepare(embedding, collection.metric)
    else:
        assert isinstance(request.key, int)
        row = index.rows.row_of_key(request.key)
        if row is None:
            return None
        entry = index.slot_of(row)
        query = index.vectors[entry : entry + 1]
    positions, squared = index.search(query, request.k + (entry is not None), entry)
    rows, squared = index.expand(positions, squared)
    keys, distances = in_order(index.rows.keys[rows].tolist(), squared.tolist())
    if entry is not None:
        if request.key not in keys:
            return None
        own = keys.index(request.key)
        del keys[own], distances[own]
    keys, distances = keys[: request.k], distances[: request.k]
    if len(keys) < request.k:
        return None
    asked = keys if entry is None else [*keys, request.key]
    values = [collection.name, str(changes.horizon), asked]
    try:
        state = _plan(plpy, collection).execute(values)
    except (
        plpy.spiexceptions.UndefinedTable,
        plpy.spiexceptions.UndefinedColumn,
        plpy.spiexceptions.InvalidSchemaName,
    ):
        return None
    if not state:
        return None
    seen = state[0]
    if seen["generation"] != changes.generation or seen["changed"] or seen["there"] < len(asked):
        return None
    return keys, to_distances(distances, collection.metric), query


def _plan(plpy: Any, collection: Collection) -> Any:
    plan = collection.plans.get("steady")
    if plan is None:
        plan = collection.plans["steady"] = plpy.prepare(
            "SELECT c.generation,"
            f" EXISTS (SELECT FROM {collection.pending} AS y WHERE y.xact_id >= $2"
            # The upper bound excludes nothing: see the ordinary statement.
            f" AND y.xact_id <= '{MAX_XACT_ID}'::pg_catalog.xid8) AS changed,"
            f" (SELECT pg_catalog.count(*) FROM {collection.relation} AS b"
            f" WHERE b.{collection.key_column} = ANY($3)) AS there"
            " FROM siamese.collections AS c"
            f" WHERE {collection.as_it_was(plpy)}",
            ["text", "xid8", "bigint[]"],
        )
    return plan
