"""Triggers that a copied table brought along, publications of all tables, subscriptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import Connection, Pictures, insert_images
from tests.support import sql_error

MODES = ["", ", embed => 'deferred'"]


@pytest.fixture(params=MODES, ids=["sync", "deferred"])
def embed(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def copy_with_triggers(db: Connection, embed: str, pictures: Pictures) -> None:
    """What pg_dump -t and schema clones make of a collection's table."""
    db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea)")
    db.execute(f"SELECT create_collection('t', 't'{embed})")
    db.execute("INSERT INTO t VALUES (1, %s), (2, %s)", (pictures.files[0], pictures.files[1]))
    db.execute("SELECT embed_pending()")
    db.execute("CREATE TABLE copy AS SELECT * FROM t; ALTER TABLE copy ADD PRIMARY KEY (id)")
    for (definition,) in db.execute(
        "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = 't'::regclass"
    ).fetchall():
        db.execute(definition.replace(" ON public.t ", " ON public.copy "))


def test_a_copied_trigger_touches_no_other_collection(
    db: Connection, pictures: Pictures, embed: str
) -> None:
    copy_with_triggers(db, embed, pictures)
    vectors = db.execute("SELECT * FROM siamese.embedding_2").fetchall()
    for statement in (
        "INSERT INTO copy VALUES (3, 'x')",
        "UPDATE copy SET image = 'y'",
        "UPDATE copy SET id = id",
        "DELETE FROM copy",
        "TRUNCATE copy",
    ):
        with sql_error("55000", "table public.copy has a trigger of another", "create_collection"):
            db.execute(statement)
    assert db.execute("SELECT * FROM siamese.embedding_2").fetchall() == vectors
    bad = db.execute("SELECT subject, detail FROM self_check() WHERE NOT ok").fetchall()
    assert [row[0] for row in bad] == ["triggers"]
    assert "public.copy has" in bad[0][1] and "pg_siamese_2_truncate" in bad[0][1]
    # The remedy.
    db.execute(f"SELECT create_collection('copy', 'copy'{embed})")
    db.execute("SELECT embed_pending()")
    assert db.execute("SELECT bool_and(ok) FROM self_check()").fetchone() == (True,)
    db.execute("TRUNCATE copy")
    assert db.execute("SELECT * FROM siamese.embedding_2").fetchall() == vectors
    assert db.execute("SELECT count(*) FROM siamese.embedding_3").fetchone() == (0,)


def test_a_copied_trigger_of_a_collection_that_is_not_there(
    db: Connection, pictures: Pictures
) -> None:
    copy_with_triggers(db, "", pictures)
    db.execute("SELECT drop_collection('t')")
    with sql_error("42704", "collection 2 does not exist", "create_collection"):
        db.execute("TRUNCATE copy")
    bad = db.execute("SELECT subject, detail FROM self_check() WHERE NOT ok").fetchall()
    assert [row[0] for row in bad] == ["triggers"] and "public.copy has" in bad[0][1]
    db.execute("SELECT create_collection('copy', 'copy')")
    assert db.execute("SELECT bool_and(ok) FROM self_check()").fetchone() == (True,)


def test_two_collections_of_one_table_keep_their_triggers(
    db: Connection, pictures: Pictures, embed: str
) -> None:
    db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea)")
    db.execute(f"SELECT create_collection('a', 't'), create_collection('b', 't'{embed})")
    db.execute("INSERT INTO t VALUES (1, %s)", (pictures.files[0],))
    db.execute("SELECT embed_pending()")
    for number in (2, 3):
        assert db.execute(f"SELECT key FROM siamese.embedding_{number}").fetchall() == [(1,)]


def test_every_table_can_be_published(db: Connection) -> None:
    """A primary key, or another replica identity: without one, published tables refuse deletes."""
    db.execute("CREATE TABLE public.t (id uuid PRIMARY KEY, image bytea)")
    db.execute("SELECT create_collection('t', 't', embed => 'deferred')")
    rows = db.execute(
        "SELECT c.relname::text, CASE c.relreplident"
        " WHEN 'd' THEN EXISTS (SELECT FROM pg_index AS i"
        " WHERE i.indrelid = c.oid AND i.indisprimary AND i.indimmediate)"
        " WHEN 'n' THEN false ELSE true END FROM pg_class AS c"
        " WHERE c.relnamespace = 'siamese'::regnamespace AND c.relkind = 'r'"
    ).fetchall()
    assert {"collections", "embedding_batches", "embedding_2", "pending_2", "queue_2"} <= {
        row[0] for row in rows
    }
    assert [name for name, can in rows if not can] == []


@pytest.fixture
def published(db: Connection) -> Iterator[list[Any]]:
    """A publication of all tables; gives the warnings that the session gets."""
    notices: list[Any] = []
    db.add_notice_handler(lambda notice: notices.append((notice.severity, notice.message_primary)))
    db.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    yield notices


