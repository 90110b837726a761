"""Copies planted among the pictures of clothes, and how many of them near_duplicates finds."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench import data
from bench.build import vacuum
from bench.report import Bar, Line
from bench.session import Session, connect
from pg_siamese.client.sources import png
from tools.cluster import Cluster

SECTION = "near-duplicates"
KINDS = ("encoded", "resized", "brightness", "cropped", "mirrored")
PROMISED = KINDS[:3]
PRECISION, TIME = "precision", "near_duplicates"
REPEATS = "repeats of the set itself"
# Two originals are one picture if, brightness and contrast fitted, they differ by no more than this
# at full size: root mean square, in grey levels.
REPEATED = 8.0
THREADS = 2


def planted(picture: NDArray[np.uint8], kind: str, generator: np.random.Generator) -> bytes:
    """Return a copy of a picture as an image file.

    JPEG has a quality of 50 to 95, sizes are 0.5 to 1.5 times as large, brightness is 0.8 to 1.2
    times as high. Crops leave out a twentieth of each side.
    """
    image = Image.fromarray(picture)
    width, height = image.size
    file = io.BytesIO()
    if kind == "encoded":
        image.save(file, "JPEG", quality=int(generator.integers(50, 96)))
        return file.getvalue()
    if kind == "resized":
        factor = generator.uniform(0.5, 1.5)
        size = round(width * factor), round(height * factor)
        image = image.resize(size, Image.Resampling.BICUBIC)
    elif kind == "brightness":
        factor = generator.uniform(0.8, 1.2)
        image = image.point(lambda value: min(255, round(value * factor)))
    elif kind == "cropped":
        left, top = generator.uniform(0, 0.05, 2)
        box = left * width, top * height, (left + 0.95) * width, (top + 0.95) * height
        size = round(0.95 * width), round(0.95 * height)
        image = image.resize(size, Image.Resampling.BICUBIC, box)
    else:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image.save(file, "PNG")
    return file.getvalue()


def duplicates(cluster: Cluster, rows: int, copies: int) -> list[Line]:
    """Store pictures and copies of some, and look for these."""
    pictures = data.fashion_mnist(rows)
    generator = np.random.default_rng(0)
    chosen = generator.choice(rows, copies, replace=False)
    kinds = [KINDS[number % len(KINDS)] for number in range(copies)]
    files = [png(picture) for picture in pictures]
    files += [
        planted(pictures[place], kind, generator)
        for place, kind in zip(chosen.tolist(), kinds, strict=True)
    ]
    data.register(cluster)
    data.create_table(cluster, "pictures", embed="sync", model="fashion_mnist")
    with Session(cluster.dsn()) as session:
        data.insert(session, "bench.pictures", files)
        session.run("SELECT siamese.build_index('pictures')")
    vacuum(cluster)
    with Session(cluster.dsn()) as session:
        call = f"siamese.near_duplicates('pictures', threads => {THREADS})"
        seconds = session.timed(f"SELECT count(*) FROM {call}")
    # Which original a key (from 1) is a picture of.
    origin = np.concatenate([np.arange(rows), chosen])
    note = f"{len(files):,} images, {THREADS} threads"
    lines = [Line(SECTION, TIME, value=round(seconds, 1), unit="s", note=note)]
    lines += _figures(cluster, pictures, origin, kinds, rows, mirrored=False)
    mirrored = _figures(cluster, pictures, origin, kinds, rows, mirrored=True)
    return [
        *lines,
        *(
            Line(SECTION, f"{one.name}, with mirrored", value=one.value, unit="%")
            for one in mirrored
        ),
    ]


def _figures(
    cluster: Cluster,
    pictures: NDArray[np.uint8],
    origin: NDArray[np.int64],
    kinds: list[str],
    rows: int,
    *,
    mirrored: bool,
) -> list[Line]:
    """Return recall by kind, precision, and the share of real repeats, in per cent."""
    call = "siamese.near_duplicates('pictures', mirrored => %s, threads => %s)"
    with connect(cluster.dsn()) as reader:
        found = reader.execute(
            f"SELECT group_number, key::int - 1, representative::int - 1 FROM {call}",
            (mirrored, THREADS),
        ).fetchall()
    group_of = {key: group for group, key, _ in found}
    hits: Counter[str] = Counter()
    for number, kind in enumerate(kinds):
        own = group_of.get(rows + number)
        hits[kind] += own is not None and own == group_of.get(int(origin[rows + number]))
    pairs = [(origin[key], origin[first]) for _, key, first in found if key != first]
    others = [(one, other) for one, other in pairs if one != other]
    repeats = sum(_is_repeated(pictures[one], pictures[other]) for one, other in others)
    wrong = len(others) - repeats
    lines = [
        Line(SECTION, f"recall: {kind}", value=100 * hits[kind] / kinds.count(kind), unit="%")
        for kind in KINDS
    ]
    precision = 100 * (1 - wrong / max(1, len(pairs)))
    note = f"{len(pairs):,} reported, {wrong:,} wrong"
    lines.append(Line(SECTION, PRECISION, value=precision, unit="%", note=note))
    note = f"{repeats:,} pairs of originals"
    share = 100 * repeats / max(1, len(pairs))
    return [*lines, Line(SECTION, REPEATS, value=share, unit="%", note=note)]


def _is_repeated(one: NDArray[Any], other: NDArray[Any]) -> bool:
    first, second = (picture.astype(np.float64).ravel() for picture in (one, other))
    correlation = np.corrcoef(first, second)[0, 1]
    contrast = max(first.std(), second.std())
    return bool(contrast * np.sqrt(max(0.0, 1 - correlation**2)) <= REPEATED)


def bars(lines: list[Line]) -> list[Bar]:
    """Return the promises on these figures."""
    by_name = {line.name: line.figure() for line in lines}
    return [
        *(Bar(f"recall: {kind}", by_name[f"recall: {kind}"], 99, "%") for kind in PROMISED),
        Bar(PRECISION, by_name[PRECISION], 99, "%"),
    ]
