"""pg_siamese: data sets, loading, training and the command line of the PostgreSQL extension."""

from __future__ import annotations

import contextlib

__version__ = "0.3.0"

# It switches ONNX Runtime's telemetry off, which must come before the first import of that. The
# set-up (tools) runs before there are any packages.
with contextlib.suppress(ModuleNotFoundError):
    import pg_siamese_server as _  # noqa: F401
