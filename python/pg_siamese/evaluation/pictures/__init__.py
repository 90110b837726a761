"""The pictures of an evaluation: which ones apply, and what is in them.

Nothing is chosen by hand: queries are the first images of each data set or class, triplets are
drawn with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pg_siamese.client.contact_sheet import Neighbour, SheetRow, draw_sheet
from pg_siamese.datasets import LabelledImages, join_labels
from pg_siamese.evaluation.figures import VOTERS, Evaluation, joined_parts
from pg_siamese.evaluation.pictures.collages import (
    Shown,
    Triplet,
    neighbour_collage,
    triplet_collage,
)
from pg_siamese.evaluation.pictures.curves import (
    change_curves,
    curves,
    read_epochs,
    reliability_curve,
    roc,
)
from pg_siamese.evaluation.pictures.matrices import Confusion, confusion, confusion_matrices
from pg_siamese.evaluation.pictures.scatter import animate, read_snapshots, scatter
from pg_siamese.evaluation.pictures.style import save
from pg_siamese.evaluation.retrieval import Integers, distances, neighbours, votes

SHEET_QUERIES = 4
SHEET_NEIGHBOURS = 4
TEN_QUERIES = 5
TEN = 10
TRIPLETS = 6
TRIPLET_SEED = 0
# Imagenette's folders are named by WordNet's numbers.
CLASS_TITLES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


def write_pictures(evaluations: Sequence[Evaluation], folder: Path) -> Iterator[Path]:
    """Write the pictures that apply into ``folder``, as EXPERIMENT-what.png, and yield their paths.

    The curves have a line for every model, from ``metrics.json`` in its folder. All others show the
    first model.

    Raises:
        CommandError: a file of the run is broken.
        OSError: a file can't be read or written.
    """
    first = evaluations[0]
    name = first.model.experiment
    shown = _Shown(first)
    runs = [e for evaluation in evaluations if (e := read_epochs(evaluation.model.path.parent))]
    drawn = curves(runs, f"{name}: training") if runs else None
    if drawn is not None:
        yield save(drawn, folder / f"{name}-curves.png")
    yield save(
        draw_sheet(shown.sheet_rows(), f"{name}: a query and its four nearest"),
        folder / f"{name}-neighbours.png",
        dpi=100,
    )
    joined = next(iter(joined_parts(first.figures).values()))
    threshold = float(joined["pairs"]["threshold"])
    yield save(
        triplet_collage(shown.triplets(), threshold, f"{name}: triplets of {first.split} images"),
        folder / f"{name}-triplets.png",
    )
    yield save(
        neighbour_collage(shown.found(TEN_QUERIES, TEN), f"{name}: the ten nearest"),
        folder / f"{name}-ten-nearest.png",
    )
    yield save(
        confusion_matrices(shown.confusions(), f"{name}: confusion matrix,\nper cent of a class"),
        folder / f"{name}-confusion.png",
    )
    kind = "of one data set" if first.model.labels == "set" else "of one class"
    yield save(
        roc(first.pairs, threshold, f"{name}:\nare two images {kind}?"), folder / f"{name}-roc.png"
    )
    if reliability := joined.get("reliability"):
        drawn = reliability_curve(reliability, f"{name}:\nis the match probability right?")
        yield save(drawn, folder / f"{name}-reliability.png")
    if changes := first.figures.get("robustness"):
        drawn = change_curves(changes, f"{name}: changed {first.split} images")
        yield save(drawn, folder / f"{name}-robustness.png")
    if first.queries.vectors.shape[1] == 2:
        classes = [title for part in first.data for title in _titles(part.train)]
        count = len(first.queries.labels)
        title = f"{name}: {count:,} {first.split} images in two dimensions"
        figure = scatter(first.queries.vectors, first.queries.labels, classes, title)
        yield save(figure, folder / f"{name}-scatter.png")
        if snapshots := read_snapshots(first.model.path.parent):
            title = f"{name}: how the embedding forms"
            yield animate(snapshots, classes, title, folder / f"{name}-forming.gif")


def _title(name: str) -> str:
    return CLASS_TITLES.get(name, name)


def _titles(part: LabelledImages) -> list[str]:
    return [_title(name) for name in part.classes]


class _Shown:
    """Images of an evaluation with their labels, by their place in the joined data sets."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.metric = evaluation.model.metric
        self.by_set = evaluation.model.labels == "set"
        self.gallery = [part.train for part in evaluation.data]
        self.queries = [getattr(part, evaluation.split) for part in evaluation.data]

    def image(self, parts: Sequence[LabelledImages], place: int, distance: float = 0.0) -> Shown:
        """Return the image at a place of the joined splits."""
        for part in parts:
            if place < len(part):
                return Shown(part.images[place], self.label(part, place), distance)
            place -= len(part)
        raise IndexError(place)

    def label(self, part: LabelledImages, place: int) -> str:
        """Return what makes images match: the set, or the class (and of which set)."""
        if self.by_set:
            return part.name
        name = _title(part.class_of(place))
        return name if len(self.gallery) == 1 else f"{part.name}: {name}"

    def places(self, count: int) -> list[int]:
        """Return the first query of each data set, or of each class if there is one set."""
        queries = self.evaluation.queries
        groups = queries.sets if len(self.gallery) > 1 else queries.labels
        first = {int(groups[place]): place for place in range(len(groups) - 1, -1, -1)}
        return [first[group] for group in sorted(first)][:count]

    def found(self, count: int, k: int) -> list[tuple[Shown, list[Shown]]]:
        """Return queries and their k nearest in the joined gallery."""
        gallery, queries = self.evaluation.gallery, self.evaluation.queries
        rows = []
        places = self.places(count)
        near = neighbours(gallery, queries.select(np.array(places)), k, self.metric)
        for place, found in zip(places, near, strict=True):
            repeated = np.repeat(queries.vectors[place][None], len(found), axis=0)
            apart = distances(repeated, gallery.vectors[found], self.metric)
            shown = [
                self.image(self.gallery, int(n), float(d))
                for n, d in zip(found, apart, strict=True)
            ]
            rows.append((self.image(self.queries, place), shown))
        return rows

    def sheet_rows(self) -> list[SheetRow]:
        """Return queries and their four nearest, for a contact sheet."""
        spec = self.evaluation.model.spec
        return [
            SheetRow(
                name=f"{self.evaluation.split} image: {query.label}",
                pixels=query.pixels,
                label=query.label,
                neighbours=[
                    Neighbour(n.pixels, n.label, n.distance, spec.match_probability(n.distance))
                    for n in neighbours
                ],
            )
            for query, neighbours in self.found(SHEET_QUERIES, SHEET_NEIGHBOURS)
        ]

    def triplets(self) -> list[Triplet]:
        """Return triplets of the split: anchors of different labels, the rest at random."""
        queries = self.evaluation.queries
        labels = queries.sets if self.by_set else queries.labels
        random = np.random.default_rng(TRIPLET_SEED)
        known = [int(v) for v in np.unique(labels) if (labels == v).sum() > 1]
        order = random.permutation(known)
        triplets = []
        for number in range(TRIPLETS):
            label = order[number % len(order)]
            anchor, positive = random.choice(np.flatnonzero(labels == label), 2, replace=False)
            negative = random.choice(np.flatnonzero(labels != label))
            repeated = np.repeat(queries.vectors[anchor][None], 2, axis=0)
            apart = distances(repeated, queries.vectors[[positive, negative]], self.metric)
            triplets.append(
                Triplet(
                    self.image(self.queries, int(anchor)),
                    self.image(self.queries, int(positive), float(apart[0])),
                    self.image(self.queries, int(negative), float(apart[1])),
                )
            )
        return triplets

    def confusions(self) -> list[Confusion]:
        """Return the confusions of the classes within each data set, or of the sets."""
        gallery, queries = self.evaluation.gallery, self.evaluation.queries
        names = [part.name for part in self.gallery]
        if self.by_set:
            near = neighbours(gallery, queries, VOTERS, self.metric)
            given = votes(gallery.sets[near], VOTERS)
            return [confusion("data sets", names, queries.sets, given)]
        parts = []
        for number, start in enumerate(join_labels(self.gallery).starts):
            part = self.gallery[number]
            own_gallery, own_queries = gallery.of_set(number), queries.of_set(number)
            labels: Integers = own_gallery.labels[self.evaluation.found[part.name]] - start
            parts.append(
                confusion(
                    part.name, _titles(part), own_queries.labels - start, votes(labels, VOTERS)
                )
            )
        return parts
