"""The same retrieval figures, computed inside the database by ``similar_images``."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psycopg
from psycopg.types.json import Jsonb

from pg_siamese.client.connection import CommandError
from pg_siamese.client.loading import find_target, store
from pg_siamese.client.models import register
from pg_siamese.client.sources import ImageRow, labelled_part
from pg_siamese.datasets import DataSplits, LabelledImages
from pg_siamese.evaluation.model import Advance, EvaluatedModel
from pg_siamese.evaluation.retrieval import Integers, Retrieval, retrieval

NEIGHBOURS = 5
# The exact scan must give the very figures that were computed offline. By default a search uses a
# graph, which is approximate, if that is quicker.
EXACT, DEFAULT = "pgvector", "auto"
ENGINES = (EXACT, DEFAULT)
GROUP_COLUMN = "image_group"


@contextmanager
def temporary_collection(
    connection: psycopg.Connection[Any], model: EvaluatedModel, keep: bool = False
) -> Iterator[str]:
    """Register the model and make a collection, and yield the name of both and of their schema.

    All is removed again, unless ``keep``.
    """
    name = f"evaluation_{secrets.token_hex(4)}"
    try:
        register(connection, name, model.path.read_bytes())
        connection.execute(f"CREATE SCHEMA {name}".encode())
        connection.execute(
            f"CREATE TABLE {name}.images ("
            " image_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,"
            " image bytea NOT NULL, dataset text, split text, label text, source text,"
            f" {GROUP_COLUMN} text)".encode()
        )
        connection.execute(
            "SELECT siamese.create_collection(name => %s, relation => %s::regclass, model => %s)",
            (name, f"{name}.images", name),
        )
        yield name
    finally:
        if not keep and not connection.closed:
            with connection.transaction():
                for catalogue, kind in (("collections", "collection"), ("models", "model")):
                    connection.execute(
                        f"SELECT siamese.drop_{kind}(name) FROM siamese.{catalogue}"
                        " WHERE name = %s".encode(),
                        (name,),
                    )
                connection.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE".encode())


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
    index is built. The query for one set has a filter on the column dataset, and leaves out the
    query's own group. Each query is asked of every engine in ``ENGINES``.

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
    with temporary_collection(connection, model, keep) as collection:
        target = find_target(connection, f"{collection}.images", "image")
        target = replace(target, columns=target.columns | {GROUP_COLUMN: "text"})
        for part in data:
            store(connection, target, _rows(part.train), advance=advance)
        connection.execute("SELECT siamese.build_index(%s)", (collection,))
        for part in data:
            # Rows went in in their order, so the n-th key is that of the n-th image.
            query = f"SELECT image_id FROM {collection}.images WHERE dataset = %s ORDER BY image_id"
            rows = connection.execute(query.encode(), (part.name,)).fetchall()
            keys = np.array([key for (key,) in rows], np.int64)
            queries = getattr(part, split)
            figures[part.name] = {}
            for engine in ENGINES:
                found = _search(connection, collection, queries, part.name, engine, advance)
                labels = part.train.labels[np.searchsorted(keys, found)]
                figures[part.name][engine] = retrieval(labels, queries.labels)
    return DatabaseFigures(collection, figures)


def _rows(images: LabelledImages) -> Iterator[ImageRow]:
    part = labelled_part(images, "evaluation")
    for number in range(len(part)):
        yield replace(part.row(number), tags=_own_group(images, number))


def _own_group(images: LabelledImages, number: int) -> dict[str, str]:
    return {} if images.groups is None else {GROUP_COLUMN: str(images.groups[number])}


def _search(
    connection: psycopg.Connection[Any],
    collection: str,
    queries: LabelledImages,
    dataset: str,
    engine: str,
    advance: Advance,
) -> Integers:
    images = labelled_part(queries, "evaluation")
    found = np.empty((len(images), NEIGHBOURS), np.int64)
    condition = Jsonb({"dataset": dataset})
    for number in range(len(images)):
        own_group = Jsonb(_own_group(queries, number))
        rows = connection.execute(
            "SELECT s.image_id FROM siamese.similar_images(image => %b::bytea, k => %s::integer,"
            " collection => %s::text, filter => %s, exclude => %s, engine => %s) AS s"
            " ORDER BY s.rank",
            (images.row(number).image, NEIGHBOURS, collection, condition, own_group, engine),
        ).fetchall()
        if len(rows) < NEIGHBOURS:
            raise CommandError(f'the database found {len(rows)} neighbours in "{dataset}"')
        found[number] = [key for (key,) in rows]
        advance(1)
    return found


def greatest_difference(offline: dict[str, float], database: dict[str, float]) -> float:
    """Return how far the figures (in per cent) lie apart at most."""
    return max(abs(offline[key] - database[key]) for key in offline)
