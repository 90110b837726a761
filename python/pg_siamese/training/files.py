"""ONNX files with the metadata that the database reads. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx

from pg_siamese.files import write_whole
from pg_siamese_server.encoding.encoder import METADATA_KEY


def write_model(model: onnx.ModelProto, path: Path, metadata: dict[str, Any]) -> None:
    """Write a model with metadata.

    ``metadata`` goes into the file's metadata_props as JSON, under the key ``pg_siamese``.

    Raises:
        onnx.checker.ValidationError: the graph is broken.
    """
    del model.metadata_props[:]
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(metadata, ensure_ascii=False))
    onnx.checker.check_model(model, full_check=True)
    write_whole(path, model.SerializeToString(deterministic=True))


def read_metadata(path: Path | str) -> dict[str, Any]:
    """Return the project's metadata of an ONNX file.

    Raises:
        KeyError: the file has none.
    """
    model = onnx.load_model(str(path), load_external_data=False)
    values = {item.key: item.value for item in model.metadata_props}
    metadata: dict[str, Any] = json.loads(values[METADATA_KEY])
    return metadata
