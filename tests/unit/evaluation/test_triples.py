"""Triples, and the decision by their least distance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pg_siamese.evaluation.triples import balanced_triples, least_distances
from tests.unit.evaluation.embeddings import embedded, vectors


def test_triples_are_half_and_half() -> None:
    labels = np.array([0] * 50 + [1] * 4 + [2])
    triples, match = balanced_triples(labels, 600, seed=1)
    assert match.sum() == 300
    of = labels[triples]
    different = np.array([len(set(row)) for row in of.tolist()])
    assert (different[match] == 2).all()
    assert (different[~match] == 3).all()
    assert all(len(set(row)) == 3 for row in triples.tolist())
    # The matching pair isn't always at the same places.
    assert len({tuple(row == row[0]) for row in of[match]}) == 3
    assert np.array_equal(balanced_triples(labels, 600, seed=1)[0], triples)


@pytest.mark.parametrize(
    ("labels", "reason"), [([0, 0, 1, 1], "three classes"), ([0, 1, 2], "no pair")]
)
def test_triples_need_three_classes_and_a_pair(labels: list[int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        balanced_triples(np.array(labels), 10, seed=0)


def test_a_triple_is_judged_by_its_least_distance() -> None:
    points = embedded(vectors((0, 0), (3, 4), (3, 5), (30, 40)), [0, 1, 1, 2])
    triples = np.array([[0, 1, 2], [0, 1, 3], [3, 2, 0]])
    assert least_distances(points, triples, "l2").tolist() == pytest.approx([1, 5, math.sqrt(34)])
