"""Make the two virtual environments: one for the server, one for clients, tests and training.

Packages come by hash only, from the locks in requirements/ that ``make lock`` writes. They come as
wheels, so that no code of a package runs while it is installed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tools.packages import OWN_PYTHON
from tools.project import ROOT, TELEMETRY_OFF, Stamp, digest
from tools.report import SetupError, clean_environment, run, say, step

LOCKS = ROOT / "requirements"
NAMES = (
    "tool",
    "server",
    "client",
    "dicomweb",
    "explore",
    "test",
    "train",
    "torch",
    "torch-cpu",
)
_FAILED = (
    "pip could not install {what}: check the network (and pip's own settings, if there is "
    "a proxy or a mirror), then run it again"
)


def lock(name: str) -> Path:
    """Return a file of pinned packages with their hashes. ``name`` is one of NAMES."""
    return LOCKS / f"{name}.txt"


def project(folder: str) -> dict[str, Any]:
    """Return the content of a folder's pyproject.toml."""
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text())


def site_packages(venv: Path, python: str = OWN_PYTHON) -> Path:
    """Return a virtual environment's site-packages folder."""
    return venv / "lib" / f"python{python}" / "site-packages"


def _interpreter(python: str) -> Path | str | None:
    """Return an interpreter of this Python that can make environments, or None."""
    if python == OWN_PYTHON:
        return sys.executable
    found = shutil.which(f"python{python}", path="/usr/bin:/usr/local/bin")
    if found:
        with contextlib.suppress(SetupError):
            run([found, "-c", "import venv, ensurepip"], failure="no venv")
            return found
    return None


def _create(venv: Path, python: str = OWN_PYTHON) -> None:
    """Make an environment, of this program's own Python if there is no other interpreter."""
    interpreter = _interpreter(python)
    run(
        [interpreter or sys.executable, "-m", "venv", "--clear", venv],
        failure=f"the virtual environment {venv} could not be made",
    )
    # For every program in it, since the packages' own switch works only once they are imported.
    line = f'import os; os.environ["{TELEMETRY_OFF}"] = "1"\n'
    site = site_packages(venv, python if interpreter else OWN_PYTHON)
    (site / "pg_siamese_telemetry_off.pth").write_text(line)


def _target(venv: Path, python: str) -> list[str | Path]:
    """Return pip's options to install for the Python of a server.

    If the environment isn't of that Python, no interpreter of it exists here. Then ready-made
    wheels are unpacked into the folder that it will use.
    """
    if (venv / "bin" / f"python{python}").exists():
        return []
    options: list[str | Path] = ["--python-version", python, "--no-compile", "--upgrade"]
    return [*options, "--target", site_packages(venv, python)]


def _pip(venv: Path, what: str, *arguments: str | Path, backend: Path | None = None) -> None:
    """Run pip install. ``backend`` is a folder with the build backend, if in an unusual place."""
    command: list[str | Path] = [venv / "bin" / "python", "-m", "pip", "install", "--quiet"]
    command += ["--no-input", "--disable-pip-version-check", "--no-warn-script-location"]
    # Three lines: the last of pip's retries names the cause, and pip's own conclusion follows.
    more = {"PYTHONPATH": str(backend)} if backend else {}
    run(
        [*command, *arguments],
        env=clean_environment(more),
        failure=_FAILED.format(what=what),
        lines=3,
    )


def _install_locked(venv: Path, what: str, name: str, *target: str | Path) -> None:
    """Install exactly the packages of a lock, and only files with the hashes in it."""
    options = ["--no-deps", "--require-hashes", "--only-binary", ":all:"]
    try:
        _pip(venv, what, *options, *target, "-r", lock(name))
    except SetupError as error:
        if "Expected sha256" not in str(error):
            raise
        raise SetupError(
            f"pip refused a file for {what}: it is not one of those that {lock(name)} names. It "
            f"was changed, or comes from another place than the package index.\n{error}"
        ) from None


def _install_own(
    venv: Path, what: str, *arguments: str | Path, backend: Path | None = None
) -> None:
    options = ["--no-deps", "--no-index", "--no-build-isolation"]
    _pip(venv, what, *options, *arguments, backend=backend)


def server_key(python: str) -> str:
    """Return a hash of all that a server's environment is made of."""
    return digest([python, sys.version, lock("server"), ROOT / "plpython"])


def client_key() -> str:
    """Return a hash of all that an installed client's environment is made of."""
    return digest([sys.version, lock("client"), ROOT / "plpython", ROOT / "python"])


def make_server(venv: Path, python: str = OWN_PYTHON) -> None:
    """Make the server's environment from scratch, with the server package in it.

    ``python`` is the version of the Python that PL/Python runs.
    """
    _make_server_packages(venv, python)
    _install_server_package(venv, python)


