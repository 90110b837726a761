"""Damaged images and decompression bombs neither crash a backend nor eat its memory.

In full: ``python -m tests.scenarios images --count 20000``, and ``dicom``.
"""

from __future__ import annotations

import pytest

from tests.conftest import Connect
from tests.scenarios.bad_dicom import BadDicom
from tests.scenarios.bad_images import BadImages
from tests.scenarios.process import private_bytes


@pytest.fixture(autouse=True)
def _memory(connect: Connect) -> None:
    try:
        private_bytes(connect().info.backend_pid)
    except OSError as error:
        pytest.skip(f"memory of the server can't be read here: {error}")


def test_damaged_files_and_bombs(connect: Connect) -> None:
    BadImages(connect, count=1000).run()


def test_damaged_dicom_files_and_bombs(connect: Connect, dsn: str) -> None:
    BadDicom(connect, count=200, dsn=dsn).run()
