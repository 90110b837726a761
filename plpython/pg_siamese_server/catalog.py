"""Models and collections as the catalog tables of schema ``siamese`` know them."""

from __future__ import annotations

import json
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from pg_siamese_server.errors import (
    NO_DATA_FOUND,
    NULL_VALUE_NOT_ALLOWED,
    UNDEFINED_OBJECT,
    SiameseError,
    check_bytes,
)
from pg_siamese_server.limits import Limits

# Prepared plans outlive transactions and follow changes of their tables by themselves.
_plans: dict[tuple[str, tuple[str, ...]], Any] = {}
MAX_PLANS = 200
_caches: list[MutableMapping[Any, Any]] = []
_catalogs: set[int] = set()
_Cache = TypeVar("_Cache", bound=MutableMapping[Any, Any])


def session_cache(cache: _Cache) -> _Cache:
    """Register what a session keeps by the catalog's numbers, or by names in it.

    When the extension is dropped and created again, numbers begin at 1 again. A session that goes
    on sees by the table's OID that the catalog is another one, and forgets all of this.
    """
    _caches.append(cache)
    return cache


def note_catalog(oid: int) -> None:
    """Forget what the session keeps if the catalog is not the one of the last lookup."""
    if oid in _catalogs:
        return
    _catalogs.clear()
    _catalogs.add(oid)
    for cache in _caches:
        cache.clear()


# Collections that triggers found in order, with the versions of the catalog's rows.
_kept: dict[int, tuple[str, Collection]] = session_cache({})
# Pending changes that a session reads. With more, pgvector scans the table.
MAX_CHANGES = 300_000
MAX_XACT_ID = 2**64 - 1
OPERATORS = {"cosine": "<=>", "l2": "<->"}

# Runs with the caller's search_path. Casts give PostgreSQL's own functions and operators their very
# types, so that nothing in another schema matches better.
COLLECTION_QUERY = """
SELECT c.collection_id, c.name, c.relation::oid::int8 AS relation_oid,
    quote_ident(n.nspname::text) || '.' || quote_ident(r.relname::text) AS relation,
    quote_ident(c.key_column::text) AS key_column, c.key_type,
    quote_ident(c.image_column::text) AS image_column, c.on_error, c.embed, c.model_id, m.dimension,
    c.max_bytes, c.max_pixels, c.dicom_window, c.frames, c.tableoid::int8 AS catalog,
    m.sha256, m.specification ->> 'metric' AS metric,
    (SELECT quote_ident(v.nspname::text) FROM pg_catalog.pg_extension AS x
        INNER JOIN pg_catalog.pg_namespace AS v ON x.extnamespace = v.oid
        WHERE x.extname = 'vector') AS vector_schema
FROM siamese.collections AS c
INNER JOIN siamese.models AS m USING (model_id)
-- An empty table can become a view (before PostgreSQL 16), whose functions would run as us.
LEFT JOIN pg_catalog.pg_class AS r ON r.oid = c.relation::oid AND r.relkind = 'r'
LEFT JOIN pg_catalog.pg_namespace AS n ON n.oid = r.relnamespace
"""
# The same for a trigger of table $2, with one check that nothing has changed since creation. If
# something has, functions check closely, repair what they can, and report what they can't.
TRIGGER_QUERY = COLLECTION_QUERY.replace(
    "\nFROM siamese.collections AS c",
    """, EXISTS (
        SELECT FROM pg_catalog.pg_proc AS p
        INNER JOIN pg_catalog.pg_class AS s ON s.relname = ('source_' || c.collection_id)::name
            AND s.relnamespace = p.pronamespace
        INNER JOIN pg_catalog.pg_rewrite AS w ON w.ev_class = s.oid
        WHERE p.proname = ('_rows_' || c.collection_id)::name
            AND p.pronamespace = 'siamese'::regnamespace
            AND r.oid = $2 AND NOT r.relforcerowsecurity
            AND p.proowner = r.relowner AND p.prosecdef
            AND p.proconfig @> ARRAY['search_path=pg_catalog, pg_temp', 'row_security=off']
            AND has_schema_privilege(r.relowner, p.pronamespace, 'USAGE')
            AND has_table_privilege(r.relowner, s.oid, 'SELECT')
            AND has_table_privilege(r.relowner, r.oid, 'SELECT')
            AND (
                SELECT count(*) FROM pg_catalog.pg_attribute AS a
                INNER JOIN pg_catalog.pg_depend AS d ON d.classid = 'pg_rewrite'::regclass
                    AND d.objid = w.oid AND d.refclassid = 'pg_class'::regclass
                    AND d.refobjid = a.attrelid AND d.refobjsubid = a.attnum
                WHERE a.attrelid = r.oid AND NOT a.attisdropped AND (
                    (a.attname = c.image_column AND a.atttypid = 'bytea'::regtype)
                    OR (a.attname = c.key_column AND (a.atttypid = c.key_type::regtype
                        OR siamese._compared_type(a.atttypid) = c.key_type)))) = 2) AS is_ready
FROM siamese.collections AS c""",
)


