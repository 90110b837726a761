"""Evaluation of ONNX encoders: pairs, triples, neighbours, also inside the database; pictures.

Needs the model file and the data sets, never torch. scikit-learn, which fits and scores pairs, is
in the extra `train` and is imported where it is used.
"""
