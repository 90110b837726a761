"""The set-up of the image: engines, base image, what a build is given of this machine."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.tools.scripts import script
from tools import apt, base_image, docker, engine, project
from tools.apt import Archive, parse_deb822
from tools.docker import Variant
from tools.engine import Engine, NoEngineError
from tools.report import SetupError

Program = Callable[..., str]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Make docker programs of shell scripts, and let no other be found."""
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    found: list[str] = []
    monkeypatch.setattr(engine, "_clients", lambda: found)

    def make(name: str, body: str) -> str:
        found.append(str(script(tmp_path / "bin" / name, body)))
        return found[-1]

    return make


SILENT = 'case "$*" in --version) echo "Docker version 28.2.2, build x";; *) exit 1;; esac'


def version(text: str) -> str:
    return f'case "$*" in --version) echo "Docker version {text}";; version*) ;; *) exit 1;; esac'


def test_a_running_engine_is_found(program: Program) -> None:
    program("first", SILENT)
    assert engine.find() is None
    second = program("second", version("20.10.24+dfsg1, build 297e128"))
    assert engine.find() == Engine(second, second)
    assert engine.ensure() == Engine(second, second)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (version("20.10.24+dfsg1, build 297e128"), True),
        (version("22.06.0, build 1"), True),
        (version("28.2.2, build e6534b4"), False),
        ('case "$*" in "buildx version") ;; *) exit 1;; esac', True),
        ("exit 1", False),
    ],
)
def test_clients_that_can_build(program: Program, body: str, expected: bool) -> None:
    assert engine.builds(program("docker", body)) is expected


def test_the_builder_may_be_another_client(program: Program) -> None:
    """As where a newer client without buildx comes before Debian's on the PATH."""
    first = program("new", version("28.2.2, build x"))
    second = program("old", version("20.10.24, build x"))
    assert engine.find() == Engine(first, second)


def test_no_engine_is_one_clear_line(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    program("docker", SILENT)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NoEngineError, match="no Docker Engine runs"):
        engine.ensure()
    monkeypatch.setenv("DOCKER_HOST", "tcp://192.0.2.1:2375")
    with pytest.raises(NoEngineError, match=r"no engine answers at DOCKER_HOST=tcp://192\.0\.2\.1"):
        engine.ensure()


