"""The project's bars as programs: the tests run them in short, ``tests.stress`` in full."""