NAMES_QUERY = """
SELECT c.name, r.relname::text AS relation, n.nspname || '.' || r.relname AS qualified
FROM siamese.collections AS c
LEFT JOIN pg_catalog.pg_class AS r ON r.oid = c.relation::oid
LEFT JOIN pg_catalog.pg_namespace AS n ON n.oid = r.relnamespace
ORDER BY c.name
"""


@dataclass(frozen=True)
class Collection:
    """A row of ``siamese.collections``, with names quoted for SQL text.

    Attributes:
        catalog: OID of the table that the row is in.
        plans: of its searches, by purpose. To build their SQL, only to look them up by it, would
            take a good part of a search's time.
        columns: those that filters named, as last looked up.
        ways: how filtered searches were answered.
        is_ready: whether a trigger has seen that the table's owner can read it.
    """

    collection_id: int
    name: str
    relation_oid: int
    relation: str
    key_column: str
    key_type: str
    image_column: str
    on_error: str
    embed: str
    model_id: int
    dimension: int
    sha256: str
    metric: str
    vector_schema: str
    catalog: int
    max_bytes: int | None = None
    max_pixels: int | None = None
    dicom_window: str | None = None
    frames: str = "one"
    is_ready: bool = False
    plans: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    columns: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    ways: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def embeddings(self) -> str:
        """The table of vectors."""
        return f"siamese.embedding_{self.collection_id}"

    @property
    def pending(self) -> str:
        """The table of changes that no index generation has."""
        return f"siamese.pending_{self.collection_id}"

    @property
    def queue(self) -> str:
        """The table of tickets of a deferred collection."""
        return f"siamese.queue_{self.collection_id}"

    def row_function(self, name: str) -> str:
        """Return the name of a function that reads the table with its owner's rights."""
        return f"siamese._{name}_{self.collection_id}"

    @cached_property
    def limits(self) -> Limits:
        """Limits and window of its images, and of the query images of its searches."""
        return Limits(self.max_bytes, self.max_pixels, self.dicom_window)

    @cached_property
    def keeps_failures(self) -> bool:
        """Whether a bad image is recorded in ``embedding_failures`` and its statement goes on."""
        return self.on_error == "quarantine" or self.embed == "deferred"

    @cached_property
    def has_frames(self) -> bool:
        """Whether each frame of an image has a vector of its own."""
        return self.frames == "all"

    @property
    def has_integer_keys(self) -> bool:
        """Whether keys fit a bigint."""
        return self.key_type in ("integer", "bigint")

    @property
    def is_by_integer(self) -> bool:
        """Whether an integer key identifies a vector, in index files as well."""
        return self.has_integer_keys and not self.has_frames

    @property
    def key_array(self) -> str:
        """The type of an array of keys."""
        return f"{self.key_type}[]"

    @property
    def candidate_array(self) -> str:
        """The type of an array of keys that callers give, which may be beyond ``integer``."""
        return "bigint[]" if self.has_integer_keys else self.key_array

    @property
    def label(self) -> str:
        """SQL of what identifies a vector ``e``: its key, as text unless ``is_by_integer``.

        Of a frame, it is the frame's number and the key, which ``items`` takes apart.
        """
        if self.has_frames:
            return "pg_catalog.concat_ws(' ', e.frame, e.key)"
        return "e.key" if self.has_integer_keys else "e.key::text"

    def items(self, labels: list[Any]) -> list[Any]:
        """Return what stands for vectors in a search: keys, or pairs of key and frame."""
        if not self.has_frames:
            return labels
        parts = (label.split(" ", 1) for label in labels)
        if self.has_integer_keys:
            return [(int(key), int(frame)) for frame, key in parts]
        return [(key, int(frame)) for frame, key in parts]

    def bases(self, items: list[Any]) -> list[Any]:
        """Return the keys of ``items``."""
        return [key for key, _ in items] if self.has_frames else items

    @property
    def one_per_image(self) -> str:
        """SQL condition that one vector ``e`` of each image meets."""
        return "e.representative" if self.has_frames else "true"

    def as_it_was(self, plpy: Any, name: str = "$1") -> str:
        """Return a condition on ``siamese.collections AS c``: unchanged, and with this name."""
        relation = plpy.quote_literal(self.relation)
        limits = " AND ".join(
            f"c.{name} {'IS NULL' if value is None else f'= {plpy.quote_literal(str(value))}'}"
            for name, value in vars(self.limits).items()
        )
        return (
            f"c.tableoid = {self.catalog}"
            f" AND c.collection_id = {self.collection_id} AND c.name = {name}"
            f" AND c.model_id = {self.model_id} AND {limits}"
            f" AND c.relation::oid = {relation}::regclass::oid"
        )

    @property
    def vector_type(self) -> str:
        """The type vector, with pgvector's schema."""
        return f"{self.vector_schema}.vector"

    @property
    def distance_operator(self) -> str:
        """The operator of the metric, with pgvector's schema."""
        return f"OPERATOR({self.vector_schema}.{OPERATORS[self.metric]})"


