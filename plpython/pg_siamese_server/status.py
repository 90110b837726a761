"""Index files on this node and the health of everything, for administrators."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

from pg_siamese_server import __version__, interrupts, telemetry
from pg_siamese_server.catalog import (
    COLLECTION_QUERY,
    Collection,
    group_column,
    is_standby,
    lock_table,
    prepare,
)
from pg_siamese_server.encoding import models
from pg_siamese_server.errors import SiameseError
from pg_siamese_server.writing.deferred import CANCELLED
from pg_siamese_server.writing.triggers import abandoned_query, compared, missing_query, stale_keys

Line = tuple[str, bool, str]
# Most rows and bytes that a check of some images reads, without full => true.
SAMPLE_ROWS, SAMPLE_BYTES = 100, 16 * 1024 * 1024
PACKAGES = (
    "numpy",
    "pillow",
    "onnxruntime",
    "faiss-cpu",
    "onnx",
    "xxhash",
    "pydicom",
    "imagecodecs",
)
TRIGGERS = ("insert", "update", "change", "delete", "truncate")
# Names of columns, without what is no letter, that hold a person's name, birth date or address.
_PERSONAL = re.compile(
    r"(?:patients?|persons?|subjects?)?"
    r"(?:(?:full|first|last|middle|given|family|maiden|birth|sur|fore)names?"
    r"|birthdate|birthday|dateofbirth|dob"
    r"|(?:home|street|postal|email)?address|email|(?:tele|mobile)?phone(?:numbers?)?"
    r"|ssn|socialsecuritynumber)"
    r"|(?:patients?|persons?|subjects?)names?|nameof(?:the)?(?:patient|person|subject)"
    r"|(?:\w*physicians?|operators?)(?:names?)?"
)
# CVE-2026-3172, in parallel builds of HNSW indexes: the first unsafe and the first safe version.
PGVECTOR_UNSAFE = ((0, 6), (0, 8, 2))


def generation_file(plpy: Any, collection_id: int | None, generation: int | None) -> str | None:
    """Return whether a generation's file is on this node: present, missing or not readable."""
    if generation is None or collection_id is None:
        return None
    try:
        from pg_siamese_server.index import generations, index_file
    except ImportError:
        return "FAISS is missing"
    paths = index_file.paths(generations.directory(plpy, collection_id), generation)
    try:
        if not all(stat.S_ISREG(os.stat(path).st_mode) for path in paths):
            return "missing"
        return "present" if all(os.access(path, os.R_OK) for path in paths) else "not readable"
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError:  # the server may not read the directory
        return "not readable"


def self_check(plpy: Any, full: bool) -> list[Line]:
    """Check installation and collections.

    Each failure is a line of its own, and the other checks still run.

    Args:
        plpy: PL/Python's module.
        full: compare every image with its vector, not only some.

    Returns:
        Rows of (subject, ok, detail).
    """
    result = [
        ("server package", True, f"version {__version__}, Python {sys.version.split()[0]}"),
        *map(_package, PACKAGES),
        ("telemetry", *telemetry.check()),
        _run_check(plpy, "pgvector", partial(_pgvector, plpy)),
        _run_check(plpy, "index directory", _directory),
        _run_check(plpy, "triggers", partial(_stray_triggers, plpy)),
        _run_check(plpy, "dicom_keywords", partial(_dicom_keywords, plpy)),
    ]
    found: dict[str, list[Line]] = {}
    # In the order in which renew_collections locks their tables.
    for row in plpy.execute(COLLECTION_QUERY + "ORDER BY c.collection_id"):
        lines = found[row["name"]] = []
        subject = f'collection "{row["name"]}"'
        if row["relation"] is None:
            call = f"drop_collection({plpy.quote_literal(row['name'])})"
            lines.append((subject, False, f"its table no longer exists; call {call}"))
            continue
        lines.extend(
            (f"{subject}: {what}", ok, detail)
            for what, ok, detail in _collection(plpy, Collection(**row), full)
        )
    return result + [line for name in sorted(found) for line in found[name]]


