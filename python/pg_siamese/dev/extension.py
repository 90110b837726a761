"""The extension's files: control file, install script, upgrade scripts."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pg_siamese.dev.project import ROOT, version
from pg_siamese.dev.report import SetupError, fail

REPLACEABLE = "-- @REPLACEABLE@\n"
# One statement: whatever holds a semicolon within quotes, dollar quotes or a comment goes with it.
_STATEMENT = re.compile(
    r"(?:\$(?P<tag>\w*)\$.*?\$(?P=tag)\$|'(?:[^']|'')*'|--[^\n]*|[^;])*?;", re.DOTALL
)
_REPLACED = re.compile(r"CREATE (?=FUNCTION|VIEW)")


def source() -> str:
    """Return the extension's SQL: the files of `sql/` in the order of their numbers."""
    files = sorted((ROOT / "sql").glob("[0-9]*.sql"))
    if not files:
        raise SetupError(f"there is no SQL file in {ROOT / 'sql'}")
    return "\n".join(file.read_text() for file in files)


def replaceable(script: str) -> str:
    """Return what an upgrade to an install script replaces: functions, views and all comments.

    Each function's body names the version, so every upgrade replaces every one of them.
    """
    text = re.sub(r"^\\.*\n|^--.*\n", "", script, flags=re.MULTILINE)
    result = []
    for found in _STATEMENT.finditer(text):
        statement = found[0].strip()
        if _REPLACED.match(statement):
            result.append(_REPLACED.sub("CREATE OR REPLACE ", statement, count=1))
        elif statement.startswith("COMMENT ON "):
            result.append(statement)
    return "\n\n".join(result) + "\n"


def _filled(text: str, site_packages: Path | str, of_version: str) -> str:
    place = str(site_packages)
    if not re.fullmatch(r"[^'\"\\$@\s][^'\"\\$@\n]*", place):
        raise SetupError(
            f"the path {place} has a quote, backslash, dollar or at sign in it, which can't stand "
            "in the install script: move the project"
        )
    return text.replace("@VERSION@", of_version).replace("@SITE_PACKAGES@", place)


def install_script(site_packages: Path | str) -> str:
    """Return the install script of the current version.

    `site_packages` is where PL/Python finds the server package: a constant in the script, not
    a setting, because whoever can set it runs code as the server.
    """
    return _filled(source(), site_packages, version())


def files(site_packages: Path | str) -> dict[str, str]:
    """Return name and content of every file of the extension for `SHAREDIR/extension`."""
    result = {
        "pg_siamese.control": (ROOT / "pg_siamese.control").read_text(),
        f"pg_siamese--{version()}.sql": install_script(site_packages),
    }
    for file in sorted((ROOT / "migrations").glob("pg_siamese--*.sql")):
        text = file.read_text()
        versions = file.stem.split("--")[1:]
        if len(versions) == 1:  # an earlier version, to upgrade from
            result[file.name] = _filled(text, site_packages, versions[0])
            continue
        if REPLACEABLE not in text:
            raise SetupError(f"{file} has no line {REPLACEABLE.strip()}")
        # On the way to the current version, what is passed through is what it was.
        target = versions[1]
        frozen = ROOT / "migrations" / f"pg_siamese--{target}.sql"
        script = source() if target == version() else frozen.read_text()
        text = text.replace(REPLACEABLE, replaceable(script))
        result[file.name] = _filled(text, site_packages, target)
    return result


def write(folder: Path, site_packages: Path | str) -> None:
    """Write the extension's files to a folder, each atomically, and only where they changed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files(site_packages).items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            temporary = folder / f".{name}.new"
            temporary.write_text(text)
            temporary.chmod(0o644)
            temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files, for a packager's own build; return the exit status."""
    parser = argparse.ArgumentParser(prog="pg_siamese.dev.extension", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--site-packages", required=True, help="where the server package will be")
    chosen = parser.parse_args(arguments)
    try:
        write(chosen.folder, chosen.site_packages)
    except (SetupError, OSError) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
