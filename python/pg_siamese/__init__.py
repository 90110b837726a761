"""pg_siamese: data sets, loading, training and the command line of the PostgreSQL extension."""

# It switches ONNX Runtime's telemetry off. That must come before the first import of ONNX Runtime.
import pg_siamese_server as _  # noqa: F401

__version__ = "0.3.0"
