"""pg_siamese: data sets, loading, training and the command line of the PostgreSQL extension."""

from __future__ import annotations

__version__ = "0.3.0"
