"""The same file gives the same vector in PostgreSQL, in ONNX Runtime outside, and in PyTorch.

In full: ``python -m tests.stress parity``.
"""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from pg_siamese_server.images import InputSpec, decode_image
from tests.bars.gallery import MODELS
from tests.bars.mutations import chunk, png_file
from tests.bars.parity import Parity, embed_onnxruntime, least_cosine
from tests.conftest import Connection

SPEC = InputSpec(28, 28)
RAMP = np.arange(28 * 28, dtype=np.uint16).reshape(28, 28) % 256


@pytest.mark.parametrize("model", ["medical", "fashion_mnist"])
def test_vectors_are_the_same_everywhere(connect: Callable[[], Connection], model: str) -> None:
    has_torch = find_spec("torch") is not None
    sets = Parity(connect, model=model, with_torch=has_torch).run()
    if not sets:
        pytest.skip("no image set on this machine")
    if not has_torch:
        pytest.skip("PyTorch is not installed: compared with ONNX Runtime only")
