"""All figures of one model: pairs, triples, neighbours, and the report of every class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pg_siamese.client.connection import CommandError
from pg_siamese.datasets import DataSplits, join_labels, parts_by_size
from pg_siamese.evaluation.model import Advance, EvaluatedModel, embed_joined
from pg_siamese.evaluation.pairs import (
    Calibration,
    Flags,
    balanced_pairs,
    best_threshold,
    calibrate,
    pair_distances,
    score_pairs,
)
from pg_siamese.evaluation.reliability import reliability
from pg_siamese.evaluation.retrieval import (
    Embedded,
    Floats,
    Integers,
    distances,
    nearest_sets,
    neighbours,
    precision_at,
    retrieval_by_set,
    retrieval_scores,
    right_set,
    votes,
)
from pg_siamese.evaluation.triples import triple_distances

PAIRS = 20_000
TRIPLES = 20_000
NEIGHBOURS = 10
VOTERS = 5  # of the neighbours, for the reports by class and the confusion matrices
# Validation pairs choose, those of the evaluated split score: never the same draw.
CHOOSING_SEED, SCORING_SEED = 0, 1
OTHER_METRIC = {"cosine": "l2", "l2": "cosine"}


@dataclass(frozen=True)
class Evaluation:
    """What one model gave: its figures, and what pictures are drawn from.

    Attributes:
        model: the encoder.
        data: the data sets.
        split: the split that was evaluated.
        gallery: embeddings of the train split.
        queries: embeddings of the evaluated split.
        found: by data set, places (Q, 10) in its own gallery, nearest first.
        pairs: distances and matches.
        figures: all figures.
        scores: by data set, each query's part (Q,) in those figures that are means over queries.
    """

    model: EvaluatedModel
    data: list[DataSplits]
    split: str
    gallery: Embedded
    queries: Embedded
    found: dict[str, Integers]
    pairs: tuple[Floats, Flags]
    figures: dict[str, Any]
    scores: dict[str, dict[str, Any]]


def evaluate_model(
    model: EvaluatedModel,
    data: Sequence[DataSplits],
    split: str = "test",
    advance: Advance = lambda count: None,
) -> Evaluation:
    """Embed train, validation and the split to evaluate, and compute every figure.

    Shares are from 0 to 1. The retrieval protocol and ``right_set`` are in per cent, as published.

    A query's own group is no neighbour. Sets in whose gallery it is have figures with it, too:
    ``as_published``. Figures across sets are by ``parts_by_size``: under ``sizes`` if there are
    several parts.

    Raises:
        CommandError: a data set is too small for a figure, or scikit-learn isn't installed.
    """
    require_sklearn()
    gallery = embed_joined(model, [part.train for part in data], advance)
    validation = embed_joined(model, [part.val for part in data], advance)
    queries = (
        validation
        if split == "val"
        else embed_joined(model, [getattr(part, split) for part in data], advance)
    )
    metric = model.metric
    parts = parts_by_size([part.name for part in data])
    try:
        joined = [
            _joined_figures(model, *(e.of_sets(part) for e in (gallery, validation, queries)))
            for part in parts.values()
        ]
    except ValueError as error:
        raise CommandError(f"{', '.join(part.name for part in data)}: {error}") from None
    figures, pairs = joined[0]
    if len(parts) > 1:
        by_size = {str(size): each for size, (each, _) in zip(parts, joined, strict=True)}
        figures = {"sizes": by_size}
    found: dict[str, Integers] = {}
    scores: dict[str, dict[str, Any]] = {}
    figures["sets"] = {}
    starts = join_labels([part.train for part in data]).starts
    for number, part in enumerate(data):
        own_gallery, own_queries = gallery.of_set(number), queries.of_set(number)
        if len(own_gallery.labels) < NEIGHBOURS:
            raise CommandError(
                f'data set "{part.name}" has {len(own_gallery.labels)} train images: at least '
                f"{NEIGHBOURS} are needed as a gallery"
            )
        # The set's own class numbers.
        start = starts[number]
        known, wanted = own_gallery.labels - start, own_queries.labels - start
        searched: dict[str, tuple[str, bool]] = {"": (metric, False)}
        if own_gallery.shares_groups(own_queries):
            searched["as_published"] = metric, True
        if not normalised(gallery):
            # Of vectors that have a length, the two metrics order neighbours differently.
            other = OTHER_METRIC[metric]
            searched[f"by_{other}"] = other, False
        try:
            near = {
                variant: neighbours(own_gallery, own_queries, NEIGHBOURS, *options)
                for variant, options in searched.items()
            }
        except ValueError as error:
            raise CommandError(f'data set "{part.name}": {error}') from None
        found[part.name] = near.pop("")
        labels = known[found[part.name]]
        scores[part.name] = neighbour_scores(labels, wanted) | {
            variant: neighbour_scores(known[places], wanted) for variant, places in near.items()
        }
        figures["sets"][part.name] = {
            **means(scores[part.name]),
            "report": class_report(wanted, votes(labels, VOTERS), part.train.classes),
        }
    return Evaluation(model, list(data), split, gallery, queries, found, pairs, figures, scores)


def _joined_figures(
    model: EvaluatedModel, gallery: Embedded, validation: Embedded, queries: Embedded
) -> tuple[dict[str, Any], tuple[Floats, Flags]]:
    """Return the figures of data sets that are joined, and the pairs."""
    metric = model.metric
    own = (validation.by_set(), queries.by_set()) if model.labels == "set" else None
    chosen, scored = own or (validation, queries)
    pairs = draw_pairs(scored, model.labels, metric, SCORING_SEED)
    calibration = _calibration(model, chosen)
    figures: dict[str, Any] = {
        "pairs": pair_figures(pairs, calibration),
        "reliability": reliability(scored, calibration, metric, pairs=PAIRS, seed=SCORING_SEED),
    }
    if len(np.unique(queries.sets)) > 1:
        figures |= set_figures(gallery, validation, queries, metric)
    if triples := triple_figures(chosen, scored, metric):
        figures["triples"] = triples
    return figures, pairs


def joined_parts(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the figures of data sets that are joined, by a note on their size if there is one."""
    sizes = figures.get("sizes")
    return {f", {size} pixels": sizes[size] for size in sizes} if sizes else {"": figures}