def make_client(venv: Path) -> None:
    """Make an environment with the command ``pg_siamese``, which needs nothing of this project."""
    _create(venv)
    _install_locked(venv, "the client's packages", "client")
    _install_own(venv, "the client", ROOT / "plpython", ROOT / "python")


def ensure_server(venv: Path, python: str = OWN_PYTHON) -> None:
    """Make or update the server's environment in the build folder.

    Its packages are those of ``requirements/server.txt``. The server package itself is a copy, not
    a link, since the server must not run half-edited files.
    """
    packages = Stamp(venv.parent, "server-packages", str(venv), python, sys.version, lock("server"))
    own = Stamp(venv.parent, "server-own", packages.key, ROOT / "plpython")
    if not packages.fresh():
        with step("Making the server's Python environment"):
            packages.remove()
            own.remove()
            _make_server_packages(venv, python)
            packages.write()
    if not own.fresh():
        with step("Installing the server package pg_siamese_server"):
            own.remove()
            _install_server_package(venv, python)
            own.write()


def _make_server_packages(venv: Path, python: str) -> None:
    _create(venv, python)
    _install_locked(venv, "the server's packages", "server", *_target(venv, python))


def _install_server_package(venv: Path, python: str) -> None:
    target = _target(venv, python)
    # The build backend is among the server's packages, and pure Python.
    backend = site_packages(venv, python) if target else None
    options = ["--force-reinstall", *target, ROOT / "plpython"]
    _install_own(venv, "the server package", *options, backend=backend)


def ensure_tool(venv: Path) -> None:
    """Make or update the environment that writes the locks."""
    made = Stamp(venv.parent, "lock-tool", str(venv), sys.version, lock("tool"))
    if not made.fresh():
        made.remove()
        _create(venv)
        _install_locked(venv, "uv", "tool")
        made.write()


def ensure_client(venv: Path, extras: Collection[str], *, small: bool = False) -> None:
    """Make or update the clients' environment, with optional dependencies.

    ``extras`` are names of ``[project.optional-dependencies]`` in ``python/pyproject.toml``. Those
    of an earlier run stay. With ``small``, and without a CPU build of torch, "train" is left out,
    and a line says so. The project's two packages are installed as links.
    """
    # With other locks it is made from scratch, so that it never has more than they name.
    place = [str(venv), sys.version, digest(map(lock, sorted(NAMES)))]
    files = [ROOT / folder / "pyproject.toml" for folder in ("plpython", "python")]
    key = digest([*place, *files])
    state = venv.parent / "stamps" / "client.json"
    try:
        known = json.loads(state.read_text())
    except (FileNotFoundError, ValueError):
        known = {}
    fresh = known.get("key") == key
    there = set(known.get("extras", ()))
    wanted = there | set(extras)
    if fresh and wanted == there:
        return
    if known.get("venv") != place:
        state.unlink(missing_ok=True)
        _create(venv)
    if "train" in wanted and not _has_torch(venv) and not _install_torch(venv, small):
        wanted.remove("train")
        if fresh and wanted == there:
            return
    state.unlink(missing_ok=True)
    what = f" ({', '.join(sorted(wanted))})" if wanted else ""
    with step(f"Making the clients' Python environment{what}"):
        for name in ("client", *sorted(wanted)):
            _install_locked(venv, "the clients' packages", name)
        _install_own(
            venv, "the client", "--editable", ROOT / "plpython", "--editable", ROOT / "python"
        )
    state.parent.mkdir(exist_ok=True)
    state.write_text(json.dumps({"key": key, "extras": sorted(wanted), "venv": place}))


def _torch_version() -> str:
    pins = project("python")["project"]["optional-dependencies"]["train"]
    pin: str = next(each for each in pins if each.startswith("torch=="))
    return pin.partition("==")[2]


def _has_torch(venv: Path) -> bool:
    return any(site_packages(venv).glob(f"torch-{_torch_version()}*.dist-info"))


def _install_torch(venv: Path, small: bool) -> bool:
    """Install torch, the CPU build if pip finds it, and return whether it was installed.

    On Linux the package index has only the build with CUDA: several GB, which ``small`` refuses.
    """
    if sys.platform == "linux":
        try:
            with step("Installing PyTorch's CPU build"):
                _install_locked(venv, "PyTorch's CPU build", "torch-cpu")
            return True
        except SetupError:
            say(
                f"pip finds no CPU build of torch {_torch_version()} with a known hash. To get "
                "it, add PyTorch's CPU index to pip's settings (PIP_EXTRA_INDEX_URL)."
            )
            if small:
                say("Without torch, the tests of training are skipped (make train installs it).")
                return False
            say("So pip installs the build with CUDA: several GB.")
    with step("Installing PyTorch"):
        _install_locked(venv, "torch", "torch")
    return True
