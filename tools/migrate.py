"""Show installed and available versions of the extension, and upgrade, for ``make migrate``.

Run it as ``PYTHONPATH=. /usr/bin/python3 -m tools.migrate [--dsn …] [--show]``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tools import overlay, postgres
from tools.embedded import embedded
from tools.project import ROOT
from tools.report import SetupError, command, say

_INSTALLED = "SELECT extversion FROM pg_catalog.pg_extension WHERE extname = 'pg_siamese'"
_AVAILABLE = (
    "SELECT v.version, a.default_version = v.version,"
    " coalesce((SELECT u.path FROM pg_catalog.pg_extension_update_paths(v.name) AS u"
    " INNER JOIN pg_catalog.pg_extension AS x ON x.extversion = u.source"
    " WHERE x.extname = v.name AND u.target = v.version), '')"
    " FROM pg_catalog.pg_available_extension_versions AS v"
    " INNER JOIN pg_catalog.pg_available_extensions AS a ON a.name = v.name"
    " WHERE v.name = 'pg_siamese' ORDER BY v.version"
)
_UPGRADE = "BEGIN; ALTER EXTENSION pg_siamese UPDATE; SELECT siamese.renew_grants(); COMMIT"


def psql() -> Path:
    """Return psql: that of the overlay, else of the newest PostgreSQL, else of the PATH."""
    try:
        return overlay.find(ROOT / "build" / "pg").bin / "psql"
    except SetupError:
        chosen = postgres.choose()
        found = chosen.bin / "psql" if chosen else shutil.which("psql")
    if not found:
        raise SetupError("psql is missing: install PostgreSQL's client")
    return Path(found)


def run_sql(dsn: str, statements: str) -> list[list[str]]:
    """Run statements through psql, and return the rows as text. Raises ``SetupError``."""
    options = ["-XAtq", "-F", "\t", "-v", "ON_ERROR_STOP=1", "-d", dsn, "-f", "-"]
    done = subprocess.run(
        [psql(), *options], input=statements + ";\n", capture_output=True, text=True
    )
    if done.returncode:
        raise SetupError(f"psql: {done.stderr.strip()}")
    return [line.split("\t") for line in done.stdout.splitlines()]


def show(dsn: str) -> tuple[str, str]:
    """Print installed and available versions, and return the installed and the default one."""
    installed = run_sql(dsn, _INSTALLED)
    if not installed:
        raise SetupError(
            "the database has no extension pg_siamese: CREATE EXTENSION pg_siamese CASCADE"
        )
    version = installed[0][0]
    say(f"installed: {version}")
    default = ""
    for name, is_default, path in run_sql(dsn, _AVAILABLE):
        if is_default == "t":
            default = name
        if name != version and (path or is_default == "t"):  # not the versions of future releases
            what = f"by {path}" if path else f"no path from {version}"
            say(f"available: {name} ({what}{', the default' if is_default == 't' else ''})")
    if not default:
        raise SetupError("the server has no files of pg_siamese: make install")
    return version, default


def migrate(dsn: str, only_show: bool = False) -> None:
    """Show versions and upgrade a database to the default version. Raises ``SetupError``."""
    version, default = show(dsn)
    if version == default:
        say("Nothing to upgrade.")
    elif only_show:
        say(f"make migrate would upgrade to {default}.")
    else:
        run_sql(dsn, _UPGRADE)
        say(f"Upgraded from {version} to {default}. Sessions opened before must reconnect.")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="make migrate", description=__doc__)
    parser.add_argument("--dsn", help="the database; else that of the embedded cluster")
    parser.add_argument("--show", action="store_true", help="show versions, change nothing")
    chosen = parser.parse_args(arguments)
    os.umask(0o022)
    dsn = chosen.dsn
    if dsn is None:
        cluster = embedded()
        if not cluster.running():
            raise SetupError('the embedded cluster is down: run "make up", or name a --dsn')
        dsn = cluster.dsn()
    migrate(dsn, chosen.show)


if __name__ == "__main__":
    sys.exit(main())
