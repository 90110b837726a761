"""Building an index in memory: equal vectors, calibration, portions."""

from __future__ import annotations

import itertools
import time

import faiss
import numpy as np
import pytest

from pg_siamese_server import build, vectors
from pg_siamese_server.build import Options
from pg_siamese_server.errors import SiameseError
from tests.support import Array


def no_poll() -> None:
    pass


class Silent:
    """In place of plpy."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, text: str, **_: str) -> None:
        self.notices.append(text)


def options(**given: float) -> Options:
    return Options(**{"m": 16, "ef_construction": 64, "target_recall": 0.99, "threads": 1, **given})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def clusters() -> Array:
    """3,000 vectors of length one around 30 centres."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(30, 32))
    points = centres[generator.integers(0, 30, 3000)] + 0.3 * generator.normal(size=(3000, 32))
    return vectors.prepare(points.astype(np.float32), "cosine")


@pytest.mark.parametrize("repeats", [1, 2, 40])
def test_equal_vectors_are_kept_once(repeats: int) -> None:
    generator = np.random.default_rng(repeats)
    distinct = generator.normal(size=(50, 16)).astype(np.float32)
    distinct[1] = distinct[0]
    distinct[1, 5] = np.nextafter(distinct[0, 5], np.float32(9))  # as near as can be, but not equal
    order = generator.permutation(np.repeat(np.arange(50), repeats))
    unique, slots = build._share_equal_vectors(distinct[order], no_poll)
    assert len(unique) == 50
    assert (slots is None) == (repeats == 1)
    if slots is not None:
        np.testing.assert_array_equal(unique[slots], distinct[order])


@pytest.mark.parametrize("repeats", [1, 3])
def test_vectors_in_the_order_of_their_levels(clusters: Array, repeats: int) -> None:
    matrix, slots = build._share_equal_vectors(np.repeat(clusters, repeats, axis=0), no_poll)
    ordered, places, levels = build._from_top_to_bottom(matrix, slots, 16)
    assert (np.diff(levels) <= 0).all() and levels[-1] == 1
    assert 0.03 < (levels > 1).mean() < 0.1  # one in sixteen
    np.testing.assert_array_equal(ordered[places], np.repeat(clusters, repeats, axis=0))


def test_equal_vectors_of_few_rows() -> None:
    for count in (0, 1, 2):
        unique, _ = build._share_equal_vectors(np.ones((count, 4), np.float32), no_poll)
        assert len(unique) == min(count, 1)


@pytest.fixture
def progress() -> build._Progress:
    return build._Progress(Silent(), "pets", 1000, time.monotonic())


def test_few_vectors_are_scanned(clusters: Array, progress: build._Progress) -> None:
    index, breadths = build._index(clusters[:100], None, options(), progress, no_poll)
    assert (index.ntotal, breadths) == (100, None)
    assert isinstance(index, faiss.IndexFlatL2)


