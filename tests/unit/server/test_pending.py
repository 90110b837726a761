"""Changes since the last build, as a session keeps them from snapshot to snapshot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pg_siamese_server import vectors
from pg_siamese_server.index.generations import Generation, opened
from pg_siamese_server.index.index_file import Rows
from pg_siamese_server.search import pending
from pg_siamese_server.search.pending import MAX_BYTES, Added, Changes, Snapshot
from tests.support import Array
from tests.unit.server.common import COLLECTION, flat

DIMENSION = 8


@pytest.mark.parametrize(
    ("newer", "older", "included"),
    [
        ("100:100:", "100:100:", True),
        ("101:105:", "100:103:101", True),
        ("100:105:100", "100:103:100,101", True),
        ("99:105:99", "100:103:", False),  # 99 runs still, in this snapshot
        ("100:100:", "104:104:", False),  # older
        ("100:110:", "103:110:", False),  # of a standby: what runs is not listed
        ("9999999999:9999999999:", "9999999998:9999999999:9999999998", True),
    ],
)
def test_snapshots(newer: str, older: str, included: bool) -> None:
    assert Snapshot.parse(newer).includes(Snapshot.parse(older)) is included


@pytest.mark.parametrize(
    ("newer", "older", "seen"),
    [
        ("100:100:", "100:100:", True),  # nothing ran, nothing ended
        ("100:104:", "100:103:", True),
        ("102:103:", "101:103:", True),
        ("100:103:", "100:103:", False),  # one of those between may have ended in between
        ("100:102:", "100:103:", False),
        ("100:103:", "101:103:", False),
        ("9999999999:9999999999:", "9999999998:9999999999:", True),
    ],
)
def test_what_a_later_snapshot_sees(newer: str, older: str, seen: bool) -> None:
    assert Snapshot.parse(newer).sees_all_of(Snapshot.parse(older)) is seen


@pytest.fixture
def generation() -> Generation:
    """Rows with embedding_ids 1 to 10."""
    rows = Rows(np.arange(1, 11), keys=np.arange(1, 11))
    return opened(flat(np.eye(10, DIMENSION, dtype=np.float32)), rows, True)


class Table:
    """In place of plpy: a vector table that a snapshot sees."""

    def __init__(self) -> None:
        self.vectors: dict[int, Array] = {}
        self.reads: list[list[int]] = []

    def fetch(
        self, plpy: Any, collection: Any, ids: list[int]
    ) -> tuple[list[int], list[Any], Array]:
        self.reads.append(ids)
        found = [number for number in ids if number in self.vectors]
        matrix = np.array([self.vectors[number] for number in found], np.float32)
        return found, [number * 100 for number in found], matrix.reshape(-1, DIMENSION)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    table = Table()
    generator = np.random.default_rng(0)
    matrix = vectors.prepare(generator.normal(size=(20, DIMENSION)).astype(np.float32), "cosine")
    table.vectors = dict(zip(range(11, 31), matrix, strict=True))
    monkeypatch.setattr(pending, "_fetch", table.fetch)
    return table


def take(changes: Changes, settled: list[int], opened: list[int], snapshot: str) -> None:
    changes.take(settled or None, opened or None, Snapshot.parse(snapshot))
    changes.fetch(None, collection=None)  # type: ignore[arg-type]


def keys_near(changes: Changes, query: Array, count: int = 50) -> set[int]:
    return set(changes.nearest(query[None], count).keys)


def test_settled_additions_are_read_once(generation: Generation, table: Table) -> None:
    changes = Changes(5, generation)
    take(changes, [11, 12], [], "100:100:")
    take(changes, [], [], "101:101:")
    take(changes, [13], [], "102:102:")
    assert table.reads == [[11, 12], [13]]
    assert keys_near(changes, table.vectors[11]) == {1100, 1200, 1300}
    assert changes.has_additions


def test_open_additions_are_those_of_the_last_snapshot(
    generation: Generation, table: Table
) -> None:
    changes = Changes(5, generation)
    take(changes, [], [11, 12], "100:103:")
    assert keys_near(changes, table.vectors[11]) == {1100, 1200}
    take(changes, [], [12, 13], "100:104:")  # 11 was rolled back to a savepoint
    assert keys_near(changes, table.vectors[11]) == {1200, 1300}
    take(changes, [12], [], "105:105:")
    assert keys_near(changes, table.vectors[11]) == {1200}
    take(changes, [], [], "106:106:")
    assert keys_near(changes, table.vectors[11]) == {1200}


def test_deletions(generation: Generation, table: Table) -> None:
    changes = Changes(5, generation)
    rows = np.arange(10)
    assert changes.is_dead(rows) is None
    take(changes, [11, 12, -3], [-4, -12], "100:103:")
    assert changes.is_dead(rows).tolist() == [row in (2, 3) for row in rows]  # type: ignore[union-attr]
    assert keys_near(changes, table.vectors[11]) == {1100}
    take(changes, [], [], "100:104:")  # rolled back
    assert changes.is_dead(rows).tolist() == [row == 2 for row in rows]  # type: ignore[union-attr]
    assert keys_near(changes, table.vectors[11]) == {1100, 1200}
    take(changes, [-11, -12], [], "105:105:")
    assert keys_near(changes, table.vectors[11]) == set()


def test_deleted_by_this_transaction_then_rolled_back(generation: Generation, table: Table) -> None:
    """The vector is not there to read while it is deleted, but may come back."""
    changes = Changes(5, generation)
    vector = table.vectors.pop(11)
    take(changes, [11], [-11], "100:103:")
    assert keys_near(changes, vector) == set()
    table.vectors[11] = vector
    take(changes, [], [], "104:104:")
    assert keys_near(changes, vector) == {1100}


def test_not_usable_for_an_older_snapshot_or_another_generation(generation: Generation) -> None:
    changes = Changes(5, generation)
    assert changes.usable_for(5, Snapshot.parse("1:1:"))
    changes.take([11], None, Snapshot.parse("100:100:"))
    assert changes.usable_for(5, Snapshot.parse("100:101:100"))
    assert not changes.usable_for(5, Snapshot.parse("99:101:99"))
    assert not changes.usable_for(6, Snapshot.parse("100:100:"))


def test_nearest_are_exact(generation: Generation, table: Table) -> None:
    changes = Changes(5, generation)
    take(changes, list(range(11, 21)), list(range(21, 31)), "100:103:")
    query = np.eye(DIMENSION, dtype=np.float32)[0]
    truth = {number * 100: ((each - query) ** 2).sum() for number, each in table.vectors.items()}
    near = changes.nearest(query[None], 4)
    assert near.squared == pytest.approx([truth[key] for key in near.keys])
    # Nothing that is nearer than it says is missing.
    assert {key for key in truth if truth[key] <= near.complete} <= set(near.keys)
    assert changes.nearest(query[None], 20).complete == np.inf


def test_long_vectors_that_are_close_together(generation: Generation) -> None:
    """|a|² - 2ab + |b|² loses its digits here; what is returned must not claim otherwise."""
    generator = np.random.default_rng(0)
    matrix = (3000 + generator.normal(size=(200, DIMENSION))).astype(np.float32)
    query = (3000 + generator.normal(size=(1, DIMENSION))).astype(np.float32)
    changes = Changes(5, generation)
    changes.added.extend(list(range(200)), list(range(200)), matrix)
    truth = ((matrix.astype(np.float64) - query) ** 2).sum(axis=1)
    for count in (1, 5, 50):
        near = changes.nearest(query, count)
        assert set(np.flatnonzero(truth <= near.complete)) <= set(near.keys)


def test_find(generation: Generation, table: Table) -> None:
    changes = Changes(5, generation)
    take(changes, [11], [12], "100:103:")
    for number in (11, 12):
        np.testing.assert_array_equal(changes.find(number), table.vectors[number][None])
    assert changes.find(13) is None


def test_too_large(generation: Generation) -> None:
    changes = Changes(5, generation)
    most = MAX_BYTES // (4 * generation.index.d)
    changes.unfetched = set(range(most))
    assert not changes.is_too_large()
    changes.unfetched.add(most)
    assert changes.is_too_large()


def test_added_in_portions() -> None:
    added = Added(DIMENSION)
    one, other = np.random.default_rng(0).normal(size=(2, 3, DIMENSION)).astype(np.float32)
    added.extend([1, 2, 3], ["a", "b", "c"], one)
    added.extend([4, 5, 6], ["d", "e", "f"], other)
    query = np.ones((1, DIMENSION), np.float32)
    places, squared = added.nearest(query, 9)
    expected = ((np.concatenate([one, other]) - query) ** 2).sum(axis=1)
    np.testing.assert_array_equal(places, np.argsort(expected))
    np.testing.assert_allclose(squared, np.sort(expected), rtol=1e-5)
    added.discard({2, 6, 99})
    assert (added.ids, added.keys) == ([1, 3, 4, 5], ["a", "c", "d", "e"])
    assert added.find(2) is None
    np.testing.assert_array_equal(added.find(4), other[:1])


def test_collections_have_safe_names() -> None:
    """Table names are made of a number, never of a user's text."""
    collection = replace(COLLECTION, collection_id=7, name="x; --", key_type="uuid")
    assert collection.embeddings == "siamese.embedding_7"
    assert collection.pending == "siamese.pending_7"
    assert (collection.key_array, collection.vector_type) == ("uuid[]", "public.vector")
    assert not collection.has_integer_keys
