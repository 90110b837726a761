"""The same retrieval figures, computed inside the database by ``similar_images``."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from pg_siamese.client.connection import CommandError
from pg_siamese.client.loading import find_target, store
from pg_siamese.client.models import register
from pg_siamese.client.sources import labelled_part
from pg_siamese.datasets import DataSplits, LabelledImages
from pg_siamese.evaluation.model import Advance, EvaluatedModel
from pg_siamese.evaluation.retrieval import Integers, Retrieval, retrieval

NEIGHBOURS = 5
# The exact scan must give the very figures that were computed offline. By default a search uses a
# graph, which is approximate, if that is quicker.
EXACT, DEFAULT = "pgvector", "auto"
ENGINES = (EXACT, DEFAULT)


@dataclass(frozen=True)
class Workplace:
    """A collection of its own, with its table, schema and model.

    ``name`` is that of all of them.
    """

    name: str

    @property
    def relation(self) -> str:
        """Return the table's name, as SQL needs it."""
        return f"{self.name}.images"


@contextmanager
def workplace(
    connection: psycopg.Connection[Any], model: EvaluatedModel, keep: bool = False
) -> Iterator[Workplace]:
    """Register the model and make a collection of its own.

    All is removed again, unless ``keep``.
    """
    place = Workplace(f"evaluation_{secrets.token_hex(4)}")
    try:
        register(connection, place.name, model.path.read_bytes())
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(place.name)))
        connection.execute(
            sql.SQL(
                "CREATE TABLE {}.images ("
                " image_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,"
                " image bytea NOT NULL, dataset text, split text, label text, source text)"
            ).format(sql.Identifier(place.name))
        )
        connection.execute(
            "SELECT siamese.create_collection(name => %s, relation => %s::regclass, model => %s)",
            (place.name, place.relation, place.name),
        )
        yield place
    finally:
        if not keep and not connection.closed:
            _remove(connection, place)


def _remove(connection: psycopg.Connection[Any], place: Workplace) -> None:
    with connection.transaction():
        for catalogue, remove in (("collections", "drop_collection"), ("models", "drop_model")):
            connection.execute(
                f"SELECT siamese.{remove}(name) FROM siamese.{catalogue} WHERE name = %s",
                (place.name,),
            )
        connection.execute(
            sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(place.name))
        )


@dataclass(frozen=True)
class DatabaseFigures:
    """The retrieval protocol by data set and engine, and the collection it was computed in."""

    collection: str
    figures: dict[str, dict[str, Retrieval]]


def database_retrieval(
    connection: psycopg.Connection[Any],
    model: EvaluatedModel,
    data: Sequence[DataSplits],
    split: str,
    *,
    keep: bool = False,
    advance: Advance = lambda count: None,
) -> DatabaseFigures:
    """Score data sets by the retrieval protocol, with one ``similar_images`` per query and engine.

    The galleries of all sets go into one collection through its trigger, as PNG files, and its
    index is built. The query for one set has a filter on the column dataset. Each query is asked of
    every engine in ``ENGINES``.

    Args:
        connection: the database.
        model: the encoder.
        data: the data sets.
        split: the split of the queries.
        keep: let the collection stay. Its name is in the result.
        advance: called for each image that goes in and each query.

    Raises:
        CommandError: a search found too few neighbours.
        psycopg.Error: the database refused.
    """
    figures: dict[str, dict[str, Retrieval]] = {}
    with workplace(connection, model, keep) as place:
        target = find_target(connection, place.relation, "image")
        for part in data:
            gallery = labelled_part(part.train, "evaluation")
            store(connection, target, map(gallery.row, range(len(gallery))), advance=advance)
        connection.execute("SELECT siamese.build_index(%s)", (place.name,))
        for part in data:
            # Rows went in in their order, so the n-th key is that of the n-th image.
            rows = connection.execute(
                sql.SQL("SELECT image_id FROM {} WHERE dataset = %s ORDER BY image_id").format(
                    sql.SQL(place.relation)
                ),
                (part.name,),
            ).fetchall()
            keys = np.array([key for (key,) in rows], np.int64)
            queries = getattr(part, split)
            figures[part.name] = {}
            for engine in ENGINES:
                found = _search(connection, place, queries, part.name, engine, advance)
                labels = part.train.labels[np.searchsorted(keys, found)]
                figures[part.name][engine] = retrieval(labels, queries.labels)
    return DatabaseFigures(place.name, figures)


def _search(
    connection: psycopg.Connection[Any],
    place: Workplace,
    queries: LabelledImages,
    dataset: str,
    engine: str,
    advance: Advance,
) -> Integers:
    images = labelled_part(queries, "evaluation")
    found = np.empty((len(images), NEIGHBOURS), np.int64)
    condition = Jsonb({"dataset": dataset})
    for number in range(len(images)):
        rows = connection.execute(
            "SELECT s.image_id FROM siamese.similar_images(image => %b::bytea, k => %s::integer,"
            " collection => %s::text, filter => %s, engine => %s) AS s ORDER BY s.rank",
            (images.row(number).image, NEIGHBOURS, place.name, condition, engine),
        ).fetchall()
        if len(rows) < NEIGHBOURS:
            raise CommandError(f'the database found {len(rows)} neighbours in "{dataset}"')
        found[number] = [key for (key,) in rows]
        advance(1)
    return found


def greatest_difference(offline: dict[str, float], database: dict[str, float]) -> float:
    """Return how far the figures (in per cent) lie apart at most."""
    return max(abs(offline[key] - database[key]) for key in offline)