def prepare(plpy: Any, sql: str, types: tuple[str, ...] = ()) -> Any:
    """Return a prepared plan, kept for the session."""
    plan = _plans.get((sql, types))
    if plan is None:
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        plan = _plans[sql, types] = plpy.prepare(sql, list(types))
    return plan


def is_standby(plpy: Any) -> bool:
    """Return whether this server replays another one's changes, and so can't write."""
    return bool(plpy.execute("SELECT pg_catalog.pg_is_in_recovery() AS yes")[0]["yes"])


def collection_by_name(plpy: Any, name: str | None) -> Collection:
    """Look up a collection. Raises ``SiameseError`` 42704 if there is none."""
    if name is None:
        raise SiameseError("collection is null", sqlstate=NULL_VALUE_NOT_ALLOWED)
    plan = prepare(plpy, COLLECTION_QUERY + "WHERE c.name = $1", ("text",))
    rows = plan.execute([name])
    if rows:
        return _check_relation(Collection(**rows[0]))
    raise SiameseError(
        f'collection "{name}" does not exist',
        sqlstate=UNDEFINED_OBJECT,
        hint=near_collection_hint(plpy, name),
    )


def group_column(plpy: Any, name: str | None) -> str | None:
    """Return the group column of a collection, or None if it has none or does not exist."""
    plan = prepare(
        plpy, "SELECT c.group_column FROM siamese.collections AS c WHERE c.name = $1", ("text",)
    )
    rows = plan.execute([name])
    return rows[0]["group_column"] if rows else None


def locked_collection(
    plpy: Any, name: str | None, lock: Callable[[Any, int], object] | None = None
) -> Collection:
    """Look up a collection and lock it until the transaction ends.

    Args:
        plpy: PL/Python's module.
        name: of the collection.
        lock: locks something of a collection by its number, by default its table. Whoever reads or
            writes vectors takes that lock first (see ``_lock_relation``).
    """
    while True:
        collection = collection_by_name(plpy, name)
        (lock or lock_table)(plpy, collection.collection_id)
        found = collection_by_name(plpy, name)  # it may have been dropped while this waited
        if found.collection_id == collection.collection_id:
            return found


def lock_table(plpy: Any, collection_id: int) -> bool:
    """Lock a collection's table against DDL. Return whether both exist."""
    plan = prepare(plpy, "SELECT siamese._lock_table($1) AS found", ("integer",))
    return bool(plan.execute([collection_id])[0]["found"])


def near_collection_hint(plpy: Any, name: str) -> str:
    """Return a hint at collections of a table of this name, or of a similar name."""
    import difflib

    known: dict[str, list[str | None]] = {}
    for row in plpy.execute(NAMES_QUERY):
        known[row["name"]] = [row["relation"], row["qualified"]]
    meant = [one for one, tables in known.items() if name in tables or one in name.split(".")]
    if not meant:
        folded = {one.casefold(): one for one in known}
        close = difflib.get_close_matches(name.casefold(), list(folded), n=3, cutoff=0.6)
        meant = [folded[one] for one in close]
    if not meant:
        return "Create collections with create_collection. siamese.collections lists them."
    names = " or ".join([f'"{one}"' for one in sorted(meant)])
    return f"Perhaps you meant {names}."


