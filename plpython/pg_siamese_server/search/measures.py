"""How well a collection's searches find what they should: recall, and figures by labels."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server.catalog import Collection, collection_by_name, group_column, prepare
from pg_siamese_server.errors import SiameseError
from pg_siamese_server.search import filters, groups
from pg_siamese_server.search import nearest as many
from pg_siamese_server.search import search as searches
from pg_siamese_server.search.filters import Conditions
from pg_siamese_server.search.request import Answer, Request

MAX_QUERIES = 10_000
# FAISS calculates distances in single precision. Rows of equal distance may differ by this much,
# of the distance or, below one, absolutely.
ROUNDING = 1e-6
# Neighbours of which figures are made.
NEIGHBOURS = 5
FIGURES = ("map5", "mmv5", "acc1", "acc3", "acc5")
NO_LABEL = -1


@dataclass(frozen=True)
class _Drawn:
    """Rows drawn at random: keys, these as an array in text, and a label of each."""

    keys: list[Any]
    array: str
    labels: list[str | None]


def measure_recall(
    plpy: Any, name: str | None, queries: int, k: int, text: str | None, seed: int
) -> tuple[int, float | None, float | None, float | None, float | None]:
    """Compare default searches by stored rows, drawn at random, with exact ones.

    Args:
        plpy: PL/Python's module.
        name: of the collection.
        queries: how many rows to draw, of those that the caller sees.
        k: rows of each answer.
        text: filter of the searches, as JSON.
        seed: which rows are drawn.

    Returns:
        The number of queries with an answer, the mean and the minimum of their recall, 0 to 1, and
        mean milliseconds of a default search and of an exact one. Without such queries, None.
    """
    if not 1 <= queries <= MAX_QUERIES:
        raise SiameseError(f"queries must be between 1 and {MAX_QUERIES}")
    Request(collection_name=name, k=k).check()
    collection = collection_by_name(plpy, name)
    drawn = _draw(plpy, collection, Conditions(), queries, seed, "NULL")
    recalls, times = [], []
    for place, key in enumerate(drawn.keys):
        if not place:  # the first search of a session opens the index
            _timed(plpy, Request(collection_name=name, key=key, k=k, filter=text))
        answer, taken = _timed(plpy, Request(collection_name=name, key=key, k=k, filter=text))
        exact, exactly = _timed(
            plpy, Request(collection_name=name, key=key, k=k, filter=text, engine="pgvector")
        )
        if exact.keys:
            recalls.append(_recall(answer, exact))
            times.append((taken, exactly))
    if not recalls:
        return 0, None, None, None, None
    mean = 1000 * np.mean(times, axis=0)
    return len(recalls), float(np.mean(recalls)), min(recalls), float(mean[0]), float(mean[1])


def retrieval_quality(
    plpy: Any,
    name: str | None,
    label_column: str,
    queries: str | None,
    gallery: str | None,
    sample: int,
    seed: int,
    own_group: bool,
) -> tuple[int, dict[str, float | None]]:
    """Compare the labels of stored rows with those of their nearest neighbours.

    Args:
        plpy: PL/Python's module.
        name: of the collection.
        label_column: of its table. Rows without a label are neither queries nor neighbours.
        queries: filter of the rows to search by, as JSON.
        gallery: filter of their neighbours.
        sample: how many queries to draw at random, of those that the caller sees.
        seed: which ones.
        own_group: whether rows of a query's own group count, if the collection has a group column.

    Returns:
        The number of queries, and figures in per cent, or None for each without queries.
    """
    if sample < 1:
        raise SiameseError("sample must be positive")
    collection = collection_by_name(plpy, name)
    column = filters.columns(plpy, collection, [label_column])[label_column]["quoted"]
    conditions = filters.parse(plpy, collection, filters.with_value(queries, label_column))
    labelled = filters.with_value(gallery, label_column)
    drawn = _draw(plpy, collection, conditions, sample, seed, f"b.{column}::text")
    if not drawn.keys:
        return 0, dict.fromkeys(FIGURES)
    own_group = own_group or group_column(plpy, name) is None
    each = Request(collection_name=name, key=0, k=NEIGHBOURS, filter=labelled, own_group=own_group)
    numbers: dict[str, int] = {}
    near = np.full((len(drawn.keys), NEIGHBOURS), NO_LABEL)
    places = {key: place for place, key in enumerate(drawn.keys)}
    for part in many.nearest(plpy, each, drawn.array, 1):
        found = groups.labels(plpy, collection, label_column, list(set(part.neighbours)))
        for key, rank, neighbour in zip(part.keys, part.ranks, part.neighbours, strict=True):
            if neighbour in found:
                number = numbers.setdefault(str(found[neighbour]), len(numbers))
                near[places[key], rank - 1] = number
    own = np.array([numbers.setdefault(str(label), len(numbers)) for label in drawn.labels])
    return len(drawn.keys), _figures(near, own)


def _draw(
    plpy: Any, collection: Collection, conditions: Conditions, count: int, seed: int, label: str
) -> _Drawn:
    """Draw rows that have a vector, as the invoker sees them, with SQL ``label`` of each.

    Which rows these are depends on the keys and the seed alone.
    """
    where = conditions.copy()
    key = f"b.{collection.key_column}"
    shown = key if collection.has_integer_keys else f"{key}::text"
    by, limit = where.parameter("bigint", seed), where.parameter("bigint", count)
    clauses = " AND ".join([collection.one_per_image, *where.clauses])
    plan = prepare(
        plpy,
        "SELECT pg_catalog.array_agg(d.key) AS keys, pg_catalog.array_agg(d.key)::text AS text,"
        " pg_catalog.array_agg(d.label) AS labels"
        f" FROM (SELECT {shown} AS key, {label} AS label FROM {collection.relation} AS b"
        f" INNER JOIN {collection.embeddings} AS e ON e.key = {key} WHERE {clauses}"
        f' ORDER BY pg_catalog.hashtextextended({key}::text COLLATE "C", {by}), {key}'
        f" LIMIT {limit}) AS d",
        tuple(where.types),
    )
    row = plan.execute(where.values)[0]
    return _Drawn(row["keys"] or [], row["text"] or "{}", row["labels"] or [])


def _timed(plpy: Any, request: Request) -> tuple[Answer, float]:
    started = time.perf_counter()
    answer = searches.search(plpy, request)
    return answer, time.perf_counter() - started


def _recall(answer: Answer, exact: Answer) -> float:
    """Return the share of the exact answer that was found. Rows as near as its last one count."""
    farthest = exact.distances[-1]
    farthest += ROUNDING * max(1.0, farthest)
    found = sum(distance <= farthest for distance in answer.distances)
    return min(1.0, found / len(exact.keys))


def _figures(near: NDArray[np.int64], own: NDArray[np.int64]) -> dict[str, float | None]:
    """Return the figures in per cent, as Mahbod et al. define them.

    Source: Engineering Applications of Artificial Intelligence 150 (2025) 110571.

    Args:
        near: labels (queries, 5) of the neighbours, nearest first. A row with fewer ends with
            ``NO_LABEL``.
        own: labels (queries,) of the queries.
    """
    relevant = near == own[:, None]
    hits = relevant.sum(axis=1)
    precision = np.cumsum(relevant, axis=1) / np.arange(1, NEIGHBOURS + 1)
    votes = ((near[:, :, None] == near[:, None, :]) & (near != NO_LABEL)[:, None, :]).sum(axis=2)
    scores = (
        (precision * relevant).sum(axis=1) / np.maximum(hits, 1),
        (hits > 0) & (hits >= votes.max(axis=1)),
        relevant[:, 0],
        relevant[:, :3].any(axis=1),
        relevant.any(axis=1),
    )
    return {name: 100 * float(score.mean()) for name, score in zip(FIGURES, scores, strict=True)}
