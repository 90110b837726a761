"""Tests, on clusters of their own."""

# First, before ONNX Runtime can be imported: the package switches the telemetry of that off.
from pg_siamese import caches

caches.set_aside()
