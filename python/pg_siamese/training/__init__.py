"""Training of metric-learning encoders, and their export to ONNX.

The only place of the project that imports torch (the extra `train`), and only in its modules:
importing this package or its `cli` costs nothing.
"""
