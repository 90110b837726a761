"""Find the installed PostgreSQL, and as root install what it lacks."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from tools import apt, pgvector
from tools.installation import Installation
from tools.packages import OWN_PYTHON
from tools.report import SetupError

_PROGRAMS = Path("/usr/lib/postgresql")
_OLDEST = 15  # views with the invoker's rights
_OLDEST_PYTHON = (3, 11)


def installed() -> list[Installation]:
    """Return the installed versions with a server, the oldest first."""
    majors = [int(path.name) for path in _PROGRAMS.glob("[0-9]*") if path.name.isdigit()]
    found = (Installation(major) for major in sorted(majors) if major >= _OLDEST)
    return [each for each in found if (each.bin / "postgres").exists()]


def choose(overlay: Path | None = None) -> Installation | None:
    """Return the version to use: that of ``overlay``, so that its data folders still fit.

    Without one, it is the newest with all that is needed, else the newest, else None.
    """
    there = installed()
    complete = [each for each in there if not each.missing()]
    for each in complete:
        if overlay and Installation(each.major, overlay / "usr").bin.exists():
            return each
    return next(reversed(complete or there), None)


def ensure_installed(build: Path) -> Installation:
    """Return the PostgreSQL to use. As root, install what is missing.

    ``build`` is the build folder, which may not exist yet. If the caller isn't root, this raises
    ``SetupError`` with every missing package.
    """
    chosen = choose(build / "pg") or Installation(distribution_major())
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
    return chosen


def distribution_major() -> int:
    """Return the major version of the distribution's package ``postgresql``."""
    version = apt.candidate("postgresql")
    found = re.match(r"(\d+)", version or "")
    if found:
        return int(found[1])
    codename = apt.os_release().get("VERSION_CODENAME", "")
    known = {"bookworm": 15, "trixie": 17, "forky": 18}.get(codename)
    if known:
        return known
    raise SetupError(
        f"no PostgreSQL below {_PROGRAMS}, and no package to install: install PostgreSQL "
        f"{_OLDEST} or later with PL/Python 3, in Debian's layout"
    )


def python_of(lib: Path) -> str:
    """Return the version of the Python that PL/Python runs, as "3.13".

    ``lib`` is the folder of plpython3.so. Raises ``SetupError``.
    """
    linked = re.search(rb"libpython(3\.\d+)", (lib / "plpython3.so").read_bytes())
    if linked is None:  # linked statically, as other distributions do
        return OWN_PYTHON
    python = linked[1].decode()
    if tuple(map(int, python.split("."))) < _OLDEST_PYTHON:
        raise SetupError(
            f"PL/Python in {lib} runs Python {python}: {'.'.join(map(str, _OLDEST_PYTHON))} or "
            "later is needed"
        )
    return python
