"""Limits of image files that belong to a collection, not to the identity of its model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # searches by a stored image need no image library
    from pg_siamese_server.encoding.specification import InputSpec


@dataclass(frozen=True)
class Limits:
    """What a collection allows.

    Attributes:
        max_bytes: largest file, or None for the model's limit.
        max_pixels: largest width x height of a file, or None for the model's limit.
    """

    max_bytes: int | None = None
    max_pixels: int | None = None

    def of(self, spec: InputSpec) -> InputSpec:
        """Return a model's input with these limits in place of its own."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(spec, **given) if given else spec


MODELS_OWN = Limits()
