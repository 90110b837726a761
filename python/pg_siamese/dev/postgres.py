"""Finding the installed PostgreSQL, and as root installing what is missing of it."""

from __future__ import annotations

import os
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from pg_siamese.dev import apt, pgvector
from pg_siamese.dev.installation import Installation
from pg_siamese.dev.report import SetupError

_PROGRAMS = Path("/usr/lib/postgresql")
_OLDEST = 15  # views with the invoker's rights


def installed() -> list[Installation]:
    """Return the installed versions of which there is a server, the oldest first."""
    majors = [int(path.name) for path in _PROGRAMS.glob("[0-9]*") if path.name.isdigit()]
    found = (Installation(major) for major in sorted(majors) if major >= _OLDEST)
    return [each for each in found if (each.bin / "postgres").exists()]


def choose(overlay: Path | None = None) -> Installation | None:
    """Return the version to use: that of `overlay`, so that its data folders keep fitting.

    Without one, the newest with all that is needed, or else the newest. None: nothing there.
    """
    there = installed()
    complete = [each for each in there if not each.missing()]
    for each in complete:
        if overlay and Installation(each.major, overlay / "usr").bin.exists():
            return each
    return next(reversed(complete or there), None)


def ensure_installed(build: Path) -> Installation:
    """Return the PostgreSQL to use; as root, install what is missing of it and for it.

    `build` is the build folder, which needn't exist yet. Raises `SetupError`, naming
    every missing package, where the caller isn't root.
    """
    chosen = choose(build / "pg") or Installation(_distribution_major())
    server = chosen.missing()
    packages = server + pgvector.missing_packages(chosen, build)
    if packages:
        if not (chosen.bin / "postgres").exists() and os.geteuid() == 0:
            apt.install(["postgresql-common"], "PostgreSQL's common files")
            quietly: AbstractContextManager[None] = apt.no_new_cluster()
        else:
            quietly = nullcontext()
        with quietly:
            apt.install(packages, "PostgreSQL, PL/Python and pgvector" if server else "packages")
    check_python(chosen.lib)
    return chosen


def _distribution_major() -> int:
    """Return the major version that the distribution's package `postgresql` stands for."""
    version = apt.candidate("postgresql")
    found = re.match(r"(\d+)", version or "")
    if found:
        return int(found[1])
    known = {"bookworm": 15, "trixie": 17}.get(apt.os_release().get("VERSION_CODENAME", ""))
    if known:
        return known
    raise SetupError(
        f"no PostgreSQL below {_PROGRAMS}, and no package to install: install PostgreSQL "
        f"{_OLDEST} or later with PL/Python 3, in Debian's layout"
    )


def check_python(lib: Path) -> None:
    """Refuse a Python that isn't the one PL/Python runs: their packages aren't exchangeable.

    `lib` is the folder of plpython3.so. Raises `SetupError`.
    """
    linked = re.search(rb"libpython(3\.\d+)", (lib / "plpython3.so").read_bytes())
    mine = f"{sys.version_info.major}.{sys.version_info.minor}"
    if linked and (theirs := linked[1].decode()) != mine:
        raise SetupError(
            f"PL/Python runs Python {theirs}, but {sys.executable} is Python {mine}: "
            f"run make with PYTHON=/usr/bin/python{theirs}"
        )
