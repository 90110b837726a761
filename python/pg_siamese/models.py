"""Registering encoders."""

from __future__ import annotations

from typing import Any

import psycopg

# The SQL types of register_model's optional parameters.
MODEL_SETTINGS = {
    "image_width": "integer",
    "image_height": "integer",
    "mean": "real[]",
    "std": "real[]",
    "resize": "text",
    "interpolation": "text",
    "metric": "text",
    "calibration": "jsonb",
    "threshold": "real",
    "max_bytes": "bigint",
    "max_pixels": "bigint",
}


def register(
    connection: psycopg.Connection[Any],
    name: str,
    onnx: bytes,
    settings: dict[str, object | None] | None = None,
) -> int:
    """Call siamese.register_model with the settings that are not None; returns the model's id."""
    given = {key: value for key, value in (settings or {}).items() if value is not None}
    arguments = "".join(f", {key} => %s::{MODEL_SETTINGS[key]}" for key in given)
    row = connection.execute(
        f"SELECT siamese.register_model(%s, %b::bytea{arguments})", (name, onnx, *given.values())
    ).fetchone()
    assert row is not None  # a SELECT of one function call
    return int(row[0])
