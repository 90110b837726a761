"""What a search is asked and what it answers."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server import vectors
from pg_siamese_server.catalog import Collection
from pg_siamese_server.encoding import models
from pg_siamese_server.errors import FEATURE_NOT_SUPPORTED, SiameseError
from pg_siamese_server.limits import Limits
from pg_siamese_server.search.trace import Trace, phase

if TYPE_CHECKING:  # few searches have one
    from pg_siamese_server.encoding.regions import Region

MAX_K = 10_000
ENGINES = ("auto", "faiss", "pgvector")
MEAN, BEST = STRATEGIES = "mean", "best"
# Of all kinds together. Each of an answer's candidates is compared with each example.
MAX_EXAMPLES = 100
MAX_PENALTY = 10


@dataclass(kw_only=True, slots=True, eq=False, repr=False)
class Examples:
    """Images to search by: more like some, and less like others.

    Attributes:
        like, unlike: keys of stored images, as the text of an array.
        like_images, unlike_images: image files.
        strategy: ``mean`` or ``best``.
        penalty: how much an unliked example counts.
    """

    like: str
    unlike: str
    like_images: list[bytes | None]
    unlike_images: list[bytes | None]
    strategy: str
    penalty: float

    def check(self) -> None:
        """Refuse arguments out of range."""
        if self.strategy not in STRATEGIES:
            raise SiameseError(
                f'unknown strategy "{self.strategy}"', hint=f"Use one of {', '.join(STRATEGIES)}."
            )
        if not 0 <= self.penalty <= MAX_PENALTY:
            raise SiameseError(f"penalty must be between 0 and {MAX_PENALTY}")


@dataclass(slots=True, eq=False, repr=False)
class Points:
    """Prepared vectors of examples, float32 (examples, dimension). ``unliked`` may be empty."""

    liked: NDArray[np.float32]
    unliked: NDArray[np.float32]
    penalty: float


# Neither compared nor printed: to make these methods takes a tenth of a millisecond each, which the
# first search of a session pays. So it is with the other classes that a search needs.
@dataclass(kw_only=True, slots=True, eq=False, repr=False)
class Request:
    """Arguments of a search function.

    Attributes:
        collection_name: which collection.
        image: an image file, or None to search by ``key``.
        key: of a stored image, which the answer leaves out. Text unless keys are integers.
        k: how many rows.
        filter: JSON text, or None: conditions that rows must meet.
        exclude: the same: conditions that no row may meet.
        candidates: keys to choose among, or None for all.
        max_distance: the farthest row, or None.
        engine: ``auto``, ``faiss`` or ``pgvector``.
        group_by: column of which each value is a group, or none if it is empty.
        per_group: how many rows of a group.
        own_group: whether rows of the stored image's own group count. If not, and without
            ``group_by``, the collection's group column says which these are.
        frame: which frame of the image is searched for, from 1, or 0 for the representative one.
        region: which part of the image is searched for, or None for all of it.
        examples: what to search by instead of an image, or None.
        left_out: keys of further rows that the answer leaves out. The query was made of them.
        vector: float32 (1, dimension), to search for instead of an image, or None.
        points: several vectors to search for instead of an image, or None.
        integer_keys: whether the caller can take integer keys only.
        trace: takes notes of the search, or None.
    """

    collection_name: str | None
    image: bytes | None = None
    key: int | str | None = None
    k: int | None = 10
    filter: str | None = None
    exclude: str | None = None
    candidates: list[Any] | None = None
    max_distance: float | None = None
    engine: str | None = "auto"
    group_by: str = ""
    per_group: int = 1
    own_group: bool = True
    frame: int = 0
    region: Region | None = None
    examples: Examples | None = None
    left_out: list[Any] = field(default_factory=list)
    vector: NDArray[np.float32] | None = None
    points: Points | None = None
    integer_keys: bool = False
    trace: Trace | None = None
    _embedded: dict[tuple[int, Limits], NDArray[np.float32]] | None = field(
        default=None, init=False, repr=False
    )

    def check(self) -> None:
        """Refuse arguments out of range."""
        if self.k is None or not 1 <= self.k <= MAX_K:
            raise SiameseError(f"k must be between 1 and {MAX_K}")
        if self.engine not in ENGINES:
            raise SiameseError(
                f'unknown engine "{self.engine}"', hint=f"Use one of {', '.join(ENGINES)}."
            )
        if self.max_distance is not None and math.isnan(self.max_distance):
            raise SiameseError("max_distance is not a number")
        if self.per_group < 1:
            raise SiameseError("per_group must be positive")
        if not self.group_by and (self.per_group > 1 or not self.own_group):
            raise SiameseError(
                "per_group and own_group need a column in group_by",
                hint="For own_group, the collection's group column serves as well: set it with"
                " alter_collection.",
            )

    def check_collection(self, collection: Collection) -> None:
        """Refuse a collection that can't answer."""
        if self.integer_keys and not collection.has_integer_keys:
            raise SiameseError(
                f'collection "{collection.name}" has keys of type {collection.key_type}',
                sqlstate=FEATURE_NOT_SUPPORTED,
                hint="Use similar_rows.",
            )
        is_stored = self.key is not None and self.region is None
        if self.frame and is_stored and not collection.has_frames:
            raise SiameseError(
                f'collection "{collection.name}" has one vector of each image',
                hint="Leave query_frame out, or search for the image itself.",
            )

    @property
    def own_keys(self) -> list[Any]:
        """Keys of the stored images that the query was made of."""
        return self.left_out if self.key is None else [self.key]

    def embedding(self, plpy: Any, collection: Collection) -> NDArray[np.float32] | None:
        """Return the embedding to search for, float32 (1, dimension).

        It is None for a search by key or by several points. An image is embedded once, however many
        ways of searching are tried.
        """
        if self.vector is not None:
            return self.vector
        if self.key is not None or self.points is not None:
            return None
        encoder = collection.model_id, collection.limits
        if self._embedded is None:
            self._embedded = {}
        if encoder not in self._embedded:
            with phase(self.trace, "embed"):
                self._embedded[encoder] = models.embed(
                    plpy,
                    collection.model_id,
                    [self.image],
                    collection.limits,
                    collection.sha256,
                    self.frame,
                    self.region,
                )
        return self._embedded[encoder]


