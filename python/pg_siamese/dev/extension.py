"""The extension's files: control file, install script, upgrade scripts."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pg_siamese.dev.project import ROOT, version
from pg_siamese.dev.report import SetupError, fail


def install_script(site_packages: Path | str) -> str:
    """Return the install script: the files of `sql/` in the order of their numbers.

    `site_packages` is where PL/Python finds the server package: a constant in the script, not
    a setting, because whoever can set it runs code as the server.
    """
    files = sorted((ROOT / "sql").glob("[0-9]*.sql"))
    if not files:
        raise SetupError(f"there is no SQL file in {ROOT / 'sql'}")
    place = str(site_packages)
    if not re.fullmatch(r"[^'\"\\$@\s][^'\"\\$@\n]*", place):
        raise SetupError(
            f"the path {place} has a quote, backslash, dollar or at sign in it, which can't stand "
            "in the install script: move the project"
        )
    text = "\n".join(file.read_text() for file in files)
    return text.replace("@VERSION@", version()).replace("@SITE_PACKAGES@", place)


def files(site_packages: Path | str) -> dict[str, str]:
    """Return name and content of every file of the extension for `SHAREDIR/extension`."""
    result = {
        "pg_siamese.control": (ROOT / "pg_siamese.control").read_text(),
        f"pg_siamese--{version()}.sql": install_script(site_packages),
    }
    for upgrade in sorted((ROOT / "migrations").glob("pg_siamese--*--*.sql")):
        text = upgrade.read_text()
        text = text.replace("@VERSION@", version()).replace("@SITE_PACKAGES@", str(site_packages))
        result[upgrade.name] = text
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
