"""A session that searches and inserts keeps its memory.

In full: ``python -m tests.stress memory``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.bars.gallery import gallery
from tests.bars.memory import Memory
from tests.bars.process import private_bytes
from tests.conftest import Connection


def test_memory_of_a_session(connect: Callable[[], Connection]) -> None:
    try:
        private_bytes(connect().info.backend_pid)
    except OSError as error:
        pytest.skip(f"memory of the server can't be read here: {error}")
    Memory(connect, gallery(4_000), rows=3_000).run()
