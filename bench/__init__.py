"""Compare pg_siamese with pgvector, FAISS alone and ONNX Runtime alone in one run."""

import pg_siamese as _  # noqa: F401 -- before ONNX Runtime: it switches the telemetry of that off
