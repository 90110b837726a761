"""Lines of self_check that depend on versions which no test server has."""

from __future__ import annotations

import pytest

from pg_siamese_server.status import pgvector_line


@pytest.mark.parametrize(
    ("version", "index", "ok"),
    [
        ("0.8.0", "public.items_idx", False),
        ("0.8.1", "public.items_idx", False),
        ("0.6.0", "public.items_idx", False),
        ("0.8.2", "public.items_idx", True),
        ("0.8.10", "public.items_idx", True),
        ("0.10.0", "public.items_idx", True),
        ("0.5.1", "public.items_idx", True),  # builds by one process
        ("0.8.1", None, True),  # nothing to build
        ("", "public.items_idx", True),
    ],
)
def test_unsafe_versions_of_pgvector(version: str, index: str | None, ok: bool) -> None:
    subject, good, detail = pgvector_line(version, index)
    assert (subject, good) == ("pgvector", ok)
    assert version in detail
    if not ok:
        assert "CVE-2026-3172" in detail and "public.items_idx" in detail and "0.8.2" in detail
