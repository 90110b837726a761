"""The server killed under load: what was committed is there and found, and nothing else is."""

from __future__ import annotations

import pytest

from tests.faults.cluster import FaultyCluster
from tests.scenarios.gallery import gallery
from tests.scenarios.kills import Kills


@pytest.mark.law(1)
@pytest.mark.timeout(3600)
def test_kills_under_load(cluster: FaultyCluster, dsn: str, cycles: int, seed: int) -> None:
    Kills(cluster, dsn, gallery(300), cycles, seed).run()
