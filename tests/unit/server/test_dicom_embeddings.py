"""One picture in many kinds of DICOM file gets one embedding, from the shipped medical encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import uid

from pg_siamese_server.encoding.images import decode_image
from pg_siamese_server.encoding.specification import InputSpec
from tests import dicom_files as made
from tests.scenarios.gallery import embed_outside
from tools.project import ROOT

REAL = ROOT.parent / "shared" / "data" / "dicom"
SPEC = InputSpec(28, 28)
LOSSLESS, LOSSY = 0.999, 0.99
# Files of one slice each. The first one is compared with the others.
SLICES = {
    "ct": (
        "16bit_deflated rle jpeg_lossless_sv1 jpeg_lossless_p14 jpegls_lossless jpeg2000_lossless",
        "jpegls_near_lossless jpeg2000_lossy jpeg_baseline_8bit jpeg_extended_12bit",
    ),
    "mr_small": ("implicit big_endian rle jpegls jpeg2000", ""),
}
WINDOW = {"WindowCenter": "2048", "WindowWidth": "4096"}


def picture() -> NDArray[np.uint16]:
    """Return 12 bits of something like a chest: a body, two lungs, and structures in them."""
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    values = np.where((x / 0.9) ** 2 + (y / 0.7) ** 2 < 1, 2600.0, 100.0)
    for side in (-0.4, 0.4):
        values[((x - side) / 0.3) ** 2 + (y / 0.5) ** 2 < 1] = 700
    values += 250 * np.sin(9 * x) * np.cos(7 * y)
    return np.clip(values, 0, 4095).astype(np.uint16)


def lossy() -> dict[str, Callable[[NDArray[np.uint16]], bytes]]:
    """Return makers of files that show nearly the same."""

    def baseline(values: NDArray[np.uint16]) -> bytes:
        eight = (values >> 4).astype(np.uint8)
        return made.compressed(
            [imagecodecs.jpeg8_encode(eight, level=85)],
            eight,
            uid.JPEGBaseline8Bit,
            WindowCenter="128",
            WindowWidth="256",
        )

    def encoded(syntax: str, encode: Callable[..., bytes | bytearray], **options: Any) -> Any:
        return lambda values: made.compressed(
            [encode(values, **options)], values, syntax, BitsStored=12, **WINDOW
        )

    jpeg_2000: dict[str, Any] = {"codecformat": "j2k", "bitspersample": 12, "level": 40}
    return {
        "JPEG Baseline": baseline,
        "JPEG Extended": encoded(
            uid.JPEGExtended12Bit, imagecodecs.jpeg8_encode, bitspersample=12, level=85
        ),
        "JPEG-LS near-lossless": encoded(
            uid.JPEGLSNearLossless, imagecodecs.jpegls_encode, level=8
        ),
        "JPEG 2000": encoded(uid.JPEG2000, imagecodecs.jpeg2k_encode, **jpeg_2000),
    }


def cosines(first: bytes, others: list[bytes]) -> NDArray[np.float32]:
    pixels = np.stack([decode_image(data, SPEC) for data in (first, *others)])
    vectors = embed_outside(pixels)
    return np.asarray(vectors[1:] @ vectors[0])


@pytest.mark.parametrize("name", list(SLICES))
def test_one_slice_in_many_transfer_syntaxes(name: str) -> None:
    paths = [[REAL / f"{name}_{kind}.dcm" for kind in kinds.split()] for kinds in SLICES[name]]
    if not REAL.is_dir():
        pytest.skip("needs the DICOM files beside the project (shared/data/dicom)")
    (first, *exact), near = ([path.read_bytes() for path in group] for group in paths)
    assert cosines(first, exact).min() >= LOSSLESS
    if near:
        assert cosines(first, near).min() >= LOSSY


def test_one_picture_in_other_words() -> None:
    values = picture()
    first = made.image(values, BitsStored=12, **WINDOW)
    exact = {name: make(values) for name, make in made.twins().items()}
    found = dict(zip(exact, cosines(first, list(exact.values())), strict=True))
    assert min(found.values()) >= LOSSLESS, found
    near = {name: make(values) for name, make in lossy().items()}
    assert len({*near.values()}) == len(near)
    found = dict(zip(near, cosines(first, list(near.values())), strict=True))
    assert min(found.values()) >= LOSSY, found
    # The bars tell pictures apart.
    turned = made.image(np.rot90(values).copy(), BitsStored=12, **WINDOW)
    inverted = made.image(4095 - values, BitsStored=12, **WINDOW)
    assert cosines(first, [turned, inverted]).max() < LOSSY