def require_sklearn() -> None:
    """Check that scikit-learn is installed.

    Raises:
        CommandError: it isn't. The message says what to do.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise CommandError(
            "evaluation needs scikit-learn, which comes with the extra packages of "
            "pg_siamese[train]"
        ) from None


def draw_pairs(embedded: Embedded, labels: str, metric: str, seed: int) -> tuple[Floats, Flags]:
    """Draw pairs, half of which match: return their distances and whether they match.

    ``labels`` says what matches: two images of one ``class``, or of one ``set``.
    """
    asked = embedded.by_set() if labels == "set" else embedded
    return pair_distances(asked, PAIRS, seed, metric)


def stated_figures(
    gallery: Embedded,
    queries: Embedded,
    calibration: Calibration,
    *,
    names: Sequence[str],
    labels: str,
    metric: str,
    seed: int,
) -> dict[str, Any]:
    """Return the figures that a model's file and its card state of one split.

    A query's own group is no neighbour. Sets in whose gallery it is have figures with it, too:
    ``as_published``.

    Args:
        gallery: embeddings of the train split.
        queries: embeddings of the split.
        calibration: what pairs are judged by.
        names: names of the data sets.
        labels: what matches, ``class`` or ``set``.
        metric: ``cosine`` or ``l2``.
        seed: seed of the experiment.
    """
    pairs = score_pairs(*draw_pairs(queries, labels, metric, seed + SCORING_SEED), calibration)
    retrieved = retrieval_by_set(gallery, queries, names, metric, labels)
    sharing = {
        name
        for number, name in enumerate(names)
        if gallery.of_set(number).shares_groups(queries.of_set(number))
    }
    published = (
        retrieval_by_set(gallery, queries, names, metric, labels, own_group=True) if sharing else {}
    )
    return {
        "retrieval": {name: score.as_dict() for name, score in retrieved.items()},
        "as_published": {
            name: score.as_dict() for name, score in published.items() if name in sharing
        },
        "right_set": round(right_set(gallery, queries, metric), 3),
        "pairs": {key: round(value, 4) for key, value in asdict(pairs).items()},
    }


def normalised(embedded: Embedded) -> bool:
    """Return whether the encoder gives unit vectors."""
    lengths = np.linalg.norm(embedded.vectors, axis=1)
    return bool(np.abs(lengths - 1).max() < 1e-3)


def _calibration(model: EvaluatedModel, validation: Embedded) -> Calibration:
    """Return the model's own calibration, as the database uses it, completed from validation."""
    spec = model.spec
    if spec.weight is not None and spec.bias is not None and spec.threshold is not None:
        return Calibration(spec.weight, spec.bias, spec.threshold)
    fitted = _fitted(validation, model.metric)
    if spec.weight is not None and spec.bias is not None:
        fitted = replace(fitted, weight=spec.weight, bias=spec.bias)
    return replace(fitted, threshold=spec.threshold) if spec.threshold is not None else fitted


