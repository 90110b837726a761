"""Damaged images and decompression bombs neither crash a backend nor eat its memory.

In full: ``python -m tests.scenarios images --count 20000``.
"""

from __future__ import annotations

import pytest

from tests.conftest import Connect
from tests.scenarios.bad_images import BadImages
from tests.scenarios.process import private_bytes


def test_damaged_files_and_bombs(connect: Connect) -> None:
    try:
        private_bytes(connect().info.backend_pid)
    except OSError as error:
        pytest.skip(f"memory of the server can't be read here: {error}")
    BadImages(connect, count=1000).run()
