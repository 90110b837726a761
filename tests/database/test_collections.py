"""Collections: on which tables, how they follow renaming and dropping, and what is refused."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from tests.conftest import Connect, Connection, Pictures, insert_images
from tests.database.tables import make_collection, register_grid
from tests.support import column_of, grid_encoder, one, rows_of, sql_error


def rows_near(db: Connection, table: str, image: bytes, **options: object) -> list[object]:
    """Keys (column ``id``) that similar_rows finds, nearest first."""
    extra = "".join(f", {name} => {value}" for name, value in options.items())
    return column_of(
        db, f"SELECT (item).id FROM similar_rows(NULL::{table}, %s, k => 100{extra})", image
    )


KEYS: dict[str, list[Any]] = {
    "integer": [1, 2**31 - 1, -5],
    "bigint": [1, 2**63 - 1, -(2**63)],
    "uuid": [UUID(int=1), UUID(int=2**128 - 1), UUID("12345678-1234-5678-1234-567812345678")],
    "smallint": [1, 2**15 - 1, -(2**15)],
    "varchar(40)": ["plain", "", 'it\'s "quoted" \\ Ä€ {a,b} NULL'],
    'varchar COLLATE "C"': ["a", "B", "NULL"],
    "small_key": [1, 2, 3],
    "code": ["A-1", "A-2", "B-1"],
    "number": [UUID(int=1), UUID(int=2), UUID(int=3)],
    "text": ["plain", "", 'it\'s "quoted" \\ Ä€ {a,b} NULL'],
    'text COLLATE "C"': ["a", "B", "NULL"],
}


@pytest.mark.parametrize("key_type", KEYS)
def test_key_types(db: Connection, pictures: Pictures, key_type: str) -> None:
    """The whole life of rows, by FAISS and by pgvector."""
    keys, files = KEYS[key_type], pictures.files
    array = "text[]" if key_type.startswith("text") else f"{key_type.partition(' ')[0]}[]"
    db.execute(
        """
        CREATE DOMAIN small_key AS smallint CHECK (value > 0);
        CREATE DOMAIN any_code AS varchar(10);
        CREATE DOMAIN code AS any_code CHECK (value ~ '^[A-Z]-\\d$');
        CREATE DOMAIN number AS uuid
        """
    )
    db.execute(f"CREATE TABLE t (id {key_type} PRIMARY KEY, image bytea)")
    db.execute(
        f"INSERT INTO t SELECT * FROM unnest(%s::{array}, %s::bytea[])", (keys[:2], files[:2])
    )
    assert one(db, "SELECT create_collection('t', 't')") == 2
    db.execute("SELECT build_index('t')")
    db.execute("INSERT INTO t VALUES (%s, %s)", (keys[2], files[2]))
    for engine in ("'faiss'", "'pgvector'"):
        for key, file in zip(keys, files, strict=False):
            found = rows_near(db, "t", file, engine=engine)
            assert found[0] == key and set(found) == set(keys)
    db.execute("UPDATE t SET image = %s WHERE id = %s", (files[3], keys[0]))
    db.execute("DELETE FROM t WHERE id = %s", (keys[1],))
    for engine in ("'faiss'", "'pgvector'"):
        assert rows_near(db, "t", files[3], engine=engine) == [keys[0], keys[2]]
    db.execute("SELECT build_index('t')")
    assert rows_near(db, "t", files[3], engine="'faiss'") == [keys[0], keys[2]]
    only = rows_near(db, "t", files[3], candidates="(SELECT array_agg(id::text) FROM t)")
    assert only == [keys[0], keys[2]]


def test_similar_images_is_for_integer_keys(db: Connection, pictures: Pictures) -> None:
    make_collection(db, key="uuid")
    for query in ("image_id => 1", "%(image)s", "%(image)s, candidates => '{1}'"):
        with sql_error("0A000", 'collection "t" has keys of type uuid', "similar_rows"):
            db.execute(
                f"SELECT similar_images({query}, collection => 't')", {"image": pictures.files[0]}
            )


def test_integer_keys_by_similar_images(db: Connection, pictures: Pictures) -> None:
    make_collection(db)
    db.execute("INSERT INTO t SELECT 1, %s UNION SELECT 2, %s", pictures.files[:2])
    assert rows_of(db, "SELECT image_id FROM similar_images(image_id => 2, collection => 't')") == [
        (1,)
    ]
    with sql_error("P0002", "image 99999999999 is not in"):
        db.execute("SELECT similar_images(image_id => 99999999999, collection => 't')")
    found = db.execute(
        "SELECT image_id FROM similar_images(%s, collection => 't',"
        " candidates => '{99999999999, 1, NULL}')",
        (pictures.files[0],),
    ).fetchall()
    assert found == [(1,)]


def test_odd_names(db: Connection, pictures: Pictures) -> None:
    schema, table = sql.Identifier('My "schema"'), sql.Identifier("it's a table")
    key, image = sql.Identifier('Key "1"; --'), sql.Identifier("the image's")
    relation = sql.SQL(".").join([schema, table])
    name = "a 'collection' \"of\" $1 %s"
    db.execute(sql.SQL("CREATE SCHEMA {}").format(schema))
    db.execute(
        sql.SQL("CREATE TABLE {} ({} text NOT NULL UNIQUE, {} bytea, other int)").format(
            relation, key, image
        )
    )
    quoted = relation.as_string()
    db.execute(
        "SELECT create_collection(%s, %s::regclass, %s, %s)",
        (name, quoted, 'Key "1"; --', "the image's"),
    )
    for place in range(3):
        insert = sql.SQL("INSERT INTO {} VALUES (%s, %s)").format(relation)
        db.execute(insert, (f"k'{place}", pictures.files[place]))
    db.execute("SELECT build_index(%s)", (name,))
    db.execute(sql.SQL("UPDATE {} SET {k} = {k} || '!'").format(relation, k=key))
    found = db.execute(
        sql.SQL("SELECT (item).{} FROM similar_rows(NULL::{}, %s)").format(key, relation),
        (pictures.files[1],),
    ).fetchall()
    assert found[0] == ("k'1!",) and len(found) == 3
    assert one(db, "SELECT bool_and(ok) FROM self_check()") is True
    labels = "SELECT label FROM classify_image(%s, 1, %s, %s)"
    assert rows_of(db, labels, pictures.files[1], name, 'Key "1"; --') == [("k'1!",)]
    db.execute("SELECT drop_collection(%s)", (name,))


def test_rows_that_are_there_already(db: Connection, pictures: Pictures) -> None:
    db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea)")
    for place in range(10):
        db.execute("INSERT INTO t VALUES (%s, %s)", (place, pictures.files[place]))
    sql = "SELECT create_collection(%s, 't', backfill => %s)"
    assert one(db, sql, "later", False) == 0
    assert one(db, sql, "now", True) == 10
    assert len(rows_near(db, "t", pictures.files[0], collection="'later'")) == 0
    assert len(rows_near(db, "t", pictures.files[0], collection="'now'")) == 10


PLAIN = "CREATE TABLE t (id int PRIMARY KEY, image bytea)"
ROW = "SELECT 1 AS id, ''::bytea AS image"
UNFIT = {
    "0A000": {
        "view public.t cannot be a collection": f"CREATE VIEW t AS {ROW}",
        "materialized view public.t cannot be a collection": f"CREATE MATERIALIZED VIEW t AS {ROW}",
        "partitioned table public.t cannot be a collection": f"{PLAIN} PARTITION BY RANGE (id)",
        "foreign table public.t cannot be a collection": (
            "CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w;"
            " CREATE FOREIGN TABLE t (id int NOT NULL, image bytea) SERVER s"
        ),
        "table with forced row-level security public.t cannot": (
            f"{PLAIN}; ALTER TABLE t FORCE ROW LEVEL SECURITY"
        ),
        "ALTER TABLE public.p DETACH PARTITION public.t": (
            "CREATE TABLE p (id int PRIMARY KEY, image bytea) PARTITION BY RANGE (id);"
            " CREATE TABLE t PARTITION OF p DEFAULT"
        ),
        "ALTER TABLE public.t NO INHERIT public.p": (
            "CREATE TABLE p (id int PRIMARY KEY, image bytea);"
            " CREATE TABLE t (PRIMARY KEY (id)) INHERITS (p)"
        ),
        "ALTER TABLE public.c NO INHERIT public.t": f"{PLAIN}; CREATE TABLE c () INHERITS (t)",
        "ALTER TABLE public.t SET LOGGED": PLAIN.replace("TABLE", "UNLOGGED TABLE"),
        "temporary table": PLAIN.replace("TABLE", "TEMP TABLE"),
        "has type numeric": PLAIN.replace("int", "numeric"),
        "type character(5)": PLAIN.replace("int", "char(5)"),
        "has type public.d": f"CREATE DOMAIN d AS numeric; {PLAIN.replace('int', 'd')}",
        "nondeterministic collation": (
            "CREATE COLLATION ci (provider = icu, locale = 'und-u-ks-level2',"
            f" deterministic = false); {PLAIN.replace('int', 'text COLLATE ci')}"
        ),
    },
    "42P16": {
        "table public.t has no primary key of one column": "CREATE TABLE t (id int, image bytea)",
        "no primary key of one column": (
            "CREATE TABLE t (id int, n int, image bytea, PRIMARY KEY (id, n))"
        ),
        "is not a key": PLAIN.replace("KEY", "KEY DEFERRABLE"),
    },
    "42804": {"has type text, not bytea": PLAIN.replace("bytea", "text")},
    "42703": {'column "image"': PLAIN.replace("image", "picture")},
}


@pytest.mark.parametrize(
    ("statement", "sqlstate", "message"),
    [(how, state, text) for state, tables in UNFIT.items() for text, how in tables.items()],
)
def test_tables_that_cannot_be_collections(
    shared: Connection, statement: str, sqlstate: str, message: str
) -> None:
    with shared.transaction(force_rollback=True):
        shared.execute(statement)
        with sql_error(sqlstate, message), shared.transaction():
            shared.execute("SELECT create_collection('t', 't')")


@pytest.mark.parametrize(
    "definition",
    [
        "id int UNIQUE",  # may be null
        "id int NOT NULL",
        "id int NOT NULL, n int, UNIQUE (id, n)",
        "id int NOT NULL, UNIQUE (id) DEFERRABLE",
        "id int NOT NULL, EXCLUDE USING btree (id WITH =)",
    ],
)
def test_columns_that_are_no_keys(shared: Connection, definition: str) -> None:
    with shared.transaction(force_rollback=True):
        shared.execute(f"CREATE TABLE t (image bytea, {definition})")
        shared.execute("CREATE UNIQUE INDEX ON t (id) WHERE id > 0")
        shared.execute("CREATE UNIQUE INDEX ON t ((id + 1))")
        with sql_error("42P16", 'column "id" of table public.t is not a key'), shared.transaction():
            shared.execute("SELECT create_collection('t', 't', 'id')")


@pytest.mark.law(3)
def test_two_collections_on_one_table(db: Connection, pictures: Pictures) -> None:
    """Each with its own model, kept in step by the same statements."""
    register_grid(db)
    db.execute("SELECT create_collection('grid', 'images', model => 'grid')")
    ids = insert_images(db, pictures.files[:30])
    db.execute("SELECT build_index('images'), build_index('grid')")
    db.execute("UPDATE images SET image = %s WHERE image_id = %s", (pictures.files[50], ids[3]))
    db.execute("DELETE FROM images WHERE image_id = %s", (ids[4],))
    for name, number, operator in (("images", 1, "<=>"), ("grid", 2, "<->")):
        used = db.execute("SELECT model FROM collection_status WHERE collection = %s", (name,))
        truth = db.execute(
            f"SELECT key, (embedding {operator} embed_image(%s, %s))::real"
            f" FROM siamese.embedding_{number} ORDER BY 2, 1 LIMIT 10",
            (pictures.files[50], used.fetchone()[0]),  # type: ignore[index]
        ).fetchall()
        found = db.execute(
            "SELECT image_id, distance"
            " FROM similar_images(%s, collection => %s, engine => 'faiss')",
            (pictures.files[50], name),
        ).fetchall()
        assert found[0][0] == ids[3]
        assert [row[0] for row in found] == [row[0] for row in truth]
        assert [row[1] for row in found] == pytest.approx([row[1] for row in truth], abs=1e-5)
    with sql_error("42P08", "images has several collections", "Name one"):
        db.execute("SELECT similar_rows(NULL::images, %s)", (pictures.files[0],))
    sql = "SELECT count(*) FROM similar_rows(NULL::images, %s, collection => 'grid')"
    assert one(db, sql, pictures.files[0]) == 10


def test_drop_collection_leaves_the_table(db: Connection, pictures: Pictures) -> None:
    insert_images(db, pictures.files[:5])
    db.execute("SELECT build_index(); SELECT drop_collection('images')")
    assert one(db, "SELECT count(*) FROM images") == 5
    insert_images(db, [b"no trigger is left to mind"])
    assert db.execute(
        "SELECT to_regclass('siamese.embedding_1'), to_regclass('siamese.pending_1'),"
        " (SELECT count(*) FROM collection_status), (SELECT count(*) FROM index_generations)"
    ).fetchone() == (None, None, 0, 0)
    with sql_error("42704", 'collection "images" does not exist'):
        db.execute("SELECT similar_images(image_id => 1)")


def test_collection_made_anew_under_its_name(
    db: Connection, connect: Connect, pictures: Pictures
) -> None:
    """A session that has used the old one must not go on with it."""
    ids = insert_images(db, pictures.files[:5])
    db.execute("SELECT build_index()")
    other = connect()
    search = "SELECT image_id, distance FROM similar_images(%s, k => 2)"
    before = other.execute(search, (pictures.files[0],)).fetchall()
    model = grid_encoder(("n", 3, 28, 28), pool=7, offset=0.5)
    db.execute("SELECT register_model('grid', %s, metric => 'l2')", (model,))
    db.execute("SELECT drop_collection('images')")
    db.execute("SELECT create_collection(model => 'grid'); SELECT build_index()")
    after = other.execute(search, (pictures.files[0],)).fetchall()
    assert before[0][0] == after[0][0] == ids[0]
    assert after == db.execute(search, (pictures.files[0],)).fetchall() != before


def test_renamed_table(db: Connection, connect: Connect, pictures: Pictures) -> None:
    ids = insert_images(db, pictures.files[:5])
    db.execute("SELECT build_index()")
    other = connect()
    search = "SELECT image_id FROM similar_images(%s, k => 100)"
    by_id = "SELECT image_id FROM similar_images(image_id => %s::bigint, k => 100)"
    assert len(other.execute(search, (pictures.files[0],)).fetchall()) == 5
    assert len(other.execute(by_id, (ids[0],)).fetchall()) == 4
    db.execute("CREATE SCHEMA clinic; ALTER TABLE images SET SCHEMA clinic")
    db.execute("ALTER TABLE clinic.images RENAME TO scans")
    db.execute("INSERT INTO clinic.scans (image) VALUES (%s)", (pictures.files[5],))
    assert len(other.execute(search, (pictures.files[0],)).fetchall()) == 6
    assert len(other.execute(by_id, (ids[0],)).fetchall()) == 5
    # Another table under the old name has nothing to do with it.
    db.execute("CREATE TABLE siamese.images (image_id bigint PRIMARY KEY, image bytea)")
    db.execute("INSERT INTO siamese.images VALUES (77, 'x')")
    assert len(other.execute(search, (pictures.files[0],)).fetchall()) == 6
    assert len(other.execute(by_id, (ids[0],)).fetchall()) == 5
    db.execute("DELETE FROM clinic.scans")
    assert other.execute(search, (pictures.files[0],)).fetchall() == []


def test_renamed_column(db: Connection, connect: Connect, pictures: Pictures) -> None:
    ids = insert_images(db, pictures.files[:5])
    db.execute("SELECT build_index()")
    other = connect()
    calls: list[tuple[str, tuple[object, ...]]] = [
        ("SELECT similar_images(%s)", (pictures.files[0],)),
        ("SELECT similar_images(image_id => %s::bigint)", (ids[0],)),
        ("SELECT similar_images(%s, engine => 'pgvector')", (pictures.files[0],)),
    ]
    for call, values in calls[:2]:
        other.execute(call, values)
    db.execute("ALTER TABLE images RENAME COLUMN image_id TO number")
    for session in (db, other):
        for call, values in calls:
            with pytest.raises(psycopg.Error) as caught:
                session.execute(call, values)
            assert caught.value.sqlstate in ("42703", "55000"), call
            hint = caught.value.diag.message_hint
            assert hint is not None and "create it again" in hint, call
    checks = db.execute("SELECT ok, detail FROM self_check() WHERE subject ~ 'images'").fetchall()
    assert checks == [(False, "renamed or dropped: image_id")]
    db.execute("ALTER TABLE images RENAME COLUMN number TO image_id")
    for session in (db, other):
        assert len(session.execute(*calls[0]).fetchall()) >= 5


def test_table_that_becomes_a_child(db: Connection, pictures: Pictures) -> None:
    """Statements on the parent fire the parent's triggers only."""
    insert_images(db, pictures.files[:2])
    healthy = "SELECT ok, detail FROM self_check() WHERE subject ~ 'images.*table'"
    assert db.execute(healthy).fetchall() == [(True, "ordinary and permanent")]
    db.execute("CREATE TABLE parent (LIKE images); ALTER TABLE images INHERIT parent")
    found = db.execute(healthy).fetchall()
    assert [row[0] for row in found] == [False] and "parent" in found[0][1]


