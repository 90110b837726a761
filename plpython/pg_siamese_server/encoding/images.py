"""Turn the bytes of an image file into the pixels that an encoder takes.

This is the project's only decode path. Training, clients and the server all call ``decode_image``,
so that the same file gives the same pixels everywhere.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from pg_siamese_server.encoding.opened import (
    MAX_SIDE,
    Box,
    Opened,
    Poll,
    check_frame,
    check_size,
    damaged,
)
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import (
    NULL_VALUE_NOT_ALLOWED,
    PROGRAM_LIMIT_EXCEEDED,
    ImageError,
    ImageSizeError,
    check_bytes,
    is_database_error,
)

if TYPE_CHECKING:  # a session that meets no DICOM file loads no pydicom
    from pg_siamese_server.encoding.dicom.file import File
    from pg_siamese_server.encoding.regions import Region

_Result = TypeVar("_Result")
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
TIFF_HEADERS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Pixels under an alpha channel are arbitrary. A viewer shows them on white.
BACKGROUND = (255, 255, 255, 255)

# A smaller file is decoded in a few milliseconds, which is not worth a check at each read.
POLL_FROM_BYTES = 16 * 1024
# Each scan of a JPEG covers the whole picture, however few bytes it has. Cameras and tools
# write a dozen at most.
MAX_JPEG_SCANS = 100
MANY_JPEG_SCANS = 16
MANY_SCANS_BLOCK = 512
# All text and profiles of a PNG together, unpacked. Pillow's own limit is 64 MB.
MAX_PNG_TEXT_BYTES = 4 * 1024 * 1024
# JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that leaves this many times the encoder's
# sides. Resampling from there gives the same pixels to within 1 of 255 on average.
DRAFT_MARGIN = 3
EIGHT_BITS = frozenset(
    ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
)
# Each frame of a collection of all frames has a vector of its own.
MAX_FRAMES = 10_000
# Keys of Pillow's metadata that may hold an orientation.
ORIENTED_BY = frozenset(("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp"))
# How a viewer turns a picture of each EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _PolledFile(io.BytesIO):
    """A file in memory that calls back at each read, so that a long decode can be interrupted."""

    def __init__(self, data: bytes, poll: Callable[[], None]) -> None:
        super().__init__(data)
        self._poll = poll

    def read(self, size: int | None = -1, /) -> bytes:
        self._poll()
        return super().read(size)


@dataclass(frozen=True)
class Frames:
    """All frames of an image file.

    Attributes:
        count: how many.
        representative: number of the one that stands for the image, from 1.
        pixels: of each in turn, decoded when asked for, as ``decode_image`` returns them.
    """

    count: int
    representative: int
    pixels: Iterator[NDArray[np.uint8]]


def decode_image(
    data: bytes | None,
    spec: InputSpec,
    poll: Poll | None = None,
    frame: int = 0,
    region: Region | None = None,
) -> NDArray[np.uint8]:
    """Decode an image file and bring it to the encoder's size.

    It takes PNG, JPEG, TIFF, BMP, WebP and GIF (first frame, first full-size page). EXIF
    orientation is applied, and colour profiles are converted to sRGB. Samples of more than 8 bits
    are scaled, and alpha is composited on white. CMYK and palettes are converted.

    Args:
        data: the bytes of the file.
        spec: size, channels, resize mode and limits.
        poll: called while reading, may raise to stop.
        frame: number of a DICOM frame, from 1, or 0 for the representative one.
        region: the part to take of the upright image, as a viewer shows it, or None for all.

    Returns:
        uint8 array of shape (height, width, channels), C-contiguous.

    Raises:
        ImageError: no data, over a limit, not an allowed format, damaged, or a region that is not
            inside the image.
    """
    decoder = _Decoder(spec, poll, frame=frame, region=region)
    return _guarded(data, spec, decoder.run)


def decode_frames(data: bytes | None, spec: InputSpec, poll: Poll | None = None) -> Frames:
    """Decode all frames of an image file, one at a time.

    DICOM files can have several frames. Every other file has one, as ``decode_image`` shows it.

    Args:
        data: the bytes of the file.
        spec: size, channels, resize mode and limits.
        poll: called while reading, may raise to stop.

    Raises:
        ImageError: as for ``decode_image``, or too many frames.
    """
    decoder = _Decoder(spec, poll)
    file = _guarded(data, spec, decoder.dicom)
    if file is None:
        return Frames(1, 1, iter([decode_image(data, spec, poll)]))
    from pg_siamese_server.encoding import dicom

    count = file.frame_count
    if count > MAX_FRAMES:
        raise ImageError(
            f"DICOM image has {count} frames",
            sqlstate=PROGRAM_LIMIT_EXCEEDED,
            detail=f"The limit of a collection of all frames is {MAX_FRAMES}.",
            hint="Store parts of it, or use a collection of one frame per image.",
        )
    pixels = (
        _guarded(data, spec, partial(decoder.dicom_frame, file, frame)) for frame in range(count)
    )
    return Frames(count, dicom.choose(file) + 1, pixels)


def render_image(
    data: bytes | None,
    side: int,
    frame: int = 0,
    region: Region | None = None,
    spec: InputSpec | None = None,
    poll: Poll | None = None,
) -> NDArray[np.uint8]:
    """Decode an image file for display, as ``decode_image`` does, in its own proportions.

    Args:
        data: the bytes of the file.
        side: most pixels of the longer side.
        frame, region: as for ``decode_image``.
        spec: limits, and how to show what the file leaves open. Its size does not matter.
        poll: as for ``decode_image``.

    Returns:
        uint8 array of shape (height, width, 3), no larger than the picture itself.

    Raises:
        ImageError: as for ``decode_image``.
    """
    shown = InputSpec(side, side)
    if spec is not None:
        shown = replace(spec, width=side, height=side, channels=3)
    decoder = _Decoder(shown, poll, keeps_shape=True, frame=frame, region=region)
    return _guarded(data, shown, decoder.run)


def render_grey(
    data: bytes | None, spec: InputSpec, side: int, poll: Poll | None = None
) -> NDArray[np.uint8]:
    """Decode an image file in shades of grey, as ``decode_image`` does, in its own proportions.

    Args:
        data: the bytes of the file.
        spec: limits of the file.
        side: most pixels of the longer side.
        poll: as for ``decode_image``.

    Returns:
        uint8 array of shape (height, width), no larger than the picture itself.

    Raises:
        ImageError: as for ``decode_image``.
    """
    spec = replace(
        spec, width=side, height=side, channels=1, resize="stretch", interpolation="bilinear"
    )
    decoder = _Decoder(spec, poll, keeps_shape=True)
    return _guarded(data, spec, decoder.run)[:, :, 0]


def _guarded(data: bytes | None, spec: InputSpec, work: Callable[[bytes], _Result]) -> _Result:
    """Run a part of decoding within the limits, and return errors as ``ImageError``."""
    if data is None:
        raise ImageError("image is null", sqlstate=NULL_VALUE_NOT_ALLOWED)
    if not data:
        raise ImageError("image is empty", hint="Store the bytes of an image file, or NULL.")
    check_bytes(len(data), spec.max_bytes)
    try:
        with warnings.catch_warnings(), _pillow_limits(spec):
            warnings.simplefilter("ignore")  # odd metadata does not matter, only pixels do
            return work(data)
    except (ImageError, ImportError):  # a package that is missing is no fault of the image
        raise
    except Image.DecompressionBombError:
        raise _too_large(data, spec) from None
    except MemoryError:
        raise ImageError(
            "image does not fit into memory",
            sqlstate=PROGRAM_LIMIT_EXCEEDED,
            hint="Reduce the image.",
        ) from None
    except Exception as error:
        # Pillow's plugins raise whatever their parsers meet. PostgreSQL's own errors, such as a
        # cancel during poll, must pass unchanged.
        if is_database_error(error):
            raise
        raise _unreadable(data, error) from None


def _too_large(data: bytes, spec: InputSpec) -> ImageError:
    """Return the error of an image that Pillow refused to open for its size."""
    size: tuple[int, int] | None = None
    if data[:4] == b"GIF8":
        size = struct.unpack_from("<HH", data, 6)
    elif data[:4] == b"RIFF":
        from pg_siamese_server.encoding.metadata import webp_size

        size = webp_size(data)
    else:
        # Only the header of these is read.
        Image.MAX_IMAGE_PIXELS, before = None, Image.MAX_IMAGE_PIXELS
        try:
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "BMP")) as image:
                size = image.size
        finally:
            Image.MAX_IMAGE_PIXELS = before
    if size is None or size[0] * size[1] <= spec.max_pixels:
        return ImageSizeError(
            "image is too large", spec.max_pixels, MAX_SIDE
        )  # by what follows its header
    return ImageSizeError(
        f"image of {size[0]} x {size[1]} pixels is too large", spec.max_pixels, MAX_SIDE
    )


def _unreadable(data: bytes, error: Exception) -> ImageError:
    """Return an error that says what the bytes are and what to do."""
    from pg_siamese_server.encoding import kinds  # only errors need it

    name = kinds.supported(data)
    if name == "JPEG":
        return _bad_jpeg(data, _reason(error))
    if name is not None:
        return damaged(name, _reason(error))
    kind = kinds.recognise(data)
    if kind is not None:
        return ImageError(f"image cannot be decoded because it is {kind.name}", hint=kind.hint)
    return ImageError(
        "image cannot be decoded",
        detail=f"Its format is unknown. It begins with the bytes {data[:8].hex(' ')}.",
        hint=f"Formats: {', '.join((*FORMATS, 'DICOM'))}.",
    )


def _bad_jpeg(data: bytes, detail: str) -> ImageError:
    from pg_siamese_server.encoding import jpeg, kinds

    coding = jpeg.unsupported_coding(data)
    if coding is None:
        return damaged("JPEG", detail)
    return ImageError(f"JPEG image with {coding} is not supported", hint=kinds.CONVERT)


def _reason(error: Exception) -> str:
    text = str(error).split("<_io")[0].split("<pg_siamese")[0].strip() or type(error).__name__
    return f"{text[:1].upper()}{text[1:200].rstrip('.')}."


@contextmanager
def _pillow_limits(spec: InputSpec) -> Iterator[None]:
    """Apply the model's limits to Pillow, which allocates GIF and WebP before it tells a size."""

    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_MEMORY
    Image.MAX_IMAGE_PIXELS = max(1, spec.max_pixels // 2)  # Pillow refuses twice this
    PngImagePlugin.MAX_TEXT_MEMORY = MAX_PNG_TEXT_BYTES
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_MEMORY = before


def _jpeg_scans(data: bytes) -> int:
    """Count the scans of a JPEG file, and refuse too many. Return 0 for other formats."""
    if data[:2] != b"\xff\xd8":
        return 0
    scans = data.count(b"\xff\xda")
    if scans > MAX_JPEG_SCANS:
        raise ImageError(
            f"JPEG image has {scans} scans",
            sqlstate=PROGRAM_LIMIT_EXCEEDED,
            detail=f"The limit is {MAX_JPEG_SCANS}.",
            hint="Save it as a baseline JPEG.",
        )
    return scans


@dataclass(frozen=True)
class _Decoder:
    """One image on its way to the encoder's pixels."""

    spec: InputSpec
    poll_or_none: Poll | None
    keeps_shape: bool = False
    frame: int = 0
    region: Region | None = None

    def poll(self) -> None:
        if self.poll_or_none:
            self.poll_or_none()

    def run(self, data: bytes) -> NDArray[np.uint8]:
        try:
            opened = self.open(data)
        except (ImageError, ImportError, Image.DecompressionBombError, MemoryError):
            raise
        except Exception as error:
            if is_database_error(error):
                raise
            opened = self.open_bare(data, error)
        return self.finish(opened)

    def dicom(self, data: bytes) -> File | None:
        """Read a DICOM file up to its pixels. Return None for other formats."""
        if data[128:132] == b"DICM" or data[:1] in (b"\2", b"\x08"):
            from pg_siamese_server.encoding import kinds

            if kinds.supported(data) == "DICOM":
                from pg_siamese_server.encoding import dicom

                return dicom.read(data, self.spec, self.poll)
        return None

    def dicom_frame(self, file: File, frame: int, _: bytes) -> NDArray[np.uint8]:
        from pg_siamese_server.encoding import dicom

        return self.finish(
            dicom.decode(file, frame, self.spec, self.poll, keeps_shape=self.keeps_shape)
        )

    def open(self, data: bytes) -> Opened:
        file = self.dicom(data)
        if file is not None:
            from pg_siamese_server.encoding import dicom

            frame = dicom.choose(file, self.frame)
            # A region is counted in the square pixels of a viewer.
            keeps_shape = self.keeps_shape or self.region is not None
            return dicom.decode(file, frame, self.spec, self.poll, keeps_shape=keeps_shape)
        check_frame(self.frame, 1)
        if data[:4] in TIFF_HEADERS:
            from pg_siamese_server.encoding import tiff

            return tiff.decode(data, self.spec, self.poll)
        if data[:2] == b"\xff\xd8" and data[-2:] != b"\xff\xd9":
            data = self.ended(data)
        elif len(data) % 2 and data[:4] == b"RIFF":
            from pg_siamese_server.encoding.metadata import padded_webp

            data = padded_webp(data)
        with self.opened(data) as image:
            check_size(*image.size, self.spec)
            box = self.set_draft(image)
            loaded = self.load(image, data)
            info, turn = image.info, 1
            if not ORIENTED_BY.isdisjoint(info):
                from pg_siamese_server.encoding.metadata import orientation

                turn = orientation(info)
            return Opened(loaded, turn, info.get("icc_profile"), box)

    def open_bare(self, data: bytes, error: Exception) -> Opened:
        """Try again without metadata, which never makes good pixels bad."""
        from pg_siamese_server.encoding.metadata import without_metadata

        bare = without_metadata(data)
        if bare is None or len(bare[0]) == len(data):
            raise error
        try:
            return self.open(bare[0])._replace(orientation=bare[1])
        except ImageError:
            raise
        except Exception as second:
            raise (second if is_database_error(second) else error) from None

    def opened(self, data: bytes) -> Image.Image:
        scans = _jpeg_scans(data)
        large = len(data) >= POLL_FROM_BYTES or scans > MANY_JPEG_SCANS
        stream = _PolledFile(data, self.poll) if self.poll_or_none and large else io.BytesIO(data)
        image = Image.open(stream, formats=FORMATS)
        if scans > MANY_JPEG_SCANS:
            image.decodermaxblock = MANY_SCANS_BLOCK
        return image

    def set_draft(self, image: Image.Image) -> Box | None:
        """Let a large JPEG be decoded at a smaller size. Return the box of the picture in it."""
        side = self.least_side()
        if side is None or min(image.size) < 2 * side or not _is_jpeg(image):
            return None
        drafted = image.draft(None, (side, side))
        return None if drafted is None else drafted[1]

    def least_side(self) -> int | None:
        """Pixels that each side keeps if a picture is reduced before it is resampled."""
        # The first takes single pixels, not their surroundings. The second needs all of its own.
        if self.spec.interpolation == "nearest" or self.region is not None:
            return None
        return DRAFT_MARGIN * max(self.spec.width, self.spec.height)

    def load(self, image: Image.Image, data: bytes) -> Image.Image:
        if image.format == "PNG":
            return self.load_png(image, data)
        image.load()
        self.poll()
        if _is_jpeg(image):
            from pg_siamese_server.encoding import jpeg

            if jpeg.is_cut_off(image, data, self.plain):
                raise damaged("JPEG", "Part of the picture is missing.")
        elif image.mode not in EIGHT_BITS:
            raise ImageError(f"{image.format} image of mode {image.mode} is not supported")
        return image

    def load_png(self, image: Image.Image, data: bytes) -> Image.Image:
        from pg_siamese_server.encoding import png

        header = png.inspect(data)
        if header is not None and png.needs_samples(header, self.spec):
            return png.deep_image(data, header, self.spec, self.plain)
        image.load()
        self.poll()
        if header is not None:
            png.convert_transparency(image, header)
        return image

    def plain(self, data: bytes, rawmode: str | None = None) -> Image.Image:
        """Decode a file at its full size, and do nothing else to it."""
        with self.opened(data) as image:
            if rawmode is not None:
                image.tile = [tile._replace(args=rawmode) for tile in image.tile]  # type: ignore[attr-defined]
            image.load()
            self.poll()
            return image

    def ended(self, data: bytes) -> bytes:
        from pg_siamese_server.encoding import jpeg

        complete = jpeg.with_end_marker(data, self.plain)
        if complete is None:
            raise _bad_jpeg(data, "Part of the picture is missing.")
        return complete

    def finish(self, opened: Opened) -> NDArray[np.uint8]:
        image, spec = opened.image, self.spec
        box = opened.box or (0.0, 0.0, float(image.width), float(image.height))
        if opened.profile:
            from pg_siamese_server.encoding.colour import to_srgb

            image, factor = to_srgb(image, opened.profile, self.poll, self.least_side())
            left, top, right, bottom = box
            box = left / factor, top / factor, right / factor, bottom / factor
        turn = TURNS.get(opened.orientation)
        if turn is not None:
            box = _turn_box(box, image.size, turn)
            image = image.transpose(turn)
        if self.region is not None:
            image = image.crop(self.region.pixels(*image.size))
            box = (0.0, 0.0, float(image.width), float(image.height))
        if self.keeps_shape:
            sides = box[2] - box[0], box[3] - box[1]
            share = min(1.0, spec.width / max(sides))
            width, height = (max(1, round(side * share)) for side in sides)
            spec = replace(spec, width=width, height=height)
        self.poll()
        mode = "RGB" if spec.channels == 3 else "L"
        # Grey is resized as one channel, not as three equal ones.
        is_grey = image.mode == "L" and "transparency" not in image.info
        converted = _convert(image, "L" if is_grey else mode)
        self.poll()
        pixels = np.asarray(_convert(_resize(converted, box, spec), mode), dtype=np.uint8)
        return np.ascontiguousarray(pixels.reshape(spec.height, spec.width, spec.channels))


def _is_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO")


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        layers = image.convert("LA") if image.mode == "La" else image
        layers = layers.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, BACKGROUND), layers)
    return image.convert(mode)


