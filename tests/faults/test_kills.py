"""The server killed under load: what was committed is there and found, and nothing else is."""

from __future__ import annotations

import pytest

from tests.bars.gallery import gallery
from tests.faults.cluster import FaultyCluster
from tests.faults.kills import Kills


@pytest.mark.timeout(3600)
def test_kills_under_load(cluster: FaultyCluster, dsn: str, cycles: int, seed: int) -> None:
    Kills(cluster, dsn, gallery(300), cycles, seed).run()
