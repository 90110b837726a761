"""Register models, and keep the encoders that this session has opened."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server import interrupts
from pg_siamese_server.catalog import load_json, prepare, session_cache
from pg_siamese_server.encoding.open_encoders import OpenEncoders
from pg_siamese_server.errors import (
    DATA_CORRUPTED,
    DUPLICATE_OBJECT,
    NULL_VALUE_NOT_ALLOWED,
    UNDEFINED_OBJECT,
    ModelError,
    SiameseError,
)
from pg_siamese_server.limits import MODELS_OWN, Limits

if TYPE_CHECKING:  # searches by a stored image need neither
    from pg_siamese_server.encoding.encoder import Encoder
    from pg_siamese_server.encoding.regions import Region
    from pg_siamese_server.encoding.specification import ModelSpec

# With their JSON text, which is quicker to hash.
_specs: dict[int, tuple[str, ModelSpec]] = session_cache({})
_encoders = OpenEncoders()


def spec(plpy: Any, model_id: int) -> ModelSpec:
    """Return a model's specification."""
    return _specification(plpy, model_id)[1]


def _specification(plpy: Any, model_id: int) -> tuple[str, ModelSpec]:
    """Return a model's specification and its text. Models never change, so it is kept."""
    found = _specs.get(model_id)
    if found is None:
        text = _row(plpy, model_id, "specification")["specification"]
        from pg_siamese_server.encoding.specification import ModelSpec

        found = _specs[model_id] = text, ModelSpec.from_json(load_json(text))
    return found


def _row(plpy: Any, model_id: int, columns: str) -> Any:
    plan = prepare(plpy, f"SELECT {columns} FROM siamese.models WHERE model_id = $1", ("integer",))
    rows = plan.execute([model_id])
    if not rows:
        raise SiameseError(f"model {model_id} does not exist", sqlstate=UNDEFINED_OBJECT)
    return rows[0]


def encoder(plpy: Any, model_id: int, sha256: str | None = None) -> Encoder:
    """Return a model's encoder, opened on first use in this session.

    Args:
        plpy: PL/Python's module.
        model_id: of the model.
        sha256: of its ONNX file, if the caller has read it.
    """
    if sha256 is None:
        sha256 = _row(plpy, model_id, "sha256")["sha256"]
    text, specification = _specification(plpy, model_id)

    def read() -> tuple[bytes, ModelSpec]:
        row = _row(
            plpy,
            model_id,
            "onnx, pg_catalog.encode(pg_catalog.sha256(onnx), 'hex') OPERATOR(pg_catalog.=) sha256"
            " AS is_whole",
        )
        if not row["is_whole"]:
            raise SiameseError(
                f"ONNX file of model {model_id} does not match its SHA-256",
                sqlstate=DATA_CORRUPTED,
                hint="Register the same file under the same name once more with register_model:"
                " that restores it.",
            )
        import pg_siamese_server.encoding.images  # noqa: F401 -- decoding follows

        return row["onnx"], specification

    return _encoders.get(sha256, text, read)


def embed(
    plpy: Any,
    model_id: int,
    images: list[bytes | None],
    limits: Limits = MODELS_OWN,
    sha256: str | None = None,
    frame: int = 0,
    region: Region | None = None,
) -> NDArray[np.float32]:
    """Decode and embed a few images, within the limits of a collection.

    Args:
        plpy: PL/Python's module.
        model_id: of the model.
        images: image files.
        limits: of the collection.
        sha256: of the model's ONNX file, if the caller has read it.
        frame: of each image, from 1, or 0 for the representative one.
        region: part of each image, or None for all of it.

    Returns:
        float32 (images, dimension).

    Raises:
        ImageError: an image is bad.
    """
    from pg_siamese_server.encoding.encoder import check_embedding
    from pg_siamese_server.encoding.images import decode_image

    model = encoder(plpy, model_id, sha256)
    poll = partial(interrupts.check, plpy)
    spec = model.spec.input.within(limits)
    pixels = np.stack([decode_image(image, spec, poll, frame, region) for image in images])
    result = model.embed(pixels, poll)
    for embedding in result:
        check_embedding(embedding, model.spec.metric)
    return result


def register(plpy: Any, name: str | None, data: bytes | None, given: dict[str, Any]) -> int:
    """Check an ONNX file, store it, and return its model_id.

    The same file with the same name and specification is accepted, and repairs the stored one.
    """
    import hashlib

    from pg_siamese_server.encoding.registration import inspect_model  # it parses ONNX

    if not name:
        raise SiameseError("a model must have a name")
    if data is None:
        raise SiameseError("onnx is null", sqlstate=NULL_VALUE_NOT_ALLOWED)
    found, dimension, metadata = inspect_model(data, given)
    sha256 = hashlib.sha256(data).hexdigest()
    specification = found.to_json()
    plan = prepare(
        plpy,
        "INSERT INTO siamese.models (name, sha256, onnx, dimension, specification, metadata)"
        " VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (name) DO NOTHING RETURNING model_id",
        ("text", "text", "bytea", "integer", "jsonb", "jsonb"),
    )
    rows = plan.execute(
        [name, sha256, data, dimension, json.dumps(specification), json.dumps(metadata)]
    )
    if rows:
        return int(rows[0]["model_id"])
    plan = prepare(
        plpy,
        "SELECT model_id, sha256, specification FROM siamese.models WHERE name = $1",
        ("text",),
    )
    row = plan.execute([name])[0]
    if row["sha256"] != sha256 or load_json(row["specification"]) != json.loads(
        json.dumps(specification)
    ):
        raise ModelError(
            f'model "{name}" already exists',
            sqlstate=DUPLICATE_OBJECT,
            detail="It has another ONNX file or specification.",
            hint="Models never change: register this one under a new name.",
        )
    # If the stored bytes have been damaged, here are the right ones.
    prepare(
        plpy,
        "UPDATE siamese.models SET onnx = $2 WHERE model_id = $1"
        " AND encode(sha256(onnx), 'hex') <> sha256",
        ("integer", "bytea"),
    ).execute([row["model_id"], data])
    return int(row["model_id"])
