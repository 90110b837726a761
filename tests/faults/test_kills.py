"""The server killed under load: what was committed is there and found, and nothing else is."""

from __future__ import annotations

import pytest

from tests.faults.cluster import FaultyCluster
from tests.scenarios.gallery import Gallery
from tests.scenarios.kills import Kills


@pytest.fixture(scope="module")
def template(empty: str) -> str:
    return empty


@pytest.mark.law(1)
@pytest.mark.timeout(3600)
def test_kills_under_load(
    cluster: FaultyCluster, dsn: str, images: Gallery, cycles: int, seed: int
) -> None:
    Kills(cluster, dsn, images, cycles, seed).run()
