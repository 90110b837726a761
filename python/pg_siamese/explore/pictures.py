"""Images as the page shows them: decoded, made smaller, and encoded again as PNG.

The bytes of a table's image never reach the browser as they are, whatever they claim to be.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from PIL import Image
from psycopg import RawCursor, sql

from pg_siamese.client.contact_sheet import SMALL_IMAGE
from pg_siamese.explore.failures import PageError
from pg_siamese.explore.tables import Table
from pg_siamese_server.encoding import drawing, windows
from pg_siamese_server.encoding.images import FORMATS, TIFF_HEADERS, render_image
from pg_siamese_server.encoding.kinds import supported
from pg_siamese_server.encoding.specification import InputSpec

MOST_SIDE, MOST_FRAMES = 2048, 1_000_000
# Enough of a file for its size in pixels.
HEAD_BYTES = 16 * 1024
BLANK = 200  # grey
# The limits of Pillow are those of the process, and decoding sets them to the collection's.
_decoding = threading.Lock()


@dataclass(frozen=True)
class Look:
    """How an image is shown.

    Attributes:
        side: most pixels of the longer side.
        frame: number of the frame, from 1, or 0 for the representative one.
        window: ``CENTER/WIDTH``, a preset for CT, or nothing for the image's own.
    """

    side: int = 160
    frame: int = 0
    window: str = ""


@dataclass(frozen=True)
class Size:
    """Size of an image. Pixels are None if the head of the file does not say them."""

    bytes: int
    width: int | None = None
    height: int | None = None

    @property
    def is_small(self) -> bool:
        """Whether blocks are clearer than a blur when the image is enlarged."""
        return max(self.width or SMALL_IMAGE, self.height or SMALL_IMAGE) < SMALL_IMAGE

    def __str__(self) -> str:
        """Return both in words."""
        kilobytes = f"{max(1, round(self.bytes / 1000)):,} kB"
        return f"{self.width} x {self.height}, {kilobytes}" if self.width else kilobytes


@dataclass(frozen=True)
class Facts:
    """What an image file says of itself.

    Attributes:
        kind: format, such as PNG.
        size: in bytes and pixels.
        is_deep: whether it has more than 8 bits per sample, so that a window makes sense.
        frames: how many.
        window: centre and width of the window that is shown first.
    """

    kind: str
    size: Size
    is_deep: bool
    frames: int
    window: tuple[float, float]


def read_image(connection: psycopg.Connection[Any], table: Table, key: str) -> bytes:
    """Read a stored image with the rights of the role.

    Raises:
        PageError: there is none, or it is larger than the collection allows.
    """
    statement = sql.SQL(
        "SELECT CASE WHEN pg_catalog.octet_length({image}) <= $1 THEN {image} END,"
        " pg_catalog.octet_length({image}) FROM {relation} WHERE {key} = $2::text::{type}"
    ).format(image=table.image, relation=table.relation, key=table.key, type=table.key_type)
    # With the placeholders of the server, since names can hold those of psycopg.
    with RawCursor(connection) as cursor:
        row = cursor.execute(statement, (table.spec.max_bytes, key), binary=True).fetchone()
    if row is None or row[1] is None:
        raise PageError(404, "There is no such image, or your role may not see it.")
    if row[0] is None:
        raise PageError(400, f"The image has {row[1]:,} bytes, more than the collection allows.")
    return bytes(row[0])


def pixels_of(data: bytes, spec: InputSpec, look: Look) -> NDArray[np.uint8]:
    """Decode an image for the page: uint8 (H, W, 3).

    Args:
        data: an image file.
        spec: limits, and how to show what the file leaves open.
        look: what to show of it.

    Raises:
        ImageError: the server would refuse the file.
        SiameseError: the window is not valid.
    """
    if look.window:
        spec = _windowed(data, spec, look.window)
    with _decoding:
        return render_image(data, look.side, look.frame, spec=spec)


def picture(data: bytes, spec: InputSpec, look: Look) -> bytes:
    """Return an image as PNG. The errors are those of ``pixels_of``."""
    return drawing.png_file(Image.fromarray(pixels_of(data, spec, look)))


def blank(side: int) -> NDArray[np.uint8]:
    """Return what takes the place of an image that can't be shown: uint8 (side, side, 3)."""
    return np.full((side, side, 3), BLANK, np.uint8)


def sizes(
    connection: psycopg.Connection[Any], table: Table, keys: Sequence[str]
) -> Mapping[str, Size]:
    """Return the sizes of stored images by key, from the head of each file."""
    statement = sql.SQL(
        "SELECT {key}::text, pg_catalog.octet_length({image}),"
        " pg_catalog.substr({image}, 1, {head}) FROM {relation}"
        " WHERE {key} = ANY ({keys}::text[]::{type}[]) AND {image} IS NOT NULL"
    ).format(
        key=table.key,
        image=table.image,
        head=sql.Literal(HEAD_BYTES),
        relation=table.relation,
        keys=sql.Literal(list(keys)),
        type=table.key_type,
    )
    rows = connection.execute(statement, binary=True)
    return {key: Size(count, *(_pixels(bytes(head)) or ())) for key, count, head in rows}


def facts(data: bytes, tags: Mapping[str, Any] | None) -> Facts:
    """Return what an image file says of itself. ``tags`` are those of a DICOM file, or None."""
    kind = supported(data) or "unknown"
    if tags is not None:
        stored = int(tags.get("BitsStored") or 8)
        size = Size(len(data), tags.get("Columns"), tags.get("Rows"))
        centre, width = (_first(tags.get(name)) for name in ("WindowCenter", "WindowWidth"))
        own = (centre, width) if centre is not None and width else (2.0**stored / 2, 2.0**stored)
        return Facts(kind, size, stored > 8, int(tags.get("NumberOfFrames") or 1), own)
    pixels = _pixels(data)
    return Facts(kind, Size(len(data), *(pixels or ())), _is_deep(data), 1, (32768.0, 65536.0))


def _windowed(data: bytes, spec: InputSpec, window: str) -> InputSpec:
    given = windows.parse(window)
    if supported(data) == "DICOM":
        return replace(spec, dicom_window=window)
    if not isinstance(given, windows.Fixed) or given.is_preset:
        raise PageError(400, "This image has no such window. Give its center and width.")
    half = given.width / 2
    return replace(spec, input_range=(given.centre - half, given.centre + half))


def _first(value: Any) -> float | None:
    found = value[0] if isinstance(value, list) and value else value
    return float(found) if isinstance(found, int | float) else None


def _pixels(head: bytes) -> tuple[int, int] | None:
    """Return width and height, if the head of a file has them."""
    try:
        if supported(head) == "DICOM":
            return _dicom_pixels(head)
        with Image.open(io.BytesIO(head), formats=FORMATS) as image:
            return image.size
    except Exception:  # Pillow and pydicom raise whatever their parsers meet in half a file.
        return None


def _dicom_pixels(head: bytes) -> tuple[int, int] | None:
    import pydicom

    names = ["Rows", "Columns"]
    elements = pydicom.dcmread(
        io.BytesIO(head), force=True, stop_before_pixels=True, specific_tags=names
    )
    return int(elements.Columns), int(elements.Rows)


def _is_deep(data: bytes) -> bool:
    if data[:4] == b"\x89PNG":
        return data[24:25] == b"\x10"
    if data[:4] not in TIFF_HEADERS:
        return False
    try:
        with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
            bits = image.tag_v2.get(258, (1,))  # type: ignore[attr-defined]
    except Exception:  # as above
        return False
    return any(count > 8 for count in (bits if isinstance(bits, tuple) else (bits,)))
