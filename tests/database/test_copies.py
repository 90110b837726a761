"""Triggers that a copied table brought along, publications of all tables, subscriptions."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Connection, Pictures, insert_images
from tests.database.tables import make_collection
from tests.support import notices_of, one, sql_error


def copy_with_triggers(db: Connection, embed: str, pictures: Pictures) -> None:
    """What pg_dump -t and schema clones make of a collection's table."""
    make_collection(db, embed=embed)
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
    db.execute(f"SELECT create_collection('copy', 'copy', embed => '{embed}')")
    db.execute("SELECT embed_pending()")
    assert one(db, "SELECT bool_and(ok) FROM self_check()") is True
    db.execute("TRUNCATE copy")
    assert db.execute("SELECT * FROM siamese.embedding_2").fetchall() == vectors
    assert one(db, "SELECT count(*) FROM siamese.embedding_3") == 0


def test_a_copied_trigger_of_a_collection_that_is_not_there(
    db: Connection, pictures: Pictures
) -> None:
    copy_with_triggers(db, "sync", pictures)
    db.execute("SELECT drop_collection('t')")
    with sql_error("42704", "collection 2 does not exist", "create_collection"):
        db.execute("TRUNCATE copy")
    bad = db.execute("SELECT subject, detail FROM self_check() WHERE NOT ok").fetchall()
    assert [row[0] for row in bad] == ["triggers"] and "public.copy has" in bad[0][1]
    db.execute("SELECT create_collection('copy', 'copy')")
    assert one(db, "SELECT bool_and(ok) FROM self_check()") is True


def test_every_table_can_be_published(db: Connection) -> None:
    """A primary key, or another replica identity: without one, published tables refuse deletes."""
    make_collection(db, key="uuid", embed="deferred")
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
def published(db: Connection) -> list[Any]:
    """A publication of all tables; gives the warnings that the session gets."""
    notices: list[Any] = []
    db.add_notice_handler(lambda notice: notices.append((notice.severity, notice.message_primary)))
    db.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    return notices


@pytest.mark.filterwarnings("ignore")
def test_everything_works_while_all_tables_are_published(
    db: Connection, pictures: Pictures, published: list[Any], embed: str
) -> None:
    ids = insert_images(db, pictures.files[:5])
    db.execute("SELECT build_index(); SELECT backfill()")
    db.execute("DELETE FROM images WHERE image_id = %s", (ids[0],))
    del published[:]
    make_collection(db, embed=embed)
    warned = [message for severity, message in published if severity == "WARNING"]
    assert len(warned) == 1 and 'publication "everything"' in warned[0]
    db.execute("INSERT INTO t VALUES (1, %s), (2, %s)", (pictures.files[0], pictures.files[1]))
    for _ in range(60):  # one batch in twenty removes the records of old ones
        db.execute("UPDATE t SET image = %s", (pictures.files[2],))
        db.execute("UPDATE siamese.embedding_batches SET embedded_at = now() - interval '1 hour'")
        db.execute("SELECT embed_pending()")
    db.execute("SELECT build_index('t'); SELECT backfill('t'); DELETE FROM t WHERE id = 1")
    db.execute("TRUNCATE t; SELECT alter_collection('t', max_bytes => 100)")
    assert one(db, "SELECT bool_and(ok) FROM self_check()") is True
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
        assert one(db, "SELECT build_index()") == 41
    finally:
        db.execute("DROP SUBSCRIPTION siamese_test")


def test_dropping_a_collection_says_nothing(db: Connection, embed: str) -> None:
    notices = notices_of(db)
    db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea)")
    create = f"SELECT create_collection('t', 't', embed => '{embed}')"
    db.execute(f"{create}; SELECT drop_collection('t')")
    assert notices == []
    db.execute(f"{create}; DROP TABLE t CASCADE")
    del notices[:]
    db.execute("SELECT drop_collection('t')")
    assert notices == []
    left = (
        "SELECT relname FROM pg_class WHERE relname ~ '_[23]$'"
        " UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = 'siamese'::regnamespace"
        " AND proname ~ '_[23]$'"
    )
    assert db.execute(left).fetchall() == []
