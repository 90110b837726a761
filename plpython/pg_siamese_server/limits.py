"""What a collection sets for its image files, apart from the identity of its model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a collection, and the window of its DICOM images.

    Attributes:
        max_bytes: largest file, or None for the model's limit.
        max_pixels: largest width x height of a file, or None for the model's limit.
        dicom_window: window to render grey DICOM images with (``encoding.windows``), or None for
            the file's own.
    """

    max_bytes: int | None = None
    max_pixels: int | None = None
    dicom_window: str | None = None


MODELS_OWN = Limits()
