"""The best of each group: as many rows as groups are asked for, and no group too often."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from pg_siamese_server.catalog import Collection, group_column, prepare
from pg_siamese_server.search import filters
from pg_siamese_server.search.filters import Conditions
from pg_siamese_server.search.request import MAX_K, Answer, Request
from pg_siamese_server.search.trace import phase

# Times what is expected to be enough, and the least by which a round is larger than the last.
ENOUGH, GROW = 1.5, 2
# With more rows a round, one scan by pgvector that knows of groups is quicker.
MAX_ROWS = 20_000


def leave_out_own(plpy: Any, request: Request) -> None:
    """Let the collection's group column say which rows are of the stored image's own group.

    All rows of other groups count, so ``per_group`` is no limit. A request for a collection without
    the column stays as it is, for ``Request.check`` to refuse.
    """
    column = group_column(plpy, request.collection_name)
    if column is None or request.per_group > 1:
        return
    if not request.own_keys:  # an image that is not stored has no group
        request.own_group = True
    else:
        request.group_by, request.per_group = column, MAX_K


def search(plpy: Any, request: Request, find: Callable[[Any, Request], Answer]) -> Answer:
    """Find the k nearest rows, at most ``per_group`` of each group.

    The nearest rows are asked for, more and more of them, until they hold enough groups or there
    are no more. As they come nearest first, the first rows of a group are its best.

    Args:
        plpy: PL/Python's module.
        request: with a column to group by.
        find: answers a request without groups.
    """
    assert request.k is not None and request.group_by
    wanted, column = request.k, request.group_by
    rows = copy.copy(request)  # which keeps the image's embedding
    rows.group_by = ""
    rows.k = math.ceil(ENOUGH * wanted) + 1
    groups: dict[Any, str | None] = {}
    while True:
        answer = find(plpy, rows)
        keys = answer.keys
        own = [] if request.own_group else request.own_keys
        new = [key for key in (*keys, *own) if key not in groups]
        with phase(request.trace, "check"):
            groups.update(labels(plpy, answer.collection, column, new))
        taken = chosen(keys, groups, request)
        if len(taken) == wanted or len(keys) < rows.k:
            if request.trace is not None:
                last = taken[-1] + 1 if len(taken) == wanted else len(keys)
                request.trace.grouped = last - len(taken)
            return answer.taken(taken)
        share = max(1, len(taken)) / len(keys)
        rows.k = max(GROW * rows.k, math.ceil(ENOUGH * wanted / share))
        if rows.k > MAX_ROWS and request.engine == "auto":
            scan = copy.copy(rows)
            scan.k, scan.group_by, scan.engine = wanted, column, "pgvector"
            if request.trace is not None:
                request.trace.reason = f"FAISS would be asked for more than {MAX_ROWS} rows."
            return find(plpy, scan)


def chosen(keys: list[Any], groups: dict[Any, str | None], request: Request) -> list[int]:
    """Return the places of the first k rows that their groups have room for."""
    assert request.k is not None
    full: Counter[str | None] = Counter()
    if not request.own_group:
        own = {groups.get(key) for key in request.own_keys} - {None}
        full.update(dict.fromkeys(own, request.per_group))
    taken: list[int] = []
    for place, key in enumerate(keys):
        if key not in groups:  # a rule hides what it showed before
            continue
        group = groups[key]
        if full[group] < request.per_group:
            full[group] += 1
            taken.append(place)
            if len(taken) == request.k:
                break
    return taken


def place(
    plpy: Any, collection: Collection, request: Request, where: Conditions, order: str
) -> str:
    """Return SQL of the place of a row in its group; adds the condition on the own group."""
    column = _quoted(plpy, collection, request.group_by)
    # As Python compares, whatever the column's collation.
    label = f'b.{column}::text COLLATE "C"'
    if request.own_keys and not request.own_group:
        own = where.parameter(collection.key_array, request.own_keys)
        where.clauses.append(
            f"({label} OPERATOR(pg_catalog.=) ANY (ARRAY(SELECT o.{column}::text"
            f" FROM {collection.relation} AS o WHERE o.{collection.key_column} = ANY({own}))))"
            " IS NOT TRUE"
        )
    return f"pg_catalog.row_number() OVER (PARTITION BY {label} ORDER BY {order})"


def labels(
    plpy: Any, collection: Collection, column: str, keys: list[Any]
) -> dict[Any, str | None]:
    """Return a column's value of each row, as text, as the invoker sees it."""
    if not keys:
        return {}
    quoted = _quoted(plpy, collection, column)
    shown = "b.{0}" if collection.has_integer_keys else "b.{0}::text"
    plan = prepare(
        plpy,
        f"SELECT {shown.format(collection.key_column)} AS key, b.{quoted}::text AS label"
        f" FROM {collection.relation} AS b WHERE b.{collection.key_column} = ANY($1)",
        (collection.key_array,),
    )
    try:
        rows = plan.execute([keys])
    except plpy.spiexceptions.UndefinedColumn:
        filters.columns(plpy, collection, [column])  # raises an error that names it
        raise
    return {row["key"]: row["label"] for row in rows}


def _quoted(plpy: Any, collection: Collection, column: str) -> str:
    """Return a column's name for SQL, looked up once: it stays the name, whatever becomes of it."""
    found = collection.columns.get(column)
    return str((found or filters.columns(plpy, collection, [column])[column])["quoted"])
