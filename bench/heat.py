"""Check similarity maps: what it costs to delete the hot tenth of a query, or a random tenth."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench import data
from bench.report import Bar, Line
from bench.timing import Summary
from pg_siamese.datasets import (
    DataNotFoundError,
    LabelledImages,
    load_fashion_mnist,
    load_medical,
)
from pg_siamese.evaluation.deletion import Deletion, delete, same_class_pairs
from pg_siamese.evaluation.model import model_pixels, open_model
from tools.project import ROOT

SECTION = "similarity maps: {}"
MEDICAL = ROOT / "models" / "medical.onnx"
MASKS = 125
HOT_WINS = "hot tenth costs more than a random one, {}"
HOT, RANDOM = "distance gained without the hot tenth, {}", "without a random tenth, {}"
MORE = "distance gained by a hot tenth more than by a random one, {}"
TIME = "pair: map, and what is deleted"
# Images of a set to draw from.
MOST = 5_000


def measure(count: int) -> list[Line]:
    """Delete parts of ``count`` queries per encoder, with another image of the same class each."""
    lines: list[Line] = []
    for model, sets in _sets():
        random = np.random.default_rng(0)
        found, seconds = [], []
        opened = open_model(model)
        for number, images in enumerate(sets):
            some = images.select(random.permutation(len(images))[:MOST])
            share = count * (number + 1) // len(sets) - count * number // len(sets)
            pixels = model_pixels(some, opened.spec)
            for pair in same_class_pairs(pixels, some.labels, share, random):
                began = time.perf_counter()
                found.append(delete(opened.encoder, *pair, MASKS, random))
                seconds.append(time.perf_counter() - began)
        section = SECTION.format(model.stem)
        names = ", ".join(images.name for images in sets)
        lines += _lines(section, found, f"{count} pairs of {names}, {MASKS} masks")
        lines.append(Line(section, TIME, Summary.of(seconds)))
    return lines


def _sets() -> Iterator[tuple[Path, list[LabelledImages]]]:
    """Yield encoders, each with images that it was not trained on, if there are any."""
    yield data.MODEL, [load_fashion_mnist("train")]
    try:
        found = load_medical(["val"], download=False)
    except DataNotFoundError:
        return
    yield MEDICAL, [parts["val"] for parts in found.values()]


def _lines(section: str, found: list[Deletion], note: str) -> Iterator[Line]:
    for way in Deletion._fields:
        hot, random = np.array([getattr(each, way) for each in found]).T
        wins = round(100 * float(np.mean(hot > random)), 1)
        yield Line(section, HOT_WINS.format(way), value=wins, unit="% of pairs", note=note)
        for name, values in ((HOT, hot), (RANDOM, random)):
            mean = round(float(values.mean()), 5)
            yield Line(section, name.format(way), value=mean, unit="", note="mean")


def bars(lines: list[Line]) -> list[Bar]:
    """Return the promises on these figures."""
    found = {(line.section, line.name): line.figure() for line in lines}
    kept = []
    for section in dict.fromkeys(line.section for line in lines):
        for way in Deletion._fields:
            more = found[section, HOT.format(way)] - found[section, RANDOM.format(way)]
            kept.append(Bar(f"{section}: {MORE.format(way)}", round(more, 5), 0))
            wins = found[section, HOT_WINS.format(way)]
            kept.append(Bar(f"{section}: {HOT_WINS.format(way)}", wins, 50, "% of pairs"))
    return kept
