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


def test_two_that_match_are_of_two_groups() -> None:
    random = np.random.default_rng(0)
    labels, groups = random.integers(0, 4, 60), random.integers(0, 12, 60)
    labels[:2], groups[:2] = 4, 20  # a class of one group
    triples, match = balanced_triples(labels, 300, 0, groups)
    for triple in triples[match]:
        of = labels[triple]
        (label,) = {one for one in of.tolist() if (of == one).sum() == 2}
        assert label != 4
        assert len(set(groups[triple][of == label])) == 2
    with pytest.raises(ValueError, match="in two groups"):
        balanced_triples(labels, 10, 0, labels)


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
