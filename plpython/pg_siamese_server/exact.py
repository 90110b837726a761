"""Exact search among the rows that qualify, and what it would cost.

The rows are read as the invoker, by keys alone: their vectors are in the mapped index file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pg_siamese_server.catalog import Collection, prepare

if TYPE_CHECKING:
    from pg_siamese_server.filters import Conditions
    from pg_siamese_server.generations import Generation

# Microseconds of one of the planner's units (a page read in sequence), and of each row that an
# exact search reads, and then compares.
PLANNER_UNIT, READ_ROW, COMPARE_ROW = 0.5, 0.1, 0.03
# Numbers that one call of FAISS compares, in some 30 ms.
VALUES_AT_ONCE = 64_000_000
_ESTIMATE = re.compile(r"cost=[\d.]+\.\.([\d.]+) rows=(\d+)")
# What array_send makes of a bigint[] of one dimension without NULL.
_HEADER_BYTES = 20
_ELEMENT = np.dtype([("length", ">i4"), ("value", ">i8")])

# What siamese._estimate() is to explain: searches are STABLE, and may not run EXPLAIN themselves.
# It takes no argument, so that nobody can have it explain anything else.
_asked: tuple[Any, list[Any]] | None = None
# Why it could not, as it was: passed on by PL/Python, its message would begin with its class.
_refusal: Exception | None = None


@dataclass(frozen=True)
class Estimate:
    """What the planner expects of a read of the rows that qualify: how many, and microseconds."""

    rows: float
    microseconds: float


def estimate(plpy: Any, collection: Collection, conditions: Conditions) -> Estimate:
    """Ask the planner, as the invoker, how many rows qualify and what it takes to read them."""
    global _asked, _refusal
    clauses = f" WHERE {' AND '.join(conditions.clauses)}" if conditions.clauses else ""
    plan = prepare(
        plpy,
        f"EXPLAIN SELECT b.{collection.key_column} FROM {collection.relation} AS b{clauses}",
        tuple(conditions.types),
    )
    _asked = plan, conditions.values
    try:
        text = prepare(plpy, "SELECT siamese._estimate() AS plan").execute([])[0]["plan"]
        if _refusal is not None:
            raise _refusal
    finally:
        _asked = _refusal = None
    found = _ESTIMATE.search(text)
    assert found is not None, text
    rows = float(found[2])
    return Estimate(rows, float(found[1]) * PLANNER_UNIT + rows * (READ_ROW + COMPARE_ROW))


def explain_asked(plpy: Any) -> str | None:
    """Return the first line of the plan that :func:`estimate` asked for; None for anyone else."""
    global _refusal
    if _asked is None:
        return None
    plan, values = _asked
    try:
        return str(plan.execute(values)[0]["QUERY PLAN"])
    except plpy.SPIError as error:
        _refusal = error
        return None


def read_keys(
    plpy: Any, collection: Collection, conditions: Conditions, limit: int
) -> NDArray[np.int64] | None:
    """Read, as the invoker, what tells the rows that qualify.

    Returns:
        int64 (rows,): integer keys, or for other keys the embedding_ids of their vectors. None if
        more than ``limit`` qualify.
    """
    clauses = f" WHERE {' AND '.join(conditions.clauses)}" if conditions.clauses else ""
    source, wanted = f"{collection.relation} AS b", f"b.{collection.key_column}::pg_catalog.int8"
    if not collection.has_integer_keys:
        source += f" INNER JOIN {collection.embeddings} AS e ON e.key = b.{collection.key_column}"
        wanted = "e.embedding_id"
    plan = prepare(
        plpy,
        "SELECT pg_catalog.array_send(pg_catalog.array_agg(x.wanted)) AS found"
        f" FROM (SELECT {wanted} AS wanted FROM {source}{clauses} LIMIT {limit + 1}) AS x",
        tuple(conditions.types),
    )
    data = plan.execute(conditions.values)[0]["found"]
    if data is None:
        return np.empty(0, dtype=np.int64)
    values = np.frombuffer(data, dtype=_ELEMENT, offset=_HEADER_BYTES)["value"]
    return None if len(values) > limit else values.astype(np.int64)


def squared_distances(
    index: Generation,
    query: NDArray[np.float32],
    slots: NDArray[np.int64],
    poll: Callable[[], None],
) -> NDArray[np.float32]:
    """Return squared distances of a query to vectors of the file; float32 (slots,)."""
    result = np.empty(len(slots), dtype=np.float32)
    slots = np.ascontiguousarray(slots, dtype=np.int64)
    pointers = faiss.swig_ptr(query), faiss.swig_ptr(index.vectors)
    block = max(1, VALUES_AT_ONCE // index.index.d)
    for start in range(0, len(slots), block):
        part = slice(start, start + block)
        faiss.fvec_L2sqr_by_idx(
            faiss.swig_ptr(result[part]),
            *pointers,
            faiss.swig_ptr(slots[part]),
            index.index.d,
            1,
            len(slots[part]),
        )
        poll()
    return result


def nearest_of_all(
    index: Generation, query: NDArray[np.float32], count: int, poll: Callable[[], None]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Scan all vectors of the file for the nearest ones.

    Returns:
        FAISS positions, ascending by squared distance, and these; ``count`` of them, or all.
    """
    total = len(index.vectors)
    squared = np.empty(total, dtype=np.float32)
    block = max(1, VALUES_AT_ONCE // index.index.d)
    for start in range(0, total, block):
        part = slice(start, min(total, start + block))
        faiss.fvec_L2sqr_ny(
            faiss.swig_ptr(squared[part]),
            faiss.swig_ptr(query),
            faiss.swig_ptr(index.vectors[part]),
            index.index.d,
            len(squared[part]),
        )
        poll()
    positions: NDArray[np.int64] = np.arange(total, dtype=np.int64)
    if count < total:
        positions = np.argpartition(squared, count - 1)[:count]
        poll()
    positions = positions[np.argsort(squared[positions], kind="stable")]
    return positions, squared[positions]


def nearest_places(squared: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], float]:
    """Return the places of the nearest, ascending by distance, and how far they are complete.

    They are ``count``, or more where several are as far as the last one, or all.
    """
    places: NDArray[np.int64] = np.arange(len(squared))
    complete = math.inf
    if count < len(squared):
        complete = float(np.partition(squared, count - 1)[count - 1])
        places = np.flatnonzero(squared <= complete)
    return places[np.argsort(squared[places], kind="stable")], complete
