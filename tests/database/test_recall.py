"""Search is exact up to the stated recall right after each step of a collection's life.

In full: ``python -m tests.scenarios recall``.
"""

from __future__ import annotations

from tests.conftest import Connect
from tests.scenarios.gallery import gallery
from tests.scenarios.recall import Recall


def test_recall_after_each_step(connect: Connect) -> None:
    # As many as a graph index takes: smaller ones are flat, and exact anyway.
    images = gallery(12_500)
    Recall(connect, images, rows=11_000, more=1_000, queries=20, least_of_step=0.95).run()
