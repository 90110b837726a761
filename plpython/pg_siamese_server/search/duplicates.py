"""Find stored images that are the same picture: near-duplicates, and leaks between splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server import interrupts
from pg_siamese_server.catalog import Collection, prepare
from pg_siamese_server.encoding import models
from pg_siamese_server.errors import SiameseError
from pg_siamese_server.search import filters, groups, pairs
from pg_siamese_server.search.pictures import CROPS, MIRRORED, PLAIN_WAY, Likeness, Pictures
from pg_siamese_server.search.request import Request

# Pixels that differ by less are taken for the same.
SAME = 0.5
# Rows of one portion of the answer.
ROWS = 5_000
SAME_IMAGE, NEAR_DUPLICATE, SAME_GROUP = "same image", "near duplicate", "same group"


class Duplicate(NamedTuple):
    """A row of a group. ``likeness`` and ``distance`` are those of it and the representative."""

    group: int
    key: Any
    representative: Any
    likeness: Likeness
    distance: float


class Leak(NamedTuple):
    """Two rows in different splits."""

    kind: str
    a: Any
    split_a: str
    b: Any
    split_b: str
    label: str | None
    difference: float | None


@dataclass
class _Groups:
    """Rows that are joined to groups, by their numbers."""

    parents: dict[int, int] = field(default_factory=dict)

    def root(self, number: int) -> int:
        """Return the row that stands for a row's group."""
        parents = self.parents
        while (parent := parents.get(number, number)) != number:
            parents[number] = parents.get(parent, parent)
            number = parent
        return number

    def join(self, one: int, other: int) -> None:
        """Join two rows' groups."""
        self.parents.setdefault(one, one)
        self.parents.setdefault(other, other)
        self.parents[self.root(one)] = self.root(other)

    def not_joined(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which pairs of rows are of different groups."""
        numbers, places = np.unique(np.concatenate([first, second]), return_inverse=True)
        roots = np.array([self.root(number) for number in numbers.tolist()])[places]
        result: NDArray[np.bool_] = roots[: len(first)] != roots[len(first) :]
        return result

    def members(self) -> list[list[int]]:
        """Return the rows of each group."""
        found = defaultdict(list)
        for number in list(self.parents):
            found[self.root(number)].append(number)
        return list(found.values())


def _pictures(plpy: Any, search: Any) -> Pictures:
    collection = search.collection
    spec = models.spec(plpy, collection.model_id).input.within(collection.limits)
    return Pictures(plpy, collection, spec, search.keys, partial(interrupts.check, plpy))


def _check(max_difference: float) -> None:
    if not max_difference >= 0:
        raise SiameseError("max_difference must not be negative")


def near_duplicates(
    plpy: Any, request: Request, max_difference: float, mirrored: bool, thread_count: int
) -> tuple[Collection, Iterator[list[Duplicate]]]:
    """Group the rows whose images are the same picture.

    Args:
        plpy: PL/Python's module.
        request: of the pairs that may be duplicates (``pairs.open_search``).
        max_difference: of the pixels, in grey levels.
        mirrored: whether mirrored pictures count as the same.
        thread_count: as for ``pairs.open_search``.
    """
    _check(max_difference)
    search = pairs.open_search(plpy, request, thread_count)
    return search.collection, _groups(plpy, search, max_difference, mirrored)


def _groups(
    plpy: Any, search: Any, max_difference: float, mirrored: bool
) -> Iterator[list[Duplicate]]:
    pictures, joined = _pictures(plpy, search), _Groups()
    for found in search.find():
        new = joined.not_joined(found.first, found.second)
        for one, other, way in pictures.candidates(
            found.first[new], found.second[new], max_difference, mirrored=mirrored
        ):
            if joined.root(one) != joined.root(other):
                likeness = pictures.compare(one, other, [way])
                if likeness.is_copy and likeness.difference <= max_difference:
                    joined.join(one, other)
    ways = [PLAIN_WAY, *([MIRRORED] if mirrored else []), *CROPS]
    listed = []
    for members in joined.members():
        interrupts.check(plpy)
        keys = search.keys(np.array(members))
        listed.append(sorted(zip(keys, members, strict=True)))
    listed.sort(key=lambda named: named[0][0])
    rows: list[tuple[int, Any, Any, Likeness]] = []
    for group, [(representative, first), *others] in enumerate(listed, start=1):
        rows.append((group, representative, representative, Likeness(0.0, True, False)))
        for key, number in others:
            rows.append((group, key, representative, pictures.compare(first, number, ways)))
            if len(rows) >= ROWS:
                yield _with_distances(plpy, search.collection, rows)
                rows = []
    if rows:
        yield _with_distances(plpy, search.collection, rows)


def _with_distances(
    plpy: Any, collection: Collection, rows: list[tuple[int, Any, Any, Likeness]]
) -> list[Duplicate]:
    """Add the distance of each row to its group's representative."""
    only = " AND {0}.representative" if collection.has_frames else ""
    kind = collection.key_array
    plan = prepare(
        plpy,
        f"SELECT pg_catalog.array_agg((x.embedding {collection.distance_operator} y.embedding)"
        " ORDER BY u.place) AS distances"
        f" FROM ROWS FROM (pg_catalog.unnest($1::{kind}), pg_catalog.unnest($2::{kind}))"
        " WITH ORDINALITY AS u (a, b, place)"
        f" INNER JOIN {collection.embeddings} AS x ON x.key = u.a{only.format('x')}"
        f" INNER JOIN {collection.embeddings} AS y ON y.key = u.b{only.format('y')}",
        (kind, kind),
    )
    columns = [[row[1] for row in rows], [row[2] for row in rows]]
    distances = plan.execute(columns)[0]["distances"]
    return [Duplicate(*row, distance) for row, distance in zip(rows, distances, strict=True)]


def leaks(
    plpy: Any,
    request: Request,
    split_column: str,
    group_column: str,
    max_difference: float,
    thread_count: int,
) -> tuple[Collection, Iterator[list[Leak]]]:
    """Find rows of different splits that show the same picture, or are of the same group.

    Args:
        plpy: PL/Python's module.
        request: of the pairs that may be duplicates (``pairs.open_search``).
        split_column: says which split a row is in. Rows without one are in none.
        group_column: says which rows belong together, or nothing.
        max_difference, thread_count: as for ``near_duplicates``.
    """
    _check(max_difference)
    request.filter = filters.with_value(request.filter, split_column)
    search = pairs.open_search(plpy, request, thread_count, differ_in=split_column)
    conditions = filters.parse(plpy, search.collection, request.filter, request.exclude)
    return search.collection, _leaks(
        plpy, search, conditions, split_column, group_column, max_difference
    )


def _leaks(
    plpy: Any,
    search: Any,
    conditions: filters.Conditions,
    split_column: str,
    group_column: str,
    max_difference: float,
) -> Iterator[list[Leak]]:
    pictures, collection = _pictures(plpy, search), search.collection
    for found in search.find():
        same: list[tuple[int, int, float]] = []
        for one, other, way in pictures.candidates(
            found.first, found.second, max_difference, mirrored=False
        ):
            likeness = pictures.compare(one, other, [way])
            if likeness.is_copy and likeness.difference <= max_difference:
                same.append((one, other, likeness.difference))
        for start in range(0, len(same), ROWS):
            yield _image_leaks(plpy, search, same[start : start + ROWS], split_column, group_column)
    if group_column:
        yield from _group_leaks(plpy, collection, conditions, split_column, group_column)


def _image_leaks(
    plpy: Any,
    search: Any,
    same: list[tuple[int, int, float]],
    split_column: str,
    group_column: str,
) -> list[Leak]:
    keys = zip(
        search.keys(np.array([one for one, _, _ in same])),
        search.keys(np.array([other for _, other, _ in same])),
        strict=True,
    )
    ordered = [(min(each), max(each)) for each in keys]
    every = list({key for each in ordered for key in each})
    splits = groups.labels(plpy, search.collection, split_column, every)
    labels = groups.labels(plpy, search.collection, group_column, every) if group_column else {}
    return [
        Leak(
            SAME_IMAGE if difference < SAME else NEAR_DUPLICATE,
            a,
            str(splits[a]),
            b,
            str(splits[b]),
            labels.get(a) if labels.get(a) == labels.get(b) else None,
            difference,
        )
        for (a, b), (_, _, difference) in zip(ordered, same, strict=True)
        if a in splits and b in splits  # a rule may hide what it showed before
    ]


def _group_leaks(
    plpy: Any,
    collection: Collection,
    conditions: filters.Conditions,
    split_column: str,
    group_column: str,
) -> Iterator[list[Leak]]:
    columns = filters.columns(plpy, collection, [split_column, group_column])
    split, label = (
        f'b.{columns[name]["quoted"]}::text COLLATE "C"' for name in (split_column, group_column)
    )
    key = f"b.{collection.key_column}"
    shown, tie = key, key
    if not collection.has_integer_keys:
        shown, tie = f"{key}::text", f'{key}::text COLLATE "C"'
    clauses = " AND ".join([f"{label} IS NOT NULL", *conditions.clauses])
    plan = prepare(
        plpy,
        f"WITH q AS MATERIALIZED (SELECT {shown} AS key, {tie} AS tie, {split} AS split,"
        f" {label} AS label FROM {collection.relation} AS b WHERE {clauses})"
        " SELECT x.key AS a, x.split AS split_a, y.key AS b, y.split AS split_b, x.label AS label"
        " FROM q AS x INNER JOIN q AS y ON x.label OPERATOR(pg_catalog.=) y.label"
        " AND x.tie < y.tie AND x.split OPERATOR(pg_catalog.<>) y.split"
        " ORDER BY x.label, x.tie, y.tie",
        tuple(conditions.types),
    )
    cursor = plan.cursor(conditions.values)
    while rows := list(cursor.fetch(ROWS)):
        yield [
            Leak(SAME_GROUP, r["a"], r["split_a"], r["b"], r["split_b"], r["label"], None)
            for r in rows
        ]