def _run_check(plpy: Any, what: str, check: Callable[[], Line]) -> Line:
    """Run a check. If the check itself fails, return a bad line, so that the others still run."""
    try:
        with plpy.subtransaction():
            return check()
    except SiameseError as error:
        return (what, False, " ".join(filter(None, (f"{error.message}.", error.hint))))
    except plpy.SPIError as error:
        if error.sqlstate in CANCELLED:
            raise
        hint = (getattr(error, "spidata", None) or (None, None, None))[2]
        return (what, False, f"{error}. {hint}" if hint else f"cannot be checked: {error}")
    except (ImportError, OSError) as error:
        return (what, False, f"cannot be checked: {error}")


def _directory() -> Line:
    path = os.path.join(os.getcwd(), "pg_siamese")
    if os.path.islink(path):
        return (
            "index directory",
            True,
            "a symbolic link, which pg_basebackup leaves out: call build_index after a restore",
        )
    return ("index directory", True, "in the data directory")


def _stray_triggers(plpy: Any) -> Line:
    rows = plpy.execute(
        "SELECT t.relation::text AS relation, pg_catalog.string_agg(t.name::text, ', ') AS names"
        " FROM siamese._triggers() AS t WHERE NOT EXISTS (SELECT FROM siamese.collections AS c"
        " WHERE c.collection_id = t.collection_id AND c.relation::oid = t.relation::oid)"
        " GROUP BY t.relation ORDER BY 1"
    )
    found = "; ".join(f"{row['relation']} has {row['names']}" for row in rows)
    if found:
        remedy = "call create_collection for such a table, or drop these triggers"
        return ("triggers", False, f"of other tables' collections: {found}; {remedy}")
    return ("triggers", True, "none of other tables' collections")


def _dicom_keywords(plpy: Any) -> Line:
    from pg_siamese_server.encoding.identifying import IDENTIFYING

    rows = plpy.execute("SELECT k.keyword FROM siamese.dicom_keywords AS k WHERE k.shown")
    found = ", ".join(sorted(IDENTIFYING.intersection(row["keyword"] for row in rows)))
    if found:
        remedy = "delete these rows of siamese.dicom_keywords, or let dicom_tag read them"
        return ("dicom_keywords", False, f"dicom_tags shows who a person is: {found}; {remedy}")
    return ("dicom_keywords", True, "none that identifies a person")


def _package(name: str) -> Line:
    module = {"pillow": "PIL", "faiss-cpu": "faiss"}.get(name, name)
    try:
        with interrupts.signals_blocked():
            import_module(module)
        return (f"package {name}", True, f"version {version(name)}")
    except ImportError as error:
        return (f"package {name}", False, f"cannot be imported: {error}")


def _pgvector(plpy: Any) -> Line:
    """Check for a pgvector that is unsafe in builds of HNSW indexes, which users may have.

    The files on disk decide, not the version that ALTER EXTENSION has recorded.
    """
    files = plpy.execute(
        "SELECT x.default_version AS version FROM pg_catalog.pg_available_extensions AS x"
        " WHERE x.name = 'vector'"
    )
    found = str(files[0]["version"]) if files else ""
    indexes = plpy.execute(
        "SELECT c.oid::regclass::text AS name FROM pg_catalog.pg_class AS c"
        " INNER JOIN pg_catalog.pg_am AS a ON a.oid = c.relam"
        " WHERE a.amname = 'hnsw' AND c.relkind = 'i' ORDER BY c.oid LIMIT 1"
    )
    return pgvector_line(found, indexes[0]["name"] if indexes else None)


def pgvector_line(found: str, index: str | None) -> Line:
    """Return self_check's line on a version of pgvector, and an HNSW index if there is one."""
    numbers = tuple(map(int, re.findall(r"\d+", found)))
    first, fixed = PGVECTOR_UNSAFE
    if index is None or not first <= numbers < fixed:
        return ("pgvector", True, f"version {found}" if found else "its files are missing")
    floor = ".".join(map(str, fixed))
    return (
        "pgvector",
        False,
        f"version {found} has CVE-2026-3172 in parallel builds of HNSW indexes, as {index}; "
        f"install {floor} or later, or build with max_parallel_maintenance_workers = 0",
    )


