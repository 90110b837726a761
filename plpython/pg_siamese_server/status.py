"""What administrators look at: index files on this node, and the health of everything."""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

from pg_siamese_server import __version__, interrupts, models, telemetry
from pg_siamese_server.catalog import COLLECTION_QUERY, Collection, is_standby, prepare
from pg_siamese_server.changes import abandoned_query, missing_query
from pg_siamese_server.errors import SiameseError

PACKAGES = ("numpy", "pillow", "onnxruntime", "faiss-cpu", "onnx", "xxhash")
TRIGGER_EVENTS = ("insert", "update", "delete", "truncate")


def generation_file(plpy: Any, collection_id: int | None, generation: int | None) -> str | None:
    """Tell whether a generation's file is on this node: present, missing or not readable."""
    if generation is None or collection_id is None:
        return None
    try:
        from pg_siamese_server import generations, index_file
    except ImportError:
        return "FAISS is missing"
    paths = index_file.paths(generations.directory(plpy, collection_id), generation)
    try:
        if not all(path.is_file() for path in paths):
            return "missing"
        return "present" if all(os.access(path, os.R_OK) for path in paths) else "not readable"
    except OSError:  # the directory is closed to the server
        return "not readable"


def self_check(plpy: Any) -> list[tuple[str, bool, str]]:
    """Check installation and collections; rows of (subject, ok, detail)."""
    result = [
        ("server package", True, f"version {__version__}, Python {sys.version.split()[0]}"),
        *map(_package, PACKAGES),
        ("telemetry", *telemetry.check()),
    ]
    for row in plpy.execute(COLLECTION_QUERY + "ORDER BY c.name"):
        subject = f'collection "{row["name"]}"'
        if row["relation"] is None:
            result.append((subject, False, "its table does not exist any more"))
            continue
        result.extend(
            (f"{subject}: {what}", ok, detail)
            for what, ok, detail in _collection(plpy, Collection(**row))
        )
    return result


def _package(name: str) -> tuple[str, bool, str]:
    module = {"pillow": "PIL", "faiss-cpu": "faiss"}.get(name, name)
    try:
        with interrupts.signals_blocked():
            import_module(module)
        return (f"package {name}", True, f"version {version(name)}")
    except ImportError as error:
        return (f"package {name}", False, f"cannot be imported: {error}")


def _collection(plpy: Any, collection: Collection) -> list[tuple[str, bool, str]]:
    columns = _columns(plpy, collection)
    if not columns[1]:
        return [columns]
    return [
        _triggers(plpy, collection),
        _count(
            plpy,
            "rows without vector",
            missing_query(collection, "count(*) AS n")
            + " AND f.key IS NULL"
            + _not_queued(collection),
            "call backfill",
        ),
        _count(
            plpy,
            "vectors without row",
            abandoned_query(collection, "count(*) AS n"),
            "call backfill",
        ),
        _model(plpy, collection),
        _index(plpy, collection),
    ]


def _columns(plpy: Any, collection: Collection) -> tuple[str, bool, str]:
    names = (collection.key_column, collection.image_column)
    plan = prepare(
        plpy,
        "SELECT quote_ident(a.attname::text) AS name FROM pg_catalog.pg_attribute AS a"
        " WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped",
        ("oid",),
    )
    found = {row["name"] for row in plan.execute([collection.relation_oid])}
    missing = ", ".join(name for name in names if name not in found)
    return ("columns", not missing, f"renamed or dropped: {missing}" if missing else "there")


def _not_queued(collection: Collection) -> str:
    if collection.embed == "sync":
        return ""
    return (
        f" AND NOT EXISTS (SELECT FROM {collection.queue} AS q"
        " CROSS JOIN unnest(q.keys) AS u (key) WHERE u.key = k.key)"
    )


def _triggers(plpy: Any, collection: Collection) -> tuple[str, bool, str]:
    plan = prepare(
        plpy,
        "SELECT t.tgname AS name FROM pg_catalog.pg_trigger AS t WHERE t.tgrelid = $1"
        " AND t.tgenabled <> 'D'"
        " AND t.tgfoid IN (SELECT to_regprocedure(f.name) FROM unnest($2) AS f (name))",
        ("oid", "text[]"),
    )
    functions = ["siamese._on_change()"]
    if collection.embed == "deferred":
        number = collection.collection_id
        functions = ["siamese._queue_change()", f"siamese._queue_insert_{number}()"]
    found = {row["name"] for row in plan.execute([collection.relation_oid, functions])}
    wanted = {f"pg_siamese_{collection.collection_id}_{event}" for event in TRIGGER_EVENTS}
    missing = ", ".join(sorted(wanted - found))
    plan = prepare(
        plpy,
        "SELECT r.relispartition OR EXISTS (SELECT FROM pg_catalog.pg_inherits AS i"
        " WHERE i.inhrelid = r.oid) AS is_child FROM pg_catalog.pg_class AS r WHERE r.oid = $1",
        ("oid",),
    )
    if plan.execute([collection.relation_oid])[0]["is_child"]:
        detail = "changes through a parent table fire none; change this table itself, then backfill"
        return ("triggers", False, detail)
    return ("triggers", not missing, f"missing or disabled: {missing}" if missing else "enabled")


def _count(plpy: Any, what: str, sql: str, remedy: str) -> tuple[str, bool, str]:
    number = int(plpy.execute(sql)[0]["n"])
    return (what, number == 0, f"{number}; {remedy}" if number else "0")


def _model(plpy: Any, collection: Collection) -> tuple[str, bool, str]:
    try:
        models.encoder(plpy, collection.model_id)
    except SiameseError as error:
        return ("model", False, f"{error.message}. {error.hint or ''}".strip())
    except ImportError as error:
        return ("model", False, f"{error}")
    return ("model", True, f"{collection.dimension} dimensions")


def _index(plpy: Any, collection: Collection) -> tuple[str, bool, str]:
    plan = prepare(
        plpy,
        "SELECT g.generation, g.build_id::text AS build_id FROM siamese.generations AS g"
        " INNER JOIN siamese.collections AS c ON c.generation = g.generation"
        " WHERE c.collection_id = $1",
        ("integer",),
    )
    rows = plan.execute([collection.collection_id])
    if not rows:
        return ("index", True, "none built; pgvector answers")
    row = rows[0]
    try:
        from pg_siamese_server import generations, index_file

        index_file.read(
            generations.directory(plpy, collection.collection_id),
            generations.identity(collection, row["generation"], row["build_id"]),
            partial(interrupts.check, plpy),
        )
    except (SiameseError, ImportError) as error:
        remedy = "rebuild_file" if is_standby(plpy) else "build_index"
        return ("index", False, f"{error}; call {remedy}")
    return ("index", True, f"generation {row['generation']} is whole")
