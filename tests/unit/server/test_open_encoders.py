"""The encoders that a process keeps open."""

from __future__ import annotations

import pytest

from pg_siamese_server.encoding import encoder
from pg_siamese_server.encoding.open_encoders import OpenEncoders
from pg_siamese_server.encoding.specification import ModelSpec


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was opened, in order."""
    files: list[str] = []

    class Fake:
        def __init__(self, data: str, spec: object) -> None:
            files.append(data)

    monkeypatch.setattr(encoder, "Encoder", Fake)
    return files


def get(encoders: OpenEncoders, sha256: str, specification: str = "{}") -> object:
    return encoders.get(sha256, specification, lambda: (sha256, None))  # type: ignore[arg-type, return-value]


def test_the_least_recently_used_one_goes(opened: list[str]) -> None:
    encoders = OpenEncoders(limit=2)
    first = get(encoders, "a")
    get(encoders, "b")
    assert get(encoders, "a") is first
    get(encoders, "c")  # instead of b
    assert get(encoders, "a") is first
    get(encoders, "b")
    assert opened == ["a", "b", "c", "b"]


def test_one_file_may_be_fed_in_several_ways(opened: list[str]) -> None:
    encoders = OpenEncoders()
    assert get(encoders, "a", "{}") is not get(encoders, "a", '{"resize": "crop"}')


def test_a_failure_to_read_keeps_what_is_open(opened: list[str]) -> None:
    encoders = OpenEncoders(limit=1)
    first = get(encoders, "a")

    def read() -> tuple[bytes, ModelSpec]:
        raise OSError

    with pytest.raises(OSError):
        encoders.get("b", "{}", read)
    assert get(encoders, "a") is first
