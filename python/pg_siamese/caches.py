"""Caches of libraries: in a temporary folder, gone when the process ends.

matplotlib keeps its list of fonts under the user's home, and torch makes a folder in /tmp when it
is imported. Neither is worth a file that stays: matplotlib's list takes 0.1 s to make.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import tempfile
from pathlib import Path

# By the variable that names the cache. A folder that the caller chose stays.
FOLDERS = {"MPLCONFIGDIR": "matplotlib", "TORCHINDUCTOR_CACHE_DIR": "torch"}


def set_aside() -> None:
    """Send the caches to a folder that is removed at exit, before the libraries are imported.

    The folder is made by the first library that writes to it: most commands need none.
    """
    missing = [name for name in FOLDERS if not os.environ.get(name)]
    if not missing:
        return
    folder = Path(tempfile.gettempdir()) / f"pg_siamese-{secrets.token_hex(16)}"
    for name in missing:
        os.environ[name] = str(folder / FOLDERS[name])
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