def test_dropped_table(db: Connection, connect: Connect, pictures: Pictures) -> None:
    make_collection(db)
    db.execute("INSERT INTO t VALUES (1, %s)", (pictures.files[0],))
    db.execute("SELECT build_index('t')")
    other = connect()
    search = "SELECT similar_images(%s, collection => 't')"
    other.execute(search, (pictures.files[0],))
    with sql_error("2BP01", "other objects depend on it"):
        db.execute("DROP TABLE t")
    db.execute("DROP TABLE t CASCADE")
    for session in (db, other):
        with sql_error("42704", 'table of collection "t" no longer exists'):
            session.execute(search, (pictures.files[0],))
    for call in ("build_index('t')", "backfill('t')"):
        with sql_error("42704", "no longer exists", "drop_collection"):
            db.execute(f"SELECT {call}")
    checks = db.execute("SELECT ok, detail FROM self_check() WHERE subject ~ '\"t\"'").fetchall()
    assert checks == [(False, "its table no longer exists; call drop_collection('t')")]
    with sql_error("42710", 'collection "t" already exists', "drop_collection"):
        db.execute("SELECT create_collection('t')")
    assert one(db, "SELECT count(*) FROM collection_status") == 2
    db.execute("SELECT drop_collection('t')")
    assert one(db, "SELECT count(*) FROM collection_status") == 1


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_creation_needs_a_new_snapshot(
    db: Connection, connect: Connect, pictures: Pictures, level: str
) -> None:
    """Rows committed after an older one would get neither trigger nor backfill."""
    db.execute("CREATE TABLE t (id int PRIMARY KEY, image bytea)")
    other = connect()
    other.execute(f"BEGIN ISOLATION LEVEL {level}; SELECT FROM t")
    db.execute("INSERT INTO t VALUES (1, %s)", (pictures.files[0],))
    with sql_error("25001", f"cannot run in a {level} transaction", "READ COMMITTED"):
        other.execute("SELECT create_collection('t', 't')")


