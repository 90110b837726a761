"""Install the extension into a system's PostgreSQL, for ``make install``.

What it installs, with the default prefix:

    /usr/local/lib/pg_siamese/VERSION/pythonX.Y     link: packages for the server's Python
    /usr/local/lib/pg_siamese/VERSION/client        link: environment of the command
    /usr/local/lib/pg_siamese/VERSION/models        the encoders that ship
    /usr/local/lib/pg_siamese/VERSION/environments  targets of the links
    /usr/local/bin/pg_siamese                       the command

Control file and scripts go to the folders of ``pg_config``. A new environment is completed beside
the current one, and one rename switches to it. So a failure leaves everything unchanged. PGXS and a
compiler aren't needed, since nothing is compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools import environments, extension, packages, pgvector, postgres
from tools.installation import Installation
from tools.project import version
from tools.report import SetupError, command, run, say, step

_COMPLETE = "complete"  # the last file of an environment


@dataclass(frozen=True)
class Server:
    """The PostgreSQL to install into, as ``pg_config`` describes it."""

    pg_config: Path
    major: int
    lib: Path
    extensions: Path

    @property
    def of_debian(self) -> bool:
        """Whether it is in the place of Debian's packages."""
        return self.lib == Installation(self.major).lib


def ask(pg_config: Path) -> Server:
    """Ask pg_config. Raises ``SetupError``."""

    def ask_for(what: str) -> str:
        return run([pg_config, what], failure=f"{pg_config} {what} failed").strip()

    found = re.search(r"(\d+)", ask_for("--version"))
    if not found:
        raise SetupError(f"{pg_config} --version names no version")
    share = Path(ask_for("--sharedir"))
    return Server(pg_config, int(found[1]), Path(ask_for("--pkglibdir")), share / "extension")


def choose() -> Server | None:
    """Return the newest PostgreSQL, or else that of the pg_config on the PATH."""
    chosen = postgres.choose()
    found = chosen.bin / "pg_config" if chosen else shutil.which("pg_config")
    return ask(Path(found)) if found else None


# --- what is missing ------------------------------------------------------------------------------


def missing(server: Server | None) -> tuple[list[str], list[str]]:
    """Return Debian packages to install, and in words what else is missing."""
    if server is not None and not server.of_debian:
        return _missing_venv(), _missing_parts(server)
    major = server.major if server else postgres.distribution_major()
    system = Installation(major)
    wanted = system.missing()
    besides = []
    if not pgvector.new_enough(system.extensions):
        name = pgvector.package(system)
        if pgvector.is_packaged(name):
            wanted.append(name)
        else:
            besides.append(
                f"pgvector {pgvector.OLDEST} or later, of which this Debian has no package: "
                f"apt.postgresql.org has {name}, or build it from source"
            )
    return wanted + _missing_venv(), besides


def _missing_parts(server: Server) -> list[str]:
    parts = []
    if not (server.lib / "plpython3.so").exists():
        parts.append(f"PL/Python 3: there is no plpython3.so in {server.lib}")
    if not pgvector.new_enough(server.extensions):
        parts.append(
            f"pgvector {pgvector.OLDEST} or later: its vector.control is to be in "
            f"{server.extensions}"
        )
    return parts


def _missing_venv() -> list[str]:
    """Return the package without which Debian's Python makes no environments."""
    there = all(importlib.util.find_spec(name) for name in ("venv", "ensurepip"))
    return [] if there else [f"python{packages.OWN_PYTHON}-venv"]


def check(server: Server | None) -> Server:
    """Raise one ``SetupError`` that names everything that is missing."""
    wanted, besides = missing(server)
    lines = [f"also missing: {text}" for text in besides]
    if wanted:
        names = " ".join(wanted)
        lines.insert(0, f"apt-get install --no-install-recommends {names}")
        raise SetupError(
            "\n  ".join([f"missing packages: {names}", *lines, "then run make install again"])
        )
    if besides:
        raise SetupError("\n  ".join(["not everything is there", *lines]))
    if server is None:
        raise SetupError("no PostgreSQL found: name it with PG_CONFIG=/path/of/pg_config")
    return server


# --- the installation -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """The target folders. ``destdir`` precedes every path that is written, and is in no file."""

    prefix: Path
    destdir: str = ""

    @property
    def packages(self) -> Path:
        """The folder that the extension's SQL names."""
        return self.prefix / "lib" / "pg_siamese"

    def below(self, path: Path) -> Path:
        """Return the path to write for an installed path."""
        return Path(self.destdir + str(path)) if self.destdir else path


