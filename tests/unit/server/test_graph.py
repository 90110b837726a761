"""The index in memory: the order of insertion, the graph, its calibration, portions."""

from __future__ import annotations

import itertools
import time
from typing import Any

import faiss
import numpy as np
import pytest

from pg_siamese_server import interrupts, vectors
from pg_siamese_server.errors import SiameseError
from pg_siamese_server.index import build, graph
from pg_siamese_server.index.generations import Breadths, opened
from pg_siamese_server.index.index_file import Rows
from pg_siamese_server.progress import Progress
from tests.support import Array
from tests.unit.server.common import no_poll


class Silent:
    """In place of plpy."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, text: str, **_: str) -> None:
        self.notices.append(text)


def options(**given: float) -> graph.Options:
    values = {"m": 16, "ef_construction": 64, "target_recall": 0.99, "threads": 1, **given}
    return graph.Options(**values)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make graphs of few vectors, in several cells."""
    monkeypatch.setattr(graph, "FLAT_BELOW", 1000)
    monkeypatch.setattr(graph, "CELL_ROWS", 300)
    monkeypatch.setattr(graph, "_is_quicker", lambda *_: True)  # a matter of the machine
    monkeypatch.setattr("pg_siamese_server.progress.NOTICE_SECONDS", 3600)  # likewise


def in_order(matrix: Array, slots: Array | None = None) -> tuple[Array, Array, Array]:
    ordered, places, levels = graph.in_order(matrix, slots, options(), no_poll)
    assert places is not None and levels is not None
    return ordered, places, levels


@pytest.fixture(scope="module")
def clusters() -> Array:
    """3,000 vectors of length one around 30 centres."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(30, 32))
    points = centres[generator.integers(0, 30, 3000)] + 0.3 * generator.normal(size=(3000, 32))
    return vectors.prepare(points.astype(np.float32), "cosine")


@pytest.mark.parametrize("repeats", [1, 3])
def test_vectors_in_the_order_of_their_levels(clusters: Array, repeats: int) -> None:
    matrix, slots = build._share_equal_vectors(np.repeat(clusters, repeats, axis=0), no_poll)
    ordered, places, levels = in_order(matrix, slots)
    assert (np.diff(levels) <= 0).all() and levels[-1] == 1
    assert 0.03 < (levels > 1).mean() < 0.1  # one in sixteen
    np.testing.assert_array_equal(ordered[places], np.repeat(clusters, repeats, axis=0))


def test_neighbours_are_inserted_one_after_the_other(clusters: Array) -> None:
    """In each round; and the vectors that calibration takes as unknown are left to chance."""
    ordered, _, levels = in_order(clusters)
    steps = np.linalg.norm(np.diff(ordered, axis=0), axis=1)
    low, last = int((levels > 1).sum()), graph._known_count(3000)
    assert steps[low:last].mean() < 0.85 * steps[:low].mean()
    assert steps[last:].mean() > 0.95 * steps[:low].mean()


def test_few_vectors_stay_as_they_are(clusters: Array) -> None:
    slots = np.arange(100, dtype=np.int32)
    matrix, places, levels = graph.in_order(clusters[:100], slots, options(), no_poll)
    np.testing.assert_array_equal(matrix, clusters[:100])
    assert places is slots and levels is None


def vectors_of(index: Any) -> Array:
    """Return the vectors of an index. Where torch is loaded as well, FAISS may give a tensor."""
    return np.asarray(index.reconstruct_n(0, index.ntotal))


def mean_hits(found: Array, truth: Array) -> float:
    """How many of each row's true neighbours were found."""
    hits = [len(np.intersect1d(*pair)) for pair in zip(found, truth, strict=True)]
    return float(np.mean(hits))


def ten_nearest(matrix: Array, queries: Array) -> Array:
    return np.argsort(((matrix[None] - queries[:, None]) ** 2).sum(axis=2), axis=1)[:, :10]


@pytest.fixture
def progress() -> Progress:
    return Progress(Silent(), "build_index", "pets")


def test_few_vectors_are_scanned(clusters: Array, progress: Progress) -> None:
    built = graph.build(clusters[:100], None, options(), progress, no_poll)
    assert (built.index.ntotal, built.measured, built.places) == (100, None, None)
    assert isinstance(built.index, faiss.IndexFlatL2)


def test_graph_reaches_the_recall_that_it_states(clusters: Array, progress: Progress) -> None:
    ordered, inserted, levels = in_order(clusters)
    built = graph.build(ordered, levels, options(), progress, no_poll)
    index, measured = built.index, built.measured
    assert isinstance(index, faiss.IndexHNSWFlat) and measured is not None
    assert measured.recall >= 0.99
    assert built.places is not None
    places = built.places[inserted]
    np.testing.assert_array_equal(vectors_of(index)[places], clusters)
    chosen = np.random.default_rng(1).integers(0, 3000, 200)
    queries = clusters[chosen]
    truth = ten_nearest(clusters, queries)
    for entries, breadth in (
        (places[chosen], measured.breadths.stored),
        (None, measured.breadths.new),
    ):
        found = graph._search(index, queries, entries, 10, breadth, options(), no_poll)
        assert mean_hits(found, places[truth]) >= 9.8


