"""The encoders that a process keeps open: a session of the server, or a worker."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported with the first encoder that is opened
    from pg_siamese_server.encoding.encoder import Encoder
    from pg_siamese_server.encoding.specification import ModelSpec

MAX_OPEN_ENCODERS = 4


class OpenEncoders:
    """The encoders used most recently, up to a limit."""

    def __init__(self, limit: int = MAX_OPEN_ENCODERS) -> None:
        self._limit = limit
        # One ONNX file may serve several models that differ in how it is fed.
        self._encoders: OrderedDict[tuple[str, str], Encoder] = OrderedDict()

    def get(
        self, sha256: str, specification: str, read: Callable[[], tuple[bytes, ModelSpec]]
    ) -> Encoder:
        """Return an encoder, opened on first use.

        Args:
            sha256: of its ONNX file.
            specification: how it is fed, as text.
            read: returns the ONNX file and the specification. Called if it is not open.
        """
        key = (sha256, specification)
        found = self._encoders.get(key)
        if found is None:
            from pg_siamese_server.encoding.encoder import Encoder

            found = Encoder(*read())
            while len(self._encoders) >= self._limit:
                self._encoders.popitem(last=False)
            self._encoders[key] = found
        else:
            self._encoders.move_to_end(key)
        return found
