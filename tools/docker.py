"""Build, run and test the images for ``make docker-build`` and its relatives.

The environment's POSTGRES_MAJOR chooses PostgreSQL's major version: 17, the default, or 18.

Run it as ``PYTHONPATH=. /usr/bin/python3 -m tools.docker build|up|down|test|base``.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tools import base_image, engine
from tools.cluster import DATABASE, SETTINGS, SUPERUSER, THROWAWAY
from tools.engine import Engine, NoEngineError
from tools.project import ROOT, build_folder, version
from tools.report import SetupError, clean_environment, command, run, say, step

CERTIFICATES = ROOT / "docker" / "certificates"
ADDED = Path("/usr/local/share/ca-certificates")  # by the machine's administrator
PORT = 5432
_PROXIES = ("http_proxy", "https_proxy", "no_proxy")
_PIP_SETTINGS = ("index-url", "extra-index-url", "trusted-host", "proxy")
_HEALTHY_SECONDS = 120


@dataclass(frozen=True)
class Variant:
    """The image of one major version of PostgreSQL, on the suite of Debian that has it."""

    major: int
    suite: str
    volume_at: str

    @property
    def official_base(self) -> str:
        """Debian's own image of the suite."""
        return f"debian:{self.suite}-slim"

    @property
    def tags(self) -> list[str]:
        """All names of the image, the main one first."""
        usual = [f"pg_siamese:{version()}", "pg_siamese:latest"]
        own = f"pg_siamese:{version()}-pg{self.major}"
        return [*usual, own] if self == VARIANTS[0] else [own]

    @property
    def image(self) -> str:
        """Main name of the image."""
        return self.tags[0]

    @property
    def container(self) -> str:
        """Name of the container of ``make docker-up``, and of its volume."""
        return "pg_siamese" if self == VARIANTS[0] else f"pg_siamese-pg{self.major}"


# The first is the default.
VARIANTS = (
    Variant(17, "trixie", "/var/lib/postgresql/data"),
    Variant(18, "forky", "/var/lib/postgresql"),
)


def choose_variant(major: str) -> Variant:
    """Return the variant of a major version, by default the usual one. Raises ``SetupError``."""
    for each in VARIANTS:
        if major in ("", str(each.major)):
            return each
    there = " and ".join(str(each.major) for each in VARIANTS)
    raise SetupError(f"POSTGRES_MAJOR={major}: there are images of PostgreSQL {there}")


# --- build ----------------------------------------------------------------------------------------


def choose_base(found: Engine, variant: Variant) -> str:
    """Return the base image: BASE_IMAGE, else Debian's, else one made here.

    Debian's is fetched if it is missing. If that fails, the base image is made, unless an earlier
    run made it.
    """
    if chosen := os.environ.get("BASE_IMAGE"):
        return chosen
    official, own = variant.official_base, base_image.tag(variant.suite)
    if found.has(official):
        return official
    try:
        with step(f"Fetching {official}"):
            found.run("pull", "--quiet", official)
        return official
    except SetupError as error:
        say(str(error).splitlines()[-1].strip(" |"))
        say(f"Taking {own} instead, made from Debian's archive.")
    if found.has(own):
        return own
    return base_image.make(found, engine.folder(), variant.suite)


def certificates(folder: Path = CERTIFICATES, system: Path | None = None) -> str:
    """Return the certificates that the build is to trust, in PEM, or "" if it needs none.

    They are this machine's bundle with the files of ``folder``. A build needs them if there are
    such files, or if the administrator added certificates to the machine.
    """
    own = sorted(file for suffix in ("crt", "pem") for file in folder.glob(f"*.{suffix}"))
    added = any(ADDED.rglob("*.crt"))
    if not own and not added and "SSL_CERT_FILE" not in os.environ:
        return ""
    usual = ssl.get_default_verify_paths().cafile, "/etc/ssl/certs/ca-certificates.crt"
    bundle = system or next((Path(p) for p in usual if p and Path(p).exists()), None)
    files = [*([bundle] if bundle else []), *own]
    return "".join(file.read_text().rstrip() + "\n" for file in files)


def pip_settings(environment: Mapping[str, str], files: Sequence[Path]) -> str:
    """Return the machine's settings of pip that reach beyond this machine, as a pip.conf, or "".

    A build lacks folders and files of this machine.
    """
    settings: dict[str, str] = {}
    for file in files:
        parser = configparser.RawConfigParser()
        with contextlib.suppress(OSError, configparser.Error):
            parser.read_string(file.read_text())
        for section in ("global", "install"):
            if parser.has_section(section):
                settings |= dict(parser[section])
    for name in _PIP_SETTINGS:
        variable = "PIP_" + name.upper().replace("-", "_")
        if environment.get(variable):
            settings[name] = environment[variable]
    lines = []
    for name in _PIP_SETTINGS:
        values = [each for each in settings.get(name, "").split() if not _is_local(each)]
        if values:
            lines.append(f"{name} = {' '.join(values)}")
    return "\n".join(["[global]", *lines, ""]) if lines else ""


