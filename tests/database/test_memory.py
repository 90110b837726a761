"""A session that searches and inserts keeps its memory.

In full: ``python -m tests.scenarios memory``.
"""

from __future__ import annotations

import pytest

from tests.conftest import Connect
from tests.scenarios.gallery import gallery
from tests.scenarios.memory import Memory
from tests.scenarios.process import private_bytes


def test_memory_of_a_session(connect: Connect) -> None:
    try:
        private_bytes(connect().info.backend_pid)
    except OSError as error:
        pytest.skip(f"memory of the server can't be read here: {error}")
    Memory(connect, gallery(1500), rows=1_000).run()
