"""`make install`: what it asks for, and that a failure leaves what was installed as it was."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.tools.scripts import script
from tools import apt, environments, install, pgvector, postgres
from tools.install import Place, Server
from tools.installation import Installation
from tools.packages import OWN_PYTHON
from tools.project import ROOT, version
from tools.report import SetupError

Make = Callable[[str], None]


def server(folder: Path, major: int = 17, python: str = "3.13") -> Server:
    """A PostgreSQL of no distribution's, with all that is needed."""
    lib, extensions = folder / str(major) / "lib", folder / str(major) / "share" / "extension"
    lib.mkdir(parents=True)
    extensions.mkdir(parents=True)
    (lib / "plpython3.so").write_bytes(f"\0libpython{python}.so.1.0\0".encode())
    (extensions / "vector.control").write_text("default_version = '0.8.5'\n")
    return Server(folder / str(major) / "pg_config", major, lib, extensions)


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Sets what the environments are made of; "" makes every attempt to make one fail."""
    current = [""]

    def make(folder: Path, python: str = OWN_PYTHON) -> None:
        site = environments.site_packages(folder, python)
        site.mkdir(parents=True, exist_ok=True)
        (site / "half.py").write_text(current[0])
        if not current[0]:
            raise SetupError("pip could not install: check the network")
        (site / "whole.py").write_text(current[0])
        script(folder / "bin" / "python", f'echo {current[0]} "$@"')

    monkeypatch.setattr(environments, "make_server", make)
    monkeypatch.setattr(environments, "make_client", make)
    monkeypatch.setattr(environments, "server_key", lambda python: current[0] * 12 + python)
    monkeypatch.setattr(environments, "client_key", lambda: current[0] * 12)
    return lambda text: current.__setitem__(0, text)


def tree(folder: Path) -> dict[str, str]:
    """All files and links below a folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in folder.rglob("*")
        if (path.is_file() or path.is_symlink()) and path.suffix != ".onnx"
    }


