"""Neighbours and their figures, each with an answer worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from pg_siamese.evaluation.retrieval import (
    Embedded,
    distances,
    nearest,
    neighbours,
    precision_at,
    retrieval,
    retrieval_by_set,
    right_set,
    unit,
    votes,
)
from tests.unit.evaluation.embeddings import vectors


def test_metrics_order_vectors_of_different_length_differently() -> None:
    gallery = vectors((10, 0), (1, 1), (0, 3))
    query = vectors((1, 0.2))
    assert nearest(query, gallery, 3, "cosine").tolist() == [[0, 1, 2]]
    assert nearest(query, gallery, 3, "l2").tolist() == [[1, 2, 0]]


def test_ties_go_to_the_lower_index_even_at_the_last_place() -> None:
    gallery = vectors(*[(1, 0)] * 9, (0, 1))
    for k in (1, 3, 9):
        assert nearest(vectors((1, 0)), gallery, k).tolist() == [list(range(k))]


def test_more_neighbours_than_images_gives_all_of_them() -> None:
    assert nearest(vectors((1, 0)), vectors((0, 1), (1, 0)), 5).tolist() == [[1, 0]]


def test_cosines_close_to_one_are_told_apart() -> None:
    # 1 - cosine is about 1e-10 and 4e-10 here: float32 has no numbers between those and 0.
    gallery = vectors((1, 2e-5), (1, 1e-5), (1, 0.5))
    assert nearest(vectors((1, 0)), gallery, 3).tolist() == [[1, 0, 2]]


def test_distances_by_hand() -> None:
    first, second = vectors((1, 0), (3, 4), (0, 2)), vectors((0, 5), (0, 0), (0, 7))
    assert distances(first, second, "l2").tolist() == pytest.approx([math.sqrt(26), 5, 5])
    assert distances(first, second, "cosine").tolist() == pytest.approx([1, 1, 0])


def test_a_vector_of_length_zero_stays_one() -> None:
    assert unit(np.array([[0.0, 0.0], [0.0, 2.0]])).tolist() == [[0, 0], [0, 1]]


def test_precision_at_k_is_the_share_of_relevant_neighbours() -> None:
    found = np.array([[1] * 7 + [2] * 3, [2] * 9 + [1]])
    assert precision_at(found, np.array([1, 1]), 10).tolist() == [0.7, 0.1]
    assert precision_at(found, np.array([1, 1]), 5).tolist() == [1, 0]


def test_votes_of_neighbours() -> None:
    found = np.array([[3, 1, 1, 2, 2], [2, 2, 1, 1, 1], [0, 1, 2, 3, 4]])
    # Once the majority; and where two are equal, the one that is nearer.
    assert votes(found, 5).tolist() == [1, 1, 0]
    assert votes(found, 4).tolist() == [1, 2, 0]
    assert votes(found, 1).tolist() == [3, 2, 0]


def test_retrieval_figures_by_hand() -> None:
    neighbours = np.array(
        [
            [1, 0, 1, 0, 0],  # AP = (1 + 2/3) / 2; class 0 has the majority
            [0, 0, 0, 0, 0],  # nothing relevant
            [2, 1, 2, 1, 0],  # a tie of 1 and 2 counts for either; AP = (1/2 + 2/4) / 2
        ]
    )
    score = retrieval(neighbours, np.array([1, 1, 1]))
    assert score.map5 == pytest.approx(100 * ((1 + 2 / 3) / 2 + 0 + 0.5) / 3)
    assert score.mmv5 == pytest.approx(100 / 3)
    assert score.acc1 == pytest.approx(100 / 3)
    assert score.acc3 == pytest.approx(200 / 3)
    assert score.acc5 == pytest.approx(200 / 3)


def test_nearest_is_exact_and_ties_go_to_the_lower_index() -> None:
    gallery = np.eye(4, dtype=np.float32)[[0, 1, 1, 2, 3, 1]]
    assert nearest(gallery[1:2], gallery, 3).tolist() == [[1, 2, 5]]
    random = np.random.default_rng(0)
    vectors = random.normal(size=(300, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = np.argsort(-(vectors[:20] @ vectors.T), axis=1, kind="stable")[:, :7]
    assert (nearest(vectors[:20], vectors, 7) == expected).all()


def test_retrieval_stays_within_each_set() -> None:
    # Set 1's vectors equal set 0's but carry other labels.
    vectors = np.tile(np.eye(2, dtype=np.float32).repeat(5, axis=0), (2, 1))
    labels = np.repeat([0, 1, 2, 3], 5)
    sets = np.repeat([0, 1], 10)
    everything = Embedded(vectors, labels, sets)
    scores = retrieval_by_set(everything, everything, ("a", "b"))
    assert {name: score.map5 for name, score in scores.items()} == {"a": 100, "b": 100}
    assert right_set(everything, everything) == 50


def test_the_querys_own_group_is_no_neighbour() -> None:
    gallery = vectors((1, 0), (1, 0.1), (1, 0.2), (0, 1))
    queries = vectors((1, 0), (1, 0))
    groups = np.array([7, 8]), np.array([7, 7, 9, 8])
    assert nearest(queries, gallery, 2, groups=groups).tolist() == [[2, 3], [0, 1]]
    with pytest.raises(ValueError, match="fewer than 3 images are outside a query's own group"):
        nearest(queries, gallery, 3, groups=groups)
    known = Embedded(gallery, np.array([0, 0, 1, 1]), np.zeros(4, np.int64), groups[1])
    asked = Embedded(queries, np.array([0, 0]), np.zeros(2, np.int64), groups[0])
    assert neighbours(known, asked, 1).tolist() == [[2], [0]]
    assert neighbours(known, asked, 1, own_group=True).tolist() == [[0], [0]]
    assert known.shares_groups(asked)
    assert not known.select(np.array([2])).shares_groups(asked)
    assert not replace(known, groups=None).shares_groups(asked)


def test_own_groups_are_left_out_in_both_figures() -> None:
    """Each query's group has the nearest image, of its class and set: without it, all is wrong."""
    points = np.repeat(np.eye(2, dtype=np.float32), 6, axis=0)
    labels, sets = np.repeat([1, 0, 3, 2], [1, 5, 1, 5]), np.repeat([0, 1], 6)
    gallery = Embedded(points, labels, sets, np.arange(12))
    queries = Embedded(points[[0, 6]], labels[[0, 6]], sets[[0, 6]], np.array([0, 6]))
    own, without = (
        retrieval_by_set(gallery, queries, ("a", "b"), own_group=own) for own in (True, False)
    )
    assert [own[name].acc1 for name in "ab"] == [100, 100]
    assert [without[name].acc5 for name in "ab"] == [0, 0]
    assert right_set(gallery, queries) == 100
    assert right_set(replace(gallery, groups=np.repeat([0, 6], 6)), queries) == 0