def _turn_box(box: Box, size: tuple[int, int], turn: Image.Transpose) -> Box:
    width, height = size
    left, top, right, bottom = box
    ways = Image.Transpose
    if turn in (ways.FLIP_LEFT_RIGHT, ways.ROTATE_180, ways.TRANSVERSE, ways.ROTATE_90):
        left, right = width - right, width - left
    if turn in (ways.FLIP_TOP_BOTTOM, ways.ROTATE_180, ways.TRANSVERSE, ways.ROTATE_270):
        top, bottom = height - bottom, height - top
    if turn in (ways.TRANSPOSE, ways.TRANSVERSE, ways.ROTATE_90, ways.ROTATE_270):
        return top, left, bottom, right
    return left, top, right, bottom


def _resize(image: Image.Image, box: Box, spec: InputSpec) -> Image.Image:
    target = (spec.width, spec.height)
    if image.size == target:
        return image
    method = RESAMPLING[spec.interpolation]
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    if spec.resize == "crop":
        wide = spec.width / spec.height
        kept = min(width, height * wide), min(height, width / wide)
        left, top = left + (width - kept[0]) * 0.5, top + (height - kept[1]) * 0.5
        return image.resize(target, method, (left, top, left + kept[0], top + kept[1]))
    if spec.resize == "pad":
        # Not ImageOps.pad, which reduces a side of less than half a pixel to nothing.
        factor = min(spec.width / width, spec.height / height)
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        padded = Image.new(image.mode, target)
        place = (round((spec.width - size[0]) * 0.5), round((spec.height - size[1]) * 0.5))
        padded.paste(image.resize(size, method, box), place)
        return padded
    return image.resize(target, method, box)
