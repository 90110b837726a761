"""Long runs under load: the tests run them in short, ``python -m tests.scenarios`` in full."""