def test_it_is_all_there_and_a_second_run_changes_nothing(
    tmp_path: Path, contents: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    contents("a")
    of, place = server(tmp_path), Place(tmp_path / "usr" / "local")
    install.install(of, place)
    release = place.packages / version()
    assert (release / "python3.13" / "whole.py").read_text() == "a"
    shipped = {file.name for file in (ROOT / "models").glob("*.onnx")}
    assert {file.name for file in (release / "models").iterdir()} == shipped != set()
    text = (of.extensions / f"pg_siamese--{version()}.sql").read_text()
    assert f"'{place.packages}/{version()}/python{{" in text
    command = [str(place.prefix / "bin" / "pg_siamese"), "status", "two words"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "a -I -m pg_siamese status two words\n"
    before = {path: path.lstat().st_ino for path in tmp_path.rglob("*")}
    capsys.readouterr()
    install.install(of, place)
    assert {path: path.lstat().st_ino for path in tmp_path.rglob("*")} == before
    assert "…" not in capsys.readouterr().out  # no step was taken


def test_a_failure_leaves_what_is_installed(tmp_path: Path, contents: Make) -> None:
    contents("a")
    of, place = server(tmp_path), Place(tmp_path / "usr")
    install.install(of, place)
    before = tree(tmp_path)
    contents("")
    with pytest.raises(SetupError, match="network"):
        install.install(of, place)
    after = tree(tmp_path)
    assert before.items() <= after.items()
    # What is only in addition is no link and no script: the half-made environment.
    assert all("/environments/" in name for name in after.keys() - before.keys())


def test_a_half_made_environment_is_made_anew(
    tmp_path: Path, contents: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As kill -9 leaves it, at the same version of everything."""
    contents("a")
    of, place = server(tmp_path), Place(tmp_path / "usr")
    key = environments.server_key("3.13")[:12]
    half = place.packages / version() / "environments" / f"server-python3.13-{key}"
    (environments.site_packages(half, "3.13")).mkdir(parents=True)
    install.install(of, place)
    assert (place.packages / version() / "python3.13" / "whole.py").read_text() == "a"


def test_majors_and_pythons_live_side_by_side(tmp_path: Path, contents: Make) -> None:
    contents("a")
    place = Place(tmp_path / "usr")
    first, second = server(tmp_path, 17, "3.13"), server(tmp_path, 18, "3.14")
    install.install(first, place)
    before = tree(tmp_path)
    install.install(second, place)
    assert before.items() <= tree(tmp_path).items()
    release = place.packages / version()
    for python in ("3.13", "3.14"):
        assert (release / f"python{python}" / "whole.py").exists()
    # Frozen scripts hold the path of one Python, that of the server that they are for.
    old = (first.extensions / "pg_siamese--0.2.0.sql").read_text()
    assert "/python3.13'" in old and "/python3.14'" not in old
    name = f"pg_siamese--{version()}.sql"
    # One text for all: a database that moves from one to the other finds the other's packages.
    assert (first.extensions / name).read_text() == (second.extensions / name).read_text()


def test_sessions_keep_their_packages(tmp_path: Path, contents: Make) -> None:
    """The environment before the current one stays, and older ones that a process has mapped."""
    of, place = server(tmp_path), Place(tmp_path / "usr")
    link = place.packages / version() / "python3.13"
    contents("a")
    install.install(of, place)
    first = link.resolve()
    contents("b")
    install.install(of, place)
    second = link.resolve()
    assert first != second
    assert (first / "whole.py").read_text() == "a"
    with (first / "whole.py").open("rb") as file:
        library = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        contents("c")
        install.install(of, place)
        assert first.exists() and second.exists()
        library.close()
    if os.geteuid() == 0:  # others don't see what processes have mapped
        contents("d")
        install.install(of, place)
        assert not first.exists() and not second.exists()
        assert (link / "whole.py").read_text() == "d"


def test_destdir_is_in_no_file(tmp_path: Path, contents: Make) -> None:
    contents("a")
    destdir = tmp_path / "package"
    of = server(tmp_path)
    install.install(of, Place(Path("/usr"), str(destdir)), client=True)
    files = tree(destdir)
    assert files["usr/bin/pg_siamese"].count("/usr/lib/pg_siamese/") == 1
    assert not [name for name, text in files.items() if str(destdir) in text]
    assert (destdir / "usr/lib/pg_siamese" / version() / "python3.13" / "whole.py").exists()
    install.install(of, Place(Path("/opt"), str(destdir)), client=False)
    assert not (destdir / "opt/bin").exists()
    assert not (destdir / "opt/lib/pg_siamese" / version() / "client").exists()


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bare Debian testing: no PostgreSQL, no venv."""
    monkeypatch.setattr(Installation, "bin", property(lambda self: tmp_path / "bin"))
    monkeypatch.setattr(Installation, "lib", property(lambda self: tmp_path / "lib"))
    monkeypatch.setattr(Installation, "extensions", property(lambda self: tmp_path / "extension"))
    monkeypatch.setattr(postgres, "distribution_major", lambda: 18)
    monkeypatch.setattr(pgvector, "is_packaged", lambda name: True)
    monkeypatch.setattr(install, "_missing_venv", lambda: [f"python{OWN_PYTHON}-venv"])
    return tmp_path


def test_one_message_names_every_missing_package(debian: Path) -> None:
    everything = "postgresql-18 postgresql-plpython3-18 postgresql-18-pgvector"
    everything += f" python{OWN_PYTHON}-venv"
    with pytest.raises(SetupError) as caught:
        install.check(None)
    assert str(caught.value).splitlines() == [
        f"missing packages: {everything}",
        f"  apt-get install --no-install-recommends {everything}",
        "  then run make install again",
    ]


def test_the_server_that_is_there_decides(debian: Path) -> None:
    """Not the distribution's usual one; and only what it lacks is named."""
    for name in ("bin/postgres", "bin/psql", "lib/plpython3.so"):
        (debian / name).parent.mkdir(exist_ok=True)
        (debian / name).touch()
    of = Server(debian / "pg_config", 17, debian / "lib", debian / "extension")
    assert install.missing(of) == (["postgresql-17-pgvector", f"python{OWN_PYTHON}-venv"], [])


def test_where_debian_has_no_pgvector(debian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pgvector, "is_packaged", lambda name: False)
    message = (
        r"postgresql-plpython3-18 python3\.\d+-venv\n(.|\n)*also missing: pgvector 0\.5 or later"
    )
    with pytest.raises(SetupError, match=f"{message}, .* postgresql-18-pgvector"):
        install.check(None)


def test_a_server_of_no_distribution_is_told_of_files(tmp_path: Path) -> None:
    of = server(tmp_path)
    assert install.check(of) == of
    (of.lib / "plpython3.so").unlink()
    (of.extensions / "vector.control").write_text("default_version = '0.4.4'\n")
    with pytest.raises(SetupError) as caught:
        install.check(of)
    assert "plpython3.so" in str(caught.value) and "vector.control" in str(caught.value)
    assert "apt-get" not in str(caught.value)


@pytest.mark.parametrize(
    ("lists", "release", "candidate", "found"),
    [
        (True, "bookworm", None, False),
        (True, "trixie", "0.8.0-1", True),
        (False, "bookworm", None, False),
        (False, "forky", None, True),
    ],
)
def test_packages_without_lists(
    lists: bool, release: str, candidate: str | None, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(name: str) -> str | None:
        if not lists:
            raise SetupError("apt-get update failed: check the network")
        return candidate

    monkeypatch.setattr(apt, "candidate", ask)
    monkeypatch.setattr(apt, "has_lists", lambda: lists)
    monkeypatch.setattr(apt, "os_release", lambda: {"VERSION_CODENAME": release})
    assert pgvector.is_packaged("postgresql-17-pgvector") is found


def test_packages_of_another_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its interpreter, ready-made wheels go where that Python will look."""
    commands: list[list[str]] = []

    def run(command: list[str | Path], **options: object) -> str:
        commands.append([str(word) for word in command])
        if "venv" in command:
            environments.site_packages(Path(command[-1])).mkdir(parents=True)
        return ""

    monkeypatch.setattr(environments, "run", run)
    monkeypatch.setattr("shutil.which", lambda name, path: None)
    environments.make_server(tmp_path / "a", "3.99")
    target = str(tmp_path / "a" / "lib" / "python3.99" / "site-packages")
    into = [each for each in commands if target in each]
    assert len(into) == 2  # the packages, and the project's own
    for command in into:
        assert command[command.index("--python-version") + 1] == "3.99"
    assert into[0][into[0].index("--only-binary") + 1] == ":all:"
    commands.clear()
    (tmp_path / "b" / "bin").mkdir(parents=True)
    (tmp_path / "b" / "bin" / f"python{OWN_PYTHON}").touch()
    environments.make_server(tmp_path / "b", OWN_PYTHON)
    assert not [each for each in commands if "--python-version" in each]
