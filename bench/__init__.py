"""Benchmarks: pg_siamese beside pgvector, FAISS alone and ONNX Runtime alone, in one run."""