def _is_local(value: str) -> bool:
    return value.startswith(("file:", "/", ".", "~"))


def _pip_files() -> list[Path]:
    """Return pip's configuration files, the one with the highest priority last."""
    home = Path.home()
    own = os.environ.get("XDG_CONFIG_HOME", "")
    files = [Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf"), home / ".pip" / "pip.conf"]
    files.append(Path(own or home / ".config") / "pip" / "pip.conf")
    if chosen := os.environ.get("PIP_CONFIG_FILE"):
        files.append(Path(chosen))
    return files


@contextlib.contextmanager
def _secrets() -> Iterator[list[str]]:
    """Write the build's secrets to a private folder, and yield the options that pass them on.

    Secrets stay in no layer, and make no other machine's layers stale.
    """
    with tempfile.TemporaryDirectory(prefix="secrets-", dir=engine.folder()) as name:
        options = []
        for secret, text in (
            ("certificates", certificates()),
            ("pip", pip_settings(os.environ, _pip_files())),
        ):
            if text:
                path = Path(name) / secret
                path.write_text(text)
                options += ["--secret", f"id={secret},src={path}"]
        yield options


def _revision() -> str:
    with contextlib.suppress(SetupError):
        return run(["git", "-C", ROOT, "rev-parse", "HEAD"], failure="git failed").strip()
    return "unknown"


def build(found: Engine, variant: Variant) -> None:
    """Build the image, quickly if nothing changed. Raises ``SetupError``."""
    base = choose_base(found, variant)
    # The machine's own network, since its proxies and name servers may be unreachable from another.
    options = ["--network", "host", "--build-arg", f"BASE_IMAGE={base}"]
    options += ["--build-arg", f"POSTGRES_MAJOR={variant.major}"]
    options += ["--build-arg", f"VERSION={version()}", "--build-arg", f"REVISION={_revision()}"]
    for name in _PROXIES:
        if name in os.environ or name.upper() in os.environ:
            options += ["--build-arg", name if name in os.environ else name.upper()]
    options += [word for tag in variant.tags for word in ("--tag", tag)]
    with _secrets() as secret_options, step(f"Building the image {variant.image}"):
        found.build(*options, *secret_options, "--file", ROOT / "docker" / "Dockerfile", ROOT)
    size = int(found.run("image", "inspect", "--format", "{{.Size}}", variant.image))
    say(f"{variant.image}: {size / 1e9:.2f} GB")


# --- containers -----------------------------------------------------------------------------------


def _wait_healthy(found: Engine, container: str) -> None:
    deadline = time.monotonic() + _HEALTHY_SECONDS
    while time.monotonic() < deadline:
        state = json.loads(found.run("inspect", "--format", "{{json .State}}", container))
        if not state["Running"]:
            break
        if state["Health"]["Status"] == "healthy":
            return
        time.sleep(0.2)
    # The server's own messages go to stderr, and docker repeats them there.
    done = subprocess.run(
        [found.client, "logs", "--tail", "10", container], capture_output=True, text=True
    )
    last = "".join(f"\n  | {line}" for line in (done.stdout + done.stderr).splitlines())
    raise SetupError(f"the server in container {container} didn't start{last}")


def _start(
    found: Engine,
    image: str,
    container: str,
    options: Sequence[str],
    password: str,
    port: int | None,
    arguments: Sequence[str] = (),
) -> int:
    published = f"127.0.0.1:{port or ''}:{PORT}"
    # The environment passes the password, since everybody can read a command line.
    command = [found.client, "run", "--detach", "--name", container, "--publish", published]
    command += ["--env", "POSTGRES_PASSWORD", "--env", f"POSTGRES_DB={DATABASE}"]
    run(
        [*command, "--shm-size", "256m", *options, image, *arguments],
        env=clean_environment({"POSTGRES_PASSWORD": password}),
        failure=f"the container {container} could not be started",
    )
    _wait_healthy(found, container)
    return _port(found, container)


def _port(found: Engine, container: str) -> int:
    return int(found.run("port", container, str(PORT)).splitlines()[0].rpartition(":")[2])


def _dsn(port: int, password: str = "", database: str = DATABASE) -> str:
    secret = f":{quote(password, safe='')}" if password else ""
    return f"postgresql://{SUPERUSER}{secret}@127.0.0.1:{port}/{database}"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return True
    return False


def _has_volume(found: Engine, volume: str) -> bool:
    return volume in found.run("volume", "ls", "--quiet").splitlines()


def _password() -> str:
    """Return the password of ``make docker-up``: POSTGRES_PASSWORD, or one drawn once and kept."""
    if given := os.environ.get("POSTGRES_PASSWORD"):
        return given
    file = engine.folder() / "password"
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(secrets.token_urlsafe(18) + "\n")
    return file.read_text().strip()


def up(found: Engine, variant: Variant) -> None:
    """Start the image with a volume of its own, unless it runs."""
    if not found.has(variant.image):
        build(found, variant)
    name = variant.container
    if found.exists(name):
        found.run("start", name)
        _wait_healthy(found, name)
        port = _port(found, name)
    else:
        if _has_volume(found, name) and not (engine.folder() / "password").exists():
            say(f"The volume {name} is there already: the password that it was made with holds.")
        chosen = os.environ.get("PORT")
        wanted = int(chosen) if chosen else PORT if _is_free(PORT) else None
        with step(f"Starting the container {name}"):
            options = ["--volume", f"{name}:{variant.volume_at}"]
            port = _start(found, variant.image, name, options, _password(), wanted)
    say(f"PostgreSQL is up: psql {_dsn(port)}")
    if not os.environ.get("POSTGRES_PASSWORD"):
        say(f"The password drawn for a new volume is in {engine.folder() / 'password'}.")


def down(found: Engine | None, variant: Variant, volume: bool) -> None:
    """Stop and remove the container. Its data stay in the volume unless ``volume`` is set."""
    if found is None:
        say("No Docker Engine runs.")
        return
    if found.exists(variant.container):
        with step(f"Stopping the container {variant.container}"):
            found.run("stop", "--time", "60", variant.container)
            found.run("rm", variant.container)
    if volume:
        found.run("volume", "rm", "--force", variant.container)
    if not found.run("ps", "--quiet"):
        engine.stop()


# --- tests ----------------------------------------------------------------------------------------


def test(found: Engine, variant: Variant, arguments: Sequence[str]) -> int:
    """Build, and run the image's tests and the database's over TCP. Return the exit status."""
    build(found, variant)
    python = build_folder() / "client" / "bin" / "python"
    password = secrets.token_urlsafe(18)
    container = f"pg_siamese-test-{os.getpid()}"
    settings = SETTINGS | THROWAWAY
    words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    try:
        with step("Starting a container for the database tests"):
            port = _start(found, variant.image, container, [], password, None, words)
        tests = [*arguments] if arguments else ["tests/docker", "tests/database"]
        # Tests of clusters on this machine don't concern the image.
        tests += ["--ignore=tests/database/test_cluster.py"]
        done = subprocess.run(
            [python, "-m", "pytest", *tests],
            cwd=ROOT,
            env=clean_environment(
                {
                    "PG_SIAMESE_TEST_DSN": _dsn(port, password, "postgres"),
                    "PG_SIAMESE_TEST_CONTAINER": container,
                    "PG_SIAMESE_TEST_IMAGE": variant.image,
                    "PG_SIAMESE_TEST_DOCKER": found.client,
                }
            ),
        )
    finally:
        if found.exists(container):
            found.run("rm", "--force", "--volumes", container)
    return done.returncode


@contextlib.contextmanager
def _running() -> Iterator[Engine]:
    """Provide an engine for one command, and stop it at the end if it was started for it."""
    before = engine.find() is not None
    found = engine.ensure()
    try:
        yield found
    finally:
        if not before:
            engine.stop()


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="tools.docker", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="build the image")
    commands.add_parser("base", help="make the base image from Debian's archive")
    commands.add_parser("up", help="start a container")
    commands.add_parser("down", help="stop it").add_argument(
        "--volume", action="store_true", help="remove its data too"
    )
    testing = commands.add_parser("test", help="run the tests against the image")
    testing.add_argument(
        "--if-possible", action="store_true", help="succeed if no engine is available"
    )
    chosen, rest = parser.parse_known_args(arguments)
    if rest and chosen.command != "test":
        parser.error(f"unknown: {' '.join(rest)}")
    # As Ctrl-C: containers are removed, and an engine that was started is stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        variant = choose_variant(os.environ.get("POSTGRES_MAJOR", ""))
        if chosen.command == "up":
            up(engine.ensure(), variant)
        elif chosen.command == "down":
            down(engine.find(), variant, chosen.volume)
        else:
            with _running() as found:
                if chosen.command == "build":
                    build(found, variant)
                elif chosen.command == "base":
                    base_image.make(found, engine.folder(), variant.suite)
                else:
                    return test(found, variant, rest)
    except NoEngineError as error:
        if not getattr(chosen, "if_possible", False):
            raise
        say(f"The image isn't tested here: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
