"""UPDATEs that leave images alone read none; whatever changes an image is seen all the same."""

from __future__ import annotations

import psycopg
import pytest

from tests.conftest import Connect, Connection, Pictures
from tests.database.tables import blocks_read, insert_rows, make_collection, without_triggers
from tests.support import one, sql_error


@pytest.fixture
def table(db: Connection, pictures: Pictures, embed: str) -> Connection:
    """Table ``t`` with rows 0 to 9; ``pool`` holds other images."""
    make_collection(db, more=", note text", embed=embed)
    db.execute("CREATE TABLE pool AS SELECT * FROM unnest(%s::bytea[]) WITH ORDINALITY"
               " AS u (image, id)", (pictures.files[100:120],))  # fmt: skip
    insert_rows(db, range(10), pictures.files[:10])
    db.execute("SELECT embed_pending()")
    return db


def check(db: Connection) -> None:
    """Each row has the vector of its image, or waits for it."""
    wrong = (
        "SELECT t.id FROM t FULL JOIN siamese.embedding_2 AS e ON e.key = t.id"
        " WHERE t.id IS NULL OR e.image_hash <> substring(sha256(t.image) FROM 1 FOR 16)"
    )
    assert db.execute(wrong).fetchall() == []
    db.execute("SELECT embed_pending()")
    assert db.execute(wrong + " OR e.key IS NULL").fetchall() == []


def test_images_are_not_read(db: Connection, embed: str) -> None:
    make_collection(db, "big", more=", note text", embed=embed)
    db.execute("ALTER TABLE big ALTER image SET STORAGE EXTERNAL")
    with without_triggers(db):
        db.execute("INSERT INTO big SELECT i, decode(repeat(md5(i::text), 10000), 'hex')"
               " FROM generate_series(1, 20) AS i")  # fmt: skip
    before = blocks_read(db, "big")
    db.execute("UPDATE big SET note = 'seen'")
    db.execute("INSERT INTO big (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET note = 'again'")
    db.execute("MERGE INTO big USING (VALUES (2)) AS s (id) ON big.id = s.id"
               " WHEN MATCHED THEN UPDATE SET note = 'merged'")  # fmt: skip
    assert blocks_read(db, "big") - before < 20  # each image has as many
    if db.info.server_version >= 170000:  # what is stored once can be told from its number
        db.execute(
            """
            CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                new.note := clock_timestamp();
                RETURN new;
            END $$;
            CREATE TRIGGER stamp BEFORE UPDATE ON big FOR EACH ROW EXECUTE FUNCTION stamp()
            """
        )
        db.execute("UPDATE big SET note = 'seen'")
        db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; UPDATE big SET id = id; COMMIT")
        assert blocks_read(db, "big") - before < 40
    db.execute("SELECT octet_length(string_agg(md5(image), '')) FROM big")
    assert blocks_read(db, "big") - before > 300  # this reads them


def test_parts_of_one_statement(table: Connection) -> None:
    """Column lists of statement triggers look at one part only."""
    for first, second in (
        ("note = 'x'", "image = pool.image"),
        ("image = pool.image", "note = 'y'"),
    ):
        for place in range(2):
            table.execute(
                f"WITH a AS (UPDATE t SET {first} FROM pool WHERE t.id = {place} AND pool.id = 1"
                " RETURNING t.id)"
                f" UPDATE t SET {second} FROM pool, a WHERE t.id = {place + 2} AND pool.id = 2"
            )
            table.execute(
                f"WITH a AS (UPDATE t SET {first} FROM pool"
                f" WHERE t.id = {place + 4} AND pool.id = 3)"
                f" UPDATE t SET {second} FROM pool WHERE t.id = {place + 6} AND pool.id = 4"
            )
            check(table)


def test_upsert_and_merge(table: Connection) -> None:
    upsert = (
        "INSERT INTO t SELECT id, image FROM pool"
        " ON CONFLICT (id) DO UPDATE SET note = 'x', image = excluded.image"
    )
    table.execute(upsert)
    check(table)
    table.execute(
        "MERGE INTO t USING pool ON t.id = pool.id - 1"
        " WHEN MATCHED AND t.id = 2 THEN UPDATE SET note = 'seen'"
        " WHEN MATCHED THEN UPDATE SET image = pool.image"
    )
    check(table)


@pytest.mark.parametrize("when", ["first", "later"])
def test_triggers_that_change_the_image_of_another_update(table: Connection, when: str) -> None:
    """An image that BEFORE triggers set is in no column list."""
    table.execute(
        """
        CREATE FUNCTION other() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            new.image := (SELECT image FROM pool WHERE pool.id = new.id + 1);
            RETURN new;
        END $$
        """
    )
    if when == "later":
        table.execute("UPDATE t SET note = 'plans are made'")
    table.execute("CREATE TRIGGER a BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION other()")
    table.execute("UPDATE t SET note = 'x' WHERE id < 5")
    check(table)
    table.execute("ALTER TABLE t DISABLE TRIGGER a; UPDATE t SET note = 'y'")
    table.execute("ALTER TABLE t ENABLE ALWAYS TRIGGER a; UPDATE t SET note = 'z'")
    check(table)


