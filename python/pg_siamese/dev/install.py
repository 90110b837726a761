"""`make install`: install the extension into a system's PostgreSQL, for its administrator.

The server package gets a virtual environment of its own below the prefix; control file and
scripts go where `pg_config` says. PGXS and a compiler aren't needed: nothing is compiled.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pg_siamese.dev import environments, extension, postgres
from pg_siamese.dev.project import version
from pg_siamese.dev.report import SetupError, fail, run, say, step


def find_pg_config() -> Path:
    """Return pg_config of the newest PostgreSQL, or else the one on the PATH."""
    chosen = postgres.choose()
    found = chosen.bin / "pg_config" if chosen else shutil.which("pg_config")
    if not found:
        raise SetupError("no PostgreSQL found: say where it is, with PG_CONFIG=/path/of/pg_config")
    return Path(found)


def install(pg_config: Path, prefix: Path, destdir: str = "") -> None:
    """Install server package and extension. Raises `SetupError`.

    `destdir` goes before every path that is written, but not before the one in the install
    script, as packagers expect.
    """
    os.umask(0o022)

    def below(path: Path) -> Path:
        return Path(destdir + str(path)) if destdir else path

    def ask(what: str) -> Path:
        return Path(run([pg_config, what], failure=f"{pg_config} {what} failed").strip())

    extensions, lib = ask("--sharedir") / "extension", ask("--pkglibdir")
    if not (lib / "plpython3.so").exists():
        raise SetupError(f"PL/Python 3 is missing: there is no plpython3.so in {lib}")
    postgres.check_python(lib)
    for folder in (below(prefix), below(extensions)):
        _check_writable(folder)
    with step(f"Installing the server package into {below(prefix)}"):
        environments.make_server(below(prefix))
    with step(f"Installing the extension into {below(extensions)}"):
        extension.write(below(extensions), environments.site_packages(prefix))
    if not (extensions / "vector.control").exists():
        say("pgvector is missing: install it too (Debian: postgresql-NN-pgvector).")
    say("In each database that is to have it: CREATE EXTENSION pg_siamese CASCADE")


def _check_writable(folder: Path) -> None:
    there = folder
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK):
        raise SetupError(f"{there} can't be written: run it as root, or set PREFIX or DESTDIR")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="make install", description=__doc__)
    parser.add_argument("--pg-config", default="", help="of the PostgreSQL to install into")
    parser.add_argument("--prefix", default="", help="of the server package's environment")
    parser.add_argument("--destdir", default="", help="goes before every path that is written")
    chosen = parser.parse_args(arguments)
    try:
        pg_config = Path(chosen.pg_config) if chosen.pg_config else find_pg_config()
        prefix = chosen.prefix or f"/usr/local/lib/pg_siamese/{version()}"
        install(pg_config, Path(prefix).absolute(), chosen.destdir)
    except (SetupError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
