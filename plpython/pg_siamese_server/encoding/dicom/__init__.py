"""DICOM files as images: guarded reading, single frames, the standard's grey scale pipeline."""

from __future__ import annotations

from PIL import Image

from pg_siamese_server.encoding.dicom import frames, rendering
from pg_siamese_server.encoding.dicom.file import File
from pg_siamese_server.encoding.dicom.file import read as read
from pg_siamese_server.encoding.dicom.frames import choose as choose
from pg_siamese_server.encoding.opened import Opened, Poll, check_size
from pg_siamese_server.encoding.specification import InputSpec


def decode(file: File, frame: int, spec: InputSpec, poll: Poll, *, keeps_shape: bool) -> Opened:
    """Render one frame of a DICOM file to 8 bits per sample.

    Args:
        file: as ``read`` returns it.
        frame: index of the frame, from 0.
        spec: limits, resize mode, and the range of files without a window.
        poll: called between steps. May raise to leave.
        keeps_shape: whether pixels that are not square matter, whatever the resize mode.

    Raises:
        ImageError: over a limit or damaged.
    """
    poll()
    pixels = frames.decode(file, frame)
    poll()
    picture = Image.fromarray(rendering.render(file, frame, pixels, spec))
    if keeps_shape or spec.resize != "stretch":
        picture = _with_square_pixels(picture, rendering.aspect(file, frame), spec)
    profile = file.value("ICCProfile") if picture.mode == "RGB" else None
    return Opened(picture, 1, profile)


def _with_square_pixels(picture: Image.Image, aspect: float, spec: InputSpec) -> Image.Image:
    """Widen or heighten a picture whose pixels are ``aspect`` times as high as wide."""
    if aspect == 1:
        return picture
    width, height = picture.size
    size = (width, round(height * aspect)) if aspect > 1 else (round(width / aspect), height)
    check_size(*size, spec)
    return picture.resize(size, Image.Resampling.BILINEAR)
