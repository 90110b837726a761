"""Know the project's paths, version and server user."""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tools.report import SetupError, say

ROOT = Path(__file__).resolve().parents[1]
SERVER_USER = "postgres"
TELEMETRY_OFF = "ORT_DISABLE_TELEMETRY"  # of ONNX Runtime (see the server package)


@cache
def version() -> str:
    """Return the project's version, from ``pg_siamese.control``.

    Raises ``SetupError`` if a Python package has another one. A session refuses to run if extension
    and package differ.
    """
    control = (ROOT / "pg_siamese.control").read_text()
    found = re.search(r"^default_version\s*=\s*'([^']+)'", control, re.MULTILINE)
    if not found:
        raise SetupError("pg_siamese.control has no default_version")
    for package in ("plpython/pg_siamese_server", "python/pg_siamese"):
        text = (ROOT / package / "__init__.py").read_text()
        theirs = re.search(r'^__version__\s*=\s*"([^"]+)"', text, re.MULTILINE)
        if not theirs or theirs[1] != found[1]:
            raise SetupError(
                f"{package}/__init__.py says version {theirs[1] if theirs else 'nothing'}, "
                f"pg_siamese.control says {found[1]}: make them equal"
            )
    return found[1]


def server_user() -> pwd.struct_passwd | None:
    """Return the unprivileged user that runs the server if the caller is root, else None.

    PostgreSQL refuses to run as root. PostgreSQL's Debian package creates the user.
    """
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(SERVER_USER)
    except KeyError:
        raise SetupError(
            f'there is no user "{SERVER_USER}" to run the server: run "make deps"'
        ) from None


def digest(parts: Iterable[str | bytes | Path]) -> str:
    """Return a hash of texts, and of files by name and content. Folders include all below them."""
    result = hashlib.sha256()

    def add(data: bytes) -> None:
        result.update(len(data).to_bytes(8, "big") + data)

    for part in parts:
        if not isinstance(part, Path):
            add(part.encode() if isinstance(part, str) else part)
            continue
        files = sorted(part.rglob("*")) if part.is_dir() else [part]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                add(str(file.relative_to(part)).encode())
                add(file.read_bytes())
    return result.hexdigest()


def can_enter(folder: Path) -> bool:
    """Return whether the server's user can enter a folder, which is true unless run by root."""
    user = server_user()
    if user is None:
        return True
    done = subprocess.run(
        ["/usr/bin/test", "-x", folder],
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        cwd="/",
    )
    return done.returncode == 0


def build_folder() -> Path:
    """Return the real path of the build folder, and make it if necessary.

    It is ``build/`` in the project. If the server's user can't enter the project, ``build`` links
    to a folder under /var/tmp. A clone under a home folder of mode 700 is such a case.
    """
    link = ROOT / "build"
    if not link.is_symlink() and can_enter(ROOT):
        link.mkdir(exist_ok=True)
        return link.resolve()
    folder = Path("/var/tmp") / f"pg_siamese-{digest([str(ROOT)])[:12]}"
    folder.mkdir(mode=0o755, exist_ok=True)
    # Anyone can make a folder in /var/tmp, so don't use anyone else's.
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        raise SetupError(f"{folder} belongs to someone else: remove it, or move the project")
    if link.is_symlink():
        if link.resolve() != folder:
            link.unlink()
    elif link.exists():
        raise SetupError(
            f'the user "{SERVER_USER}" can no longer enter {ROOT}: run "make clean" first'
        )
    if not link.is_symlink():
        link.symlink_to(folder)
        say(f'The user "{SERVER_USER}" can\'t enter {ROOT}: build is a link to {folder}.')
    return folder


class Stamp:
    """A file under ``build/`` with the hash of the inputs of a step's last run."""

    def __init__(self, build: Path, name: str, *parts: str | bytes | Path) -> None:
        self.path = build / "stamps" / name
        self.key = digest(parts)

    def fresh(self) -> bool:
        """Return whether the step was last done with the same parts."""
        try:
            return self.path.read_text() == self.key
        except FileNotFoundError:
            return False

    def write(self) -> None:
        """Record that the step was done."""
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(self.key)

    def remove(self) -> None:
        """Remove the record, before a step that may fail half-way."""
        self.path.unlink(missing_ok=True)
