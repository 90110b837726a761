"""What is built an index of: vectors as they are read, prepared, and equal ones once."""

from __future__ import annotations

import numpy as np
import pytest

from pg_siamese_server import vectors
from pg_siamese_server.index import build


@pytest.mark.parametrize("repeats", [1, 2, 40])
def test_equal_vectors_are_kept_once(repeats: int) -> None:
    generator = np.random.default_rng(repeats)
    distinct = generator.normal(size=(50, 16)).astype(np.float32)
    distinct[1] = distinct[0]
    distinct[1, 5] = np.nextafter(distinct[0, 5], np.float32(9))  # as near as can be, but not equal
    order = generator.permutation(np.repeat(np.arange(50), repeats))
    unique, slots = build._share_equal_vectors(distinct[order], lambda: None)
    assert len(unique) == 50
    assert (slots is None) == (repeats == 1)
    if slots is not None:
        np.testing.assert_array_equal(unique[slots], distinct[order])


def test_equal_vectors_of_few_rows() -> None:
    for count in (0, 1, 2):
        unique, _ = build._share_equal_vectors(np.ones((count, 4), np.float32), lambda: None)
        assert len(unique) == min(count, 1)


def test_long_runs_of_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "LONG_RUN", 3)
    ids = [-5, -4, -3, 0, 1, 7, 9, 10, 11, 12]
    assert build._long_runs(np.array(ids)) == [(-5, -3), (9, 12)]
    assert build._long_runs(np.arange(4, 7)) == [(4, 6)]
    assert build._long_runs(np.array([2, 4, 6, 8])) == build._long_runs(np.array([], int)) == []


def test_vectors_from_pgvector() -> None:
    """As vector_send gives them: dimension, unused, big-endian numbers."""
    values = np.array([[1.5, -2.25], [0.0, 3e38]], np.float32)
    data = b"".join(b"\0\2\0\0" + row.astype(">f4").tobytes() for row in values)
    np.testing.assert_array_equal(vectors.from_send(data, 2), values)
    text = vectors.to_text(np.array([0.1, 1e-30], np.float32))
    numbers = [np.float32(number) for number in text.strip("[]").split(",")]
    assert numbers == [np.float32(0.1), np.float32(1e-30)]


def test_distances() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 1, 16)).astype(np.float32)
    cosine = 1 - (a @ b.T / np.linalg.norm(a) / np.linalg.norm(b)).item()
    one, other = vectors.prepare(a, "cosine"), vectors.prepare(b, "cosine")
    squared = vectors.squared_distances(one, other)
    assert vectors.to_distances(squared.tolist(), "cosine") == [pytest.approx(cosine, abs=1e-6)]
    squared = vectors.squared_distances(vectors.prepare(a, "l2"), b)
    distance = pytest.approx(np.linalg.norm(a - b), rel=1e-6)
    assert vectors.to_distances(squared.tolist(), "l2") == [distance]


def test_prepared_vectors_have_length_one() -> None:
    long = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32) * 1e18
    lengths = np.linalg.norm(vectors.prepare(long, "cosine"), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)
    np.testing.assert_array_equal(vectors.prepare(long, "l2"), long)
