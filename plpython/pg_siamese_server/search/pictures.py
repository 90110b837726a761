"""Compare the pixels of stored images: are two of them the same picture?

Two copies of one picture differ by a few grey levels once both are small, of equal brightness and
of equal contrast: JPEG's noise and the traces of resizing are in fine detail. Other pictures differ
by more, even if they show the same thing.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pg_siamese_server.catalog import Collection, prepare
from pg_siamese_server.encoding.batches import FIRST_ROWS, next_portion
from pg_siamese_server.encoding.images import render_grey
from pg_siamese_server.encoding.opened import Box
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import ImageError, SiameseError

# Pixels of the longer side of a picture as it is kept, and of the sides of its sketch.
SIDE, SKETCH = 64, 8
# Pairs of sketches that are compared at once without FAISS.
AT_ONCE = 4096
# Pixels of a comparison, as a share of the smaller picture's shorter side. Less detail would tell
# fewer pictures apart, and more would make copies of half the size differ.
SHARE = 0.43
# What a sketch may differ more than the picture: its pixels are whole grey levels, and may be white
# for want of room. A crop lies beside its box, too.
SLACK, CROP_SLACK = 1.5, 3.0
# Crops are looked for in pictures of at least so many pixels per side. In smaller ones, other
# pictures fit as well.
MIN_CROPPED = 48
# Pairs whose sketches differ by more are no crops of each other either.
COARSE = 28.0
# Least correlation of copies, and the largest ratio of their contrasts.
MIN_CORRELATION, MAX_GAIN = 0.95, 1.6
# Largest ratio of the proportions of two copies.
MAX_STRETCH = 1.1
# Standard deviation below which a picture is plain.
PLAIN = 1.0
# Grey level of pixels that may have been brighter, had there been room, and how much brighter they
# may be than in the other picture. If more than half of a picture is so, all pixels count.
WHITE, MAX_BRIGHTER, MOST_WHITE = 245, 1.3, 0.5
# Parts of a picture: all of it, and what is left without a twentieth of each side.
WHOLE = (0.0, 0.0, 1.0, 1.0)
KEPT = 0.95
STEPS = tuple(step * (1 - KEPT) / 2 for step in range(3))
BOXES = (
    WHOLE,
    *((left, top, left + KEPT, top + KEPT) for top in STEPS for left in STEPS),
)
# Pictures and sketches to keep, at most.
MAX_PICTURES, MAX_SKETCHES = 8_192, 100_000
# Keys of a statement that reads images, and pairs that are compared at once.
KEYS, MAX_PAIRS = 1_000, 10_000


class Way(NamedTuple):
    """How the first picture of a pair may lie on the second: numbers of ``BOXES``, and a mirror."""

    first: int = 0
    second: int = 0
    is_mirrored: bool = False


PLAIN_WAY = Way()
MIRRORED = Way(is_mirrored=True)
CROPS = tuple(way for box in range(1, len(BOXES)) for way in (Way(box, 0), Way(0, box)))


class Likeness(NamedTuple):
    """How two pictures compare.

    Attributes:
        difference: root mean square of the differences of pixels, in grey levels, after brightness
            and contrast are fitted.
        is_copy: whether they are one picture, as far as correlation and shape tell.
        is_mirrored: whether one of them was mirrored for that.
    """

    difference: float
    is_copy: bool
    is_mirrored: bool


class Pictures:
    """Pictures of a collection's rows, as they are needed.

    Args:
        plpy: PL/Python's module.
        collection: of the rows.
        spec: limits of its images.
        keys: returns the keys of rows by their numbers.
        poll: called often, may raise to stop.
    """

    def __init__(
        self,
        plpy: Any,
        collection: Collection,
        spec: InputSpec,
        keys: Callable[[NDArray[np.int64]], list[Any]],
        poll: Callable[[], None],
    ) -> None:
        self._plpy, self._collection, self._spec = plpy, collection, spec
        self._keys, self._poll = keys, poll
        self._pictures: OrderedDict[int, Image.Image] = OrderedDict()
        self._sketches = np.empty((0, len(BOXES), SKETCH * SKETCH), np.uint8)
        self._is_large = np.empty(0, bool)
        self._places: dict[int, int] = {}

    def candidates(
        self,
        first: NDArray[np.int64],
        second: NDArray[np.int64],
        max_difference: float,
        *,
        mirrored: bool,
    ) -> Iterator[tuple[int, int, Way]]:
        """Yield the pairs of rows whose sketches are alike, with the way in which they are."""
        for start in range(0, len(first), MAX_PAIRS):
            part = slice(start, start + MAX_PAIRS)
            numbers, places = np.unique(
                np.concatenate([first[part], second[part]]), return_inverse=True
            )
            held = self._sketched(numbers.tolist())
            own, other = places[: len(places) // 2], places[len(places) // 2 :]
            best, ways = self._compare_sketches(held, own, other, mirrored)
            for pair in np.flatnonzero(best <= max_difference).tolist():
                yield int(numbers[own[pair]]), int(numbers[other[pair]]), ways[pair]
            self._poll()

    def _compare_sketches(
        self,
        held: NDArray[np.int64],
        own: NDArray[np.int64],
        other: NDArray[np.int64],
        mirrored: bool,
    ) -> tuple[NDArray[np.float32], list[Way]]:
        """Return the least difference of each pair, as its sketches tell, and the way of it."""
        sketches = _Sketches(self._sketches[held])
        best = sketches.differences(own, other, PLAIN_WAY) - SLACK
        which = np.zeros(len(own), np.int64)
        ways = [PLAIN_WAY, *([MIRRORED] if mirrored else []), *CROPS]
        large = self._is_large[held]
        may_be_crops = np.flatnonzero(large[own] & large[other] & (best <= COARSE))
        for number, way in enumerate(ways[1:], start=1):
            some = may_be_crops if way in CROPS else np.arange(len(own))
            if not len(some):
                continue
            found = sketches.differences(own[some], other[some], way)
            found -= CROP_SLACK if way in CROPS else SLACK
            better = found < best[some]
            best[some[better]], which[some[better]] = found[better], number
            self._poll()
        return best, [ways[number] for number in which.tolist()]

    def compare(self, first: int, second: int, ways: Iterable[Way] = (PLAIN_WAY,)) -> Likeness:
        """Compare two pictures, in the best of some ways."""
        self._poll()
        one, two = self._picture(first), self._picture(second)
        shortest = min(*one.size, *two.size)
        return min(
            _compare(one, two, way) for way in ways if way not in CROPS or shortest >= MIN_CROPPED
        )

    def _picture(self, number: int) -> Image.Image:
        if number not in self._pictures:
            self._load([number])
        self._pictures.move_to_end(number)
        return self._pictures[number]

    def _sketched(self, numbers: list[int]) -> NDArray[np.int64]:
        """Return the places of rows' sketches, after those that are missing are drawn."""
        missing = [number for number in numbers if number not in self._places]
        if len(self._places) + len(missing) > MAX_SKETCHES:
            self._places.clear()
            missing = numbers
        self._load(missing)
        return np.array([self._places[number] for number in numbers], dtype=np.int64)

    def _load(self, numbers: list[int]) -> None:
        """Read and decode images."""
        for start in range(0, len(numbers), KEYS):
            part = numbers[start : start + KEYS]
            self._read(dict(zip(self._keys(np.array(part)), part, strict=True)))

    def _read(self, numbers: dict[Any, int]) -> None:
        collection = self._collection
        key = f"b.{collection.key_column}"
        shown = key if collection.has_integer_keys else f"{key}::text"
        plan = prepare(
            self._plpy,
            f"SELECT {shown} AS key, b.{collection.image_column} AS image"
            f" FROM {collection.relation} AS b WHERE {key} = ANY($1)",
            (collection.key_array,),
        )
        cursor, count = plan.cursor([list(numbers)]), FIRST_ROWS
        while rows := list(cursor.fetch(count)):
            count = next_portion(len(rows), sum(len(row["image"] or b"") for row in rows))
            for row in rows:
                self._poll()
                self._keep(numbers.pop(row["key"]), row["key"], row["image"])
        if numbers:  # a rule hides what it showed before
            raise SiameseError(f"image {next(iter(numbers))} is no longer visible")

    def _keep(self, number: int, key: Any, image: bytes | None) -> None:
        try:
            pixels = render_grey(image, self._spec, SIDE, self._poll)
        except ImageError as error:
            raise SiameseError(
                f"image {key} cannot be compared: {error.message}",
                sqlstate=error.sqlstate,
                detail=error.detail,
                hint=error.hint,
            ) from None
        picture = Image.fromarray(pixels)
        self._pictures[number] = picture
        if len(self._pictures) > MAX_PICTURES:
            self._pictures.popitem(last=False)
        if number not in self._places and len(self._places) < MAX_SKETCHES:
            self._sketch(number, picture)

    def _sketch(self, number: int, picture: Image.Image) -> None:
        place = self._places[number] = len(self._places)
        if place >= len(self._sketches):
            size = min(MAX_SKETCHES, max(1_024, 2 * place))
            sketches, is_large = self._sketches, self._is_large
            self._sketches = np.empty((size, *sketches.shape[1:]), np.uint8)
            self._is_large = np.empty(size, bool)
            self._sketches[: len(sketches)], self._is_large[: len(is_large)] = sketches, is_large
        self._is_large[place] = min(picture.size) >= MIN_CROPPED
        boxes = BOXES if self._is_large[place] else BOXES[:1]
        for box, part in enumerate(boxes):
            self._sketches[place, box] = _reduced(picture, part, SKETCH).ravel()


