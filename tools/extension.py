"""Make the extension's files: control file, install script, upgrade scripts."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.packages import OWN_PYTHON, server_folder, write_file
from tools.project import ROOT, version
from tools.report import SetupError, command

REPLACEABLE = "-- @REPLACEABLE@\n"
# What PL/Python bodies begin with: the server package, or else the error of loading it.
_LOAD = """\
if 'pg_siamese @VERSION@' not in GD:
    failure = plpy.execute('SELECT siamese._load() AS failure')[0]['failure']
    if failure:
        return failure
"""
# One statement. A semicolon within quotes, dollar quotes or a comment does not end it.
_STATEMENT = re.compile(
    r"(?:\$(?P<tag>\w*)\$.*?\$(?P=tag)\$|'(?:[^']|'')*'|--[^\n]*|[^;])*?;", re.DOTALL
)
_BEFORE = re.compile(r"\A(?:\s+|(?:--|\\).*\n)*")
_REPLACED = re.compile(r"CREATE (?=FUNCTION|VIEW)")


def source() -> str:
    """Return the extension's SQL: the files of ``sql/`` in the order of their numbers."""
    files = sorted((ROOT / "sql").glob("[0-9]*.sql"))
    if not files:
        raise SetupError(f"there is no SQL file in {ROOT / 'sql'}")
    text = "\n".join(file.read_text() for file in files)
    of_set = _LOAD.replace("return failure", "return [failure]")
    return text.replace("# @LOAD@\n", _LOAD).replace("# @LOAD_OF_SET@\n", of_set)


def replaceable(script: str) -> str:
    """Return what an upgrade to an install script replaces: functions, views and all comments.

    The bodies of functions name the version. So every upgrade replaces all of them.
    """
    result = []
    for found in _STATEMENT.finditer(script):
        statement = _BEFORE.sub("", found[0]).strip()
        if _REPLACED.match(statement):
            result.append(_REPLACED.sub("CREATE OR REPLACE ", statement, count=1))
        elif statement.startswith("COMMENT ON "):
            result.append(statement)
    return "\n\n".join(result) + "\n"


def _filled(text: str, packages: Path | str, of_version: str, python: str = OWN_PYTHON) -> str:
    place = str(packages)
    if not re.fullmatch(r"/[^'\"\\$@\n{}]*", place):
        raise SetupError(
            f"the path {place} can't stand in the install script: it must be absolute, without "
            "quotes, backslashes, braces, dollar and at signs; move the project, or choose another"
        )
    # Scripts of versions before 0.3.0 hold the whole path of one Python's packages.
    own = server_folder(Path(place), python)
    text = text.replace("@VERSION@", of_version).replace("@PACKAGES@", place)
    return text.replace("@SITE_PACKAGES@", str(own))


def install_script(packages: Path | str) -> str:
    """Return the install script of the current version.

    PL/Python finds the server package below ``packages`` (see ``packages.py``). This is a constant
    in the script and not a setting. Whoever can change it runs code as the server.
    """
    return _filled(source(), packages, version())


def files(packages: Path | str, python: str = OWN_PYTHON) -> dict[str, str]:
    """Return name and content of every file of the extension for ``SHAREDIR/extension``.

    ``python`` is the server's, for scripts of old versions. The control file comes last, since it
    names the default version.
    """
    result = {f"pg_siamese--{version()}.sql": install_script(packages)}
    for file in sorted((ROOT / "migrations").glob("pg_siamese--*.sql")):
        text = file.read_text()
        versions = file.stem.split("--")[1:]
        if len(versions) == 1:  # an earlier version, to upgrade from
            result[file.name] = _filled(text, packages, versions[0], python)
            continue
        if REPLACEABLE not in text:
            raise SetupError(f"{file} has no line {REPLACEABLE.strip()}")
        # An upgrade to an earlier version makes what that version had.
        target = versions[1]
        frozen = ROOT / "migrations" / f"pg_siamese--{target}.sql"
        script = source() if target == version() else frozen.read_text()
        text = text.replace(REPLACEABLE, replaceable(script))
        result[file.name] = _filled(text, packages, target)
    return result | {"pg_siamese.control": (ROOT / "pg_siamese.control").read_text()}


def write(folder: Path, packages: Path | str, python: str = OWN_PYTHON) -> None:
    """Write the extension's files to a folder, each atomically, and only if it changed."""
    for name, text in files(packages, python).items():
        write_file(folder / name, text.encode())


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files for a packager's own build."""
    parser = argparse.ArgumentParser(prog="tools.extension", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packages", required=True, help="VERSION/pythonX.Y will be below it")
    chosen = parser.parse_args(arguments)
    write(chosen.folder, chosen.packages)


if __name__ == "__main__":
    sys.exit(main())
