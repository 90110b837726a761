"""Groups of the images of a folder or a zip file, such as patients."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np

from pg_siamese.datasets.base import DataFormatError, Groups
from pg_siamese.datasets.folder import Member

GROUPS_FILE = "groups.csv"


def read_groups(data: bytes, source: PurePath) -> dict[str, str]:
    """Read a CSV file with the columns ``file``, relative to the CSV file, and ``group``.

    Args:
        data: the file.
        source: its path.

    Returns:
        The group of each image, by the name of its ``Member``.

    Raises:
        DataFormatError: it is not such a file.
    """
    rows = read_table(data, source, ("file", "group"))
    found: dict[str, str] = {}
    for number, row in enumerate(rows, 2):
        # Blanks around a name would make two patients of one, of which one could test the other.
        file, group = row["file"], (row["group"] or "").strip()
        if not file or not group:
            raise DataFormatError(f"{source}: row {number} lacks a value of file or group")
        name = str(source.parent / file)
        if found.setdefault(name, group) != group:
            raise DataFormatError(f'{source}: row {number} puts "{file}" into another group')
    return found


def read_table(data: bytes, source: PurePath, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read the rows of a CSV file that has these columns.

    Raises:
        DataFormatError: it is not such a file.
    """
    try:
        table = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        rows, found = list(table), table.fieldnames or ()
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataFormatError(f"{source}: not a CSV file in UTF-8: {error}") from error
    if not set(columns).issubset(found):
        wanted, shown = " and ".join(columns), ", ".join(found)[:80]
        raise DataFormatError(f"{source}: lacks the columns {wanted}; its first row: {shown}")
    return rows


def groups_of(members: Sequence[Member], groups: dict[str, str] | None) -> Groups | None:
    """Return the groups of images in their order, or None without groups.

    Raises:
        DataFormatError: an image has none.
    """
    if groups is None:
        return None
    for member in members:
        if member.name not in groups:
            raise DataFormatError(f"{member.name}: has no group in {GROUPS_FILE}")
    return np.array([groups[member.name] for member in members], np.str_)
