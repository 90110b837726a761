"""Options that several commands have."""

import json
from typing import Annotated, Literal

import typer

from pg_siamese.client.connection import CommandError

Dsn = Annotated[
    str | None,
    typer.Option(help="libpq connection string. PG* variables fill in what it omits."),
]
CollectionName = Annotated[str, typer.Option("--collection", "-c", help="Name of the collection.")]
Filter = Annotated[
    str | None,
    typer.Option(help='Only rows with these column values, as JSON: \'{"split": "train"}\'.'),
]
Engine = Annotated[Literal["auto", "faiss", "pgvector"], typer.Option(help="Engine that answers.")]
Threads = Annotated[int, typer.Option(min=1, help="Number of CPU threads.")]


def json_object(text: str | None, option: str = "--filter") -> dict[str, object] | None:
    """Return the JSON object of an option, or None without one."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CommandError(f"{option} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CommandError(f'{option} is not a JSON object such as {{"label": "pneumonia"}}')
    return value
