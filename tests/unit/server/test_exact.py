"""Exact comparison of some or all vectors of an index file."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pg_siamese_server.index import generations
from pg_siamese_server.index.generations import Generation, opened
from pg_siamese_server.index.index_file import Rows
from pg_siamese_server.search import exact
from tests.support import Array
from tests.unit.server.common import flat, no_poll

COUNT, DIMENSION = 1000, 12


@pytest.fixture
def matrix() -> Array:
    return np.random.default_rng(3).standard_normal((COUNT, DIMENSION)).astype(np.float32)


@pytest.fixture
def generation(matrix: Array) -> Generation:
    return opened(flat(matrix), Rows(np.arange(COUNT), keys=np.arange(COUNT)), True)


def squares(matrix: Array, query: Array) -> Array:
    result: Array = ((matrix - query) ** 2).sum(axis=1)
    return result


def test_distances_to_some(
    generation: Generation, matrix: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces, with a look at interrupts after each."""
    monkeypatch.setattr(generations, "VALUES_AT_ONCE", 10 * DIMENSION)
    slots = np.array([999, 0, 5, *range(100, 130)], dtype=np.int64)
    polls: list[int] = []
    found = generation.squared_distances(matrix[:1], slots, lambda: polls.append(1))
    np.testing.assert_allclose(found, squares(matrix[slots], matrix[0]), atol=1e-4)
    assert len(polls) == 4


@pytest.mark.parametrize("count", [1, 10, 999, 1000, 5000])
def test_nearest_of_all(
    generation: Generation, matrix: Array, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generations, "VALUES_AT_ONCE", 300 * DIMENSION)
    truth = squares(matrix, matrix[7])
    positions, squared = generation.scan(matrix[7:8], count, no_poll)
    assert positions[0] == 7 and len(positions) == min(count, COUNT)
    np.testing.assert_allclose(squared, np.sort(truth)[:count], atol=1e-4)
    np.testing.assert_allclose(squared, truth[positions], atol=1e-4)


def test_nearest_places_keep_all_that_are_as_far_as_the_last() -> None:
    squared = np.array([3, 1, 2, 1, 2, 9], dtype=np.float32)
    places, complete = exact.nearest_places(squared, 3)
    assert sorted(places[:2].tolist()) == [1, 3] and sorted(places[2:].tolist()) == [2, 4]
    assert complete == 2.0
    places, complete = exact.nearest_places(squared, 6)
    assert len(places) == 6 and complete == math.inf
    assert exact.nearest_places(squared[:0], 3)[1] == math.inf


@pytest.mark.parametrize("count", [1, 5, 30])
def test_few_and_many_places_are_chosen_alike(count: int) -> None:
    squared = np.random.default_rng(count).integers(0, 60, exact.FEW).astype(np.float32)
    places, complete = exact.nearest_places(squared, count)
    padded = np.append(squared, np.full(exact.FEW, 99, np.float32))
    more, as_complete = exact.nearest_places(padded, count)
    assert places.tolist() == more.tolist() and complete == as_complete
    assert len(places) >= count and complete == np.sort(squared)[count - 1]


def test_numbers_that_sql_puts_together() -> None:
    data = b"".join(value.to_bytes(8, "big", signed=True) for value in (5, -1, 2**62))
    assert exact.from_send(data).tolist() == [5, -1, 2**62]
    assert exact.from_send(None).tolist() == []


def test_nobody_but_a_search_has_anything_explained() -> None:
    assert exact.explain_asked(None) is None
