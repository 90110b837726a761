"""Keep the server's Python packages and the encoders that ship below one folder.

``PACKAGES/VERSION/pythonX.Y`` is, or links to, a site-packages folder for that Python.
``PACKAGES/VERSION/models`` holds the ONNX files. PACKAGES is a constant in the extension's SQL. So
several versions, Pythons and PostgreSQL majors can be installed together.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tools import overlay
from tools.project import ROOT, version

OWN_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def server_folder(packages: Path, python: str) -> Path:
    """Return the folder, or link, of the server's packages for a Python, as "3.13"."""
    return packages / version() / f"python{python}"


def switch(link: Path, target: Path) -> Path | None:
    """Make a link lead to ``target`` by one rename, and return its previous target.

    It is relative, so that a packager may move both.
    """
    link.parent.mkdir(parents=True, exist_ok=True)
    before = link.resolve() if link.is_symlink() else None
    overlay.make_link(link, os.path.relpath(target, link.parent))
    return before


def write_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file whole and atomically, unless it exists with this content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.is_symlink() or path.read_bytes() != content:
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_bytes(content)
        temporary.chmod(mode)
        temporary.replace(path)


def write_models(packages: Path) -> None:
    """Write the encoders that ship below ``packages``, and remove those that no longer do."""
    folder = packages / version() / "models"
    shipped = {file.name: file.read_bytes() for file in (ROOT / "models").glob("*.onnx")}
    for name, content in shipped.items():
        write_file(folder / name, content)
    for file in folder.glob("*.onnx"):
        if file.name not in shipped:
            file.unlink()
