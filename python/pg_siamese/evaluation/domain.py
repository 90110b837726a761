"""What an encoder is calibrated for: fitting the domain to its images, and counting errors."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pg_siamese.datasets import DataNotFoundError, open_dataset
from pg_siamese.evaluation.retrieval import Vectors, distances, nearest
from pg_siamese_server import vectors
from pg_siamese_server.encoding.domain import Domain
from pg_siamese_server.encoding.images import decode_image
from pg_siamese_server.encoding.specification import InputSpec, ModelSpec

Pixels = npt.NDArray[np.uint8]

# Chosen for the shipped encoders by their validation images and some kinds of others: see
# docs/training.md.
MOST_CENTRES = 32
MOST_DIRECTIONS = 32
IMAGES_PER_CENTRE = 20
# A ball's size is the distance within which so many of its images lie. All balls are then widened
# by one factor, so that this share of the validation images is inside.
SPREAD = 0.95
ACCEPTED = 0.99
# Of every other kind that is tried, at most so many.
OUTSIDE_IMAGES = 1000
GENERATED_IMAGES = 100
_PAGE = (700, 900)
_WORDS = (
    *("the", "and", "of", "to", "in", "is", "for", "was", "with", "that", "from", "this", "not"),
    *("patient", "results", "figure", "table", "method", "report", "date", "number", "analysis"),
)


def fit_domain(train: Vectors, validation: Vectors, metric: str, seed: int = 0) -> Domain:
    """Fit a domain to an encoder's embeddings of train and validation images, each (count, d).

    The centres are those of k-means, so that the kinds of images need no names. The directions are
    the principal ones in which images differ from their centres.
    """
    from sklearn.cluster import KMeans

    known = vectors.prepare(train, metric).astype(np.float64)
    enough = max(1, len(known) // IMAGES_PER_CENTRE)
    count = min(MOST_CENTRES, enough, len(np.unique(known, axis=0)))
    found = KMeans(count, n_init=3, random_state=seed).fit(known)
    scale = float(np.abs(found.cluster_centers_).max()) / 127 or 1.0
    centres = np.rint(found.cluster_centers_ / scale).astype(np.int8)
    axes, shrink = _directions(known - centres[found.labels_] * scale, enough)

    def ball(limits: npt.NDArray[np.float64]) -> Domain:
        rounded = tuple(float(f"{limit:.6g}") for limit in limits)
        return Domain(centres.tobytes(), scale, rounded, axes.tobytes(), shrink)

    unit = ball(np.ones(count))
    squares = unit.squares(known)
    spread = np.array(
        [np.quantile(squares[found.labels_ == own, own], SPREAD) for own in range(count)]
    )
    # Not below what 8 bits make of a centre.
    spread = np.maximum(spread, known.shape[1] * (scale / 2) ** 2)
    held_out = vectors.prepare(validation, metric)
    factor = float(np.quantile((unit.squares(held_out) / spread).min(axis=1), ACCEPTED))
    # Nor below what holds the train images, however few validation images there are.
    return ball(spread * max(factor, 1.0))


def _directions(
    differences: npt.NDArray[np.float64], most: int
) -> tuple[npt.NDArray[np.int8], tuple[float, ...]]:
    """Return the principal directions (rank, d), and how much to shrink along each of them.

    Along them a length then counts in units of its own deviation, along all others in units of
    their common one (probabilistic principal components: Tipping and Bishop 1999).
    """
    dimension = differences.shape[1]
    variances, axes = np.linalg.eigh(differences.T @ differences / len(differences))
    rank = min(MOST_DIRECTIONS, most, dimension - 1)
    rest = max(variances[: dimension - rank].mean(), 1e-3 * variances.mean())
    if rest <= 0:
        rank = 0
    chosen = axes[:, dimension - rank :].T
    ratio = np.maximum(variances[dimension - rank :] / rest, 1.0)
    shrink = tuple(float(f"{part:.6g}") for part in 1 - 1 / np.sqrt(ratio))
    return np.rint(chosen * 127).astype(np.int8), shrink


def refused(domain: Domain, embedded: Vectors, metric: str) -> float:
    """Return the share of embedded images that are outside, in per cent."""
    inside = domain.contains(vectors.prepare(embedded, metric))
    return round(100 * float((~inside).mean()), 1)


def domain_errors(
    domain: Domain,
    metric: str,
    known: Mapping[str, Mapping[str, Vectors]],
    others: Mapping[str, Vectors],
) -> dict[str, Any]:
    """Return the errors of a domain in per cent: what it wrongly refuses and wrongly accepts.

    Args:
        domain: the domain.
        metric: the encoder's metric.
        known: embeddings by split and data set.
        others: embeddings of other kinds of images.
    """
    return {
        "refused": {
            split: {name: refused(domain, found, metric) for name, found in sets.items()}
            for split, sets in known.items()
        },
        "accepted": {
            name: round(100 - refused(domain, found, metric), 1) for name, found in others.items()
        },
    }


def false_matches(
    spec: ModelSpec, threshold: float, gallery: Vectors, others: Mapping[str, Vectors]
) -> dict[str, dict[str, float]]:
    """Count images of other kinds that match an image of the gallery, in per cent.

    Of each kind:

    - ``accepted``: inside the domain. All are if the encoder has none.
    - ``near``: the nearest gallery image is within ``threshold``.
    - ``false_match``: both.

    Args:
        spec: the encoder's metric and domain.
        threshold: distance up to which two images count as a match.
        gallery: embeddings of all that is searched, (G, d).
        others: embeddings of other kinds of images.
    """
    figures: dict[str, dict[str, float]] = {}
    for name, found in others.items():
        inside = spec.is_inside(vectors.prepare(found, spec.metric))
        closest = gallery[nearest(found, gallery, 1, spec.metric)[:, 0]]
        near = distances(found, closest, spec.metric) <= threshold
        figures[name] = {
            "images": len(found),
            "accepted": 100 * float(inside.mean()),
            "near": 100 * float(near.mean()),
            "false_match": 100 * float((inside & near).mean()),
        }
    return figures


def other_images(
    specs: Sequence[str], size: InputSpec, say: Callable[[str], object] = print
) -> Iterator[tuple[str, Pixels]]:
    """Yield kinds of images that an encoder does not know: names and uint8 pixels (N, H, W, 3).

    Generated ones come first: pages of text, noise, plain colours. Then come the test splits of the
    data sets that ``specs`` name. Those that are not available are left out, with a line.
    """
    random = np.random.default_rng(0)
    shape = (GENERATED_IMAGES, size.height, size.width, 3)
    yield "pages of text", np.stack([_page(random, size) for _ in range(GENERATED_IMAGES)])
    yield "noise", random.integers(0, 256, shape, np.uint8)
    colours = random.integers(0, 256, (GENERATED_IMAGES, 1, 1, 3), np.uint8)
    yield "plain colours", np.broadcast_to(colours, shape).copy()
    for spec in specs:
        try:
            found = open_dataset(spec, input_spec=size).test
        except DataNotFoundError as error:
            say(f"left out: {error}")
            continue
        step = max(1, len(found) // OUTSIDE_IMAGES)
        yield found.name, found.select(slice(0, step * OUTSIDE_IMAGES, step)).rgb()


def _page(random: np.random.Generator, size: InputSpec) -> Pixels:
    """Draw a page of text, black on white, of a font size and margins of its own."""
    points, margin = int(random.integers(12, 36)), int(random.integers(20, 90))
    text = textwrap.wrap(
        " ".join(random.choice(_WORDS, 800)), (_PAGE[0] - 2 * margin) * 2 // points
    )
    text = text[: (_PAGE[1] - 2 * margin) * 3 // (4 * points)]
    # Paragraphs.
    lines = [line if random.random() > 0.07 else "" for line in text]
    page = Image.new("L", _PAGE, 255)
    font = ImageFont.load_default(points)
    ImageDraw.Draw(page).multiline_text((margin, margin), "\n".join(lines), 0, font)
    file = io.BytesIO()
    page.save(file, "BMP")
    return decode_image(file.getvalue(), size)