class _Sketches:
    """Sketches of some pictures, ready to be compared. Input: uint8 (pictures, boxes, pixels)."""

    def __init__(self, sketches: NDArray[np.uint8]) -> None:
        self._sketches = sketches
        self._prepared: dict[tuple[int, bool], tuple[NDArray[np.float32], NDArray[np.float32]]] = {}

    def _box(self, box: int, is_mirrored: bool) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return sketches of mean 0 and length 1, and their standard deviations."""
        found = self._prepared.get((box, is_mirrored))
        if found is None:
            pixels = self._sketches[:, box].astype(np.float32)
            if is_mirrored:
                pixels = pixels.reshape(-1, SKETCH, SKETCH)[:, :, ::-1].reshape(len(pixels), -1)
            pixels = pixels - pixels.mean(axis=1, keepdims=True)
            lengths = np.sqrt(np.einsum("ij,ij->i", pixels, pixels))
            unit = np.ascontiguousarray(pixels / np.maximum(lengths, 1e-6)[:, None])
            found = self._prepared[box, is_mirrored] = unit, lengths / SKETCH
        return found

    def differences(
        self, own: NDArray[np.int64], other: NDArray[np.int64], way: Way
    ) -> NDArray[np.float32]:
        """Return the differences of pairs of sketches, by their places, in grey levels."""
        one, one_contrast = self._box(way.first, way.is_mirrored)
        two, two_contrast = self._box(way.second, False)
        cosines = _products(one, own, two, other)
        contrast = np.maximum(one_contrast[own], two_contrast[other])
        result: NDArray[np.float32] = contrast * np.sqrt(np.maximum(0, 1 - cosines**2))
        result[cosines < 0] = np.inf
        return result


def _products(
    one: NDArray[np.float32],
    own: NDArray[np.int64],
    two: NDArray[np.float32],
    other: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Return the inner products of pairs of rows of two matrices, float32 (pairs,)."""
    found = np.empty(len(own), np.float32)
    try:
        import faiss
    except ImportError:
        for start in range(0, len(own), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            found[some] = np.einsum("ij,ij->i", one[own[some]], two[other[some]])
        return found
    from pg_siamese_server.index.threads import threads

    own, other = np.ascontiguousarray(own), np.ascontiguousarray(other)
    pointers = map(faiss.swig_ptr, (one, own, two, other, found))
    with threads(1):  # where no index file was read, FAISS would use all cores
        faiss.pairwise_indexed_inner_product(one.shape[1], len(own), *pointers)
    return found


def _reduced(picture: Image.Image, box: Box, side: int) -> NDArray[np.uint8]:
    """Return a part of a picture at a small size."""
    width, height = picture.size
    edges = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    return np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR, edges))