@dataclass(slots=True, eq=False, repr=False)
class Neighbours:
    """Rows near a query, nearest first, and ordered by key if equally near.

    Attributes:
        keys: integers or text, or pairs of these and a frame (``Collection.items``).
        squared: squared Euclidean distances of their prepared vectors.
        complete: squared distance within which no row is missing.
    """

    keys: list[Any] = field(default_factory=list)
    squared: list[float] = field(default_factory=list)
    complete: float = math.inf

    @classmethod
    def in_order(
        cls,
        keys: list[Any],
        squared: list[float],
        complete: float = math.inf,
        *,
        is_mixed: bool = False,
    ) -> Neighbours:
        """Sort rows. Unless ``is_mixed``, they are sorted by distance already, except for ties."""
        if is_mixed or len(set(squared)) < len(squared):
            order = sorted(range(len(keys)), key=lambda place: (squared[place], keys[place]))
            keys, squared = [keys[place] for place in order], [squared[place] for place in order]
        return cls(keys, squared, complete)

    def remove(self, key: Any) -> bool:
        """Remove a row. Return whether it was present."""
        if key is None or key not in self.keys:
            return False
        place = self.keys.index(key)
        del self.keys[place], self.squared[place]
        return True

    def remove_frames(self, key: Any) -> None:
        """Remove all frames of a row."""
        kept = [place for place, item in enumerate(self.keys) if item[0] != key]
        self.keys = [self.keys[place] for place in kept]
        self.squared = [self.squared[place] for place in kept]

    def within(self, limit: float) -> int:
        """Return how many of the rows are within a squared distance."""
        return bisect.bisect_right(self.squared, limit)

    def cut(self, count: int) -> None:
        """Keep the nearest ``count`` rows."""
        del self.keys[count:], self.squared[count:]


@dataclass(slots=True, eq=False, repr=False)
class Answer:
    """Keys and distances of the rows found, nearest first.

    ``query`` is the prepared vector that was searched for, or None if the model has no use for it.
    ``frames`` are numbers, from 1, or None if each image has one vector.
    """

    collection: Collection
    keys: list[Any]
    distances: list[float]
    query: NDArray[np.float32] | None
    frames: list[int] | None = None

    @classmethod
    def of(cls, collection: Collection, found: Neighbours, query: NDArray[np.float32]) -> Answer:
        """Convert squared distances to the collection's metric."""
        distances = vectors.to_distances(found.squared, collection.metric)
        return cls.of_items(collection, found.keys, distances, query)

    @classmethod
    def of_items(
        cls,
        collection: Collection,
        items: list[Any],
        distances: list[float],
        query: NDArray[np.float32] | None,
    ) -> Answer:
        """Take the frames from what identifies vectors (``Collection.items``)."""
        if not collection.has_frames:
            return cls(collection, items, distances, query)
        keys, frames = [key for key, _ in items], [frame for _, frame in items]
        return cls(collection, keys, distances, query, frames)

    @property
    def items(self) -> list[Any]:
        """What identifies the vectors found (``Collection.items``)."""
        return self.keys if self.frames is None else list(zip(self.keys, self.frames, strict=True))

    def taken(self, places: list[int]) -> Answer:
        """Return some of the rows, by their places."""
        return Answer(
            self.collection,
            [self.keys[place] for place in places],
            [self.distances[place] for place in places],
            self.query,
            None if self.frames is None else [self.frames[place] for place in places],
        )
