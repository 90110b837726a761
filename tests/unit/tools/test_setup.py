"""The set-up: apt's configuration, the install script, the overlay, build folders."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tools import apt, extension, overlay, packages, pgvector, postgres, project
from tools.apt import Archive, parse_deb822, parse_one_line
from tools.cluster import Cluster
from tools.installation import Installation
from tools.project import ROOT, Stamp, digest, version
from tools.report import SetupError, clean_environment, run

DEB822 = """\
# made by the installer
Types: deb deb-src
# a snapshot
URIs: https://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: https://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBF
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb-src
URIs: https://mirror.example/sources
Suites: bookworm
Components: main

Enabled: no
Types: deb
URIs: https://elsewhere.example
Suites: bookworm
Components: main
"""


def test_deb822_sources() -> None:
    first, second = parse_deb822(DEB822)
    places = ("https://mirror.example/debian",), ("bookworm", "bookworm-updates")
    signed = {"Signed-By": "/usr/share/keyrings/debian-archive-keyring.gpg"}
    assert first == Archive(*places, ("main", "contrib"), signed)
    assert second.options["Signed-By"].splitlines()[1] == " -----BEGIN PGP PUBLIC KEY BLOCK-----"
    # A key that stands in the file survives a round trip.
    assert parse_deb822(second.stanza("deb", second.suites)) == [second]


def test_one_line_sources() -> None:
    text = """
    # deb http://off.example/debian bookworm main
    deb http://mirror.example/debian bookworm main contrib # fast
    deb-src http://mirror.example/debian bookworm main
    deb [arch=amd64 signed-by=/a.gpg,/b.gpg] https://other.example/apt stable main
    """
    first, second = parse_one_line(text)
    assert first == Archive(("http://mirror.example/debian",), ("bookworm",), ("main", "contrib"))
    assert second.options == {"Signed-By": "/a.gpg /b.gpg"}


@pytest.mark.parametrize(
    ("suite", "security"), [("bookworm", "bookworm-security"), ("stable", "x/updates")]
)
def test_main_archive(
    suite: str, security: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sources.list").write_text(
        f"deb http://security.example {security} main\n"
        f"deb http://fast.example {suite}-updates main\n"
        "deb http://other.example bookworm other\n"
        f"deb http://mirror.example {suite} main\n"
    )
    found = apt.archives(tmp_path)
    monkeypatch.setattr(apt, "archives", lambda: found)
    monkeypatch.setattr(apt, "os_release", lambda: {"VERSION_CODENAME": "bookworm"})
    archive = apt.main_archive()
    assert archive is not None
    assert archive.uris == ("http://mirror.example",)
    stanza = "Types: deb-src\nURIs: http://mirror.example\nSuites: trixie\nComponents: main\n"
    assert archive.stanza("deb-src", ["trixie"]) == stanza


def test_a_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(apt, "available", lambda: True)
    with pytest.raises(SetupError, match=r"missing packages: a b\n.*apt-get install .* a b"):
        apt.install(["a", "b"], "things")
    monkeypatch.setattr(apt, "available", lambda: False)
    with pytest.raises(SetupError, match="things is missing, and this machine has no apt"):
        apt.install(["a", "b"], "things")


def test_the_system_cluster_setting_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "createcluster.conf"
    settings.write_text("ssl = on\n")
    monkeypatch.setattr(apt, "_CREATE_CLUSTER", settings)
    with pytest.raises(RuntimeError, match="interrupted"), apt.no_new_cluster():
        assert "\ncreate_main_cluster = false\n" in settings.read_text()
        raise RuntimeError("interrupted")
    assert settings.read_text() == "ssl = on\n"


def test_install_script_is_complete_and_ordered() -> None:
    script = extension.install_script("/somewhere/packages")
    assert not re.search("@[A-Z_]+@", script)
    assert f"'/somewhere/packages/{version()}/python{{" in script
    assert f"'/somewhere/packages/{version()}/models'" in script
    parts = [path.read_text()[:60] for path in sorted((ROOT / "sql").glob("[0-9]*.sql"))]
    places = [script.index(part.split("@")[0]) for part in parts]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "place", ["/it's", '/a"b', "/a$$b", "/a\\b", "/a\nb", "/a@VERSION@", "/a{b}", "a/b", ""]
)
def test_install_script_refuses_paths_that_would_be_code(place: str) -> None:
    with pytest.raises(SetupError, match="move the project"):
        extension.install_script(place)


def inodes(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_ino for path in folder.rglob("*")}


def test_extension_files_are_written_only_where_they_change(tmp_path: Path) -> None:
    extension.write(tmp_path, "/a")
    names = {path.name for path in tmp_path.iterdir()}
    others = {path.name for path in (ROOT / "migrations").glob("pg_siamese--*.sql")}
    assert names == {"pg_siamese.control", f"pg_siamese--{version()}.sql"} | others
    before = inodes(tmp_path)
    extension.write(tmp_path, "/a")
    assert inodes(tmp_path) == before
    extension.write(tmp_path, "/b")
    script = tmp_path / f"pg_siamese--{version()}.sql"
    assert script.stat().st_ino != before[script]
    assert f"'/b/{version()}/" in script.read_text()
    # Which version is the default one is said last, when its script is there.
    assert list(extension.files("/b"))[-1] == "pg_siamese.control"


def test_stamps_follow_contents(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "a.py").write_text("1")
    stamp = Stamp(tmp_path, "x", "text", folder)
    assert not stamp.fresh()
    stamp.write()
    assert Stamp(tmp_path, "x", "text", folder).fresh()
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "a.pyc").write_text("compiled")
    assert Stamp(tmp_path, "x", "text", folder).fresh()
    (folder / "a.py").write_text("2")
    assert not Stamp(tmp_path, "x", "text", folder).fresh()
    # Parts don't run into each other.
    assert digest(["ab", "c"]) != digest(["a", "bc"])


def fake_system(folder: Path, major: int = 15) -> Installation:
    """An installation with a few empty files, in Debian's layout."""
    system = Installation(major, folder)
    for path in (
        *(system.bin / name for name in ("postgres", "initdb", "pg_ctl", "pg_config", "psql")),
        system.lib / "plpython3.so",
        system.share / "postgres.bki",
        system.extensions / "plpython3u.control",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    return system


def test_overlay_adds_files_and_leaves_the_system_alone(tmp_path: Path) -> None:
    system = fake_system(tmp_path / "usr")
    before = digest([tmp_path / "usr"])
    extra = tmp_path / "extra"
    for name in ("lib/vector.so", "extension/vector.control"):
        (extra / name).parent.mkdir(parents=True)
        (extra / name).write_text("ours")
    private = overlay.sync(system, tmp_path / "pg", [extra])
    assert (private.extensions / "vector.control").read_text() == "ours"
    assert (private.extensions / "plpython3u.control").is_symlink()
    assert (private.lib / "vector.so").read_text() == "ours"
    assert (private.share / "postgres.bki").read_text() == "postgres.bki"
    assert not (private.bin / "postgres").is_symlink()
    assert (private.bin / "psql").is_symlink()
    assert overlay.find(tmp_path / "pg").major == 15

    first = inodes(tmp_path / "pg")
    overlay.sync(system, tmp_path / "pg", [extra])
    assert inodes(tmp_path / "pg") == first
    # An upgrade of the system's packages comes through, a removed file goes.
    (system.bin / "postgres").write_text("a newer server")
    (extra / "extension" / "vector.control").unlink()
    overlay.sync(system, tmp_path / "pg", [extra])
    assert (private.bin / "postgres").read_text() == "a newer server"
    assert not (private.extensions / "vector.control").is_symlink()
    (system.bin / "postgres").write_text("postgres")
    assert digest([tmp_path / "usr"]) == before


def test_overlay_missing(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="make deps"):
        overlay.find(tmp_path)


def test_choice_of_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [fake_system(tmp_path / "usr", major) for major in (15, 17)]
    newest = found[1]
    (newest.lib / "plpython3.so").unlink()
    monkeypatch.setattr(postgres, "installed", lambda: found)
    # The newest that has all that is needed …
    assert postgres.choose(tmp_path / "pg") == found[0]
    (newest.lib / "plpython3.so").write_text("")
    assert postgres.choose(tmp_path / "pg") == found[1]
    # … but the one that data folders were made with, once there is one.
    overlay.sync(found[0], tmp_path / "pg", [])
    assert postgres.choose(tmp_path / "pg") == found[0]
    monkeypatch.setattr(postgres, "installed", lambda: [])
    assert postgres.choose(tmp_path / "pg") is None


def test_pgvector_must_have_hnsw(tmp_path: Path) -> None:
    system = fake_system(tmp_path)
    assert not pgvector.new_enough(system.extensions)
    control = system.extensions / "vector.control"
    control.write_text("default_version = '0.4.4'\n")
    assert not pgvector.new_enough(system.extensions)
    control.write_text("default_version = '0.10.0'\n")
    assert pgvector.new_enough(system.extensions)


def test_the_python_of_plpython(tmp_path: Path) -> None:
    (tmp_path / "plpython3.so").write_bytes(b"\0libpython3.14.so.1.0\0")
    assert postgres.python_of(tmp_path) == "3.14"
    (tmp_path / "plpython3.so").write_bytes(b"\0linked statically\0")
    assert postgres.python_of(tmp_path) == packages.OWN_PYTHON
    (tmp_path / "plpython3.so").write_bytes(b"\0libpython3.7m.so.1.0\0")
    with pytest.raises(SetupError, match=r"runs Python 3\.7: 3\.11 or later"):
        postgres.python_of(tmp_path)


def test_build_folder_moves_where_the_server_cannot_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(project, "ROOT", tmp_path)
    monkeypatch.setattr(project, "can_enter", lambda folder: False)
    folder = project.build_folder()
    try:
        assert folder.parent == Path("/var/tmp")
        assert (tmp_path / "build").resolve() == folder
        assert project.build_folder() == folder
    finally:
        folder.rmdir()
    folder.symlink_to(tmp_path)
    try:
        with pytest.raises((SetupError, FileExistsError)):
            project.build_folder()
    finally:
        folder.unlink()


def test_a_long_socket_path_is_avoided(tmp_path: Path) -> None:
    assert Cluster(tmp_path / "c").socket_folder == tmp_path / "c" / "socket"
    deep = Cluster(tmp_path / ("x" * 90) / "c")
    assert deep.socket_folder.parent == Path("/tmp")
    assert len(bytes(deep.socket_folder)) < 50
    assert "host=%2Ftmp%2Fpg_siamese-" in deep.dsn()
    assert "user%40x@/data%20base?" in deep.dsn("data base", "user@x")


def test_failures_of_programs_are_told() -> None:
    with pytest.raises(SetupError, match=r"^it failed\n.*\n  \| why$"):
        run(["sh", "-c", "echo why >&2; exit 3"], failure="it failed")
    with pytest.raises(SetupError, match="no-such-program: No such file"):
        run(["no-such-program"], failure="it failed")


def test_python_settings_do_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/x")
    assert "PYTHONPATH" not in clean_environment()
    assert clean_environment({"A": "1"})["A"] == "1"