def _compare(one: Image.Image, two: Image.Image, way: Way) -> Likeness:
    side = max(SKETCH, round(SHARE * min(*one.size, *two.size)))
    if way.first:  # the first picture has more around it
        one, two = two, one
    second = _reduced(one, WHOLE, side).astype(np.float64)
    box = BOXES[way.first or way.second]
    first = _reduced(two, box, side).astype(np.float64)
    if way.is_mirrored:
        first = first[:, ::-1]
    stretch = (one.width * two.height) / (one.height * two.width)
    has_shape = max(stretch, 1 / stretch) <= MAX_STRETCH
    if max(first.std(), second.std()) < PLAIN:
        difference = abs(float(first.mean() - second.mean()))
        return Likeness(difference, has_shape, way.is_mirrored)
    if way not in CROPS:
        fit = _fit(first, second)
    else:
        # The crop may lie a bit beside the box.
        box = _moved(box, _fit(first, second, moves=True).moves, side)
        first = _reduced(two, box, side).astype(np.float64)
        fit = _fit(first, second, moves=True)
    largest, least = max(first.std(), second.std()), min(first.std(), second.std())
    is_copy = has_shape and fit.correlation >= MIN_CORRELATION and largest <= MAX_GAIN * least
    difference = fit.rest * float(largest / max(second.std(), 1e-6))
    return Likeness(difference, bool(is_copy), way.is_mirrored)