def test_many_neighbours_have_the_recall_too(clusters: Array, progress: Progress) -> None:
    ordered, _, levels = in_order(clusters)
    built = graph.build(ordered, levels, options(), progress, no_poll)
    assert built.measured is not None
    generation = opened(built.index, Rows(np.arange(3000)), False, built.measured.breadths)
    stored = vectors_of(built.index)
    for count in (100, 300, 1000):
        hits = 0
        for place in range(0, 3000, 100):
            query = stored[place : place + 1]
            truth = np.argsort(((stored - query) ** 2).sum(axis=1))[:count]
            hits += np.isin(truth, generation.search(query, count, None)[0]).sum()
        assert hits >= 0.985 * 30 * count


def test_a_graph_built_again_is_as_good(clusters: Array, progress: Progress) -> None:
    ordered, inserted, levels = in_order(clusters)
    measured = graph.build(ordered, levels, options(), progress, no_poll).measured
    again = graph.build_again(ordered, levels, options(), progress, no_poll)
    index, moved = again.index, again.places
    assert isinstance(index, faiss.IndexHNSWFlat) and measured is not None and moved is not None
    places = moved[inserted]
    np.testing.assert_array_equal(vectors_of(index)[places], clusters)
    queries = clusters[np.random.default_rng(1).integers(0, 3000, 200)]
    breadth = measured.breadths.new
    found = graph._search(index, queries, None, 10, breadth, options(), no_poll)
    assert mean_hits(found, places[ten_nearest(clusters, queries)]) >= 9.8
    flat = graph.build_again(clusters[:100], None, options(), progress, no_poll).index
    assert isinstance(flat, faiss.IndexFlatL2) and flat.ntotal == 100


def test_near_vectors_are_next_to_each_other(
    clusters: Array, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the links of each are as they were."""
    ordered, _, levels = in_order(clusters)
    # Otherwise how many vectors one call adds depends on the time.
    monkeypatch.setattr(
        graph, "portions", lambda first, last, **_: [(first, last)] if first < last else []
    )
    with monkeypatch.context() as patch:
        patch.setattr(graph, "_gather", lambda *_: None)
        before = graph.build(ordered, levels, options(threads=1), progress, no_poll).index
    monkeypatch.setattr(graph, "GATHERED", 700)
    built = graph.build(ordered, levels, options(threads=1), progress, no_poll)
    places = built.places
    assert places is not None
    stored = vectors_of(built.index)
    steps, inserted = (np.linalg.norm(np.diff(m, axis=0), axis=1).mean() for m in (stored, ordered))
    assert steps < 0.95 * inserted
    assert built.index.hnsw.entry_point == places[before.hnsw.entry_point]
    assert built.index.hnsw.max_level == before.hnsw.max_level
    for place in range(0, 3000, 30):
        assert neighbours(built.index, places[place]) == [
            places[each] for each in neighbours(before, place)
        ]


def neighbours(index: Any, place: int) -> list[int]:
    """Return the links of a vector, on all levels."""
    start, end = faiss.vector_to_array(index.hnsw.offsets)[place : place + 2].astype(int)
    links = faiss.vector_to_array(index.hnsw.neighbors)[start:end]
    return [each for each in links.tolist() if each >= 0]


def test_no_graph_where_it_misses_the_recall(
    clusters: Array, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_calibrate", lambda *_: graph.Measured(Breadths(512, 512), 0.7))
    ordered, _, levels = in_order(clusters)
    built = graph.build(ordered, levels, options(), progress, no_poll)
    assert isinstance(built.index, faiss.IndexFlatL2)
    assert (built.index.ntotal, built.measured, built.places) == (3000, None, None)
    assert "recall of only 0.700" in progress.plpy.notices[0]


def test_exact_neighbours(clusters: Array) -> None:
    found = graph._exact(clusters, clusters[:20].copy(), 10, options(), no_poll)
    assert (found[:, 0] == np.arange(20)).all()
    assert mean_hits(found, ten_nearest(clusters, clusters[:20])) >= 9.9


def test_portions_cover_all_and_grow() -> None:
    portions = list(interrupts.portions(0, 100_000, size=200, least=50, most=4_000))
    assert portions[0][0] == 0 and portions[-1][1] == 100_000
    assert all(one[1] == other[0] for one, other in itertools.pairwise(portions))
    sizes = [end - start for start, end in portions]
    assert sizes[1] == 2 * sizes[0] and max(sizes) <= 4_000


def test_portions_shrink_when_slow() -> None:
    portions = interrupts.portions(0, 600, size=200, least=50, most=4_000)
    first = next(portions)
    time.sleep(0.2)
    second = next(portions)
    assert second[1] - second[0] < first[1] - first[0]


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


def test_threads_are_only_for_builds(clusters: Array, progress: Progress) -> None:
    faiss.omp_set_num_threads(1)
    ordered, _, levels = in_order(clusters[:2100])
    graph.build(ordered, levels, options(threads=2), progress, no_poll)
    assert faiss.omp_get_max_threads() == 1
