"""The command of the page, and the files of others that it serves."""

from __future__ import annotations

import hashlib
import re
import socket
from pathlib import Path

import pytest

from pg_siamese.explore import serving
from pg_siamese.explore.answers import harmless
from pg_siamese.explore.pictures import Size, facts
from pg_siamese.explore.query import Condition
from pg_siamese.explore.serving import Address
from tests.support import encode
from tests.unit.client.test_cli import fails, run
from tools.project import ROOT

VENDORED = (ROOT / "python/pg_siamese/explore/static", ROOT / "tests/data/axe")


@pytest.mark.parametrize("folder", VENDORED, ids=lambda folder: folder.name)
def test_files_of_others_are_what_they_were(folder: Path) -> None:
    rows = re.findall(
        r"^\| `([^`]+)` .* `([0-9a-f]{64})` \|$", (folder / "README.md").read_text(), re.M
    )
    assert rows
    for name, digest in rows:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        assert re.search(r"\d+\.\d+\.\d+", name)


def test_only_this_machine_without_a_certificate(tmp_path: Path) -> None:
    assert "without --certificate" in fails("explore", "--host", "0.0.0.0", "--login")
    file = tmp_path / "certificate.pem"
    file.write_text("no certificate")
    assert "go together" in fails("explore", "--certificate", str(file))
    assert "leave out --login" in fails("explore", "--open", "--login")
    missing = str(tmp_path / "missing")
    assert "missing" in fails("explore", "--certificate", missing, "--key", str(file), "--login")


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("explore", "--login", "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 1
    assert "is not free" in result.stderr.splitlines()[-1]


def test_the_page_s_address() -> None:
    assert Address("127.0.0.1", 8765).url == "http://127.0.0.1:8765"
    files = Path("certificate"), Path("key")
    assert Address("0.0.0.0", 443, ("page.example",), *files).url == "https://page.example:443"
    assert set(serving.LOOPBACK) == {"127.0.0.1", "localhost"}


def test_conditions_as_filters() -> None:
    assert Condition(("a", "b")).filter == ["a", "b"]
    assert Condition(("a",), with_null=True).filter == ["a", None]
    assert Condition(least="1", most="2").filter == {">=": "1", "<=": "2"}
    assert Condition(("1",), least="0").filter == {">=": "0", "in": ["1"]}


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("=1+1", "'=1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("-2+3", "'-2+3"),
        ("-2.5", "-2.5"),
        ("+1e5", "+1e5"),
        ("a=b", "a=b"),
        ("", ""),
        (None, None),
    ],
)
def test_formulas_become_texts(text: str | None, safe: str | None) -> None:
    assert harmless(text) == safe


def test_facts_of_files() -> None:
    import numpy as np

    pixels = np.zeros((20, 30), np.uint8)
    found = facts(encode(pixels), None)
    assert (found.kind, str(found.size), found.is_deep) == ("PNG", "30 x 20, 1 kB", False)
    assert facts(encode(pixels.astype(np.uint16)), None).is_deep
    assert facts(encode(pixels.astype(np.uint16), "TIFF"), None).is_deep
    assert not facts(encode(pixels, "TIFF"), None).is_deep
    # Damaged ones have no size in pixels.
    for data in (b"II*\0" + b"\xff" * 40, b"<html>", b"", encode(pixels)[:20]):
        found = facts(data, None)
        assert not found.is_deep and found.size == Size(len(data))
