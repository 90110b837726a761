"""The two virtual environments: a lean one for the server, one for clients, tests and training."""

from __future__ import annotations

import json
import platform
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pg_siamese.dev.project import ROOT, Stamp, digest
from pg_siamese.dev.report import SetupError, run, say, step

CONSTRAINTS = ROOT / "python" / "constraints.txt"
_FAILED = (
    "pip could not install {what}: check the network (and pip's own settings, where there is "
    "a proxy or a mirror), then run it again"
)


def _pyproject(folder: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text())


def site_packages(venv: Path) -> Path:
    """Return a virtual environment's site-packages folder."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return venv / "lib" / name / "site-packages"


def _create(venv: Path) -> None:
    run(
        [sys.executable, "-m", "venv", "--clear", venv],
        failure=f"the virtual environment {venv} could not be made",
    )


def _pip(venv: Path, what: str, *arguments: str | Path, constrained: bool = True) -> None:
    command: list[str | Path] = [venv / "bin" / "python", "-m", "pip", "install", "--quiet"]
    command += ["--no-input", "--disable-pip-version-check", "--no-warn-script-location"]
    if constrained:
        command += ["--constraint", CONSTRAINTS]
    # Three lines: the last of pip's retries says the cause, and pip's own conclusion follows.
    run([*command, *arguments], failure=_FAILED.format(what=what), lines=3)


def make_server(venv: Path) -> None:
    """Make the server's environment anew, with the server package in it."""
    _make_server_packages(venv)
    _install_server_package(venv)


def ensure_server(venv: Path) -> None:
    """Make or bring up to date the server's environment in the build folder.

    Its packages are those of `plpython/pyproject.toml`. The server package itself is a copy,
    not a link into the project: the server must not run half-edited files.
    """
    place = [str(venv), sys.version]
    metadata = ROOT / "plpython" / "pyproject.toml"
    packages = Stamp(venv.parent, "server-packages", *place, metadata, CONSTRAINTS)
    own = Stamp(venv.parent, "server-own", packages.key, ROOT / "plpython")
    if not packages.fresh():
        with step("Making the server's Python environment"):
            packages.remove()
            own.remove()
            _make_server_packages(venv)
            packages.write()
    if not own.fresh():
        with step("Installing the server package pg_siamese_server"):
            own.remove()
            _install_server_package(venv)
            own.write()


def _make_server_packages(venv: Path) -> None:
    project = _pyproject("plpython")
    _create(venv)
    needs = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    _pip(venv, "the server's packages", *needs)


def _install_server_package(venv: Path) -> None:
    options = ["--no-deps", "--no-build-isolation", "--force-reinstall"]
    _pip(venv, "the server package", *options, ROOT / "plpython")


def ensure_client(venv: Path, extras: Collection[str]) -> None:
    """Make or bring up to date the clients' environment, with optional dependencies.

    `extras` are names of `[project.optional-dependencies]` in `python/pyproject.toml`; those
    that an earlier run installed stay. The project's two packages are installed as links.
    """
    client, server = _pyproject("python"), _pyproject("plpython")
    files = [ROOT / folder / "pyproject.toml" for folder in ("plpython", "python")]
    key = digest([str(venv), sys.version, CONSTRAINTS, *files])
    state = venv.parent / "stamps" / "client.json"
    try:
        known = json.loads(state.read_text())
    except (FileNotFoundError, ValueError):
        known = {}
    fresh = known.get("key") == key
    wanted = set(extras) | set(known.get("extras", ()))
    if fresh and wanted == set(known["extras"]):
        return
    what = f" ({', '.join(sorted(wanted))})" if wanted else ""
    state.unlink(missing_ok=True)
    if known.get("venv") != [str(venv), sys.version]:
        _create(venv)
    if "train" in wanted:
        _warn_of_cuda(venv, client)
    with step(f"Making the clients' Python environment{what}"):
        backend = {*client["build-system"]["requires"], *server["build-system"]["requires"]}
        _pip(venv, "the build backend", *sorted(backend))
        chosen = f"{ROOT / 'python'}[{','.join(sorted(wanted))}]" if wanted else ROOT / "python"
        editable: list[str | Path] = ["--editable", ROOT / "plpython", "--editable", chosen]
        _pip(venv, "the clients' packages", "--no-build-isolation", *editable)
        # medmnist declares torchvision, of which nothing is used (see pyproject.toml).
        alone = client["dependency-groups"]["without-dependencies"]
        _pip(venv, "medmnist", "--no-deps", *alone)
    state.parent.mkdir(exist_ok=True)
    state.write_text(
        json.dumps({"key": key, "extras": sorted(wanted), "venv": [str(venv), sys.version]})
    )


def _warn_of_cuda(venv: Path, client: dict[str, Any]) -> None:
    """Say before a download of several GB that it comes, and how to avoid it.

    Where pip finds a CPU build (version NUMBER+cpu), it takes that, without being told.
    """
    pins = client["project"]["optional-dependencies"]["train"]
    pin = next(each for each in pins if each.startswith("torch=="))
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return
    if list(site_packages(venv).glob("torch-*.dist-info")):
        return
    try:
        _pip(venv, pin, "--dry-run", "--no-deps", f"{pin}+cpu", constrained=False)
    except SetupError:
        say(
            f"pip finds no CPU build of {pin}, so the default build with CUDA comes: several GB. "
            "To avoid that, add PyTorch's CPU index to pip's settings (PIP_EXTRA_INDEX_URL)."
        )
