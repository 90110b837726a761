"""Make a standby's own file of the current generation from the replicated tables.

A standby can't write to the database, so it can't build a generation of its own. Its file holds
what the generation holds in the snapshot it is made in: the vectors that are not pending. It may
lack a vector that an earlier snapshot still sees. So the file names its snapshot, and serves later
ones only.

On a primary this would not be safe. With ``synchronous_commit`` off, a crash may lose transactions
that others have seen, and use their numbers again. A primary has ``build_index``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from pg_siamese_server import interrupts
from pg_siamese_server.catalog import Collection, collection_by_name, is_standby, prepare
from pg_siamese_server.errors import OBJECT_NOT_IN_PREREQUISITE_STATE, IndexFileError, SiameseError
from pg_siamese_server.index import build, generations, graph, index_file
from pg_siamese_server.progress import Progress, reported


def rebuild_file(plpy: Any, name: str | None) -> int | None:
    """Make this standby's file of a collection's current generation, if it has no undamaged one.

    All statements must see one snapshot, so the SQL function is STABLE.

    Returns:
        The generation, or None if the collection has none.
    """
    if not is_standby(plpy):
        raise SiameseError(
            "this server is not a standby",
            sqlstate=OBJECT_NOT_IN_PREREQUISITE_STATE,
            detail="A server that can write builds a new generation instead.",
            hint="Use build_index.",
        )
    collection = collection_by_name(plpy, name)
    with reported(plpy, "rebuild_file", collection) as progress:
        return _rebuild(plpy, collection, progress)


def _rebuild(plpy: Any, collection: Collection, progress: Progress) -> int | None:
    number = collection.collection_id
    progress.enter("waiting for another build")
    plpy.execute(f"SELECT pg_advisory_xact_lock({build.LOCK_CLASS}, {number})")
    plan = prepare(
        plpy,
        "SELECT g.generation, g.build_id::text AS build_id, g.index_type, g.m, g.ef_construction,"
        " (SELECT min(o.generation) FROM siamese.generations AS o"
        " WHERE o.collection_id = c.collection_id) AS oldest,"
        " pg_current_snapshot()::text AS snapshot"
        " FROM siamese.collections AS c INNER JOIN siamese.generations AS g USING (generation)"
        " WHERE c.collection_id = $1",
        ("integer",),
    )
    found = plan.execute([number])
    if not found:
        return None
    current = found[0]
    generation = int(current["generation"])
    directory = generations.directory(plpy, number)
    identity = generations.identity(collection, generation, current["build_id"])
    poll = partial(interrupts.check, plpy)
    progress.enter("checking file")
    try:
        index_file.read(directory, identity, poll)
    except IndexFileError:
        _write(plpy, collection, current, identity, progress)
    # Snapshots of this server may still need the previous generation. If a newer one came
    # meanwhile, this file is the first to go.
    index_file.remove_before(directory, int(current["oldest"]))
    return generation


def _write(
    plpy: Any,
    collection: Collection,
    current: Any,
    identity: index_file.Identity,
    progress: Progress,
) -> None:
    directory = generations.directory(plpy, collection.collection_id)
    index_file.remove_temporary(directory)
    poll = partial(interrupts.check, plpy)
    options = graph.Options(
        current["m"] or 0, current["ef_construction"] or 0, 1.0, build.default_threads(plpy)
    )
    rows, matrix, levels = build.read(
        plpy,
        collection,
        options,
        progress,
        poll,
        f"NOT EXISTS (SELECT FROM {collection.pending} AS p"
        " WHERE p.embedding_id = e.embedding_id AND NOT p.deleted)",
        is_graph=current["index_type"] == "hnsw",
    )
    built = graph.build_again(matrix, levels, options, progress, poll)
    rows.move(built.places)
    progress.enter("writing file")
    index_file.write(directory, identity, built.index, rows, poll, made_for=current["snapshot"])
