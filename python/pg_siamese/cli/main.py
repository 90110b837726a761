"""The `pg_siamese` command.

Every command takes `--dsn`, a libpq connection string. PG* variables fill in what it omits. The
commands import heavy modules when they run, so that `--help` and mistakes answer at once.
"""

import typer

from pg_siamese.cli import (
    collections,
    demo,
    evaluation,
    explore,
    loading,
    measures,
    models,
    pairs,
    training,
    worker,
)
from pg_siamese.cli.failures import Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Reflows the docstrings.
    rich_markup_mode="markdown",
    help="Similar-image search inside PostgreSQL: load and search images, and maintain the index.",
)
app.command()(loading.load)
app.command()(loading.create_dicom_table)
app.command()(collections.query)
app.command()(collections.similarity_map)
app.command()(pairs.nearest)
app.command()(pairs.pairs)
app.command()(pairs.duplicates)
app.command()(pairs.leaks)
app.command()(measures.explain)
app.command()(measures.recall)
app.command()(measures.quality)
app.command()(explore.explore)
app.command()(collections.status)
app.command()(collections.build_index)
app.command()(collections.rebuild_file)
app.command()(worker.worker)
app.command()(models.register_model)
app.command()(demo.demo)
app.command()(training.train)
app.command()(training.export)
app.command()(training.calibrate_domain)
app.command()(training.baseline)
app.command()(evaluation.evaluate)


if __name__ == "__main__":
    app()
