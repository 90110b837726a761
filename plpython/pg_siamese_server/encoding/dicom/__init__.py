"""DICOM files as images: guarded reading, one frame, the standard's grey scale pipeline."""

from __future__ import annotations

from PIL import Image

from pg_siamese_server.encoding.dicom import file, frames, rendering
from pg_siamese_server.encoding.opened import Opened, Poll, check_size
from pg_siamese_server.encoding.specification import InputSpec


def decode(data: bytes, spec: InputSpec, poll: Poll, *, keeps_shape: bool) -> Opened:
    """Render one frame of a DICOM file to 8 bits per sample.

    Args:
        data: a DICOM Part 10 file, or a data set without its preamble.
        spec: limits, resize mode, and the range of files without a window.
        poll: called between steps. May raise to leave.
        keeps_shape: whether pixels that are not square matter, whatever the resize mode.

    Raises:
        ImageError: over a limit, damaged, not a picture, or of an unsupported transfer syntax.
    """
    opened = file.read(data, spec, poll)
    chosen = frames.choose(opened)
    poll()
    pixels = frames.decode(opened, chosen)
    poll()
    picture = Image.fromarray(rendering.render(opened, chosen, pixels, spec))
    if keeps_shape or spec.resize != "stretch":
        picture = _with_square_pixels(picture, rendering.aspect(opened, chosen), spec)
    profile = opened.value("ICCProfile") if picture.mode == "RGB" else None
    return Opened(picture, 1, profile)


def _with_square_pixels(picture: Image.Image, aspect: float, spec: InputSpec) -> Image.Image:
    """Widen or heighten a picture whose pixels are ``aspect`` times as high as wide."""
    if aspect == 1:
        return picture
    width, height = picture.size
    size = (width, round(height * aspect)) if aspect > 1 else (round(width / aspect), height)
    check_size(*size, spec)
    return picture.resize(size, Image.Resampling.BILINEAR)
