"""Limits of image files that belong to a collection, not to the identity of its model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a collection.

    Attributes:
        max_bytes: largest file, or None for the model's limit.
        max_pixels: largest width x height of a file, or None for the model's limit.
    """

    max_bytes: int | None = None
    max_pixels: int | None = None


MODELS_OWN = Limits()
