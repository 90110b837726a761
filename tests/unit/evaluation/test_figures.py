"""The figures of an evaluation, each with an answer worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pg_siamese.evaluation.figures import (
    class_report,
    means,
    neighbour_scores,
    normalised,
    pair_figures,
    set_figures,
    stated_figures,
    triple_figures,
)
from pg_siamese.evaluation.pairs import Calibration
from tests.unit.evaluation.embeddings import embedded, vectors


def test_figures_of_neighbours_by_hand() -> None:
    # Of ten neighbours: relevant at 1 and 3, and at 2, 4, 6, 8, 10.
    found = np.array([[1, 0, 1, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]])
    figures = means(neighbour_scores(found, np.array([1, 1])))
    map5 = 100 * ((1 + 2 / 3) / 2 + (1 / 2 + 2 / 4) / 2) / 2
    assert figures["retrieval"]["map5"] == pytest.approx(map5)
    assert figures["retrieval"]["acc1"] == 50
    assert figures["retrieval"]["mmv5"] == 0
    assert figures["precision_at_10"] == pytest.approx(0.35)
    assert figures["knn_accuracy"] == {"1": 0.5, "5": 0.0, "10": 0.0}


def test_pair_figures_have_the_report_of_both_kinds() -> None:
    apart = np.array([0.1, 0.9, 0.2, 0.8, 0.9])
    match = np.array([True, True, False, False, False])
    figures = pair_figures((apart, match), Calibration(-1, 0.5, 0.5))
    assert figures["count"] == 5
    assert figures["accuracy"] == pytest.approx(3 / 5)
    report = figures["report"]
    assert report["match"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert report["no match"]["recall"] == pytest.approx(2 / 3)


def test_triple_figures_of_separate_classes_are_perfect() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    points = np.eye(3)[labels] + random.normal(0, 0.01, (60, 3))
    figures = triple_figures(
        embedded(points[::2].astype(np.float32), labels[::2].tolist()),
        embedded(points[1::2].astype(np.float32), labels[1::2].tolist()),
        "l2",
    )
    assert figures is not None
    assert figures["accuracy"] == 1.0
    assert 0.1 < figures["threshold"] < 1.4


def test_no_triples_of_two_classes() -> None:
    points = embedded(vectors((1, 0), (0, 1), (1, 1)), [0, 1, 1])
    assert triple_figures(points, points, "cosine") is None


def test_pairs_of_sets_by_distance_and_by_neighbour() -> None:
    # Two sets of two far classes each: distance cannot tell sets, the nearest image can.
    corners = np.eye(4, dtype=np.float32)
    gallery = embedded(corners, [0, 1, 2, 3], [0, 0, 1, 1])
    queries = embedded(np.repeat(corners, 5, axis=0), [0] * 20, [0] * 10 + [1] * 10)
    figures = set_figures(gallery, queries, queries, "cosine")
    assert figures["right_set"] == 100
    assert figures["set_pairs"]["accuracy_by_neighbour"] == 1.0
    # Half of a set's images are of the other class, as far as those of the other set: 4 of 9
    # matching pairs and all others are told right.
    assert figures["set_pairs"]["accuracy"] == pytest.approx((4 / 9 + 1) / 2, abs=0.02)


def test_labels_by_set() -> None:
    points = embedded(vectors((1, 0), (0, 1)), [3, 4], [0, 1])
    assert points.by_set().labels.tolist() == [0, 1]
    assert normalised(points)
    assert not normalised(embedded(vectors((1, 1)), [0]))


def test_stated_figures_ask_for_the_class_or_for_the_set() -> None:
    # Two sets at two places, and in each two classes that nothing tells apart.
    corners = np.repeat(np.eye(2, dtype=np.float32), 20, axis=0)
    points = embedded(corners, [0, 1] * 10 + [2, 3] * 10, [0] * 20 + [1] * 20)
    calibration = Calibration(weight=-4, bias=2, threshold=0.5)
    options: Any = {"names": ("a", "b"), "metric": "cosine", "seed": 0}
    by_class, by_set = (
        stated_figures(points, points, calibration, labels=labels, **options)
        for labels in ("class", "set")
    )
    assert list(by_class["retrieval"]) == ["a", "b"]
    assert by_class["retrieval"]["a"]["acc1"] == 50
    assert by_class["pairs"]["accuracy"] == pytest.approx(0.75, abs=0.01)
    assert list(by_set["retrieval"]) == ["all"]
    assert by_set["retrieval"]["all"]["acc1"] == 100
    assert by_set["pairs"]["accuracy"] == 1
    assert by_class["right_set"] == by_set["right_set"] == 100


def test_class_report_by_hand() -> None:
    report = class_report(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), ("a", "b"))
    assert report["a"] == {"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "support": 3}
    assert report["b"] == {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1}
    assert report["macro avg"]["recall"] == pytest.approx(5 / 6)
