"""Registering encoders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from pg_siamese.client.connection import CommandError

if TYPE_CHECKING:
    import onnx

# The SQL types of register_model's optional parameters.
MODEL_SETTINGS = {
    "image_width": "bigint",
    "image_height": "bigint",
    "mean": "double precision[]",
    "std": "double precision[]",
    "resize": "text",
    "interpolation": "text",
    "metric": "text",
    "calibration": "jsonb",
    "threshold": "double precision",
    "max_bytes": "bigint",
    "max_pixels": "bigint",
    "input_range": "double precision[]",
}
# The server's limit of an ONNX file.
MAX_ONNX_BYTES = 512 * 1024 * 1024


def register(
    connection: psycopg.Connection[Any],
    name: str,
    onnx: bytes,
    settings: dict[str, object | None] | None = None,
) -> int:
    """Call siamese.register_model with the settings that are not None. Return the model's id."""
    given = {key: value for key, value in (settings or {}).items() if value is not None}
    arguments = "".join(f", {key} => %s::{MODEL_SETTINGS[key]}" for key in given)
    row = connection.execute(
        f"SELECT siamese.register_model(%s, %b::bytea{arguments})", (name, onnx, *given.values())
    ).fetchone()
    assert row is not None  # a SELECT of one function call
    return int(row[0])


def read_model(file: Path) -> bytes:
    """Return an ONNX file with all its weights inside, wherever the exporter has put them.

    torch.onnx.export writes them to a file beside the model by default (model.onnx.data). Only
    files in the model's own folder are read, since a foreign model may name any path.

    Raises:
        CommandError: such a file is missing, in another folder, too large or too short.
    """
    if file.stat().st_size > MAX_ONNX_BYTES:  # PostgreSQL or protobuf might refuse it less clearly
        raise CommandError(f"{file}: larger than {MAX_ONNX_BYTES} bytes")
    data = file.read_bytes()
    import onnx  # takes a while

    from pg_siamese_server.encoding.registration import graphs, is_outside, tensors

    try:
        model = onnx.load_from_string(data)
    except Exception:  # protobuf's errors have no common base, and the server says what is wrong
        return data
    outside = [each for graph in graphs(model) for each in tensors(graph) if is_outside(each)]
    if not outside:
        return data
    total = len(data)
    for tensor in outside:
        part = _external_bytes(file, tensor)
        total += len(part)
        if total > MAX_ONNX_BYTES:
            raise CommandError(f"{file}: larger than {MAX_ONNX_BYTES} bytes with its weights")
        tensor.raw_data = part
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT
    return bytes(model.SerializeToString(deterministic=True))


def _external_bytes(file: Path, tensor: onnx.TensorProto) -> bytes:
    about = {entry.key: entry.value for entry in tensor.external_data}
    name = about.get("location", "")
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CommandError(
            f'{file}: tensor "{tensor.name}" is in "{name}", which is not a file beside the model'
        )
    path = file.parent / name
    if path.resolve().parent != file.parent.resolve() and path.is_symlink():
        raise CommandError(f"{path}: a link that leads out of the model's folder")
    try:
        offset = int(about.get("offset", 0))
        with path.open("rb") as opened:
            size = path.stat().st_size
            length = int(about.get("length", size - offset))
            if offset < 0 or length < 0 or offset + length > size:
                raise CommandError(f'{path}: too short for tensor "{tensor.name}"')
            if length > MAX_ONNX_BYTES:
                raise CommandError(f"{path}: larger than {MAX_ONNX_BYTES} bytes")
            opened.seek(offset)
            content: bytes = opened.read(length)
            return content
    except FileNotFoundError:
        raise CommandError(
            f'{path}: no such file, but {file.name} keeps tensor "{tensor.name}" in it'
        ) from None
    except ValueError:
        raise CommandError(f'{file}: tensor "{tensor.name}" has no valid offset') from None
