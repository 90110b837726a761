"""From the bytes of an image file to the pixels that an encoder takes.

This is the only decode path of the project: training, clients and the server all call
:func:`decode_image`, so that the same file gives the same pixels everywhere.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
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
POLL_FROM_BYTES = 256 * 1024

# Sizes are checked here, against the limits of the model, before anything is allocated.
Image.MAX_IMAGE_PIXELS = None


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
    size = _webp_size(data)
    if size is not None:
        _check_size(size, spec)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata; the pixels are what counts
            polled = poll if len(data) >= POLL_FROM_BYTES else None
            stream = _PolledFile(data, polled) if polled else io.BytesIO(data)
            with Image.open(stream, formats=FORMATS) as image:
                _check_size(image.size, spec)
                return _to_array(image, spec)
    except ImageError:
        raise
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


def _check_size(size: tuple[int, int], spec: InputSpec) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"image of {width} x {height} pixels has no content")
    if width * height > spec.max_pixels:
        raise ImageError(
            f"image of {width} x {height} pixels is too large",
            sqlstate=PROGRAM_LIMIT_EXCEEDED,
            detail=f"The model's limit is {spec.max_pixels} pixels.",
        )


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Read the canvas size of a WebP file, whose decoder allocates before Pillow tells the size."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if kind == b"VP8X":
        return (
            1 + int.from_bytes(body[4:7], "little"),
            1 + int.from_bytes(body[7:10], "little"),
        )
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", body[6:10])
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + ((bits >> 14) & 0x3FFF)
    return None


def _to_array(image: Image.Image, spec: InputSpec) -> NDArray[np.uint8]:
    oriented = ImageOps.exif_transpose(_to_eight_bits(image))
    converted = _convert(oriented, "RGB" if spec.channels == 3 else "L")
    resized = _resize(converted, spec)
    pixels = np.asarray(resized, dtype=np.uint8)
    return np.ascontiguousarray(pixels.reshape(spec.height, spec.width, spec.channels))


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
    scaled = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    scaled.info.update(image.info)
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
        return ImageOps.pad(image, target, method=method)
    return image.resize(target, method)
