"""The places of data on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from pg_siamese.datasets.base import DataNotFoundError


def data_folders(name: str) -> list[Path]:
    """Return the folders to look for the files of one data set in, in order.

    These are ``name`` in the folder that the environment variable ``PG_SIAMESE_DATA`` names, and
    ``../shared/data/name``.
    """
    root = os.environ.get("PG_SIAMESE_DATA")
    own = [Path(root).expanduser() / name] if root else []
    return [*own, Path.cwd().parent / "shared" / "data" / name]


def find_data(name: str, *patterns: str) -> Path:
    """Return the first file that matches one of the glob patterns in the folders of a data set.

    Raises:
        DataNotFoundError: there is none. The message names the folders and the patterns.
    """
    folders = data_folders(name)
    for folder in folders:
        for pattern in patterns:
            if found := sorted(folder.glob(pattern)):
                return found[0]
    raise DataNotFoundError(
        f"{name}: none of {', '.join(patterns)} is in {' or '.join(map(str, folders))}: put the "
        f"files there, or into the folder {name} of one that PG_SIAMESE_DATA names"
    )