def test_graph_reaches_the_recall_that_it_states(
    clusters: Array, progress: build._Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_is_quicker", lambda *_: True)  # a matter of the machine
    ordered, places, levels = build._from_top_to_bottom(clusters, None, 16)
    index, breadths = build._index(ordered, levels, options(), progress, no_poll)
    assert isinstance(index, faiss.IndexHNSWFlat) and breadths is not None
    assert breadths.recall >= 0.99
    queries = clusters[np.random.default_rng(1).integers(0, 3000, 200)]
    truth = np.argsort(((clusters[None] - queries[:, None]) ** 2).sum(axis=2), axis=1)[:, :10]
    found = build._search(index, queries, 10, breadths.stored, options(), no_poll)
    hits = [len(np.intersect1d(*pair)) for pair in zip(found, places[truth], strict=True)]
    assert np.mean(hits) >= 9.8


def test_no_graph_where_it_misses_the_recall(
    clusters: Array, progress: build._Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_calibrate", lambda *_: build.Breadths(512, 512, 0.7))
    ordered, _, levels = build._from_top_to_bottom(clusters, None, 16)
    index, breadths = build._index(ordered, levels, options(), progress, no_poll)
    assert isinstance(index, faiss.IndexFlatL2)
    assert (index.ntotal, breadths) == (3000, None)
    assert "recall of 0.700 only" in progress.plpy.notices[0]


def test_exact_neighbours(clusters: Array) -> None:
    found = build._exact(clusters, clusters[:20].copy(), options(), no_poll)
    truth = np.argsort(((clusters[None] - clusters[:20, None]) ** 2).sum(axis=2), axis=1)[:, :10]
    assert (found[:, 0] == np.arange(20)).all()
    assert np.mean([len(np.intersect1d(*pair)) for pair in zip(found, truth, strict=True)]) >= 9.9


def test_portions_cover_all_and_grow() -> None:
    portions = list(build._portions(0, 100_000))
    assert portions[0][0] == 0 and portions[-1][1] == 100_000
    assert all(one[1] == other[0] for one, other in itertools.pairwise(portions))
    sizes = [end - start for start, end in portions]
    assert sizes[1] == 2 * sizes[0] and max(sizes) <= 20_000


def test_portions_shrink_when_slow() -> None:
    portions = build._portions(0, 600)
    first = next(portions)
    time.sleep(0.2)
    second = next(portions)
    assert second[1] - second[0] < first[1] - first[0]


def test_progress_is_told_now_and_then() -> None:
    late = build._Progress(Silent(), "pets", 1000, time.monotonic() - 60)
    late.report(400)
    late.report(401)
    assert late.plpy.notices == ['building index of collection "pets": 40% (400 of 1000 vectors)']


@pytest.mark.parametrize(
    "given",
    [
        {"m": 3},
        {"m": 65},
        {"m": None},
        {"ef_construction": 7},
        {"ef_construction": None},
        {"target_recall": 1.01},
        {"target_recall": float("nan")},
        {"target_recall": None},
        {"threads": 0},
    ],
)
def test_options_out_of_range(given: dict[str, float]) -> None:
    with pytest.raises(SiameseError, match=f"{next(iter(given))} must be between"):
        options(**given).check()
    options().check()


def test_vectors_from_pgvector() -> None:
    """As vector_send gives them: dimension, unused, big-endian numbers."""
    values = np.array([[1.5, -2.25], [0.0, 3e38]], np.float32)
    data = b"".join(b"\0\2\0\0" + row.astype(">f4").tobytes() for row in values)
    np.testing.assert_array_equal(vectors.from_send(data, 2), values)
    text = vectors.to_text(np.array([0.1, 1e-30], np.float32))
    assert [np.float32(number) for number in text.strip("[]").split(",")] == [
        np.float32(0.1),
        np.float32(1e-30),
    ]


def test_distances() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 1, 16)).astype(np.float32)
    cosine = 1 - (a @ b.T / np.linalg.norm(a) / np.linalg.norm(b)).item()
    one, other = vectors.prepare(a, "cosine"), vectors.prepare(b, "cosine")
    squared = vectors.squared_distances(one, other)
    assert vectors.distances(squared, "cosine")[0] == pytest.approx(cosine, abs=1e-6)
    squared = vectors.squared_distances(vectors.prepare(a, "l2"), b)
    assert vectors.distances(squared, "l2")[0] == pytest.approx(np.linalg.norm(a - b), rel=1e-6)


def test_prepared_vectors_have_length_one() -> None:
    long = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32) * 1e18
    np.testing.assert_allclose(
        np.linalg.norm(vectors.prepare(long, "cosine"), axis=1), 1, rtol=1e-6
    )
    np.testing.assert_array_equal(vectors.prepare(long, "l2"), long)


def test_threads_are_only_for_builds(clusters: Array, progress: build._Progress) -> None:
    faiss.omp_set_num_threads(1)
    ordered, _, levels = build._from_top_to_bottom(clusters[:2100], None, 16)
    build._index(ordered, levels, options(threads=2), progress, no_poll)
    assert faiss.omp_get_max_threads() == 1