class _Fit(NamedTuple):
    """How well a picture can be made from another one.

    Attributes:
        rest: root mean square of what is left, in grey levels.
        correlation: of the two, -1 to 1.
        moves: of the left, upper, right and lower edge, in pixels.
    """

    rest: float
    correlation: float
    moves: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


def _fit(first: NDArray[np.float64], second: NDArray[np.float64], *, moves: bool = False) -> _Fit:
    """Fit brightness and contrast of the first picture to the second, and its edges if it moves.

    Small moves add tangents to the picture, as in the tangent distance of Simard et al. (1993).
    """
    counts = ~_are_white(first, second)
    parts = [first]
    if moves:
        along_y, along_x = np.gradient(first, axis=0), np.gradient(first, axis=1)
        places = (np.arange(len(first)) + 0.5) / len(first) - 0.5
        parts += [along_x, along_x * places, along_y, along_y * places[:, None]]
    matrix = np.stack([part[counts] - part[counts].mean() for part in parts], axis=1)
    wanted = second[counts] - second[counts].mean()
    found = np.linalg.lstsq(matrix, wanted, rcond=1e-6)[0]
    left = float(np.square(wanted - matrix @ found).sum())
    share = left / max(float(wanted @ wanted), 1e-12)
    correlation = math.copysign(math.sqrt(max(0.0, 1 - share)), found[0])
    rest = math.sqrt(left / len(wanted))
    if not moves or abs(found[0]) < 1e-6:
        return _Fit(rest, correlation)
    x, width, y, height = (found[1:] / found[0]).tolist()
    return _Fit(rest, correlation, (x - width / 2, y - height / 2, x + width / 2, y + height / 2))


def _moved(box: Box, moves: Box, side: int) -> Box:
    """Return a box with its edges moved, by at most a pixel and within the picture."""
    scale = box[2] - box[0], box[3] - box[1]
    left, top, right, bottom = (
        min(1.0, max(0.0, edge + min(1.0, max(-1.0, move)) * scale[place % 2] / side))
        for place, (edge, move) in enumerate(zip(box, moves, strict=True))
    )
    return left, top, right, bottom


def _are_white(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return the pixels that brightness has made white in one of two pictures."""
    brighter, darker = np.maximum(first, second), np.minimum(first, second)
    white: NDArray[np.bool_] = (brighter >= WHITE) & (darker >= WHITE / MAX_BRIGHTER)
    return white if white.mean() <= MOST_WHITE else np.zeros_like(white)
