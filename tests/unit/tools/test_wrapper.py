"""The command in a clone, ./pg_siamese: which server it takes when nobody says."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.unit.tools.scripts import script
from tools import embedded
from tools.cluster import Cluster
from tools.project import ROOT


@pytest.fixture
def clone() -> Iterator[Path]:
    """A clone whose client says what it was called with, and whose cluster runs."""
    # pytest's folders can be too long for the path of a socket, which is elsewhere then.
    with TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        shutil.copy(ROOT / "pg_siamese", folder / "pg_siamese")
        client = 'echo "${PGHOST-none} ${PGDATABASE-none}" "$@"'
        script(folder / "build" / "client" / "bin" / "python", client)
        lines = embedded.environment(Cluster(folder / "it's a cluster"))
        script(folder / "set-up", f"cat <<'END'\n{lines}\nEND")
        yield folder


def call(clone: Path, *words: str, **environment: str) -> str:
    usual = {"PATH": "/usr/bin:/bin", "PYTHON": str(clone / "set-up")}
    link = clone / "elsewhere"
    link.unlink(missing_ok=True)
    link.symlink_to(clone / "pg_siamese")  # as on somebody's PATH
    done = subprocess.run(
        [link, *words], cwd="/", env=usual | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.rstrip("\n")


def test_the_embedded_cluster_is_the_default(clone: Path) -> None:
    expected = f"{clone}/it's a cluster/socket siamese -m pg_siamese load two words"
    assert call(clone, "load", "two words") == expected


@pytest.mark.parametrize("name", ["PGHOST", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE"])
def test_variables_go_before(clone: Path, name: str) -> None:
    assert "cluster" not in call(clone, "status", **{name: "mine"})


@pytest.mark.parametrize("words", [("--dsn", "dbname=mine"), ("--dsn=dbname=mine",)])
def test_dsn_goes_before(clone: Path, words: tuple[str, ...]) -> None:
    """And what it leaves out comes from libpq's defaults, not from the embedded cluster."""
    assert call(clone, "status", *words).startswith("none none ")


def test_where_nothing_runs(clone: Path) -> None:
    script(clone / "set-up", "exit 0")
    assert call(clone, "status") == "none none -m pg_siamese status"


def test_before_set_up(clone: Path) -> None:
    shutil.rmtree(clone / "build")
    done = subprocess.run([clone / "pg_siamese"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "make deps" in done.stderr
