"""Show which parts of an image make it similar to another one, given or stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from pg_siamese_server import interrupts
from pg_siamese_server.catalog import Collection, stored_image
from pg_siamese_server.encoding import models
from pg_siamese_server.errors import SiameseError
from pg_siamese_server.limits import MODELS_OWN

LEAST_MASKS, MOST_MASKS = 20, 5_000
LEAST_SIDE, MOST_SIDE = 64, 1_024


@dataclass(frozen=True)
class Picture:
    """An image file, or the key of a stored one, and which of its frames, as in ``Request``."""

    image: bytes | None
    key: int | str | None
    frame: int


def similarity_map(
    plpy: Any,
    query: Picture,
    neighbour: Picture,
    collection: Collection | None,
    model_id: int,
    masks: int,
    side: int,
    legend: bool,
) -> bytes:
    """Draw the query, and how much farther from its neighbour it is without each of its parts.

    Args:
        plpy: PL/Python's module.
        query: the picture that is drawn.
        neighbour: what it is compared with.
        collection: that stored images are in. Its limits hold for all images.
        model_id: of the encoder.
        masks: how many versions of the query to embed, at most.
        side: pixels of the longer side.
        legend: whether to say below what the colours mean.

    Returns:
        A PNG file.
    """
    for name, value, least, most in (
        ("masks", masks, LEAST_MASKS, MOST_MASKS),
        ("side", side, LEAST_SIDE, MOST_SIDE),
    ):
        if not least <= value <= most:
            raise SiameseError(f"{name} must be between {least} and {most}")
    from pg_siamese_server.encoding import heat_map, occlusion
    from pg_siamese_server.encoding.images import decode_image, render_image

    limits = MODELS_OWN if collection is None else collection.limits
    spec = models.spec(plpy, model_id).input.within(limits)
    poll = partial(interrupts.check, plpy)
    file = _file(plpy, query, collection, spec.max_bytes)
    compared = _file(plpy, neighbour, collection, spec.max_bytes)
    other = models.embed(plpy, model_id, [compared], limits, frame=neighbour.frame)
    encoder = models.encoder(plpy, model_id)
    pixels = decode_image(file, spec, poll, query.frame)
    heat = occlusion.effects(encoder, pixels, other, masks, poll)
    shown = render_image(file, side, query.frame, spec=spec, poll=poll)
    return heat_map.draw(shown, heat, spec, side, legend=legend)


def _file(
    plpy: Any, picture: Picture, collection: Collection | None, max_bytes: int
) -> bytes | None:
    """Return the image file. That of a stored image is read as the invoker."""
    if collection is None or picture.key is None:
        return picture.image
    return stored_image(plpy, collection, picture.key, max_bytes)
