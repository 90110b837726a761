"""Search by what is not one whole image: by several examples, or by a part of a stored image.

Strategy ``mean`` is a search for one vector: the mean of the liked examples, moved away from the
mean of the unliked ones (Rocchio, in The SMART Retrieval System, 1971, chapter 14). Strategy
``best`` takes the distance to the nearest liked example, and weighs it by the distance to the
nearest unliked one (after Giacinto and Roli, Neural Information Processing Systems 2004).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server import interrupts, vectors
from pg_siamese_server.catalog import Collection, no_image, prepare, stored_image
from pg_siamese_server.encoding import models
from pg_siamese_server.errors import (
    NULL_VALUE_NOT_ALLOWED,
    OBJECT_NOT_IN_PREREQUISITE_STATE,
    PROGRAM_LIMIT_EXCEEDED,
    ImageError,
    SiameseError,
)
from pg_siamese_server.search.request import MAX_EXAMPLES, MEAN, Answer, Points, Request

if TYPE_CHECKING:
    from pg_siamese_server.search.faiss_search import FaissSearch
    from pg_siamese_server.search.filters import Conditions

# Times the rows of a round, and the most numbers in the vectors of all its candidates.
GROW, MAX_VALUES = 2, 4_000_000
# Distances by FAISS and by NumPy differ by less, of their size.
ROUNDING = 1e-5


def settle(plpy: Any, request: Request, collection: Collection) -> None:
    """Turn the examples of a request, or the key whose image has a region, into a query."""
    if request.examples is None:
        spec = models.spec(plpy, collection.model_id).input.within(collection.limits)
        request.image = stored_image(plpy, collection, request.key, spec.max_bytes)
        request.left_out, request.key = [request.key], None
        return
    examples = request.examples
    liked = _Read(plpy, collection, "like", examples.like, examples.like_images)
    unliked = _Read(plpy, collection, "unlike", examples.unlike, examples.unlike_images)
    if not liked.count:
        raise SiameseError(
            "no example is liked", hint="Give at least one in like or in like_images."
        )
    if liked.count + unliked.count > MAX_EXAMPLES:
        raise _too_many()
    for key in liked.stored.keys() & unliked.stored.keys():
        raise SiameseError(f"image {key} is in both like and unlike")
    request.left_out = [*liked.stored, *unliked.stored]
    points = Points(liked.vectors(), unliked.vectors(), examples.penalty)
    if examples.strategy != MEAN:
        request.points = points
        return
    from pg_siamese_server.encoding.encoder import have_distances

    request.vector = moved_mean(points)
    if not have_distances(request.vector, collection.metric):
        raise SiameseError(
            "mean of the examples has no distance to other vectors",
            detail="They are opposite to each other.",
            hint="Use strategy => 'best'.",
        )


def _too_many() -> SiameseError:
    return SiameseError(
        f"more than {MAX_EXAMPLES} examples are given", sqlstate=PROGRAM_LIMIT_EXCEEDED
    )


class _Read:
    """Examples of one kind.

    Attributes:
        stored: prepared vectors, float32 (1, dimension), by key, as the invoker sees them.
    """

    def __init__(
        self,
        plpy: Any,
        collection: Collection,
        name: str,
        keys: str,
        images: list[Any],
    ) -> None:
        self.plpy, self.collection, self.name = plpy, collection, name
        self.stored = self._read(keys) if keys != "{}" else {}
        while images and isinstance(images[0], list):  # of several dimensions
            images = [image for part in images for image in part]
        self.images = images
        self.count = len(self.stored) + len(images)

    def vectors(self) -> NDArray[np.float32]:
        """Return all vectors, prepared, float32 (examples, dimension)."""
        empty = np.empty((0, self.collection.dimension), dtype=np.float32)
        embedded = [self._embed(place) for place in range(len(self.images))]
        return np.concatenate([empty, *self.stored.values(), *embedded])

    def _read(self, keys: str) -> dict[Any, NDArray[np.float32]]:
        collection = self.collection
        shown = "x.key" if collection.has_integer_keys else "x.key::text"
        plan = prepare(
            self.plpy,
            f"SELECT {shown} AS key, b.{collection.key_column} IS NOT NULL AS is_there,"
            f" {collection.vector_schema}.vector_send(e.embedding) AS vector"
            " FROM (SELECT u.key, u.place"
            f" FROM pg_catalog.unnest(CAST($1 AS {collection.candidate_array}))"
            f" WITH ORDINALITY AS u (key, place) LIMIT {MAX_EXAMPLES + 1}) AS x"
            f" LEFT JOIN {collection.relation} AS b ON b.{collection.key_column} = x.key"
            f" LEFT JOIN {collection.embeddings} AS e ON e.key = b.{collection.key_column}"
            f" AND {collection.one_per_image} ORDER BY x.place",
            ("text",),
        )
        rows = plan.execute([keys])
        if len(rows) > MAX_EXAMPLES:
            raise _too_many()
        found = {}
        for row in rows:
            if row["key"] is None:
                raise self._null(self.name)
            if not row["is_there"]:
                raise no_image(row["key"], collection.name)
            if row["vector"] is None:
                raise SiameseError(
                    f'image {row["key"]} of collection "{collection.name}" has no vector',
                    sqlstate=OBJECT_NOT_IN_PREREQUISITE_STATE,
                    detail="It is not embedded yet, could not be embedded, or is null.",
                    hint="Leave it out. Such rows are listed in embedding_failures or wait in a"
                    " queue.",
                )
            vector = vectors.from_send(row["vector"], 1)
            found[row["key"]] = vectors.prepare(vector, collection.metric)
        return found

    def _embed(self, place: int) -> NDArray[np.float32]:
        image, name, collection = self.images[place], f"{self.name}_images", self.collection
        if image is None:
            raise self._null(name)
        try:
            embedded = models.embed(
                self.plpy, collection.model_id, [image], collection.limits, collection.sha256
            )
        except ImageError as error:
            error.message += f" ({name}, element {place + 1})"
            raise
        return vectors.prepare(embedded, collection.metric)

    @staticmethod
    def _null(name: str) -> SiameseError:
        return SiameseError(f"an element of {name} is null", sqlstate=NULL_VALUE_NOT_ALLOWED)


def moved_mean(points: Points) -> NDArray[np.float32]:
    """Return the mean of the liked, moved away from that of the unliked: float32 (1, dimension).

    It moves by their difference times the penalty.
    """
    mean = points.liked.mean(axis=0, keepdims=True, dtype=np.float64)
    if len(points.unliked):
        mean += points.penalty * (mean - points.unliked.mean(axis=0, dtype=np.float64))
    result: NDArray[np.float32] = mean.astype(np.float32)
    return result


def nearest_distances(
    examples: NDArray[np.float32],
    matrix: NDArray[np.float32],
    metric: str,
    poll: Callable[[], None],
) -> NDArray[np.float64]:
    """Return the distance of each prepared vector (rows, dimension) to the nearest example.

    It is infinite if there are no examples.
    """
    least = np.full(len(matrix), np.inf, dtype=np.float32)
    for example in examples:
        np.minimum(least, vectors.squared_distances(matrix, example[None]), out=least)
        poll()
    return np.array(vectors.to_distances(least.tolist(), metric))


def best_scores(
    liked: NDArray[np.float64], unliked: NDArray[np.float64], penalty: float
) -> NDArray[np.float64]:
    """Return what ``best`` orders rows by, from their distances to the nearest examples.

    It is the distance to the liked one, made longer by the penalty times how close the unliked one
    is: 0 if infinitely far, 1 if as far as the liked one, 2 if it is the same.
    """
    both = liked + unliked
    added = np.zeros_like(liked)
    np.divide(2 * penalty * liked**2, both, out=added, where=both > 0)
    return liked + added


def best_sql(points: Points, collection: Collection, where: Conditions) -> str:
    """Return SQL of ``best_scores`` of the vector ``e.embedding``. Adds parameters."""

    def nearest(examples: NDArray[np.float32]) -> str:
        places = [
            where.parameter(collection.vector_type, vectors.to_text(example))
            for example in examples
        ]
        each = (f"e.embedding {collection.distance_operator} {place}" for place in places)
        return f"LEAST({', '.join(each)})"

    liked = nearest(points.liked)
    if not len(points.unliked):
        return liked
    penalty = where.parameter("double precision", 2 * points.penalty)
    closeness = f"{liked} / NULLIF({liked} + {nearest(points.unliked)}, 0)"
    return f"({liked} + COALESCE({penalty} * {liked} * {closeness}, 0))"


def search_best(finder: FaissSearch, request: Request, conditions: Conditions) -> Answer | None:
    """Find the k rows of the best scores among those nearest to each liked example.

    A score is never less than the distance to the nearest liked example. So no row is missing once
    the k-th score is less than the distance up to which the rows near each example are known.

    Args:
        finder: of this snapshot.
        request: with points to search for.
        conditions: of its filters.

    Returns:
        None if that takes too many candidates.
    """
    assert request.points is not None and request.k is not None
    collection, points = finder.collection, request.points
    one = copy.copy(request)
    one.points, one.k = None, request.k
    while len(points.liked) * one.k * collection.dimension <= MAX_VALUES:
        items: dict[Any, None] = {}
        known = math.inf
        for liked in points.liked:
            interrupts.check(finder.plpy)
            one.vector = liked[None]
            near = finder.search(one, conditions)
            items.update(dict.fromkeys(near.items))
            if len(near.keys) == one.k:
                known = min(known, near.distances[-1] * (1 - ROUNDING))
        answer = _ordered(finder, request, list(items))
        scores = answer.distances
        if known == math.inf or (len(scores) >= request.k and scores[request.k - 1] < known):
            return answer.taken(list(range(min(request.k, len(scores)))))
        one.k *= GROW
    return None


def _ordered(finder: FaissSearch, request: Request, items: list[Any]) -> Answer:
    """Return candidates by score, and by key and frame if equal, within ``max_distance``."""
    assert request.points is not None
    collection = finder.collection
    matrix, items = _vectors_of(finder.plpy, collection, items)
    poll = partial(interrupts.check, finder.plpy)
    points = request.points
    liked, unliked = (
        nearest_distances(examples, matrix, collection.metric, poll)
        for examples in (points.liked, points.unliked)
    )
    scores = best_scores(liked, unliked, points.penalty).astype(np.float32)
    order = sorted(range(len(items)), key=lambda place: (scores[place], items[place]))
    if request.max_distance is not None:
        order = [place for place in order if scores[place] <= request.max_distance]
    return Answer.of_items(
        collection, [items[place] for place in order], scores[order].tolist(), None
    )


def _vectors_of(
    plpy: Any, collection: Collection, items: list[Any]
) -> tuple[NDArray[np.float32], list[Any]]:
    """Read vectors, as the invoker sees them: prepared float32 (rows, dimension), and their items.

    What the invoker no longer sees is left out.
    """
    source, match = "pg_catalog.unnest($1)", "e.key = x.key"
    types, values, names = [collection.key_array], [items], "key"
    if collection.has_frames:
        source, match = f"{source}, pg_catalog.unnest($2)", f"{match} AND e.frame = x.frame"
        types, names = [*types, "bigint[]"], "key, frame"
        values = [[key for key, _ in items], [frame for _, frame in items]]
    plan = prepare(
        plpy,
        "SELECT pg_catalog.array_agg(x.place ORDER BY x.place) AS places, pg_catalog.string_agg("
        f"{collection.vector_schema}.vector_send(e.embedding), '' ORDER BY x.place) AS vectors"
        f" FROM ROWS FROM ({source}) WITH ORDINALITY AS x ({names}, place)"
        f" INNER JOIN {collection.embeddings} AS e ON {match}",
        tuple(types),
    )
    row = plan.execute(values)[0]
    places = row["places"] or []
    if not places:
        return np.empty((0, collection.dimension), dtype=np.float32), []
    matrix = vectors.from_send(row["vectors"], len(places))
    return vectors.prepare(matrix, collection.metric), [items[place - 1] for place in places]
