"""From the bytes of an image file to the pixels that an encoder takes.

This is the only decode path of the project: training, clients and the server all call
:func:`decode_image`, so that the same file gives the same pixels everywhere.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pg_siamese_server.errors import (
    NULL_VALUE_NOT_ALLOWED,
    PROGRAM_LIMIT_EXCEEDED,
    ImageError,
    ModelError,
)

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")
RESIZE_MODES = ("stretch", "crop", "pad")
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Pixels under an alpha channel are arbitrary; on white is how a viewer shows them.
BACKGROUND = (255, 255, 255, 255)

# A smaller file is decoded in a few milliseconds: not worth a look at interrupts at each read.
POLL_FROM_BYTES = 16 * 1024
# Resampling takes memory and time by the length of a side: 1.5 GB for 1 x 25,000,000 pixels.
MAX_SIDE = 65_535
# Each scan of a JPEG goes over the whole picture, however few bytes it has; cameras and tools write
# a dozen at most.
MAX_JPEG_SCANS = 100
MANY_JPEG_SCANS = 16
MANY_SCANS_BLOCK = 512
# All text and profiles of a PNG together, unpacked. Pillow's own limit is 64 MB.
MAX_PNG_TEXT_BYTES = 4 * 1024 * 1024
TIFF_TILE_WIDTH, TIFF_TILE_LENGTH = 322, 323


@dataclass(frozen=True)
class InputSpec:
    """What an encoder takes, and the limits that untrusted image files must keep.

    Attributes:
        width, height: pixels of the encoder's input.
        channels: 3 (RGB) or 1 (luma).
        resize: ``stretch`` to the size, ``crop`` (short side to the size, then the centre) or
            ``pad`` (long side to the size, black borders).
        interpolation: one of ``nearest``, ``bilinear``, ``bicubic``, ``lanczos`` (Pillow's filters,
            with antialiasing).
        max_bytes: largest file.
        max_pixels: largest width x height of a file.
    """

    width: int
    height: int
    channels: int = 3
    resize: str = "stretch"
    interpolation: str = "bicubic"
    max_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 25_000_000

    def __post_init__(self) -> None:
        """Check each field; raises ModelError."""
        for name in ("width", "height", "channels", "max_bytes", "max_pixels"):
            if type(getattr(self, name)) is not int:
                raise ModelError(f"{name} of the encoder input is not an integer")
        if not (1 <= self.width <= 4096 and 1 <= self.height <= 4096):
            raise ModelError(
                f"encoder input of {self.width} x {self.height} pixels is out of range",
                detail="Width and height must be between 1 and 4096.",
            )
        if self.channels not in (1, 3):
            raise ModelError(f"encoder input of {self.channels} channels is not supported")
        if self.resize not in RESIZE_MODES:
            raise ModelError(
                f'unknown resize mode "{self.resize}"',
                hint=f"Use one of {', '.join(RESIZE_MODES)}.",
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ModelError(
                f'unknown interpolation "{self.interpolation}"',
                hint=f"Use one of {', '.join(INTERPOLATIONS)}.",
            )
        if self.max_bytes < 1 or self.max_pixels < 1:
            raise ModelError("max_bytes and max_pixels must be positive")

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> InputSpec:
        """Make a specification from a JSON object, ignoring keys that aren't its own."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: item for name, item in value.items() if name in names})

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that :meth:`from_json` takes."""
        return asdict(self)


class _PolledFile(io.BytesIO):
    """A file in memory that calls back at each read: a long decode can be left in the middle."""

    def __init__(self, data: bytes, poll: Callable[[], None]) -> None:
        super().__init__(data)
        self._poll = poll

    def read(self, size: int | None = -1, /) -> bytes:
        self._poll()
        return super().read(size)


def decode_image(
    data: bytes | None, spec: InputSpec, poll: Callable[[], None] | None = None
) -> NDArray[np.uint8]:
    """Decode an image file and bring it to the encoder's size.

    PNG, JPEG, TIFF, BMP, WebP and GIF (first frame or page); EXIF orientation is applied; 16-bit
    grey is scaled from its full range; alpha is composited on white; CMYK and palettes are
    converted.

    Args:
        data: the bytes of the file.
        spec: size, channels, resize mode and limits.
        poll: called while reading, may raise to leave.

    Returns:
        uint8 array of shape (height, width, channels), C-contiguous.

    Raises:
        ImageError: no data, over a limit, not an allowed format, or damaged.
    """
    if data is None:
        raise ImageError("image is null", sqlstate=NULL_VALUE_NOT_ALLOWED)
    if not data:
        raise ImageError("image is empty")
    if len(data) > spec.max_bytes:
        raise ImageError(
            f"image file of {len(data)} bytes is too large",
            sqlstate=PROGRAM_LIMIT_EXCEEDED,
            detail=f"The model's limit is {spec.max_bytes} bytes.",
        )
    scans = _jpeg_scans(data)
    large = len(data) >= POLL_FROM_BYTES or scans > MANY_JPEG_SCANS
    try:
        with warnings.catch_warnings(), _pillow_limits(spec):
            warnings.simplefilter("ignore")  # odd metadata; the pixels are what counts
            stream = _PolledFile(data, poll) if poll and large else io.BytesIO(data)
            with Image.open(stream, formats=FORMATS) as image:
                _check_size(image, spec)
                if scans > MANY_JPEG_SCANS:
                    image.decodermaxblock = MANY_SCANS_BLOCK
                return _to_array(image, spec, poll)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(
            "image is too large",
            sqlstate=PROGRAM_LIMIT_EXCEEDED,
            detail=f"The model's limit is {spec.max_pixels} pixels.",
        ) from None
    except MemoryError:
        raise ImageError(
            "image does not fit into memory", sqlstate=PROGRAM_LIMIT_EXCEEDED
        ) from None
    except Exception as error:
        # Pillow's plugins raise whatever their parsers meet; PostgreSQL's own errors (a cancel
        # during poll) must pass untouched.
        if _is_database_error(error):
            raise
        raise ImageError(
            "image cannot be decoded",
            detail=_reason(error),
            hint=f"Formats: {', '.join(FORMATS)}.",
        ) from None


def _is_database_error(error: Exception) -> bool:
    return hasattr(error, "sqlstate") or type(error).__module__ in ("plpy", "plpy.spiexceptions")


def _reason(error: Exception) -> str:
    text = str(error).split("<_io")[0].split("<pg_siamese")[0].strip() or type(error).__name__
    return f"{text[:1].upper()}{text[1:200].rstrip('.')}."


@contextmanager
def _pillow_limits(spec: InputSpec) -> Iterator[None]:
    """Hold Pillow to the model's limits where it allocates before it tells a size (GIF, WebP)."""
    from PIL import PngImagePlugin  # Pillow loads it with the first image anyway

    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_MEMORY
    Image.MAX_IMAGE_PIXELS = max(1, spec.max_pixels // 2)  # Pillow refuses twice this
    PngImagePlugin.MAX_TEXT_MEMORY = MAX_PNG_TEXT_BYTES
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_MEMORY = before


def _jpeg_scans(data: bytes) -> int:
    """Count the scans of a JPEG file, and refuse very many; 0 for other formats."""
    if data[:2] != b"\xff\xd8":
        return 0
    scans = data.count(b"\xff\xda")
    if scans > MAX_JPEG_SCANS:
        raise ImageError(
            f"JPEG image has {scans} scans",
            sqlstate=PROGRAM_LIMIT_EXCEEDED,
            detail=f"The limit is {MAX_JPEG_SCANS}.",
        )
    return scans


def _check_size(image: Image.Image, spec: InputSpec) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"image of {width} x {height} pixels has no content")
    if width * height > spec.max_pixels or max(width, height) > MAX_SIDE:
        raise ImageError(
            f"image of {width} x {height} pixels is too large",
            sqlstate=PROGRAM_LIMIT_EXCEEDED,
            detail=f"The model's limit is {spec.max_pixels} pixels, {MAX_SIDE} on a side.",
        )
    tags = getattr(image, "tag_v2", {})
    if tags.get(TIFF_TILE_WIDTH, 1) * tags.get(TIFF_TILE_LENGTH, 1) > spec.max_pixels:
        raise ImageError(
            "image has tiles that are too large",
            sqlstate=PROGRAM_LIMIT_EXCEEDED,
            detail=f"The model's limit is {spec.max_pixels} pixels.",
        )