def collection_by_id(plpy: Any, collection_id: int) -> Collection:
    """Look up a collection by its number."""
    plan = prepare(plpy, COLLECTION_QUERY + "WHERE c.collection_id = $1", ("integer",))
    rows = plan.execute([collection_id])
    if not rows:
        raise SiameseError(
            f"collection {collection_id} does not exist",
            sqlstate=UNDEFINED_OBJECT,
            hint="Drop the trigger that refers to it, or call create_collection for its table,"
            " which drops it.",
        )
    return _check_relation(Collection(**rows[0]))


def collection_of_trigger(
    plpy: Any, collection_id: int, relation_oid: int, versions: str | None
) -> Collection:
    """Look up a collection for a trigger, and check that it belongs to the trigger's table.

    A copy of another table may have brought the trigger along. The table may have a new owner.
    ``_on_change`` reads ``versions``. If these are unchanged, a collection that was in order still
    is. To check everything again would take a good part of a short insert's time.
    """
    kept = _kept.get(collection_id)
    if kept is not None and kept[0] == versions:
        return kept[1]
    plan = prepare(plpy, TRIGGER_QUERY + "WHERE c.collection_id = $1", ("integer", "oid"))
    rows = plan.execute([collection_id, relation_oid])
    if not rows or not rows[0].pop("is_ready"):
        collection = collection_by_id(plpy, collection_id)
        plan = prepare(plpy, "SELECT siamese._check_table($1, $2)", ("integer", "oid"))
        plan.execute([collection_id, relation_oid])
        return collection
    collection = Collection(**rows[0], is_ready=True)
    note_catalog(collection.catalog)
    if versions is not None:
        _kept[collection_id] = versions, collection
    return collection


def _check_relation(collection: Collection) -> Collection:
    note_catalog(collection.catalog)
    if collection.relation is None:
        raise no_table(collection.name)
    return collection


def no_table(name: str) -> SiameseError:
    """Return the error of a collection whose table was dropped."""
    return SiameseError(
        f'table of collection "{name}" no longer exists',
        sqlstate=UNDEFINED_OBJECT,
        hint="Drop the collection with drop_collection.",
    )


def no_image(key: Any, collection: str) -> SiameseError:
    """Return the error of a stored image that a search names, and that is not there."""
    return SiameseError(
        f'image {key} is not in collection "{collection}"',
        sqlstate=NO_DATA_FOUND,
        detail="There is no such row, or it is not visible to you.",
    )


def stored_image(plpy: Any, collection: Collection, key: Any, max_bytes: int) -> bytes | None:
    """Return the image of a stored row, as the invoker sees it.

    Raises:
        SiameseError: P0002, there is no such row.
        ImageError: 54000, it has more bytes than allowed. Then it is not read.
    """
    plan = prepare(
        plpy,
        "SELECT i.size, CASE WHEN i.size OPERATOR(pg_catalog.<=) $2 THEN i.image END AS image"
        f" FROM (SELECT b.{collection.image_column} AS image,"
        f" pg_catalog.octet_length(b.{collection.image_column}) AS size"
        f" FROM {collection.relation} AS b WHERE b.{collection.key_column} = ANY($1)) AS i",
        (collection.candidate_array, "bigint"),
    )
    rows = plan.execute([[key], max_bytes])
    if not rows:
        raise no_image(key, collection.name)
    check_bytes(rows[0]["size"] or 0, max_bytes)
    image: bytes | None = rows[0]["image"]
    return image


def model_id_by_name(plpy: Any, name: str | None) -> int:
    """Return a model's number, or that of the default model if ``name`` is None."""
    plan = prepare(
        plpy,
        "SELECT siamese._model_id($1) AS model_id,"
        " 'siamese.collections'::regclass::oid::int8 AS catalog",
        ("text",),
    )
    found = plan.execute([name])[0]
    note_catalog(found["catalog"])
    return int(found["model_id"])


def load_json(text: str | None) -> Any:
    """Parse a jsonb value, which PL/Python passes as text."""
    return None if text is None else json.loads(text)
