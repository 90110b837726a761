"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_whole(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write a file that appears whole or not at all; return its path.

    Args:
        path: of the file. Missing folders are made, and a previous file is replaced.
        data: its content. Text is written as UTF-8.

    Raises:
        OSError: the file can't be written. A previous file stays as it was.
    """
    with open_whole(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return Path(path)


@contextmanager
def open_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing that appears when the body ends without an error.

    Until then it has another name in the same folder, and what was there stays.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