def _collection(plpy: Any, collection: Collection, full: bool) -> list[Line]:
    columns = _run_check(plpy, "columns", partial(_columns, plpy, collection))
    if not columns[1]:
        known = f"SELECT FROM siamese.collections WHERE collection_id = {collection.collection_id}"
        return [columns] if plpy.execute(known).nrows() else []  # dropped meanwhile
    missing = missing_query(collection, "count(*) AS n") + " AND f.key IS NULL"
    abandoned = abandoned_query(collection, "count(*) AS n")
    checks: dict[str, Callable[[], Line]] = {
        "group column": partial(_group_column, plpy, collection),
        "table": partial(_table, plpy, collection),
        "personal data": partial(_personal_data, plpy, collection),
        "owner": partial(_owner, plpy, collection),
        "triggers": partial(_triggers, plpy, collection),
        "rows without vector": partial(
            _count, plpy, "rows without vector", missing + _not_queued(collection)
        ),
        "vectors without row": partial(_count, plpy, "vectors without row", abandoned),
        "vectors of other images": partial(_hashes, plpy, collection, full),
        "model": partial(_model, plpy, collection),
        "index": partial(_index, plpy, collection),
    }
    return [_run_check(plpy, what, check) for what, check in checks.items()]


def _table(plpy: Any, collection: Collection) -> Line:
    plan = prepare(
        plpy,
        "SELECT o.kind, o.hint FROM siamese._obstacle($1) AS o WHERE o.kind IS NOT NULL"
        " AND o.kind <> 'table with forced row-level security'",  # a matter of the owner
        ("regclass",),
    )
    for row in plan.execute([str(collection.relation_oid)]):
        detail = f"a {row['kind']} now"
        if row["kind"] == "unlogged table":
            detail += ": after a crash it is empty, and its vectors are not"
        elif row["kind"] in ("partition", "child table"):
            detail += ": changes through its parent fire no triggers, so call backfill after them"
        return ("table", False, f"{detail}. {row['hint']}")
    return ("table", True, "ordinary and permanent")


def _personal_data(plpy: Any, collection: Collection) -> Line:
    found = ", ".join(
        name
        for name in _column_names(plpy, collection)
        if _PERSONAL.fullmatch(re.sub(r"[^a-z]", "", name.lower()))
    )
    if found:
        remedy = "keep them in a table of their own, which searches do not return"
        return ("personal data", False, f"columns that may name a person: {found}; {remedy}")
    return ("personal data", True, "no column by the name of it")


def _owner(plpy: Any, collection: Collection) -> Line:
    if not is_standby(plpy):
        plpy.execute(f"SELECT siamese._let_owner_read({collection.collection_id}, true)")
    return ("owner", True, "reads the table")


def _hashes(plpy: Any, collection: Collection, full: bool) -> Line:
    what = "vectors of other images"
    unknown = (
        f"SELECT count(*) AS n FROM {collection.embeddings} AS e"
        f" WHERE {collection.one_per_image} AND e.image_hash IS NULL"
    )
    unhashed = int(plpy.execute(unknown)[0]["n"])
    if full:
        stale = len(stale_keys(plpy, collection, None)) - unhashed
        seen = "all rows"
    else:
        count, found = compared(plpy, collection, _sample(plpy, collection), SAMPLE_BYTES)
        stale, seen = len(found), f"{count} rows, drawn by chance"
    if stale:
        return (what, False, f"{stale} of {seen}; call backfill")
    detail = f"0 of {seen}"
    if unhashed:
        detail += f"; {unhashed} vectors have no hash yet, call backfill"
    return (what, True, detail)


def _sample(plpy: Any, collection: Collection) -> list[Any]:
    """Return keys with a hash: all of a small collection, else a random sample."""
    first = plpy.execute(
        f"SELECT array_agg(s.key) AS keys FROM (SELECT e.key FROM {collection.embeddings} AS e"
        f" WHERE {collection.one_per_image} AND e.image_hash IS NOT NULL"
        f" LIMIT {SAMPLE_ROWS + 1}) AS s"
    )[0]["keys"]
    if first is None or len(first) <= SAMPLE_ROWS:
        return first or []
    drawn = plpy.execute(
        "SELECT array_agg(DISTINCT n.key) AS keys FROM"
        f" (SELECT min(e.embedding_id) AS low, max(e.embedding_id) AS high"
        f" FROM {collection.embeddings} AS e) AS b"
        f" CROSS JOIN generate_series(1, {SAMPLE_ROWS}) AS i"
        " CROSS JOIN LATERAL (SELECT b.low + floor((random() + 0 * i) * (b.high - b.low + 1))"
        "::bigint AS place) AS r"
        f" CROSS JOIN LATERAL (SELECT e.key, e.image_hash FROM {collection.embeddings} AS e"
        " WHERE e.embedding_id >= r.place ORDER BY e.embedding_id LIMIT 1) AS n"
        " WHERE n.image_hash IS NOT NULL"
    )[0]["keys"]
    return drawn or []


