"""Long runs under load: the tests run them in short, ``python -m tests.scenarios`` in full.

What most of them take: ``connect`` opens an autocommit connection, ``images`` is what there is,
``seed`` is of what is random, ``report`` takes lines.
"""
