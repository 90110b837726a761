"""Where DICOM instances come from: folders, zip files and DICOMDIR trees, one file at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Instance:
    """One DICOM file that may be loaded.

    Attributes:
        name: for messages, such as a path.
        read: returns the bytes of the file. It is called once, and not if the instance is stored.
        sop_uid: SOP Instance UID, if it is known before the file is read.
    """

    name: str
    read: Callable[[], bytes]
    sop_uid: str | None = None
