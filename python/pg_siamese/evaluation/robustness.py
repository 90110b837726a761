"""How far embeddings move, and whether neighbours stay, if pictures are changed.

Brightness, contrast, JPEG compression, blur and noise are those of MedMNIST-C (Di Salvo, Doerrich
and Ledig, arXiv 2406.17536), with the severities of its chest X-rays for all sets. Turns, shifts
and zoom are not in MedMNIST-C. Their severities were set here.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from pg_siamese.datasets import DataSplits, LabelledImages, open_dataset
from pg_siamese.datasets.base import Pixels
from pg_siamese.evaluation.figures import Evaluation
from pg_siamese.evaluation.model import FILE_KINDS, Advance, EvaluatedModel, embed_images
from pg_siamese.evaluation.retrieval import Integers, distances, neighbours, retrieval

SEED = 0
SEVERITIES = range(1, 6)
# MedMNIST-C changes pictures of this size. Files are changed at no less.
SIDE = 224
# Pixels repeated around a picture, as a share of its longer side: no move shows what lies beyond.
MARGIN = 0.25


def _brightness(image: Image.Image, factor: float, random: np.random.Generator) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def _contrast(image: Image.Image, factor: float, random: np.random.Generator) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def _jpeg(image: Image.Image, quality: float, random: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(quality))
    return Image.open(file)


def _blur(image: Image.Image, sigma: float, random: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(sigma * min(image.size) / SIDE))


def _noise(image: Image.Image, deviation: float, random: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image)
    noise = random.normal(0, 255 * deviation, pixels.shape)
    return Image.fromarray(np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8))


def _turn(image: Image.Image, degrees: float, random: np.random.Generator) -> Image.Image:
    return _moved(image, turn=math.radians(degrees) * random.choice((-1, 1)))


def _shift(image: Image.Image, share: float, random: np.random.Generator) -> Image.Image:
    angle = random.uniform(0, 2 * math.pi)
    along = share * image.width * math.cos(angle), share * image.height * math.sin(angle)
    return _moved(image, along=along)


def _zoom(image: Image.Image, factor: float, random: np.random.Generator) -> Image.Image:
    return _moved(image, zoom=factor ** random.choice((-1, 1)))


def _moved(
    image: Image.Image,
    turn: float = 0.0,
    along: tuple[float, float] = (0.0, 0.0),
    zoom: float = 1.0,
) -> Image.Image:
    """Turn and zoom around the centre, and shift by pixels. The picture's edge is repeated."""
    pixels = np.asarray(image)
    margin = math.ceil(MARGIN * max(image.size))
    around = [(margin, margin)] * 2 + [(0, 0)] * (pixels.ndim - 2)
    padded = Image.fromarray(np.pad(pixels, around, mode="edge"))
    cosine, sine = math.cos(turn) / zoom, math.sin(turn) / zoom
    x, y = image.width / 2, image.height / 2
    # Where in the padded picture each pixel of the new one comes from.
    places = (
        *(cosine, -sine, margin + x - cosine * x + sine * y - along[0]),
        *(sine, cosine, margin + y - sine * x - cosine * y - along[1]),
    )
    return padded.transform(
        image.size, Image.Transform.AFFINE, places, resample=Image.Resampling.BICUBIC
    )


class Kind(NamedTuple):
    """A kind of change, with its amount at each severity."""

    change: Callable[[Image.Image, float, np.random.Generator], Image.Image]
    amounts: tuple[float, float, float, float, float]


KINDS = {
    "brightness_up": Kind(_brightness, (1.1, 1.2, 1.3, 1.4, 1.5)),
    "brightness_down": Kind(_brightness, (0.9, 0.8, 0.7, 0.6, 0.5)),
    "contrast_up": Kind(_contrast, (1.1, 1.2, 1.3, 1.4, 1.6)),
    "contrast_down": Kind(_contrast, (0.9, 0.8, 0.7, 0.6, 0.4)),
    "jpeg_compression": Kind(_jpeg, (50, 30, 15, 10, 7)),  # quality
    # Sigma in pixels of a side of 224. MedMNIST-C states kernels of 3 to 11 pixels.
    "gaussian_blur": Kind(_blur, (0.8, 1.1, 1.4, 1.7, 2.0)),
    "gaussian_noise": Kind(_noise, (0.04, 0.08, 0.12, 0.18, 0.26)),  # of white
    "turn": Kind(_turn, (2, 4, 6, 8, 10)),  # degrees, to either side
    "shift": Kind(_shift, (0.02, 0.04, 0.06, 0.08, 0.10)),  # of the side, in any direction
    "zoom": Kind(_zoom, (1.04, 1.08, 1.12, 1.16, 1.20)),  # in or out
}