def test_creation_can_be_rolled_back(db: Connection, pictures: Pictures) -> None:
    db.execute("CREATE TABLE t (id int PRIMARY KEY, image bytea)")
    for _ in range(2):
        with db.transaction(force_rollback=True):
            db.execute("SELECT create_collection('t', 't')")
            db.execute("INSERT INTO t VALUES (1, %s)", (pictures.files[0],))
            db.execute("SELECT build_index('t')")
            assert len(rows_near(db, "t", pictures.files[0])) == 1
    with sql_error("42704", 'collection "t" does not exist'):
        db.execute("SELECT similar_images(%s, collection => 't')", (pictures.files[0],))
    db.execute("INSERT INTO t VALUES (1, 'junk')")


def test_ready_made_table(db: Connection) -> None:
    columns = db.execute(
        "SELECT attname, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute"
        " WHERE attrelid = 'siamese.images'::regclass AND attnum > 0 ORDER BY attnum"
    ).fetchall()
    assert columns == [
        ("image_id", "bigint", True),
        ("image", "bytea", True),
        ("dataset", "text", False),
        ("split", "text", False),
        ("label", "text", False),
        ("source", "text", False),
        ("inserted_at", "timestamp with time zone", True),
    ]
    with sql_error("23502", "image"):
        db.execute("INSERT INTO images (image) VALUES (NULL)")