@pytest.mark.filterwarnings("ignore")
def test_everything_works_while_all_tables_are_published(
    db: Connection, pictures: Pictures, published: list[Any], embed: str
) -> None:
    ids = insert_images(db, pictures.files[:5])
    db.execute("SELECT build_index(); SELECT backfill()")
    db.execute("DELETE FROM images WHERE image_id = %s", (ids[0],))
    db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea)")
    del published[:]
    db.execute(f"SELECT create_collection('t', 't'{embed})")
    warned = [message for severity, message in published if severity == "WARNING"]
    assert len(warned) == 1 and 'publication "everything"' in warned[0]
    db.execute("INSERT INTO t VALUES (1, %s), (2, %s)", (pictures.files[0], pictures.files[1]))
    for _ in range(60):  # one batch in twenty removes the records of old ones
        db.execute("UPDATE t SET image = %s", (pictures.files[2],))
        db.execute("UPDATE siamese.embedding_batches SET embedded_at = now() - interval '1 hour'")
        db.execute("SELECT embed_pending()")
    db.execute("SELECT build_index('t'); SELECT backfill('t'); DELETE FROM t WHERE id = 1")
    db.execute("TRUNCATE t; SELECT alter_collection('t', max_bytes => 100)")
    assert db.execute("SELECT bool_and(ok) FROM self_check()").fetchone() == (True,)
    db.execute("SELECT drop_collection('t')")


def test_a_database_whose_collections_are_replicated(db: Connection, pictures: Pictures) -> None:
    """As pg_createsubscriber leaves it: numbers drawn here would meet the publisher's."""
    insert_images(db, pictures.files[:5])
    db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea)")
    db.execute(
        "CREATE SUBSCRIPTION siamese_test CONNECTION 'dbname=none' PUBLICATION everything"
        " WITH (connect = false, slot_name = NONE)"
    )
    try:
        db.execute("SET allow_system_table_mods = on")
        db.execute(
            "INSERT INTO pg_subscription_rel (srsubid, srrelid, srsubstate)"
            " SELECT oid, 'siamese.generations'::regclass, 'r' FROM pg_subscription"
            " WHERE subname = 'siamese_test'"
        )
        for call in ("build_index()", "create_collection('t', 't')"):
            with sql_error("55000", "are replicated into this database", "Publish the tables"):
                db.execute(f"SELECT {call}")
        # Refreshed with a publication that does not hold them: the numbers that came stay taken.
        db.execute("DELETE FROM pg_subscription_rel")
        db.execute(
            "INSERT INTO siamese.generations SELECT n, 1, gen_random_uuid(), 5, 5, 'flat', NULL,"
            " NULL, NULL, NULL, 1, 1, 1 FROM generate_series(1, 40) AS n"
        )
        assert db.execute("SELECT build_index()").fetchone() == (41,)
    finally:
        db.execute("DROP SUBSCRIPTION siamese_test")


def test_dropping_a_collection_says_nothing(db: Connection, embed: str) -> None:
    notices: list[Any] = []
    db.add_notice_handler(lambda notice: notices.append(notice.message_primary))
    db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea)")
    db.execute(f"SELECT create_collection('t', 't'{embed}); SELECT drop_collection('t')")
    db.execute(f"SELECT create_collection('t', 't'{embed}); DROP TABLE t CASCADE")
    del notices[:]
    db.execute("SELECT drop_collection('t')")
    assert notices == []
    left = "SELECT relname FROM pg_class WHERE relname ~ '_[23]$'"
    assert db.execute(left).fetchall() == []
    left = (
        "SELECT proname FROM pg_proc"
        " WHERE proname ~ '_[23]$' AND pronamespace = 'siamese'::regnamespace"
    )
    assert db.execute(left).fetchall() == []


def test_quoted_identifiers(db: Connection, pictures: Pictures, embed: str) -> None:
    """As some tools set: what PostgreSQL prints is quoted then."""
    db.execute("SET quote_all_identifiers = on")
    db.execute("CREATE TABLE t (id text PRIMARY KEY, image bytea)")
    db.execute(f"SELECT create_collection('t', 't'{embed})")
    db.execute("INSERT INTO t VALUES ('a', %s)", (pictures.files[0],))
    db.execute("SELECT embed_pending(); SELECT build_index('t'), backfill('t')")
    assert db.execute("SELECT bool_and(ok) FROM self_check()").fetchone() == (True,)
    db.execute("UPDATE t SET image = %s; DELETE FROM t; TRUNCATE t".replace("%s", "NULL"))
    db.execute("SELECT drop_collection('t')")


def test_searches_in_triggers(
    db: Connection, connect: Callable[..., Connection], pictures: Pictures
) -> None:
    """Vectors are there for statement triggers whose names come after those of the collection."""
    db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea)")
    db.execute("CREATE TABLE seen (name text, found bigint)")
    db.execute("SELECT create_collection('t', 't')")
    db.execute(
        """
        CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO seen SELECT TG_NAME, count(*)
            FROM t CROSS JOIN LATERAL similar_images(t.image, k => 5, collection => 't');
            RETURN NULL;
        END $$
        """
    )
    for name, level in (("a", "STATEMENT"), ("z", "STATEMENT"), ("z_row", "ROW")):
        db.execute(
            f"CREATE TRIGGER {name} AFTER INSERT ON t FOR EACH {level} EXECUTE FUNCTION look()"
        )
    db.execute("INSERT INTO t VALUES (1, %s)", (pictures.files[0],))
    rows = db.execute("SELECT name, found FROM seen ORDER BY name").fetchall()
    assert rows == [("a", 0), ("z", 1), ("z_row", 0)]
