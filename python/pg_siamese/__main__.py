"""The command, as `python -m pg_siamese`: what `make install` and a clone's wrapper run."""

from pg_siamese.cli.main import app

app(prog_name="pg_siamese")
