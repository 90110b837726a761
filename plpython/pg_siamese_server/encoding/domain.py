"""Know what an encoder was calibrated for, to tell its own kinds of images from all others.

An encoder gives every image a vector, a page of text too. It lies somewhere among those of X-rays.
But it differs from them not only in the ways in which X-rays differ from each other. So a domain is
a few balls around centres of vectors. Their space is shrunk along the directions in which images of
one kind differ most. That is a Mahalanobis distance of low rank.
"""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server.errors import ModelError

MAX_CENTRES = 1024


@dataclass(frozen=True)
class Domain:
    """The union of balls in a shrunk space of prepared vectors (see ``vectors.prepare``).

    Attributes:
        centres: int8 (count, dimension), in rows. Times ``scale`` they are the centres.
        scale: the step of these numbers.
        limits: squared radius of each ball.
        directions: int8 (rank, dimension), in rows, to shrink along. Orthogonal except for
            rounding, and of any length.
        shrink: part of a length to take away along each direction.
    """

    centres: bytes
    scale: float
    limits: tuple[float, ...]
    directions: bytes = b""
    shrink: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check that the parts fit together. Raises ``ModelError``."""
        if not all(is_number(part) and part > 0 for part in (self.scale, *self.limits)):
            raise _domain_error("Its scale and limits must be finite numbers above 0.")
        if not 1 <= len(self.limits) <= MAX_CENTRES:
            raise _domain_error(f"It must have 1 to {MAX_CENTRES} limits.")
        if not self.centres or len(self.centres) % len(self.limits):
            raise _domain_error("Its centres must be as many rows of bytes as it has limits.")
        if not all(is_number(part) and 0 <= part < 1 for part in self.shrink):
            raise _domain_error("Its shrink must be numbers from 0 to below 1.")
        rank = len(self.shrink)
        if len(self.directions) != rank * self.dimension or rank > self.dimension:
            raise _domain_error("Its directions must be as many rows of bytes as it has shrink.")

    @property
    def dimension(self) -> int:
        """Dimension of the vectors that it can check."""
        return len(self.centres) // len(self.limits)

    @classmethod
    def from_json(cls, value: Any) -> Domain:
        """Make a domain from the JSON object of ``to_json``. Raises ``ModelError``."""
        try:
            return cls(
                base64.b64decode(value["centres"], validate=True),
                value["scale"],
                tuple(value["limits"]),
                base64.b64decode(value["directions"], validate=True),
                tuple(value["shrink"]),
            )
        except (TypeError, KeyError, binascii.Error, ValueError):
            raise _domain_error(
                "It must be an object of centres and directions (base64), scale, limits and shrink."
            ) from None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object with every field."""
        return {
            "centres": base64.b64encode(self.centres).decode(),
            "scale": self.scale,
            "limits": list(self.limits),
            "directions": base64.b64encode(self.directions).decode(),
            "shrink": list(self.shrink),
        }

    @cached_property
    def _form(self) -> _Form:
        count = len(self.limits)
        centres = np.frombuffer(self.centres, np.int8).reshape(count, -1) * self.scale
        rows = np.frombuffer(self.directions, np.int8).reshape(len(self.shrink), self.dimension)
        axes: NDArray[np.float64] = np.linalg.qr(rows.T.astype(np.float64)).Q
        shrink = np.asarray(self.shrink, dtype=np.float64)
        shrunk = centres - ((centres @ axes) * shrink) @ axes.T
        again = shrunk - ((shrunk @ axes) * shrink) @ axes.T
        limits = np.asarray(self.limits, dtype=np.float64)
        return _Form(
            np.ascontiguousarray(np.hstack([2 * again.T / limits, axes])),
            np.einsum("ij,ij->i", shrunk, shrunk) / limits,
            1 / limits,
            1 - (1 - shrink) ** 2,
        )

    def contains(self, prepared: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """Return which vectors are of images that the encoder knows.

        Args:
            prepared: (..., dimension), of length one if the metric is ``cosine``.
        """
        inside: NDArray[np.bool_] = self.squares(prepared).min(axis=-1) <= 1
        return inside

    def squares(self, prepared: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Return the squared distances from the centres as fractions of the limits, (..., balls).

        With S for the shrinking: |Sx - Sc|² / r² = |Sx|² / r² - 2 x·SSc / r² + |Sc|² / r².
        """
        form = self._form
        balls = len(self.limits)
        vectors = prepared.astype(np.float64)
        products = vectors.dot(form.weights)
        along = products[..., balls:]
        own = np.einsum("...j,...j->...", vectors, vectors) - (along * along).dot(form.taken)
        squares: NDArray[np.float64] = np.multiply.outer(own, form.share)
        squares -= products[..., :balls]
        squares += form.bias
        return squares


class _Form(NamedTuple):
    """What a check needs: one product with a matrix, and a few numbers per ball."""

    weights: NDArray[np.float64]  # (dimension, balls + directions)
    bias: NDArray[np.float64]  # of each ball
    share: NDArray[np.float64]  # of the square of a vector, of each ball
    taken: NDArray[np.float64]  # of the square along each direction


def is_number(value: Any) -> bool:
    """Return whether a value of a JSON object is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _domain_error(detail: str) -> ModelError:
    return ModelError("model's domain is not understood", detail=detail)
