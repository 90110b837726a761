"""Colour profiles: pictures of other colour spaces brought to sRGB, which encoders learn from."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

# Profiles of cameras and screens have some kilobytes, those of printing presses up to three MB.
MAX_PROFILE_BYTES = 4 * 1024 * 1024
MAX_TRANSFORMS = 16
STRIPE_PIXELS = 1_000_000
# A profile that changes no colour by more than this is sRGB under another name.
SAME = 1
_SPACES = {"RGB": "RGB", "RGBA": "RGB", "CMYK": "CMYK"}

_transforms: OrderedDict[tuple[bytes, str], ImageCms.ImageCmsTransform | None] = OrderedDict()


def to_srgb(image: Image.Image, profile: object, poll: Callable[[], None]) -> Image.Image:
    """Convert a colour picture to sRGB by its embedded profile.

    Grey pictures are left as they are: their profiles describe printing, while encoders learn from
    the stored values. A profile that is broken, too large or of another kind is ignored.
    """
    if not isinstance(profile, bytes) or not 128 <= len(profile) <= MAX_PROFILE_BYTES:
        return image
    if image.mode == "RGBa":
        image = image.convert("RGBA")
    elif image.mode in ("P", "PA") or (image.mode == "RGB" and image.has_transparency_data):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode not in _SPACES:
        return image
    transform = _transform(profile, image.mode)
    if transform is None:
        return image
    result = Image.new(transform.output_mode, image.size)
    step = max(1, STRIPE_PIXELS // image.width)
    for top in range(0, image.height, step):
        poll()
        stripe = image.crop((0, top, image.width, min(top + step, image.height)))
        result.paste(transform.apply(stripe), (0, top))
    return result


def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the way to sRGB, kept for this session; None where there is none, or no need."""
    key = (hashlib.sha256(profile).digest(), mode)
    if key in _transforms:
        _transforms.move_to_end(key)
    else:
        _transforms[key] = _made(profile, mode)
        if len(_transforms) > MAX_TRANSFORMS:
            _transforms.popitem(last=False)
    return _transforms[key]


def _made(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
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
        return None if mode != "CMYK" and _changes_nothing(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError, MemoryError):
        return None


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    probe = Image.fromarray(colours)
    changed = np.asarray(transform.apply(probe.convert(mode)).convert("RGB"))
    return int(np.abs(changed.astype(int) - colours).max()) <= SAME
