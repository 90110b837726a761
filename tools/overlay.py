"""Make a private overlay of the installed PostgreSQL, in which the embedded server runs.

PostgreSQL finds its folders relative to its own program file. So a copy of the programs at
``build/pg/usr/lib/postgresql/NN/bin``, with links to the system's files around it, is a complete
installation. Extensions can be added to it without root and without writing to the system's
folders.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from tools.installation import Installation
from tools.report import SetupError, run

# These look for files relative to themselves, after resolving links, so they must be copies.
_COPIED = frozenset(("postgres", "initdb", "pg_ctl", "pg_config"))


def find(overlay: Path) -> Installation:
    """Return the overlay in this folder. Raises ``SetupError`` if there is none."""
    majors = [path.name for path in (overlay / "usr" / "lib" / "postgresql").glob("[0-9]*")]
    if not majors:
        raise SetupError('PostgreSQL isn\'t set up: run "make deps"')
    return Installation(max(map(int, majors)), (overlay / "usr").resolve())


def sync(system: Installation, overlay: Path, extras: Iterable[Path]) -> Installation:
    """Make or update the overlay, and return it as an installation.

    Each folder of ``extras`` may have ``lib/`` and ``extension/``, whose files override the
    system's. Files are replaced one by one and atomically, so a running server isn't disturbed. A
    second run changes nothing and takes milliseconds.
    """
    private = Installation(system.major, overlay / "usr")
    folders = list(extras)
    lib = _entries(system.lib, *(folder / "lib" for folder in folders))
    extension = _entries(system.extensions, *(folder / "extension" for folder in folders))
    share = _entries(system.share)
    share.pop("extension", None)
    private.extensions.mkdir(parents=True, exist_ok=True)
    _link_all(share, private.share, keep={"extension"})
    _link_all(extension, private.extensions)
    _link_all(lib, private.lib)
    programs = _entries(system.bin)
    _link_all({k: v for k, v in programs.items() if k not in _COPIED}, private.bin, keep=_COPIED)
    for name in sorted(_COPIED & programs.keys()):
        _copy(programs[name], private.bin / name)
    return private


def verify(private: Installation) -> None:
    """Raise ``SetupError`` unless the overlay's programs use the overlay's folders."""
    for what, expected in (("--sharedir", private.share), ("--pkglibdir", private.lib)):
        said = run([private.bin / "pg_config", what], failure="pg_config failed").strip()
        if Path(said).resolve() != expected.resolve():
            raise SetupError(
                f"this PostgreSQL uses {said}, not {expected}: it isn't relocatable as "
                "Debian's is, so the embedded server can't run it"
            )


def _entries(*folders: Path) -> dict[str, Path]:
    """Return name and path of everything in these folders. Later folders override earlier ones."""
    return {path.name: path for folder in folders if folder.is_dir() for path in folder.iterdir()}


def _link_all(entries: dict[str, Path], folder: Path, keep: Iterable[str] = ()) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in set(os.listdir(folder)) - entries.keys() - set(keep):
        (folder / name).unlink()
    for name, target in entries.items():
        make_link(folder / name, str(target))


def make_link(link: Path, target: str) -> None:
    """Make a link, or let it lead elsewhere, by one rename."""
    if not link.is_symlink() or os.readlink(link) != target:
        temporary = link.with_name(f".new-{os.getpid()}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(link)


def _copy(source: Path, target: Path) -> None:
    """Copy a program unless the copy has its size and time."""
    there = target.stat() if target.exists() else None
    wanted = source.stat()
    same = there and (there.st_size, there.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns)
    if not same:
        temporary = target.with_name(f".new-{os.getpid()}")
        shutil.copy2(source, temporary)
        temporary.replace(target)
