"""Options that several commands have."""

from typing import Annotated

import typer

Dsn = Annotated[
    str | None,
    typer.Option(help="libpq connection string. PG* variables fill in what it omits."),
]
CollectionName = Annotated[str, typer.Option("--collection", "-c", help="Name of the collection.")]
Threads = Annotated[int, typer.Option(min=1, help="Number of CPU threads.")]
