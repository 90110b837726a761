"""Search exactly among the rows that qualify, and estimate the cost.

The rows are read as the invoker, by keys alone. Their vectors are in the mapped index file.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server.catalog import Collection, prepare

if TYPE_CHECKING:
    from pg_siamese_server.search.filters import Conditions

# Microseconds of the planner's unit (a page read in sequence), and of each row that is read and
# compared. CALL is the rest of one round of a search.
PLANNER_UNIT, READ_ROW, COMPARE_ROW = 0.5, 0.1, 0.03
CALL = 150
# Rows to read at most, if next to none are expected.
MIN_READ = 10_000
# To ask the table about a row.
CHECK_ROW = 1.5
# The first look asks about k rows times this.
LOOK = 6
# Up to this number of rows, sorting all is quicker than selecting some.
FEW = 200
_ESTIMATE = re.compile(r"cost=[\d.]+\.\.([\d.]+) rows=(\d+)")
# SQL of many integers as one value, which is quicker than an array.
ALL_WANTED = "pg_catalog.string_agg(pg_catalog.int8send(x.wanted), '')"

# What siamese._estimate() explains, since searches are STABLE and may not run EXPLAIN. It takes no
# argument, so that nobody can have it explain anything else.
_asked: tuple[Any, list[Any]] | None = None
# Why it could not. PL/Python would put the class in front of the message.
_refusal: Exception | None = None


@dataclass(eq=False, repr=False)
class Estimate:
    """What the planner expects of reading the rows that qualify: their number and the time."""

    rows: float
    microseconds: float

    @property
    def most(self) -> int:
        """Most rows to read before the estimate is taken for wrong."""
        return 4 * int(self.rows) + MIN_READ


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
    """Return the first line of the plan that ``estimate`` asked for, or None for anyone else."""
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
    """Read, as the invoker, what identifies the rows that qualify.

    Returns:
        int64 (rows,): integer keys, or for other keys and frames the embedding_ids. None if more
        than ``limit`` qualify.
    """
    clauses = f" WHERE {' AND '.join(conditions.clauses)}" if conditions.clauses else ""
    source, wanted = rows_source(collection)
    plan = prepare(
        plpy,
        f"SELECT {ALL_WANTED} AS found"
        f" FROM (SELECT {wanted} AS wanted FROM {source}{clauses} LIMIT {limit + 1}) AS x",
        tuple(conditions.types),
    )
    found = from_send(plan.execute(conditions.values)[0]["found"])
    return None if len(found) > limit else found


def rows_source(collection: Collection) -> tuple[str, str]:
    """Return SQL of a collection's rows, and of what identifies each of them."""
    source, key = f"{collection.relation} AS b", f"b.{collection.key_column}"
    if collection.is_by_integer:
        return source, f"{key}::pg_catalog.int8"
    return f"{source} INNER JOIN {collection.embeddings} AS e ON e.key = {key}", "e.embedding_id"


def from_send(data: bytes | None) -> NDArray[np.int64]:
    """Return the integers of ``ALL_WANTED``, or none for None."""
    return np.frombuffer(data or b"", dtype=">i8").astype(np.int64)


def nearest_places(squared: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], float]:
    """Return the places of the nearest by distance, and the distance up to which they are complete.

    They are ``count``, more if several are as far as the last one, or all.
    """
    if len(squared) <= count:
        return np.argsort(squared, kind="stable"), math.inf
    if len(squared) <= FEW:
        order: NDArray[np.int64] = np.argsort(squared, kind="stable")
        complete = float(squared[order[count - 1]])
        while count < len(order) and squared[order[count]] == complete:
            count += 1
        return order[:count], complete
    complete = float(np.partition(squared, count - 1)[count - 1])
    places = np.flatnonzero(squared <= complete)
    return places[np.argsort(squared[places], kind="stable")], complete
