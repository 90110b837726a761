"""The same file gives the same vector in PostgreSQL, in ONNX Runtime outside, and in PyTorch.

In full: ``python -m tests.scenarios parity``.
"""

from __future__ import annotations

import base64
import hashlib
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest

from pg_siamese_server.encoding.images import decode_image
from pg_siamese_server.encoding.specification import InputSpec
from tests.conftest import Connect, Connection
from tests.scenarios.gallery import MODELS
from tests.scenarios.mutations import chunk, png_file
from tests.scenarios.parity import Parity, embed_onnxruntime, least_cosine
from tests.support import encode, one

SPEC = InputSpec(28, 28)
RAMP = np.arange(28 * 28, dtype=np.uint16).reshape(28, 28) % 256


@pytest.mark.law(8)
@pytest.mark.parametrize("model", ["medical", "clinical", "fashion_mnist"])
def test_vectors_are_the_same_everywhere(connect: Connect, model: str) -> None:
    has_torch = find_spec("torch") is not None
    sets = Parity(connect, model=model, count=120, with_torch=has_torch).run()
    if not sets:
        pytest.skip("no image set on this machine")
    if not has_torch:
        pytest.skip("PyTorch is not installed: compared with ONNX Runtime only")


@pytest.mark.law(8)
def test_quantised_convolutions_give_the_same_everywhere(db: Connection, tmp_path: Path) -> None:
    """The quantised graph is the reference: alone, in a batch, and in the database."""
    pytest.importorskip("msgspec", reason="training is not installed")
    from pg_siamese.training.quantise import quantised

    pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28, 3), np.uint8)
    path = tmp_path / "int8.onnx"
    model = quantised(onnx.load(MODELS / "fashion_mnist.onnx"), pixels)
    path.write_bytes(model.SerializeToString())
    assert any(item.data_type == onnx.TensorProto.INT8 for item in model.graph.initializer)
    one(db, "SELECT register_model('int8', %s)", path.read_bytes())
    query = "SELECT embed_image(%s, 'int8')::real[]"
    found = np.array([one(db, query, encode(image)) for image in pixels])
    assert least_cosine(found, embed_onnxruntime(path, pixels)) >= 0.9999
    exact = embed_onnxruntime(MODELS / "fashion_mnist.onnx", pixels)
    assert least_cosine(found, exact) < 1 - 1e-6


# --- golden files -------------------------------------------------------------------------------

# A smooth picture, written once by libjpeg; the hashes are of the pixels that it decodes to.
JPEG_GREY = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywt"
    "QFdBRkxOUlNSMj5aYVpQYEpRUk//wAALCAAcABwBAREA/8QAFgABAQEAAAAAAAAAAAAAAAAABgUE/8QAIRAAAQIGAwEB"
    "AAAAAAAAAAAABAACAQMFFCFBEhMiMTL/2gAIAQEAAD8AY001nTDOlPrZrOMcoxLNZcfdpSGay3blHqae/phnSn1s9/GO"
    "UYlHuuPu0pDPfbtytlNBf0wxpT62C/jHCMSgX3HzaUhgvt24Timjy+mHlT62PL4x8oxLHl3H52lIY8u3b5X/2Q=="
)
JPEG_COLOUR = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywt"
    "QFdBRkxOUlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09P"
    "T09PT09PT09PT09PT09PT09PT0//wAARCAAcABwDASIAAhEBAxEB/8QAFwABAQEBAAAAAAAAAAAAAAAABgUEAf/EACEQ"
    "AAEDBAIDAQAAAAAAAAAAAAMAAQQSEyIxAgUhI0Ey/8QAFwEBAQEBAAAAAAAAAAAAAAAABQQCA//EAB4RAAEEAgMBAAAA"
    "AAAAAAAAAAABAgMFBBMREiEx/9oADAMBAAIRAxEAPwBMUHCj4oE8HCp9LaXscNqBP7HJ/KPwqyTebhy5NJqig4XG0kAA"
    "cLTIbF7H2bSAHY+pvKRtKyThCJuXJ2UnlESj6oE8RKn2nxY46PyoM+OOp8VxwrRd/wAFYY26QtFES420hAIlptrkWOO4"
    "2KQgjjtNikrS0XhPCJsbeyn/2Q=="
)


def lines(values: np.ndarray) -> bytes:
    """Pack scan lines of a PNG, each with filter 0."""
    return zlib.compress(b"".join(b"\0" + line.tobytes() for line in values))


def replicated(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def golden() -> dict[str, tuple[bytes, np.ndarray]]:
    """Return files written here, byte by byte, with the pixels that they mean."""
    grey = RAMP.astype(np.uint8)
    colour = np.stack([grey, grey.T, 255 - grey], axis=-1)
    colours = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    alpha = np.where(np.arange(28) < 14, 255, 0).astype(np.uint8)
    on_white = colour.copy()
    on_white[:, 14:] = 255
    with_alpha = np.concatenate([colour, np.broadcast_to(alpha, (28, 28))[..., None]], axis=2)
    bmp = b"BM" + struct.pack(
        "<IHHIIiiHHIIiiII", 54 + 28 * 84, 0, 0, 54, 40, 28, -28, 1, 24, *[0] * 6
    )
    return {
        "grey": (png_file(28, 28, 8, 0, lines(grey)), replicated(grey)),
        "colour": (png_file(28, 28, 8, 2, lines(colour)), colour),
        "16 bits": (png_file(28, 28, 16, 0, lines((RAMP * 257).astype(">u2"))), replicated(grey)),
        "palette": (
            png_file(28, 28, 8, 3, lines(grey), chunk(b"PLTE", colours.tobytes())),
            colours[grey],
        ),
        "alpha": (png_file(28, 28, 8, 6, lines(with_alpha)), on_white),
        "bmp": (bmp + np.ascontiguousarray(colour[..., ::-1]).tobytes(), colour),
    }


@pytest.mark.law(8)
@pytest.mark.parametrize("name", list(golden()))
def test_golden_files(db: Connection, name: str) -> None:
    file, pixels = golden()[name]
    np.testing.assert_array_equal(decode_image(file, SPEC), pixels)
    found = one(db, "SELECT embed_image(%s)::real[]", file)
    expected = embed_onnxruntime(MODELS / "medical.onnx", pixels[None])
    assert least_cosine(np.array([found]), expected) >= 0.9999


@pytest.mark.law(8)
@pytest.mark.parametrize(
    ("text", "sha256"),
    [
        (JPEG_GREY, "4cc9333781e9c3c0ec905e96e303992d63e016a479d128bf7a8e1130951454dc"),
        (JPEG_COLOUR, "ba678f0e07ed3d2f0ec099fa123a44e40e3ab203d8c541ef143a2d5ef5189dcc"),
    ],
)
def test_golden_jpeg(db: Connection, text: str, sha256: str) -> None:
    file = base64.b64decode(text)
    pixels = decode_image(file, SPEC)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == sha256
    # Inside: the distance to the same pixels without loss is that of the same vector.
    assert abs(one(db, "SELECT image_distance(%s, %s)", file, encode(pixels))) < 1e-6
