"""The figures of an evaluation, each with an answer worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pg_siamese.evaluation.figures import (
    by_set,
    class_report,
    neighbour_figures,
    normalised,
    pair_figures,
    set_figures,
    triple_figures,
)
from pg_siamese.evaluation.pairs import (
    Calibration,
    balanced_pairs,
    best_threshold,
    calibrate,
    contrastive_loss,
    pair_distances,
    score_pairs,
)
from pg_siamese.evaluation.retrieval import (
    Embedded,
    distances,
    nearest,
    precision_at,
    unit,
    votes,
)
from pg_siamese.evaluation.triples import balanced_triples, least_distances


def vectors(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, np.float32)


def embedded(rows: np.ndarray, labels: list[int], sets: list[int] | None = None) -> Embedded:
    return Embedded(rows, np.array(labels), np.array(sets or [0] * len(labels)))


# --- neighbours -------------------------------------------------------------------------------


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


def test_precision_at_k_is_the_mean_share_of_relevant_neighbours() -> None:
    found = np.array([[1] * 7 + [2] * 3, [2] * 9 + [1]])
    assert precision_at(found, np.array([1, 1]), 10) == pytest.approx((0.7 + 0.1) / 2)
    assert precision_at(found, np.array([1, 1]), 5) == pytest.approx(0.5)


def test_votes_of_neighbours() -> None:
    found = np.array([[3, 1, 1, 2, 2], [2, 2, 1, 1, 1], [0, 1, 2, 3, 4]])
    # Once the majority; and where two are equal, the one that is nearer.
    assert votes(found, 5).tolist() == [1, 1, 0]
    assert votes(found, 4).tolist() == [1, 2, 0]
    assert votes(found, 1).tolist() == [3, 2, 0]


def test_neighbour_figures_by_hand() -> None:
    # Of ten neighbours: relevant at 1 and 3, and at 2, 4, 6, 8, 10.
    found = np.array([[1, 0, 1, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]])
    figures = neighbour_figures(found, np.array([1, 1]))
    assert figures["retrieval"]["map5"] == pytest.approx(
        100 * ((1 + 2 / 3) / 2 + (1 / 2 + 2 / 4) / 2) / 2
    )
    assert figures["retrieval"]["acc1"] == 50
    assert figures["retrieval"]["mmv5"] == 0
    assert figures["precision_at_10"] == pytest.approx(0.35)
    assert figures["knn_accuracy"] == {"1": 0.5, "5": 0.0, "10": 0.0}


# --- pairs ------------------------------------------------------------------------------------


def test_contrastive_loss_by_hand() -> None:
    # P(match) 0.8 for a match: p = 0.2, p² = 0.04. P(match) 0.6 for none: (1 - 0.4)² = 0.36.
    logit = np.log(np.array([0.8 / 0.2, 0.6 / 0.4]))
    assert contrastive_loss(logit, np.array([True, False])) == pytest.approx((0.04 + 0.36) / 2)
    # It is bounded, and finite, however sure and wrong the answer is.
    far = np.array([-1e6, 1e6])
    assert contrastive_loss(far, np.array([True, False])) == pytest.approx(1)
    assert contrastive_loss(far, np.array([False, True])) == pytest.approx(0)


def test_pair_scores_by_hand() -> None:
    # P(match) = sigmoid(2 - 4 d): 0.5 at the distance 0.5.
    calibration = Calibration(weight=-4, bias=2, threshold=0.4)
    apart = np.array([0.0, 0.45, 0.5, 1.0])
    match = np.array([True, True, False, False])
    scores = score_pairs(apart, match, calibration)
    assert scores.accuracy == 0.75  # 0.45 is beyond the threshold
    assert scores.auc == 1.0
    probability = 1 / (1 + np.exp(4 * apart - 2))
    right = np.where(match, probability, 1 - probability)
    assert scores.log_loss == pytest.approx(-np.log(right).mean())
    assert scores.contrastive_loss == pytest.approx(((1 - right) ** 2).mean())


def test_the_threshold_lies_between_the_pairs() -> None:
    apart = np.array([0.1, 0.2, 0.6, 0.8])
    assert best_threshold(apart, np.array([True, True, False, False])) == pytest.approx(0.4)
    # Where matching pairs are the farther ones, there is still one, and it is finite.
    assert math.isfinite(best_threshold(apart, np.array([False, False, True, True])))


def test_a_calibration_gives_back_known_odds() -> None:
    random = np.random.default_rng(0)
    apart = random.uniform(0, 2, 50_000)
    match = random.random(50_000) < 1 / (1 + np.exp(6 * apart - 5))
    calibration = calibrate(apart, match)
    assert calibration.weight == pytest.approx(-6, rel=0.05)
    assert calibration.bias == pytest.approx(5, rel=0.05)


def test_pairs_of_sets_are_half_and_half() -> None:
    sets = np.array([0] * 30 + [1] * 3)
    first, second, match = balanced_pairs(sets, sets, 400, seed=0)
    assert match.sum() == 200
    assert ((sets[first] == sets[second]) == match).all()
    assert (first != second).all()
    # A small set is drawn as often as a large one.
    assert 150 < (sets[first] == 0).sum() < 250


@pytest.mark.parametrize(
    ("labels", "reason"), [([0, 0], "different classes"), ([0, 1], "of one class")]
)
def test_there_must_be_pairs_of_both_kinds(labels: list[int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        balanced_pairs(np.array(labels), np.zeros(2, np.int64), 10, seed=0)


def test_pair_figures_have_the_report_of_both_kinds() -> None:
    apart = np.array([0.1, 0.9, 0.2, 0.8, 0.9])
    match = np.array([True, True, False, False, False])
    figures = pair_figures((apart, match), Calibration(-1, 0.5, 0.5))
    assert figures["count"] == 5
    assert figures["accuracy"] == pytest.approx(3 / 5)
    report = figures["report"]
    assert report["match"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert report["no match"]["recall"] == pytest.approx(2 / 3)


def test_pairs_of_a_metric_are_measured_by_it() -> None:
    points = embedded(vectors((1, 0), (5, 0), (0, 1), (0, 5)), [0, 0, 1, 1])
    angles, match = pair_distances(points, 40, 0, "cosine")
    assert angles[match].max() == pytest.approx(0)
    lengths, match = pair_distances(points, 40, 0, "l2")
    assert lengths[match].tolist() == pytest.approx([4.0] * 20)


# --- triples ----------------------------------------------------------------------------------


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


# --- several data sets ------------------------------------------------------------------------


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
    assert by_set(points).labels.tolist() == [0, 1]
    assert normalised(points)
    assert not normalised(embedded(vectors((1, 1)), [0]))


def test_class_report_by_hand() -> None:
    report = class_report(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), ("a", "b"))
    assert report["a"] == {"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "support": 3}
    assert report["b"] == {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1}
    assert report["macro avg"]["recall"] == pytest.approx(5 / 6)