def test_bad_rows_stop_the_creation(db: Connection, pictures: Pictures) -> None:
    db.execute("CREATE TABLE t (id int PRIMARY KEY, image bytea)")
    db.execute("INSERT INTO t VALUES (1, %s), (2, 'junk')", (pictures.files[0],))
    with sql_error("22P03", "cannot be decoded (row id = 2 of table public.t)"):
        db.execute("SELECT create_collection('t', 't')")
    assert one(db, "SELECT count(*) FROM siamese.collections") == 1
    sql = "SELECT create_collection('t', 't', on_error => 'quarantine')"
    assert one(db, sql) == 1
    columns = "collection, key, sqlstate, message, failed_at <= now()"
    failures = rows_of(db, f"SELECT {columns} FROM embedding_failures")
    assert failures == [("t", "2", "22P03", "image cannot be decoded", True)]


def test_a_key_that_is_not_validated(db: Connection) -> None:
    """Rows from before its constraint may hold NULL: the reason names it, and the remedy works."""
    if db.info.server_version < 180000:
        pytest.skip("NOT NULL can't be NOT VALID yet")
    db.execute("CREATE TABLE t (id int UNIQUE, image bytea)")
    db.execute("INSERT INTO t VALUES (NULL, NULL)")
    db.execute("ALTER TABLE t ADD CONSTRAINT has_key NOT NULL id NOT VALID")
    with sql_error("42P16", '"has_key" is NOT VALID', "VALIDATE CONSTRAINT has_key"):
        db.execute("SELECT create_collection('t', 't', 'id')")
    db.execute("DELETE FROM t; ALTER TABLE t VALIDATE CONSTRAINT has_key")
    db.execute("SELECT create_collection('t', 't', 'id')")


def test_a_virtual_image(db: Connection) -> None:
    """No statement names it, and triggers see no value."""
    if db.info.server_version < 180000:
        pytest.skip("generated columns are stored")
    db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, base bytea,"
        " image bytea GENERATED ALWAYS AS (substring(base FROM 3)) VIRTUAL)"
    )
    with sql_error("0A000", 'column "image" is a virtual generated column', "STORED"):
        db.execute("SELECT create_collection('t', 't')")


def test_integer_keys_that_become_bigint(db: Connection, pictures: Pictures) -> None:
    """PostgreSQL refuses; in one transaction with a new collection it goes."""
    make_collection(db)
    db.execute("INSERT INTO t VALUES (1, %s)", (pictures.files[0],))
    alter = "ALTER TABLE t ALTER COLUMN id TYPE bigint"
    with sql_error("0A000", "cannot alter type of a column used"):
        db.execute(alter)
    with db.transaction():
        db.execute("SELECT drop_collection('t')")
        db.execute(alter)
        db.execute("SELECT create_collection('t', 't')")
    db.execute("INSERT INTO t VALUES (5000000000, %s)", (pictures.files[1],))
    assert rows_near(db, "t", pictures.files[1])[0] == 5_000_000_000
