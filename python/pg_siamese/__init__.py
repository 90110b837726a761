"""pg_siamese: data sets, loading, training and the command line of the PostgreSQL extension."""

# It switches ONNX Runtime's telemetry off. That must come before the first import of ONNX Runtime.
import pg_siamese_server as _  # noqa: F401

TYPE_CHECKING = False  # as in typing, whose import would take longer than all of this
if TYPE_CHECKING:
    from pg_siamese.client.notebook import show as show
    from pg_siamese.client.notebook import similar as similar

__version__ = "0.3.0"


def __getattr__(name: str) -> object:
    """Import what notebooks use when it is asked for, since it needs psycopg and Pillow."""
    if name in ("show", "similar"):
        from pg_siamese.client import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