def test_an_engine_that_cannot_be_installed(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(apt, "candidate", lambda name: None)
    with pytest.raises(NoEngineError, match="apt has no package"):
        engine.ensure()
    monkeypatch.setattr(apt, "candidate", lambda name: "1" if name == "docker.io" else None)
    installed: list[list[str]] = []

    def refuse(packages: list[str], what: str) -> None:
        installed.append(packages)
        raise SetupError("no network")

    monkeypatch.setattr(apt, "install", refuse)
    with pytest.raises(NoEngineError, match="it can't be: no network"):
        engine.ensure()
    assert installed == [["docker.io"]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build folder of the test's own."""
    monkeypatch.setattr(engine, "build_folder", lambda: tmp_path)
    (tmp_path / "docker").mkdir()
    return tmp_path / "docker"


def test_an_engine_that_cannot_start_says_why(
    program: Program, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("docker", SILENT)
    script(tmp_path / "dockerd", "echo 'mount: operation not permitted'\nexit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(NoEngineError, match="operation not permitted"):
        engine.ensure()
    assert not (folder / "dockerd.pid").exists()


def test_the_engine_that_was_started_is_stopped_and_no_other(
    program: Program, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up = tmp_path / "up"
    program("docker", f'case "$*" in --version) echo version 20.1;; *) test -e {up};; esac')
    # Its name counts: a number in the file may be another program's by now.
    body = "import time, pathlib\npathlib.Path('/proc/self/comm').write_text('dockerd')\n"
    body += f"pathlib.Path('{up}').touch()\ntime.sleep(60)\n"
    script(tmp_path / "dockerd", body, sys.executable)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert not engine.stop()
    engine.ensure()
    pid = int((folder / "dockerd.pid").read_text())
    assert Path(f"/proc/{pid}").exists()
    assert engine.stop()
    assert not Path(f"/proc/{pid}").exists()
    other = subprocess.Popen(["sleep", "60"])
    try:
        (folder / "dockerd.pid").write_text(f"{other.pid}\n")
        assert not engine.stop()
        assert other.poll() is None
    finally:
        other.terminate()
        other.wait()


# --- the base image ------------------------------------------------------------------------------

KEYS = {"Signed-By": "/usr/share/keyrings/debian-archive-keyring.gpg"}


def test_sources_of_the_base_image() -> None:
    """The machine's own archives, with the other suite."""
    main = Archive(("https://a.example/debian",), ("bookworm", "bookworm-updates"), ("main",), KEYS)
    security = Archive(("https://b.example/security",), ("bookworm-security",), ("main",), KEYS)
    other = Archive(("https://c.example/apt",), ("stable",), ("main",))
    stanzas = base_image.stanzas(main, [main, other, security], "bookworm", "trixie")
    assert [parse_deb822(each) for each in stanzas] == [
        [Archive(main.uris, ("trixie", "trixie-updates"), ("main",), KEYS)],
        [Archive(security.uris, ("trixie-security",), ("main",), KEYS)],
    ]
    assert base_image.stanzas(
        Archive(main.uris, ("bookworm",), ("main", "contrib")), [other], "bookworm", "trixie"
    ) == [Archive(main.uris, ("trixie",), ("main",)).stanza("deb", ["trixie"])]
    # Testing gets its updates and security fixes in the one suite that it has.
    assert base_image.stanzas(main, [main, other, security], "bookworm", "forky") == [
        Archive(main.uris, ("forky",), ("main",), KEYS).stanza("deb", ["forky"])
    ]


def test_the_base_image_needs_debian(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(apt, "main_archive", lambda: None)
    with pytest.raises(SetupError, match="needs Debian with apt"):
        base_image.make(Engine("docker", "docker"), tmp_path, "trixie")


@pytest.mark.parametrize("variant", docker.VARIANTS)
def test_the_choice_of_a_base_image(
    variant: Variant, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def make(found: Engine, scratch: Path, suite: str) -> str:
        made.append(suite)
        return "made"

    monkeypatch.setattr(base_image, "make", make)
    monkeypatch.delenv("BASE_IMAGE", raising=False)
    official, own = f"debian:{variant.suite}-slim", f"pg_siamese-base:{variant.suite}"

    def choose(body: str) -> str:
        client = program("docker", body)
        return docker.choose_base(Engine(client, client), variant)

    assert choose(f'test "$*" = "image inspect {official}"') == official
    assert choose(f'test "$*" = "pull --quiet {official}"') == official
    assert choose(f'test "$*" = "image inspect {own}"') == own
    assert made == []
    assert choose("exit 1") == "made"
    assert made == [variant.suite]
    monkeypatch.setenv("BASE_IMAGE", "mine")
    assert choose("exit 1") == "mine"


def test_variants() -> None:
    """Each major has names of its own; the usual one has the plain ones too."""
    usual, other = docker.choose_variant(""), docker.choose_variant("18")
    assert docker.choose_variant("17") == usual
    assert usual.image == f"pg_siamese:{project.version()}"
    assert other.tags == [f"pg_siamese:{project.version()}-pg18"]
    assert usual.container == "pg_siamese" != other.container
    with pytest.raises(SetupError, match="POSTGRES_MAJOR=16: there are images of PostgreSQL 17"):
        docker.choose_variant("16")


# --- what a build is given of this machine -------------------------------------------------------


def test_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    own, system = tmp_path / "certificates", tmp_path / "system.pem"
    own.mkdir()
    system.write_text("SYSTEM\n")
    monkeypatch.setattr(docker, "ADDED", tmp_path / "added")
    assert docker.certificates(own, system) == ""
    (own / "b.crt").write_text("B")
    (own / "a.pem").write_text("A\n\n")
    (own / "README").write_text("no certificate")
    assert docker.certificates(own, system) == "SYSTEM\nA\nB\n"
    # Of the machine's own, its bundle has what its administrator added.
    for file in own.iterdir():
        file.unlink()
    (tmp_path / "added" / "company").mkdir(parents=True)
    (tmp_path / "added" / "company" / "proxy.crt").write_text("PROXY")
    assert docker.certificates(own, system) == "SYSTEM\n"


def test_settings_of_pip(tmp_path: Path) -> None:
    """Places of the network go along; folders of this machine don't."""
    first, second = tmp_path / "pip.conf", tmp_path / "user.conf"
    first.write_text(
        "[global]\nindex-url = https://one.example/simple\ncert = /etc/ssl/x.pem\n"
        "extra-index-url = file:///srv/simple\n  https://two.example/simple\n"
        "find-links = /srv/wheels\n"
    )
    second.write_text("[install]\ntrusted-host = one.example\n")
    missing = tmp_path / "missing.conf"
    assert docker.pip_settings({}, [first, second, missing]) == (
        "[global]\nindex-url = https://one.example/simple\n"
        "extra-index-url = https://two.example/simple\ntrusted-host = one.example\n"
    )
    changed = docker.pip_settings({"PIP_INDEX_URL": "https://three.example/simple"}, [first])
    assert "index-url = https://three.example/simple\n" in changed
    local = tmp_path / "local.conf"
    local.write_text("[global]\nextra-index-url = file:///srv/simple\n")
    assert docker.pip_settings({"PIP_FIND_LINKS": "/srv"}, [local, missing]) == ""


def test_a_drawn_password_is_kept_and_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POSTGRES_PASSWORD", raising=False)
    monkeypatch.setattr(engine, "build_folder", lambda: tmp_path)
    first = docker._password()
    assert len(first) >= 20
    assert docker._password() == first
    assert stat.S_IMODE((tmp_path / "docker" / "password").stat().st_mode) == 0o600
    monkeypatch.setenv("POSTGRES_PASSWORD", "given")
    assert docker._password() == "given"


def test_ci_passes_where_no_engine_can_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> Engine:
        raise NoEngineError("there is none")

    monkeypatch.setattr(engine, "find", lambda: None)
    monkeypatch.setattr(engine, "ensure", refuse)
    assert docker.main(["test", "--if-possible"]) == 0
    assert "isn't tested here: there is none" in capsys.readouterr().out
    assert docker.main(["test"]) == 1
    assert "error: there is none" in capsys.readouterr().err


def test_an_engine_lives_as_long_as_the_command_that_started_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[str] = []
    found = Engine("docker", "docker")
    monkeypatch.setattr(engine, "ensure", lambda: found)
    monkeypatch.setattr(engine, "stop", lambda: steps.append("stopped"))
    monkeypatch.setattr(docker, "build", lambda each, variant: steps.append("built"))
    monkeypatch.setattr(engine, "find", lambda: found)
    assert docker.main(["build"]) == 0
    assert steps == ["built"]
    monkeypatch.setattr(engine, "find", lambda: None)
    assert docker.main(["build"]) == 0
    assert steps == ["built", "built", "stopped"]
