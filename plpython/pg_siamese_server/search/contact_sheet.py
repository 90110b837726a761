"""Draw stored images on a contact sheet, as the invoker sees them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from pg_siamese_server import interrupts
from pg_siamese_server.catalog import Collection, stored_image
from pg_siamese_server.encoding import models
from pg_siamese_server.encoding.contact_sheet import Sheet
from pg_siamese_server.encoding.images import render_image
from pg_siamese_server.errors import (
    NO_DATA_FOUND,
    NULL_VALUE_NOT_ALLOWED,
    PROGRAM_LIMIT_EXCEEDED,
    SiameseError,
    counted,
)

MAX_IMAGES = 500
MAX_COLUMNS = 100
# What a marked cell says.
REASONS = {
    NO_DATA_FOUND: "not found",
    NULL_VALUE_NOT_ALLOWED: "no image",
    PROGRAM_LIMIT_EXCEEDED: "too large",
}


def contact_sheet(
    plpy: Any,
    collection: Collection,
    keys: Sequence[Any],
    captions: Sequence[str | None],
    frames: Sequence[int | None],
    columns: int,
    side: int,
) -> bytes:
    """Draw the images of some rows, in the order of their keys.

    A row that can't be shown has a marked cell. Images are read and drawn one at a time.

    Args:
        plpy: PL/Python's module.
        collection: of the rows. Its limits and its window hold.
        keys: of the rows, at least one.
        captions: as many, or none to write the keys.
        frames: as many, or none to draw the representative frames.
        columns: images per line, at most.
        side: pixels of an image's longer side.

    Returns:
        A PNG file.
    """
    if len(keys) > MAX_IMAGES:
        raise SiameseError(
            f"contact_sheet takes at most {MAX_IMAGES} keys", sqlstate=PROGRAM_LIMIT_EXCEEDED
        )
    if not 1 <= columns <= MAX_COLUMNS:
        raise SiameseError(f"columns must be between 1 and {MAX_COLUMNS}")
    for name, values in (("captions", captions), ("frames", frames)):
        if values and len(values) != len(keys):
            given = counted(len(values), "element")
            raise SiameseError(f"{name} has {given}, but keys has {len(keys)}")
    spec = models.spec(plpy, collection.model_id).input.within(collection.limits)
    poll = partial(interrupts.check, plpy)
    sheet = Sheet(["" if text is None else str(text) for text in captions or keys], columns, side)
    for place, key in enumerate(keys):
        poll()
        frame = frames[place] if frames else None
        try:
            image = stored_image(plpy, collection, key, spec.max_bytes)
            pixels = render_image(image, side, frame or 0, spec=spec, poll=poll)
        except SiameseError as error:
            sheet.mark(place, REASONS.get(error.sqlstate, "not readable"))
        else:
            sheet.draw(place, pixels)
    return sheet.file(poll)
