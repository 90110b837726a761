"""The encoders that come with the installation."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pg_siamese_server import __version__
from pg_siamese_server.catalog import prepare
from pg_siamese_server.encoding import models
from pg_siamese_server.errors import UNDEFINED_FILE, SiameseError


def register_shipped_models(plpy: Any, folder: str) -> list[tuple[str, int, bool]]:
    """Register the ONNX files of a folder, each under its own name.

    A file that is a model already, under whatever name, is skipped. Models never change. If another
    file has the name, the version is appended.

    Args:
        plpy: PL/Python's module.
        folder: of the installation. A constant of the extension, never a caller's.

    Returns:
        For each file: name of the model, its model_id, and whether it is new.
    """
    files = sorted(Path(folder).glob("*.onnx"))
    if not files:
        raise SiameseError(
            "the installation has no shipped models",
            sqlstate=UNDEFINED_FILE,
            detail=f'There is no ONNX file in "{folder}".',
            hint="Run make install for this server, or register a file of your own with"
            " register_model.",
        )
    return [_register(plpy, file) for file in files]


def _register(plpy: Any, file: Path) -> tuple[str, int, bool]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise SiameseError(
            f'could not read shipped model "{file}": {error.strerror}', sqlstate=UNDEFINED_FILE
        ) from None
    known = prepare(
        plpy,
        "SELECT m.name, m.model_id FROM siamese.models AS m WHERE m.sha256 = $1"
        " ORDER BY m.name <> $2, m.model_id LIMIT 1",
        ("text", "text"),
    ).execute([hashlib.sha256(data).hexdigest(), file.stem])
    if known:
        return known[0]["name"], int(known[0]["model_id"]), False
    taken = prepare(plpy, "SELECT FROM siamese.models AS m WHERE m.name = $1", ("text",)).execute(
        [file.stem]
    )
    name = f"{file.stem}_{__version__}" if taken else file.stem
    return name, models.register(plpy, name, data, {"input": {}}), True
