"""The shipped encoders' network, by its old place."""

from __future__ import annotations

from pg_siamese.training.networks.residual import ResidualEncoder

__all__ = ["ResidualEncoder"]
