"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pg_siamese.files import open_whole, write_whole


def test_folders_are_made_and_text_is_utf8(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    assert write_whole(path, "é\n") == path
    assert path.read_bytes() == b"\xc3\xa9\n"
    assert write_whole(str(path), b"bytes") == path
    assert path.read_bytes() == b"bytes"
    assert list(path.parent.iterdir()) == [path]


def test_after_a_failure_the_previous_file_stays(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "a", b"previous")
    with pytest.raises(KeyboardInterrupt), open_whole(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"previous"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_meet_in_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with open_whole(path) as first, open_whole(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = write_whole(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
