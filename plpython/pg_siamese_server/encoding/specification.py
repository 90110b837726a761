"""Specify a model besides its weights: its input and the meaning of its distances.

This needs no image library or ONNX Runtime, since searches by a stored image load only this.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server.encoding.domain import Domain, is_number
from pg_siamese_server.errors import ModelError
from pg_siamese_server.limits import Limits

METRICS = ("cosine", "l2")
RESIZE_MODES = ("stretch", "crop", "pad")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
# A smaller probability would be out of range for SQL's real, as in similar_images.
MAX_LOGIT = 85.0


@dataclass(frozen=True)
class InputSpec:
    """Input of an encoder, and limits of untrusted image files.

    Attributes:
        width, height: pixels of the encoder's input.
        channels: 3 (RGB) or 1 (luma).
        resize: ``stretch``, ``crop`` (short side to the size, then the centre) or ``pad`` (long
            side to the size, black borders).
        interpolation: one of ``nearest``, ``bilinear``, ``bicubic``, ``lanczos`` (Pillow's filters,
            with antialiasing).
        max_bytes: largest file.
        max_pixels: largest width x height of a file.
        input_range: samples that are black and white, in files that leave it open. These have 16
            bits without significant bits, more bits, signed samples or fractions. None is the full
            range of 16 bits, and refuses the others.
        dicom_window: window of grey DICOM images (``encoding.windows``), or None for the file's
            own. Collections and callers set it. It is no part of a model.
    """

    width: int
    height: int
    channels: int = 3
    resize: str = "stretch"
    interpolation: str = "bicubic"
    max_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 25_000_000
    input_range: tuple[float, float] | None = None
    dicom_window: str | None = None

    def within(self, limits: Limits) -> InputSpec:
        """Return this input with what a collection sets in place of its own."""
        given = {name: value for name, value in vars(limits).items() if value is not None}
        return replace(self, **given) if given else self

    def __post_init__(self) -> None:
        """Check each field. Raises ``ModelError``."""
        for name in ("width", "height", "channels", "max_bytes", "max_pixels"):
            if type(getattr(self, name)) is not int:
                raise ModelError(f"{name} of the encoder input is not an integer")
        if not (1 <= self.width <= 4096 and 1 <= self.height <= 4096):
            raise ModelError(
                f"encoder input of {self.width} x {self.height} pixels is out of range",
                detail="Width and height must be between 1 and 4096.",
            )
        if self.channels not in (1, 3):
            raise ModelError(f"encoder input of {self.channels} channels is not supported")
        _check_name("resize mode", self.resize, RESIZE_MODES)
        _check_name("interpolation", self.interpolation, INTERPOLATIONS)
        if self.max_bytes < 1 or self.max_pixels < 1:
            raise ModelError("max_bytes and max_pixels must be positive")
        if self.input_range is not None and not _is_range(self.input_range):
            raise ModelError(
                "input_range must be two different finite numbers",
                hint="Give the values of black and white, such as {0, 4095}.",
            )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> InputSpec:
        """Make a specification from a JSON object, ignoring unknown keys."""
        names = {field.name for field in fields(cls)} - {"dicom_window"}
        given = {name: item for name, item in value.items() if name in names}
        if given.get("input_range") is not None:
            given["input_range"] = tuple(given["input_range"])
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that ``from_json`` takes."""
        value = asdict(self)
        del value["dicom_window"]
        if self.input_range is None:
            del value["input_range"]  # as versions before 0.3.0 wrote it
        else:
            value["input_range"] = list(self.input_range)
        return value


def _check_name(kind: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ModelError(f'unknown {kind} "{name}"', hint=f"Use one of {', '.join(known)}.")


def _is_range(value: tuple[float, ...]) -> bool:
    return (
        len(value) == 2
        and all(type(end) in (int, float) and math.isfinite(end) for end in value)
        and value[0] != value[1]
        and math.isfinite(255 / (value[1] - value[0]))
    )


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model but its weights.

    Attributes:
        input: the encoder's input and decoding limits.
        metric: ``cosine`` or ``l2``.
        mean, std: per channel, for float encoders, of pixels scaled to 0..1.
        weight, bias: calibration, P(match) = 1 / (1 + exp(-(weight * distance + bias))), or None.
        threshold: distance up to which two images count as a match, or None.
        domain: the images that calibration and threshold hold for, or None for all.
    """

    input: InputSpec
    metric: str = "cosine"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    weight: float | None = None
    bias: float | None = None
    threshold: float | None = None
    domain: Domain | None = None

    def __post_init__(self) -> None:
        """Check what ``InputSpec`` does not. Raises ``ModelError``."""
        _check_name("metric", self.metric, METRICS)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.input.channels or not all(map(math.isfinite, values)):
                raise ModelError(f"{name} must have {self.input.channels} finite values")
        if not all(value > 0 for value in self.std):
            raise ModelError("std must be positive")
        if (self.weight is None) != (self.bias is None):
            raise ModelError("calibration must have both a weight and a bias")
        for name in ("weight", "bias", "threshold"):
            value = getattr(self, name)
            if value is not None and not is_number(value):
                raise ModelError(f"{name} must be a finite number")

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ModelSpec:
        """Make a specification from the JSON object of ``to_json``."""
        spec = InputSpec.from_json(value["input"])
        calibration = value.get("calibration") or {}
        domain = value.get("domain")
        return cls(
            input=spec,
            metric=value.get("metric", "cosine"),
            mean=tuple(value.get("mean") or (0.0,) * spec.channels),
            std=tuple(value.get("std") or (1.0,) * spec.channels),
            weight=calibration.get("weight"),
            bias=calibration.get("bias"),
            threshold=value.get("threshold"),
            domain=None if domain is None else Domain.from_json(domain),
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object with every field."""
        calibration = None
        if self.weight is not None and self.bias is not None:
            calibration = {"weight": self.weight, "bias": self.bias}
        described = {
            "input": self.input.to_json(),
            "metric": self.metric,
            "mean": list(self.mean),
            "std": list(self.std),
            "calibration": calibration,
            "threshold": self.threshold,
        }
        # Models of versions without domains are described as they were.
        if self.domain is not None:
            described["domain"] = self.domain.to_json()
        return described

    def is_inside(self, prepared: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return for which prepared vectors (..., dimension) calibration and threshold hold."""
        if self.domain is None:
            return np.ones(prepared.shape[:-1], dtype=bool)
        return self.domain.contains(prepared)

    def match_probability(self, distance: float) -> float | None:
        """Return the calibrated probability that two images at this distance match, or None.

        It holds for images inside the domain (see ``is_inside``).
        """
        if self.weight is None or self.bias is None:
            return None
        logit = self.weight * distance + self.bias
        return 1.0 / (1.0 + math.exp(min(MAX_LOGIT, -logit)))