def changed(images: Pixels, kind: str, severity: int) -> Pixels:
    """Change each of the images (N, H, W) or (N, H, W, 3).

    An image has the same direction, or pattern of noise, at each severity.

    Args:
        images: uint8 pixels.
        kind: a key of ``KINDS``.
        severity: from 1, the least, to 5.
    """
    change, amounts = KINDS[kind]
    amount = amounts[severity - 1]
    return np.stack(
        [
            np.asarray(change(Image.fromarray(image), amount, np.random.default_rng((SEED, place))))
            for place, image in enumerate(images)
        ]
    )


def embedded_images(data: Sequence[DataSplits], split: str, most: int) -> int:
    """Return how many images ``robustness`` embeds."""
    queries = sum(min(most, len(getattr(part, split))) for part in data)
    return queries * (1 + len(KINDS) * len(SEVERITIES))


def robustness(
    evaluation: Evaluation, most: int, advance: Advance = lambda count: None
) -> dict[str, Any]:
    """Change queries of each data set in every way, and compare them with the unchanged ones.

    Of each kind and severity, and as the mean of all of them:

    - ``cosine``: mean cosine between the embeddings of the changed and the unchanged image.
    - ``same_neighbour``: share of queries whose nearest gallery image stays the same image.
    - ``same_class``: share of queries whose nearest gallery image keeps its class.
    - ``map5``: mAP@5 of the changed queries, in per cent.

    A query's own group is no neighbour.

    Args:
        evaluation: an evaluated model, with its gallery.
        most: number of queries of each data set. If there are more, they are drawn.
        advance: called with numbers of images.
    """
    figures = {}
    for number, part in enumerate(evaluation.data):
        model, gallery = evaluation.model, evaluation.gallery.of_set(number)
        queries = evaluation.queries.of_set(number)
        chosen = np.arange(len(queries.labels))
        if len(chosen) > most:
            chosen = np.sort(np.random.default_rng(SEED).choice(chosen, most, replace=False))
        queries = queries.select(chosen)
        images = _originals(model, part, evaluation.split).select(chosen)
        known = embed_images(model, images, advance)
        found = neighbours(gallery, replace(queries, vectors=known), 5, model.metric)
        changes: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in KINDS}
        for kind, by_severity in changes.items():
            for severity in SEVERITIES:
                pixels = changed(images.images, kind, severity)
                vectors = embed_images(model, replace(images, images=pixels), advance)
                again = neighbours(gallery, replace(queries, vectors=vectors), 5, model.metric)
                by_severity[str(severity)] = {
                    "cosine": float(1 - distances(vectors, known).mean()),
                    **_stayed(found[:, 0], again[:, 0], gallery.labels),
                    "map5": retrieval(gallery.labels[again], queries.labels).map5,
                }
        every = [figure for by_severity in changes.values() for figure in by_severity.values()]
        figures[part.name] = {
            "queries": len(chosen),
            "unchanged": {"map5": retrieval(gallery.labels[found], queries.labels).map5},
            "mean": {key: float(np.mean([each[key] for each in every])) for key in every[0]},
            "changes": changes,
        }
    return figures


def _stayed(first: Integers, again: Integers, labels: Integers) -> dict[str, float]:
    return {
        "same_neighbour": float((first == again).mean()),
        "same_class": float((labels[first] == labels[again]).mean()),
    }


def _originals(model: EvaluatedModel, part: DataSplits, split: str) -> LabelledImages:
    """Return the images to change: arrays as they are, those of files at 224 pixels or more."""
    size = model.spec.input
    factor = SIDE / min(size.width, size.height)
    if part.spec.partition(":")[0] not in FILE_KINDS or factor <= 1:
        found: LabelledImages = getattr(part, split)
    else:
        larger = replace(size, width=round(size.width * factor), height=round(size.height * factor))
        opened = open_dataset(part.spec, seed=model.seed, input_spec=larger)
        found = getattr(opened, split)
    return found
