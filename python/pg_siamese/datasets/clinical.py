"""Clinical images at 224 pixels and more: a zip file, and a CSV file with a row per picture.

The splits are the published ones. Lesions, patients and repeated pictures are in several of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pg_siamese.datasets.base import SPLITS, DataFormatError, DataNotFoundError
from pg_siamese.datasets.folder import Member
from pg_siamese.datasets.groups import read_table
from pg_siamese.datasets.names import CLASS_NAMES
from pg_siamese.datasets.places import find_data

# The columns whose values make two pictures of one set belong together.
_GROUP_COLUMNS = {
    "breast_224": ("group",),
    "pneumonia_224": ("patient", "group"),
    "ham10000_224": ("lesion_id",),
}
# PneumoniaMNIST's own test split: Kaggle's has other pictures, too.
OFFICIAL = "pneumonia_224/official"
NAMES = (*_GROUP_COLUMNS, OFFICIAL)


@dataclass(frozen=True)
class ClinicalSet:
    """One set, before its images are decoded.

    Attributes:
        name: the data set's name.
        archive: the zip file.
        table: the CSV file.
        members: the images, with their splits and classes.
        classes: names of the classes, in the order of their numbers.
        groups: the group of each image by its name in the archive.
    """

    name: str
    archive: Path
    table: Path
    members: list[Member]
    classes: tuple[str, ...]
    groups: dict[str, str]


def find_clinical(name: str) -> ClinicalSet:
    """Find a set by its name, and read its table.

    Raises:
        DataNotFoundError: its files are in none of their folders.
        DataFormatError: there is no such set, or its table isn't what it should be.
    """
    if name not in NAMES:
        raise DataFormatError(f"clinical:{name}: there are: {', '.join(NAMES)}")
    stem = name.partition("/")[0]
    archive = find_data("clinical", f"{stem}.zip")
    table = archive.with_suffix(".csv")
    if not table.is_file():
        raise DataNotFoundError(f"clinical:{name}: {table} is missing")
    columns = _GROUP_COLUMNS[stem]
    wanted = ("split", "file", "label", *columns, *(("row28",) if name == OFFICIAL else ()))
    rows = read_table(table.read_bytes(), table, wanted)
    classes = CLASS_NAMES[stem]
    names = {str(number): label for number, label in enumerate(classes)}
    for number, row in enumerate(rows, 2):
        if not row["file"] or row["split"] not in SPLITS or row["label"] not in names:
            raise DataFormatError(
                f'{table}: row {number} has file "{row["file"]}", split "{row["split"]}" and '
                f'label "{row["label"]}"'
            )
    if name == OFFICIAL:
        rows = [row for row in rows if row["split"] != "test" or row["row28"]]
    members = [Member(row["file"], names[row["label"]], row["split"]) for row in rows]
    groups = _joined((row["file"], [f"{c} {row[c]}" for c in columns if row[c]]) for row in rows)
    return ClinicalSet(name.replace("/", "_"), archive, table, members, classes, groups)


def _joined(rows: Iterable[tuple[str, list[str]]]) -> dict[str, str]:
    """Return each file's group: files that share a mark belong together, by way of others, too."""
    above: dict[str, str] = {}

    def root(mark: str) -> str:
        while (up := above.setdefault(mark, mark)) != mark:
            mark = up
        return mark

    found = {}
    for file, marks in rows:
        first, *others = marks or [f"file {file}"]
        for other in others:
            above[root(other)] = root(first)
        found[file] = first
    return {file: root(first) for file, first in found.items()}
