"""Python packages: pinned by version and hash, complete, and nothing but that is installed."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import re
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import environments, lock
from tools.environments import LOCKS, NAMES, project
from tools.project import ROOT
from tools.report import SetupError

HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def requirements(name: str) -> Iterator[tuple[Requirement, list[str]]]:
    """Yield what a lock asks for, with the hashes that it allows."""
    text = environments.lock(name).read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for entry in re.split(r"(?<!\\)\n", "\n".join(lines)):
        if entry.strip():
            wanted, *hashes = re.split(r"\s*\\\n\s*", entry.strip())
            yield Requirement(wanted), hashes


@pytest.mark.parametrize("name", NAMES)
def test_every_package_has_its_version_and_hashes(name: str) -> None:
    found = list(requirements(name))
    assert found
    for wanted, hashes in found:
        (version,) = wanted.specifier
        # "===": not a build like 2.13.0+cpu.
        assert version.operator == ("===" if name == "torch" and wanted.name == "torch" else "==")
        assert wanted.url is None
        assert hashes and all(HASH.fullmatch(each) for each in hashes), wanted
    text = environments.lock(name).read_text()
    assert "://" not in text and "--index" not in text and "--find" not in text


def test_locks_are_of_what_the_projects_ask_for() -> None:
    """Each direct requirement is pinned, once for all, and is in the lock that installs it."""
    client = project("python")
    extras = client["project"]["optional-dependencies"]
    asked = {
        "server": [*project("plpython")["project"]["dependencies"], "flit_core==4.2.0"],
        "client": client["project"]["dependencies"],
        "dicomweb": extras["dicomweb"],
        "explore": extras["explore"],
        "test": extras["test"],
        "train": extras["train"],
    }
    files = {name: {str(each.name): each for each, _ in requirements(name)} for name in NAMES}
    for name, wanted in asked.items():
        known = files["client"] | files["train"] | files["torch"] | files[name]
        pinned = {
            canonicalize_name(key): str(value.specifier).replace("===", "==")
            for key, value in known.items()
        }
        for requirement in map(Requirement, wanted):
            if requirement.name != "pg_siamese_server":
                assert pinned[canonicalize_name(requirement.name)] == str(requirement.specifier)
    backends = {tuple(project(each)["build-system"]["requires"]) for each in ("plpython", "python")}
    assert backends == {("flit_core==4.2.0",)}


def test_locks_agree() -> None:
    """Environments that have several of them have one version of each package."""
    versions: dict[str, set[str]] = {}
    for name in NAMES:
        for each, _ in requirements(name):
            plain = str(each.specifier).removesuffix("+cpu").replace("===", "==")  # torch
            versions.setdefault(canonicalize_name(each.name), set()).add(plain)
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


def test_releases_known_as_bad_cannot_be_chosen() -> None:
    lines = (LOCKS / "known-bad.txt").read_text().splitlines()
    bad = [Requirement(line) for line in lines if line and not line.startswith("#")]
    excluded = {each.name: each.specifier for each in bad}
    for name in ("lightning", "pytorch-lightning"):
        assert not any(excluded[name].contains(version) for version in ("2.6.2", "2.6.3"))
    for name in NAMES:
        for each, _ in requirements(name):
            (version,) = each.specifier
            if each.name in excluded:
                assert excluded[each.name].contains(version.version)
    # No project file leaves a choice.
    for folder in ("plpython", "python"):
        declared = project(folder)["project"]
        listed = [*declared["dependencies"]]
        for extra in declared.get("optional-dependencies", {}).values():
            listed += extra
        assert all("==" in each for each in listed)


def test_the_environment_is_what_the_locks_say() -> None:
    """Of every package that is installed: its version, and that all it needs is there."""
    wanted = {
        canonicalize_name(each.name): each.specifier
        for name in NAMES
        for each, _ in requirements(name)
        if each.marker is None or each.marker.evaluate()
    }
    here = {canonicalize_name(each.name): each for each in importlib.metadata.distributions()}
    own = {"pg-siamese", "pg-siamese-server", "pip"}
    if sys.version_info < (3, 12):
        own.add("setuptools")  # venv brings its own
    assert set(here) - own <= set(wanted)
    for name in set(here) - own:
        version = str(wanted[name]).lstrip("=").removesuffix("+cpu")
        assert here[name].version.removesuffix("+cpu") == version, name
    # Its project says why it has not all that it declares.
    for name in set(here) - own - {"medmnist"}:
        for text in here[name].requires or ():
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                found = here.get(canonicalize_name(need.name))
                assert found, f"{name} needs {need}"
                assert need.specifier.contains(found.version, prereleases=True), (name, text)


def test_pins_are_read_from_a_lock() -> None:
    text = "# a==1\nb==2 \\\n    --hash=sha256:0\nc-d==3.1+cpu ; sys_platform == 'linux' \\\n  x\n"
    assert lock.pins(text) == {"b": "b==2", "c-d": "c-d==3.1+cpu ; sys_platform == 'linux'"}
    assert lock.pins("a===1\nb==2 ; x == 'y'\n") == {"a": "a==1", "b": "b==2 ; x == 'y'"}


def wheel(folder: Path, name: str, version: str) -> str:
    """Write a wheel with one empty module; returns its SHA-256."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {file: hashlib.sha256(text.encode()).digest() for file, text in files.items()}
    record = "".join(
        f"{file},sha256={base64.urlsafe_b64encode(digest).decode()},{len(files[file])}\n"
        for file, digest in digests.items()
    )
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(file, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment for packages of a folder, and locks of its own."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(environments, "LOCKS", tmp_path)
    venv.create(tmp_path / "venv", with_pip=True)
    return tmp_path


def installed(folder: Path) -> set[str]:
    found = environments.site_packages(folder / "venv").glob("*.py")
    return {each.stem for each in found} & {"good", "swapped", "torch"}


def test_a_file_with_another_hash_is_refused(offline: Path) -> None:
    good, _ = wheel(offline, "good", "1.0"), wheel(offline, "swapped", "1.0")
    (offline / "server.txt").write_text(f"good==1.0 --hash=sha256:{good}\n")
    environments._install_locked(offline / "venv", "it", "server")
    assert installed(offline) == {"good"}
    (offline / "server.txt").write_text(f"swapped==1.0 --hash=sha256:{good}\n")
    with pytest.raises(SetupError, match="pip refused a file for it"):
        environments._install_locked(offline / "venv", "it", "server")
    (offline / "server.txt").write_text("swapped==1.0\n")
    with pytest.raises(SetupError, match="require-hashes"):
        environments._install_locked(offline / "venv", "it", "server")
    assert installed(offline) == {"good"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the package index has CPU builds")
def test_without_a_cpu_build_tests_do_without_torch(
    offline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The build with CUDA comes only where training is asked for; an unknown CPU build never."""
    plain, other = wheel(offline, "torch", "2.13.0"), wheel(offline, "torch", "2.13.0+cpu")
    (offline / "torch.txt").write_text(f"torch===2.13.0 --hash=sha256:{plain}\n")
    (offline / "torch-cpu.txt").write_text(f"torch==2.13.0+cpu --hash=sha256:{plain}\n")
    place = offline / "venv"
    assert environments._install_torch(place, small=True) is False
    assert installed(offline) == set()
    assert "no CPU build of torch" in capsys.readouterr().out
    assert environments._install_torch(place, small=False) is True
    (found,) = environments.site_packages(place).glob("torch-*")
    assert found.name == "torch-2.13.0.dist-info"
    assert environments._has_torch(place)
    (offline / "torch-cpu.txt").write_text(f"torch==2.13.0+cpu --hash=sha256:{other}\n")
    assert environments._install_torch(place, small=True) is True
    assert list(environments.site_packages(place).glob("torch-2.13.0+cpu.dist-info"))


def test_environments_without_hashes_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(environments, "_create", lambda venv: done.append("created"))

    def pip(venv: Path, *rest: str | Path, **more: object) -> None:
        done.append(str(rest[-1]))

    monkeypatch.setattr(environments, "_pip", pip)
    state = tmp_path / "stamps" / "client.json"
    state.parent.mkdir()
    state.write_text(json.dumps({"key": "old", "extras": ["test"], "venv": ["x", sys.version]}))
    environments.ensure_client(tmp_path / "client", ["test"])
    steps = [LOCKS / "client.txt", LOCKS / "test.txt", ROOT / "python"]
    assert done == ["created", *map(str, steps)]
    done.clear()
    environments.ensure_client(tmp_path / "client", [])
    assert done == []
