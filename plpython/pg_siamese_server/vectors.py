"""Convert vectors between SQL, NumPy and FAISS."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server.catalog import Collection
from pg_siamese_server.catalog import prepare as prepare_statement


def from_send(data: bytes, count: int) -> NDArray[np.float32]:
    """Parse concatenated results of pgvector's ``vector_send``.

    Args:
        data: for each vector two 16-bit words (dimension, unused), then big-endian float32.
        count: how many vectors.

    Returns:
        float32 (count, dimension), native byte order.
    """
    words = np.frombuffer(data, dtype=">f4").reshape(count, -1)
    return words[:, 1:].astype(np.float32)


def stored(plpy: Any, collection: Collection, embedding_id: int) -> NDArray[np.float32]:
    """Read a stored vector, prepared, float32 (1, dimension)."""
    plan = prepare_statement(
        plpy,
        f"SELECT {collection.vector_schema}.vector_send(e.embedding) AS vector"
        f" FROM {collection.embeddings} AS e WHERE e.embedding_id = $1",
        ("bigint",),
    )
    data = plan.execute([embedding_id])[0]["vector"]
    return prepare(from_send(data, 1), collection.metric)


def to_text(vector: NDArray[np.float32]) -> str:
    """Return pgvector's text form. Nine digits keep every float32 exactly."""
    return _text_template(len(vector)) % tuple(vector.tolist())


@functools.cache
def _text_template(dimension: int) -> str:
    return f"[{','.join(['%.9g'] * dimension)}]"


def prepare(vectors: NDArray[np.float32], metric: str) -> NDArray[np.float32]:
    """Bring vectors to the form that is indexed: of length one for ``cosine``, else unchanged.

    For vectors of length one, squared Euclidean distance is twice the cosine distance. FAISS builds
    better graphs with it than with inner products.
    """
    if metric != "cosine":
        return np.ascontiguousarray(vectors, dtype=np.float32)
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    return np.ascontiguousarray(vectors / norms[:, None], dtype=np.float32)


def squared_distances(
    matrix: NDArray[np.float32], query: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return squared Euclidean distances of rows to one query (1, dimension), float32 (rows,)."""
    difference = matrix - query
    result: NDArray[np.float32] = np.einsum("ij,ij->i", difference, difference)
    return result


def to_distances(squared: list[float], metric: str) -> list[float]:
    """Convert squared Euclidean distances of prepared vectors to those that callers see."""
    if metric == "cosine":
        return [0.5 * square for square in squared]
    return [math.sqrt(square) for square in squared]


def squared_limit(max_distance: float, metric: str) -> float:
    """Return the largest squared Euclidean distance of prepared vectors within ``max_distance``."""
    if max_distance < 0:
        return -1.0
    if metric == "cosine":
        return 2 * max_distance
    # The largest square whose root, as callers see it, is still within.
    distance = np.float32(max_distance)
    limit = distance * distance
    while np.isfinite(limit) and np.sqrt(np.nextafter(limit, np.float32(np.inf))) <= distance:
        limit = np.nextafter(limit, np.float32(np.inf))
    while np.sqrt(limit) > distance:
        limit = np.nextafter(limit, np.float32(0))
    return float(limit)


def are_in(values: NDArray[np.int64], ordered: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which values are among ascending ones."""
    if not len(ordered):
        return np.zeros(len(values), dtype=bool)
    places = np.minimum(ordered.searchsorted(values), len(ordered) - 1)
    result: NDArray[np.bool_] = ordered[places] == values
    return result
