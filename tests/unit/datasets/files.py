"""Data sets written by hand."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pg_siamese.client.sources import png

CLINICAL_COLUMNS = {
    "breast_224": "split,row28,file,label,group",
    "pneumonia_224": "split,file,label,patient,row28,group",
    "ham10000_224": "split,row,file,label,lesion_id",
}


def idx_bytes(array: np.ndarray, code: int = 0x08) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.tobytes()


def write_clinical(
    folder: Path,
    name: str,
    rows: Sequence[str],
    pictures: Sequence[np.ndarray],
    columns: str = "",
) -> None:
    """Write a clinical set by the rows of its table, and their pictures."""
    columns = columns or CLINICAL_COLUMNS[name]
    place = columns.split(",").index("file")
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        for row, picture in zip(rows, pictures, strict=True):
            archive.writestr(row.split(",")[place], png(picture))
    (folder / f"{name}.csv").write_text("\n".join([columns, *rows]) + "\n")