def _columns(plpy: Any, collection: Collection) -> Line:
    lock_table(plpy, collection.collection_id)  # before the checks take others
    names = (collection.key_column, collection.image_column)
    found = _column_names(plpy, collection)
    missing = ", ".join(name for name in names if name not in found)
    return ("columns", not missing, f"renamed or dropped: {missing}" if missing else "there")


def _column_names(plpy: Any, collection: Collection) -> list[str]:
    """Return the names of the table's columns, quoted for SQL if necessary, in their order."""
    plan = prepare(
        plpy,
        "SELECT quote_ident(a.attname::text) AS name FROM pg_catalog.pg_attribute AS a"
        " WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
        ("oid",),
    )
    return [row["name"] for row in plan.execute([collection.relation_oid])]


def _group_column(plpy: Any, collection: Collection) -> Line:
    column = group_column(plpy, collection.name)
    if column is None:
        return ("group column", True, "none")
    if plpy.quote_ident(column) in _column_names(plpy, collection):
        return ("group column", True, column)
    remedy = "set another with alter_collection"
    return ("group column", False, f"renamed or dropped: {column}; {remedy}")


def _not_queued(collection: Collection) -> str:
    if collection.embed == "sync":
        return ""
    return (
        f" AND NOT EXISTS (SELECT FROM {collection.queue} AS q"
        " CROSS JOIN unnest(q.keys) AS u (key) WHERE u.key = k.key)"
    )


def _triggers(plpy: Any, collection: Collection) -> Line:
    plan = prepare(
        plpy,
        "SELECT t.tgname AS name FROM pg_catalog.pg_trigger AS t WHERE t.tgrelid = $1"
        " AND t.tgenabled <> 'D'"
        " AND t.tgfoid IN (SELECT to_regprocedure(f.name) FROM unnest($2) AS f (name))",
        ("oid", "text[]"),
    )
    functions = ["siamese._note_change()", "siamese._on_change()"]
    if collection.embed == "deferred":
        number = collection.collection_id
        functions[1:] = ["siamese._queue_change()", f"siamese._queue_insert_{number}()"]
    found = {row["name"] for row in plan.execute([collection.relation_oid, functions])}
    wanted = {f"pg_siamese_{collection.collection_id}_{event}" for event in TRIGGERS}
    missing = ", ".join(sorted(wanted - found))
    return ("triggers", not missing, f"missing or disabled: {missing}" if missing else "enabled")


def _count(plpy: Any, what: str, sql: str) -> Line:
    number = int(plpy.execute(sql)[0]["n"])
    return (what, number == 0, f"{number}; call backfill" if number else "0")


def _model(plpy: Any, collection: Collection) -> Line:
    try:
        models.encoder(plpy, collection.model_id)
    except SiameseError as error:
        return ("model", False, f"{error.message}. {error.hint or ''}".strip())
    except ImportError as error:
        return ("model", False, f"{error}")
    return ("model", True, f"{collection.dimension} dimensions")


def _index(plpy: Any, collection: Collection) -> Line:
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
        from pg_siamese_server.index import generations, index_file

        index_file.read(
            generations.directory(plpy, collection.collection_id),
            generations.identity(collection, row["generation"], row["build_id"]),
            partial(interrupts.check, plpy),
        )
    except (SiameseError, ImportError) as error:
        remedy = "rebuild_file" if is_standby(plpy) else "build_index"
        return ("index", False, f"{error}; call {remedy}")
    return ("index", True, f"generation {row['generation']} is whole")