def _to_array(
    image: Image.Image, spec: InputSpec, poll: Callable[[], None] | None
) -> NDArray[np.uint8]:
    poll = poll or _no_poll
    image.load()
    poll()
    oriented = ImageOps.exif_transpose(_to_eight_bits(image))
    poll()
    converted = _convert(oriented, "RGB" if spec.channels == 3 else "L")
    poll()
    resized = _resize(converted, spec)
    pixels = np.asarray(resized, dtype=np.uint8)
    return np.ascontiguousarray(pixels.reshape(spec.height, spec.width, spec.channels))


def _no_poll() -> None:
    pass


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion would clip it."""
    mode = image.mode
    if mode.startswith("I;16"):
        # Pillow reads big-endian files into native or big-endian modes; numpy knows which.
        values = np.asarray(image).astype(np.uint16)
    elif mode == "I" and image.format == "PNG":
        values = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
    elif mode in ("I", "F"):
        raise ImageError(
            "image with 32 bits a pixel has no defined range",
            hint="Store it with 8 or 16 bits a channel.",
        )
    else:
        return image
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = 65535  # white, as BACKGROUND
    scaled = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    exif = image.getexif()
    if exif:
        scaled.info["exif"] = exif.tobytes()
    return scaled


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, BACKGROUND), layers)
    return image.convert(mode)


def _resize(image: Image.Image, spec: InputSpec) -> Image.Image:
    target = (spec.width, spec.height)
    if image.size == target:
        return image
    method = INTERPOLATIONS[spec.interpolation]
    if spec.resize == "crop":
        return ImageOps.fit(image, target, method=method)
    if spec.resize == "pad":
        # Not ImageOps.pad, which lets a side of less than half a pixel vanish, and all with it.
        factor = min(spec.width / image.width, spec.height / image.height)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        padded = Image.new(image.mode, target)
        place = (round((spec.width - size[0]) * 0.5), round((spec.height - size[1]) * 0.5))
        padded.paste(image.resize(size, method), place)
        return padded
    return image.resize(target, method)
