"""Evaluation of ONNX encoders: pairs, triples, neighbours, also inside the database, and pictures.

It needs the model file and the data sets, never torch. scikit-learn, which fits and scores pairs,
is in the extra ``train`` and is imported only when it is used.
"""
