"""ONNX Runtime's telemetry is off before it can be imported, whatever imports it; caches go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from pg_siamese_server import telemetry
from tools.cluster import Cluster
from tools.project import ROOT

PATHS = [str(ROOT), str(ROOT / "python"), str(ROOT / "plpython"), sysconfig.get_path("purelib")]


def environment_after(code: str, *options: str, **variables: str) -> dict[str, str]:
    """Run code in a Python of its own; return the environment it leaves."""
    given = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(PATHS)} | variables
    code += "\nimport json, os\nprint(json.dumps(dict(os.environ)))"
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.law(10)
@pytest.mark.parametrize("package", ["pg_siamese_server", "pg_siamese", "bench", "tests"])
@pytest.mark.parametrize("inherited", [None, "", "0", "2"])
def test_every_package_switches_it_off(package: str, inherited: str | None) -> None:
    """Without the environment's own switch (-S), and against values that leave it on."""
    given = {} if inherited is None else {telemetry.VARIABLE: inherited}
    assert environment_after(f"import {package}", "-S", **given)[telemetry.VARIABLE] == "1"


def test_the_environments_switch_it_off() -> None:
    """Also for programs that import nothing of this project."""
    assert environment_after("pass")[telemetry.VARIABLE] == "1"


def test_clusters_switch_it_off(tmp_path: Path) -> None:
    """For functions that import ONNX Runtime without the server package; homes are their own."""
    found = Cluster(tmp_path)._environment()
    assert found[telemetry.VARIABLE] == "1"
    assert found["HOME"] == str(tmp_path)
    assert f"{telemetry.VARIABLE}=1" in (ROOT / "docker" / "Dockerfile").read_text()


@pytest.mark.parametrize(
    ("before", "ok"),
    [
        ("import onnxruntime", False),
        ("import os; os.environ['ORT_DISABLE_TELEMETRY'] = '0'; import onnxruntime", False),
        ("import os; os.environ['ORT_DISABLE_TELEMETRY'] = 'true'; import onnxruntime", True),
        ("pass", True),
    ],
)
def test_an_earlier_import_is_noticed(before: str, ok: bool, tmp_path: Path) -> None:
    code = f"{before}\nfrom pg_siamese_server import telemetry\nassert telemetry.check()[0] == {ok}"
    environment_after(code, "-S", XDG_CACHE_HOME=str(tmp_path))


def test_what_was_left_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert telemetry.check() == (True, "off")
    left = tmp_path / ".cache" / "Microsoft" / "DeveloperTools" / ".onnxruntime"
    left.mkdir(parents=True)
    ok, detail = telemetry.check()
    assert not ok and f'"{left}"' in detail


@pytest.mark.law(10)
def test_caches_are_set_aside(tmp_path: Path) -> None:
    """Into one folder that the libraries make, and that is gone at the end; chosen ones stay."""
    code = """
from pg_siamese import caches
caches.set_aside()
import matplotlib.font_manager
import os
assert os.listdir(os.environ["MPLCONFIGDIR"])
"""
    folders = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    found = environment_after(code, **folders, TORCHINDUCTOR_CACHE_DIR="/mine")
    assert found["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    assert Path(found["MPLCONFIGDIR"]).is_relative_to(tmp_path)
    assert list(tmp_path.iterdir()) == []
