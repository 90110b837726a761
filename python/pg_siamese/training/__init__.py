"""Training of metric-learning encoders, and their export to ONNX.

The only part of the project that imports torch (the extra ``train``), and only in its modules.
Importing this package or the experiments costs nothing.
"""
