"""A cluster for faults: not that of the other tests, which must not notice."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from tests.conftest import make_template
from tests.faults.cluster import SETTINGS, FaultyCluster


@pytest.fixture(scope="session")
def is_long(pytestconfig: pytest.Config) -> bool:
    """Whether to run the long form."""
    return bool(pytestconfig.getoption("--faults-long"))


@pytest.fixture(scope="session")
def cycles(pytestconfig: pytest.Config, is_long: bool) -> int:
    """How often to kill."""
    given = pytestconfig.getoption("--faults-cycles")
    return int(given) if given is not None else 100 if is_long else 6


@pytest.fixture
def seed(pytestconfig: pytest.Config) -> int:
    """Seed of what is random; printed, so that a failure shows it."""
    given = pytestconfig.getoption("--faults-seed")
    number = int(given) if given is not None else secrets.randbelow(10**6)
    print(f"seed: --faults-seed {number}")
    return number


@pytest.fixture(scope="session")
def cluster() -> Iterator[FaultyCluster]:
    """A throw-away cluster whose commits survive SIGKILL."""
    with FaultyCluster.temporary(SETTINGS) as running:
        assert isinstance(running, FaultyCluster)
        yield running


@pytest.fixture(scope="session")
def template(cluster: FaultyCluster, onnx: bytes) -> str:
    """As the other tests' template, in this cluster."""
    return make_template(cluster, onnx)
