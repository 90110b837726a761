"""Measure searches by several examples on validation images: how many of the first ten are right.

``python -m bench.examples models/medical.onnx`` prints the table in docs/examples.md. Liked ones
are validation images of one class. Unliked ones are what an analyst would mark: the nearest train
images of other classes, which every search here leaves out. The formulas are the server's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pg_siamese.evaluation.model import data_specs, embed_joined, open_data, open_model
from pg_siamese.evaluation.retrieval import Embedded, each_set
from pg_siamese_server import vectors
from pg_siamese_server.search.queries import best_scores, moved_mean, nearest_distances
from pg_siamese_server.search.request import BEST, MEAN, STRATEGIES, Points

COUNTS = (1, 3, 5)
PENALTIES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
SEARCHES, FIRST = 200, 10
Figures = dict[tuple[str, float, int], float]


def measure(gallery: Embedded, queries: Embedded, metric: str, seed: int = 0) -> Figures:
    """Return the share of the first rows with the liked class, in per cent.

    Figures are by strategy, penalty and number of examples of either kind. Without a penalty, none
    is unliked.
    """
    generator = np.random.default_rng(seed)
    stored = vectors.prepare(gallery.vectors, metric)
    found: Figures = {}
    for count in COUNTS:
        shares: dict[tuple[str, float], list[float]] = {}
        for liked, label in _liked(queries, metric, count, generator):
            near = nearest_distances(liked, stored, metric, _no_poll)
            wrong = np.flatnonzero(gallery.labels != label)
            unliked = wrong[np.argsort(near[wrong], kind="stable")[:count]]
            far = nearest_distances(stored[unliked], stored, metric, _no_poll)
            for penalty in PENALTIES:
                points = Points(liked, stored[unliked] if penalty else liked[:0], penalty)
                query = vectors.prepare(moved_mean(points), metric)
                for strategy, scores in (
                    (MEAN, vectors.squared_distances(stored, query).astype(np.float64)),
                    (BEST, best_scores(near, far, penalty)),
                ):
                    scores[unliked] = np.inf
                    first = np.argsort(scores, kind="stable")[:FIRST]
                    share = float((gallery.labels[first] == label).mean())
                    shares.setdefault((strategy, penalty), []).append(share)
        found |= {(*key, count): 100 * float(np.mean(values)) for key, values in shares.items()}
    return found


def _liked(
    queries: Embedded, metric: str, count: int, generator: np.random.Generator
) -> Iterator[tuple[NDArray[np.float32], int]]:
    """Draw examples of one class each, which is that of an image drawn at random."""
    prepared = vectors.prepare(queries.vectors, metric)
    numbers = np.bincount(queries.labels)
    labels = queries.labels[numbers[queries.labels] >= count]
    for label in generator.choice(labels, SEARCHES).tolist():
        of_class = np.flatnonzero(queries.labels == label)
        yield prepared[generator.choice(of_class, count, replace=False)], label


def _no_poll() -> None:
    """Nothing interrupts a script."""


def table(figures: dict[str, Figures]) -> str:
    """Return a Markdown table of sets and their mean, one line per strategy and penalty."""
    heads = [f"{name}: {count}" for name in figures for count in COUNTS] + ["mean"]
    lines = [f"| | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for strategy in STRATEGIES:
        for penalty in PENALTIES:
            values = [own[strategy, penalty, count] for own in figures.values() for count in COUNTS]
            kind = f"penalty {penalty:g}" if penalty else "without `unlike`"
            cells = " | ".join(f"{value:.1f}" for value in (*values, np.mean(values)))
            lines.append(f"| `{strategy}`, {kind} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table of an encoder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    model = open_model(parser.parse_args().model)
    data = open_data(model, data_specs(model), "val")
    gallery = embed_joined(model, [part.train for part in data])
    queries = embed_joined(model, [part.val for part in data])
    names = [part.name for part in data]
    print(
        table(
            {
                name: measure(stored, asked, model.spec.metric)
                for name, stored, asked in each_set(gallery, queries, names)
            }
        )
    )


if __name__ == "__main__":
    main()
