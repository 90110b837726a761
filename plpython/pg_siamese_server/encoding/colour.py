"""Convert pictures with colour profiles to sRGB, which encoders learn from."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

# Profiles of cameras and screens have some kilobytes, those of printing presses up to 3 MB.
MAX_PROFILE_BYTES = 4 * 1024 * 1024
MAX_TRANSFORMS = 16
STRIPE_PIXELS = 1_000_000
# A profile that changes no colour by more than this is sRGB under another name.
SAME = 1
_SPACES = {"RGB": "RGB", "RGBA": "RGB", "CMYK": "CMYK"}

_transforms: OrderedDict[tuple[bytes, str], ImageCms.ImageCmsTransform | None] = OrderedDict()


def to_srgb(
    image: Image.Image, profile: object, poll: Callable[[], None], least_side: int | None = None
) -> tuple[Image.Image, int]:
    """Convert a colour picture to sRGB by its embedded profile.

    Converting takes time per pixel. So if a picture has to be converted and is much larger than
    needed, it is reduced first.

    Grey pictures stay as they are. Their profiles describe printing, while encoders learn from the
    stored values. A profile that is broken, too large or of another kind is ignored.

    Args:
        image: the picture.
        profile: from its file.
        poll: called between stripes, may raise to stop.
        least_side: pixels that each side must keep, or None for all.

    Returns:
        The picture, and the whole number that it was reduced by.
    """
    if not isinstance(profile, bytes) or not 128 <= len(profile) <= MAX_PROFILE_BYTES:
        return image, 1
    if image.mode == "RGBa":
        image = image.convert("RGBA")
    elif image.mode in ("P", "PA") or (image.mode == "RGB" and image.has_transparency_data):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode not in _SPACES:
        return image, 1
    transform = _transform(profile, image.mode)
    if transform is None:
        return image, 1
    factor = max(1, min(image.size) // least_side) if least_side else 1
    if factor > 1:
        image = image.reduce(factor)
        poll()
    result = Image.new(transform.output_mode, image.size)
    step = max(1, STRIPE_PIXELS // image.width)
    for top in range(0, image.height, step):
        poll()
        stripe = image.crop((0, top, image.width, min(top + step, image.height)))
        result.paste(transform.apply(stripe), (0, top))
    return result, factor


def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform to sRGB, kept for this session, or None if none exists or is needed."""
    key = (hashlib.sha256(profile).digest(), mode)
    if key in _transforms:
        _transforms.move_to_end(key)
    else:
        _transforms[key] = _build_transform(profile, mode)
        if len(_transforms) > MAX_TRANSFORMS:
            _transforms.popitem(last=False)
    return _transforms[key]


def _build_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGBA" if mode == "RGBA" else "RGB",
            ImageCms.Intent.PERCEPTUAL,
        )
        return None if mode != "CMYK" and _is_identity(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError, MemoryError):
        return None


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    probe = Image.fromarray(colours)
    changed = np.asarray(transform.apply(probe.convert(mode)).convert("RGB"))
    return int(np.abs(changed.astype(int) - colours).max()) <= SAME