def test_a_trigger_that_an_old_snapshot_does_not_show(table: Connection, connect: Connect) -> None:
    table.execute(
        """
        CREATE FUNCTION other() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            new.image := decode('00', 'hex') || old.image;
            RETURN new;
        END $$
        """
    )
    session = connect()
    session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM pool")
    table.execute("CREATE TRIGGER a BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION other()")
    try:
        session.execute("UPDATE t SET note = 'x' WHERE id = 1")
        session.execute("COMMIT")
    except Exception as error:
        assert getattr(error, "sqlstate", None) == "22P03"  # the image was looked at
        session.execute("ROLLBACK")
        return
    assert table.execute("SELECT FROM siamese.embedding_2 WHERE key = 1").fetchall() == []


@pytest.mark.law(2)
@pytest.mark.parametrize("frames", ["one", "all"])
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE t SET image = NULL WHERE id = 1",
        "UPDATE t SET image = (SELECT image FROM t WHERE id = 0) WHERE id = 1",
        "UPDATE t SET id = 2 WHERE id = 1",
        "DELETE FROM t WHERE id = 1",
    ],
)
def test_a_vector_that_an_old_snapshot_does_not_show(
    db: Connection, pictures: Pictures, connect: Connect, embed: str, frames: str, change: str
) -> None:
    """A backfill leaves the row unchanged, so PostgreSQL lets an older transaction change it."""
    make_collection(db, embed=embed, frames=frames)
    with without_triggers(db):
        insert_rows(db, range(2), pictures.files[:2])
    session = connect()
    session.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    with sql_error("40001", "concurrent embedding"), session.transaction():
        session.execute("SELECT FROM t")
        assert one(db, "SELECT backfill('t')") == 2
        session.execute(change.encode())
    with session.transaction():
        session.execute(change.encode())
    db.execute("SELECT embed_pending()")
    assert db.execute("SELECT subject FROM self_check(true) WHERE NOT ok").fetchall() == []


def test_nested_updates(table: Connection) -> None:
    """Another statement on the table, within this one, between its triggers or undone."""
    table.execute(
        """
        CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF pg_trigger_depth() > 1 THEN
                RETURN NULL;
            END IF;
            UPDATE t SET note = 'nested' WHERE id = 7;
            BEGIN
                UPDATE t SET image = (SELECT image FROM pool WHERE id = 9) WHERE id IN (1, 8);
                RAISE division_by_zero;
            EXCEPTION WHEN division_by_zero THEN
                NULL;
            END;
            UPDATE t SET note = 'nested again' WHERE id = 1;
            RETURN NULL;
        END $$;
        CREATE TRIGGER a AFTER UPDATE ON t FOR EACH ROW EXECUTE FUNCTION again();
        CREATE TRIGGER z AFTER UPDATE ON t FOR EACH ROW EXECUTE FUNCTION again();
        CREATE TRIGGER b AFTER UPDATE ON t FOR EACH STATEMENT EXECUTE FUNCTION again()
        """
    )
    table.execute("UPDATE t SET image = (SELECT image FROM pool WHERE id = 1) WHERE id IN (1, 2)")
    check(table)
    table.execute("UPDATE t SET note = 'x'")
    check(table)
    with table.transaction():
        with table.transaction(force_rollback=True):
            table.execute("UPDATE t SET image = (SELECT image FROM pool WHERE id = 2) WHERE id = 3")
        table.execute("UPDATE t SET image = (SELECT image FROM pool WHERE id = 3) WHERE id = 4")
        table.execute("UPDATE t SET note = 'y'")
    check(table)


@pytest.mark.parametrize(
    "meddling",
    [
        "ALTER TABLE t DISABLE TRIGGER pg_siamese_2_change",
        "DROP TRIGGER pg_siamese_2_change ON t",
        "SET session_replication_role = replica;"
        " ALTER TABLE t ENABLE ALWAYS TRIGGER pg_siamese_2_update",
        "ALTER TABLE t RENAME image TO old; ALTER TABLE t ADD image bytea;"
        " SET session_replication_role = replica; UPDATE t SET image = old;"
        " RESET session_replication_role",
    ],
    ids=["disabled", "dropped", "replica", "renamed"],
)
def test_a_row_trigger_that_is_not_as_it_was_made(table: Connection, meddling: str) -> None:
    """Then images are compared."""
    table.execute(meddling)
    try:
        table.execute("UPDATE t SET image = (SELECT image FROM pool WHERE id = 1) WHERE id = 1")
    except psycopg.Error as error:
        assert error.sqlstate == "55000" and "RENAME" in meddling, error
    stale = (
        "SELECT t.id FROM t JOIN siamese.embedding_2 AS e ON e.key = t.id"
        " WHERE e.image_hash <> substring(sha256(t.image) FROM 1 FOR 16)"
    )
    assert table.execute(stale).fetchall() == []


def test_generated_images(db: Connection, pictures: Pictures, embed: str) -> None:
    """Stored ones are in no SET list."""
    db.execute("CREATE TABLE t (id int PRIMARY KEY, base bytea, image bytea"
               " GENERATED ALWAYS AS (substring(base FROM 3)) STORED)")  # fmt: skip
    db.execute(f"SELECT create_collection('t', 't', embed => '{embed}')")
    db.execute("INSERT INTO t VALUES (1, %s)", (b"xy" + pictures.files[0],))
    check(db)
    db.execute("UPDATE t SET base = %s", (b"xy" + pictures.files[1],))
    check(db)


def test_keys_by_cascade(table: Connection) -> None:
    table.execute("CREATE TABLE parent (id int PRIMARY KEY)")
    table.execute("INSERT INTO parent SELECT id FROM t")
    table.execute("ALTER TABLE t ADD FOREIGN KEY (id) REFERENCES parent ON UPDATE CASCADE")
    table.execute("UPDATE parent SET id = id + 100 WHERE id < 5")
    check(table)