def install(server: Server, place: Place, client: bool = True) -> None:
    """Install packages, command, encoders and extension. Raises ``SetupError``.

    What exists is replaced once its successor is complete, and each step can be repeated.
    """
    os.umask(0o022)
    python = postgres.python_of(server.lib)
    real, extensions = place.below(place.packages), place.below(server.extensions)
    program = place.below(place.prefix / "bin" / "pg_siamese")
    for folder in (real, extensions, *([program.parent] if client else [])):
        _check_writable(folder)
    with _single_run(real):
        site = _environment(
            real,
            f"server-python{python}",
            environments.server_key(python),
            f"Installing the server's packages for Python {python}",
            lambda folder: environments.make_server(folder, python),
        )
        owned = [(packages.server_folder(real, python), environments.site_packages(site, python))]
        if client:
            made = _environment(
                real,
                "client",
                environments.client_key(),
                "Installing the command pg_siamese",
                environments.make_client,
            )
            owned.append((real / version() / "client", made))
        packages.write_models(real)
        before = [packages.switch(link, target) for link, target in owned]
        if client:
            packages.write_file(program, _program(place).encode(), 0o755)
        extension.write(extensions, place.packages, python)
        _remove_unused(real, before)
    where = f"PostgreSQL {server.major} ({extensions})"
    say(f"pg_siamese {version()} is installed for {where}.")


def _environment(real: Path, name: str, key: str, what: str, make: Callable[[Path], None]) -> Path:
    """Return a complete environment, and make it if none has this key."""
    folder = real / version() / "environments" / f"{name}-{key[:12]}"
    if not (folder / _COMPLETE).exists():
        with step(f"{what} into {folder}"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            make(folder)
            (folder / _COMPLETE).touch()
    return folder


def _program(place: Place) -> str:
    python = place.packages / version() / "client" / "bin" / "python"
    return f'#!/bin/sh\nexec {shlex.quote(str(python))} -I -m pg_siamese "$@"\n'


def _remove_unused(real: Path, before: Sequence[Path | None]) -> None:
    """Remove environments of this version that no link leads to.

    Sessions may still import from the one that was just replaced. So it stays until the next time,
    as does any that a process has mapped.
    """
    release = real / version()
    links = [path.resolve() for path in release.iterdir() if path.is_symlink()]
    kept = [path for path in (*links, *before) if path is not None]
    for folder in (release / "environments").iterdir():
        used = any(path == folder or folder in path.parents for path in kept)
        if not used and not _is_mapped(folder):
            shutil.rmtree(folder)


def _is_mapped(folder: Path) -> bool:
    """Return whether a process has, or may have, a file of this folder mapped."""
    if os.geteuid() != 0:
        return True
    name = os.fsencode(folder) + b"/"
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has just ended
            if name in maps.read_bytes():
                return True
    return False


@contextlib.contextmanager
def _single_run(real: Path) -> Iterator[None]:
    real.mkdir(parents=True, exist_ok=True)
    with (real / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_writable(folder: Path) -> None:
    there = folder
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK):
        raise SetupError(f"{there} can't be written: run it as root, or set PREFIX or DESTDIR")


def _print_next_steps(server: Server) -> None:
    others = [
        each for each in postgres.installed() if server.of_debian and each.major != server.major
    ]
    for each in others:
        say(f"For PostgreSQL {each.major} too: make install PG_CONFIG={each.bin / 'pg_config'}")
    say(
        "In each database that is to have it:\n"
        "  CREATE EXTENSION pg_siamese CASCADE;\n"
        "  SELECT * FROM siamese.register_shipped_models();"
    )


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="make install", description=__doc__)
    parser.add_argument("--pg-config", default="", help="of the PostgreSQL to install into")
    parser.add_argument("--prefix", default="", help="/usr/local; lib/ and bin/ are below it")
    parser.add_argument("--destdir", default="", help="goes before every path that is written")
    parser.add_argument("--client", default="", choices=("", "yes", "no"), help="the command too")
    chosen = parser.parse_args(arguments)
    server = check(ask(Path(chosen.pg_config)) if chosen.pg_config else choose())
    place = Place(Path(chosen.prefix or "/usr/local").absolute(), chosen.destdir)
    install(server, place, chosen.client != "no")
    _print_next_steps(server)


if __name__ == "__main__":
    sys.exit(main())