def _fitted(validation: Embedded, metric: str) -> Calibration:
    return calibrate(*draw_pairs(validation, "class", metric, CHOOSING_SEED))


def pair_figures(pairs: tuple[Floats, Flags], calibration: Calibration) -> dict[str, Any]:
    """Return accuracy, losses, area under the ROC curve, and the report for match and no match."""
    apart, match = pairs
    return {
        "count": len(match),
        "threshold": calibration.threshold,
        **asdict(score_pairs(apart, match, calibration)),
        "report": class_report(match, apart <= calibration.threshold, ("no match", "match")),
    }


def set_figures(
    gallery: Embedded, validation: Embedded, queries: Embedded, metric: str
) -> dict[str, Any]:
    """Answer which set an image is of: ``right_set``, and pairs that match if both are of one set.

    Pairs are judged by their distance, with a calibration fitted on validation pairs. They are also
    judged (``accuracy_by_neighbour``) by whether the nearest gallery images of the two are of one
    set.
    """
    labelled = queries.by_set()
    first, second, match = balanced_pairs(
        labelled.labels, labelled.sets, PAIRS, SCORING_SEED, labelled.groups
    )
    apart = distances(queries.vectors[first], queries.vectors[second], metric)
    guessed = nearest_sets(gallery, queries, metric)
    agree = (guessed[first] == guessed[second]) == match
    return {
        "right_set": 100 * float((guessed == queries.sets).mean()),
        "set_pairs": {
            **pair_figures((apart, match), _fitted(validation.by_set(), metric)),
            "accuracy_by_neighbour": float(agree.mean()),
        },
    }


def triple_figures(validation: Embedded, queries: Embedded, metric: str) -> dict[str, Any] | None:
    """Answer whether at least two of three match.

    Returns:
        The figures, None if there are fewer than three labels.
    """
    if len(np.unique(validation.labels)) < 3 or len(np.unique(queries.labels)) < 3:
        return None
    threshold = best_threshold(*triple_distances(validation, TRIPLES, CHOOSING_SEED, metric))
    least, match = triple_distances(queries, TRIPLES, SCORING_SEED, metric)
    return {
        "count": len(match),
        "threshold": threshold,
        "accuracy": float(((least <= threshold) == match).mean()),
        "report": class_report(match, least <= threshold, ("no two match", "two match")),
    }


def neighbour_scores(labels: Integers, wanted: Integers) -> dict[str, Any]:
    """Return each query's part (Q,) in the figures of neighbours' labels (Q, 10).

    ``wanted`` are the queries' labels (Q,).
    """
    return {
        "retrieval": retrieval_scores(labels[:, :5], wanted),
        "precision_at_10": precision_at(labels, wanted, NEIGHBOURS),
        "knn_accuracy": {
            str(k): (votes(labels, k) == wanted).astype(np.float64) for k in (1, 5, NEIGHBOURS)
        },
    }


def means(scores: Any) -> Any:
    """Return the means of scores in dictionaries, in the same form."""
    if isinstance(scores, dict):
        return {key: means(item) for key, item in scores.items()}
    return float(scores.mean())


def class_report(
    wanted: Integers | Flags, given: Integers | Flags, classes: Sequence[str]
) -> dict[str, Any]:
    """Return precision, recall, F1 and support of each class, and their plain means."""
    from sklearn.metrics import classification_report

    report: dict[str, Any] = classification_report(
        wanted.astype(np.int64),
        given.astype(np.int64),
        labels=range(len(classes)),
        target_names=list(classes),
        output_dict=True,
        zero_division=0,
    )
    rows = {name: report[name] for name in (*classes, "macro avg")}
    return {
        name: {
            "precision": float(row["precision"]),
            "recall": float(row["recall"]),
            "f1": float(row["f1-score"]),
            "support": int(row["support"]),
        }
        for name, row in rows.items()
    }
