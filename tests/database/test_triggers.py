"""Embedding by the statement itself: bad images, large statements, settings, backfill."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Connect, Connection, Pictures, insert_images
from tests.database.tables import Table, insert_rows, without_triggers
from tests.support import notices_of, one, sql_error, wait_until


@pytest.fixture
def table(db: Connection, pictures: Pictures) -> Iterator[Table]:
    """Rows 0 to 9 are in an index; whatever a test does, the table is in step at its end."""
    table = Table.indexed(db, pictures.files[:40])
    yield table
    table.check()


def test_many_rows_in_one_statement(table: Table, pictures: Pictures) -> None:
    """More than any batch or fetch holds."""
    table.files = pictures.files
    table.db.execute("DELETE FROM t")
    table.db.execute(
        "INSERT INTO t SELECT place - 1, image FROM unnest(%s::bytea[])"
        " WITH ORDINALITY AS u (image, place)",
        (pictures.files[:700],),
    )
    assert len(table.vectors()) == 700
    table.db.execute("DELETE FROM t WHERE id % 7 > 0")


@pytest.mark.law(9)
def test_failed_statement_leaves_nothing(table: Table) -> None:
    before = table.vectors()
    with sql_error("22P03", "row id = 21 of table public.t"):
        insert_rows(table.db, [20, 21], [table.files[20], b"junk"])
    with sql_error("22P03", "row id = 1 of table public.t"):
        table.db.execute("UPDATE t SET image = 'junk' WHERE id = 1")
    with sql_error("23505", "t_pkey"):
        table.insert(20, 1)
    assert table.vectors() == before


def test_a_session_meets_what_was_changed(table: Table, connect: Connect) -> None:
    """It keeps what it knows of a collection, and must see that it is another now."""
    db, session = table.db, connect()
    junk = "INSERT INTO t (id, image) VALUES (50, 'junk')"
    with sql_error("22P03", "row id = 50 of table public.t"):
        session.execute(junk)
    db.execute("SELECT alter_collection('t', max_bytes => 3)")
    with sql_error("54000", "of 4 bytes is too large"):
        session.execute(junk)
    db.execute("SELECT alter_collection('t', max_bytes => -1)")
    with session.transaction(force_rollback=True):
        session.execute("SELECT alter_collection('t', on_error => 'quarantine')")
        session.execute(junk)
        session.execute("SELECT alter_collection('t', on_error => 'reject')")
        with sql_error("22P03"), session.transaction():
            session.execute("INSERT INTO t (id, image) VALUES (51, 'junk')")
    with sql_error("22P03"):
        session.execute(junk)
    db.execute("CREATE SCHEMA clinic; ALTER TABLE t SET SCHEMA clinic")
    with sql_error("22P03", "row id = 50 of table clinic.t"):
        session.execute(junk.replace(" t ", " clinic.t "))
    db.execute("ALTER SCHEMA clinic RENAME TO hospital; ALTER TABLE hospital.t RENAME TO scans")
    with sql_error("22P03", "row id = 50 of table hospital.scans"):
        session.execute(junk.replace(" t ", " hospital.scans "))
    db.execute("ALTER TABLE hospital.scans FORCE ROW LEVEL SECURITY")
    session.execute("INSERT INTO hospital.scans VALUES (20, %s)", (table.files[20],))
    db.execute("ALTER TABLE hospital.scans NO FORCE ROW LEVEL SECURITY")
    db.execute("ALTER TABLE hospital.scans RENAME TO t; ALTER TABLE hospital.t SET SCHEMA public")
    db.execute("CREATE SCHEMA extensions; ALTER EXTENSION vector SET SCHEMA extensions")
    session.execute("INSERT INTO t VALUES (21, %s)", (table.files[21],))
    db.execute("ALTER EXTENSION vector SET SCHEMA public")


def test_backfill_leaves_locked_rows_alone(table: Table, connect: Connect) -> None:
    with without_triggers(table.db):
        table.insert(20, 21)
    other, notices = connect(), notices_of(table.db)
    with other.transaction():
        other.execute("UPDATE t SET note = 'busy' WHERE id = 20")
        assert one(table.db, "SELECT backfill('t')") == 1
    assert any("1 row " in notice for notice in notices)
    assert one(table.db, "SELECT backfill('t')") == 1


def test_rows_that_change_during_a_backfill(table: Table, connect: Connect) -> None:
    """Their trigger has stored the vector by the time that the backfill comes to them."""
    insert = "INSERT INTO t SELECT i, %s FROM generate_series(100, 1600) AS i"
    with without_triggers(table.db):
        table.db.execute(insert, (table.files[0],))
    other = connect()
    counts: list[int] = []
    thread = threading.Thread(target=lambda: counts.append(one(other, "SELECT backfill('t')")))
    thread.start()
    stores = (
        "SELECT FROM pg_locks WHERE pid = %s AND relation = 'siamese.embedding_2'::regclass"
        " AND mode = 'RowExclusiveLock'"
    )
    wait_until(lambda: table.db.execute(stores, (other.info.backend_pid,)).rowcount)
    table.db.execute("UPDATE t SET image = %s WHERE id > 1500", (table.files[1],))
    thread.join()
    assert counts and 1401 <= counts[0] <= 1501
    assert len(table.vectors()) == 1511
    table.db.execute("DELETE FROM t WHERE id BETWEEN 100 AND 1590")


@pytest.fixture
def quarantine(db: Connection, pictures: Pictures) -> Table:
    """Table ``t`` with quarantine and rows 0 to 4, of which 1 and 3 are bad, and 5 has no image."""
    table = Table.create(db, pictures.files[:40], on_error="quarantine")
    images = [table.files[0], b"junk", table.files[2], b"", table.files[4], None]
    insert_rows(db, range(6), images)
    return table


def failures(db: Connection) -> dict[str, tuple[Any, ...]]:
    rows = db.execute("SELECT key, sqlstate, message FROM embedding_failures").fetchall()
    return {row[0]: row[1:] for row in rows}


@pytest.mark.law(9)
def test_quarantine(quarantine: Table) -> None:
    assert failures(quarantine.db) == {
        "1": ("22P03", "image cannot be decoded"),
        "3": ("22P03", "image is empty"),
    }
    assert set(quarantine.vectors()) == {0, 2, 4}
    found = quarantine.db.execute(
        "SELECT image_id FROM similar_images(%s, collection => 't')", (quarantine.files[0],)
    ).fetchall()
    assert {row[0] for row in found} == {0, 2, 4}


def test_quarantine_is_left_by_repair(quarantine: Table) -> None:
    db = quarantine.db
    db.execute("UPDATE t SET image = %s WHERE id = 1", (quarantine.files[1],))
    assert set(failures(db)) == {"3"}
    db.execute("UPDATE t SET note = 'seen'")
    assert set(failures(db)) == {"3"}
    db.execute("UPDATE t SET id = 33 WHERE id = 3")
    assert set(failures(db)) == {"33"}
    db.execute("UPDATE t SET image = '' WHERE id = 0")
    assert failures(db)["0"] == ("22P03", "image is empty")
    db.execute("DELETE FROM t WHERE id IN (0, 33)")
    assert failures(db) == {}
    db.execute("DELETE FROM t WHERE id = 5")
    quarantine.check()
    db.execute("INSERT INTO t VALUES (6, 'x')")
    db.execute("TRUNCATE t")
    assert failures(db) == {}


def test_left_overs_of_quarantined_rows(quarantine: Table) -> None:
    db = quarantine.db
    with without_triggers(db):
        db.execute("DELETE FROM t")
    assert set(failures(db)) == {"1", "3"} and set(quarantine.vectors()) == {0, 2, 4}
    quarantine.insert(1)
    db.execute(
        "INSERT INTO t VALUES (0, 'junk'), (2, %s), (3, %s)",
        (quarantine.files[2], quarantine.files[3]),
    )
    assert set(failures(db)) == {"0"} and set(quarantine.vectors()) == {1, 2, 3, 4}
    db.execute("INSERT INTO t VALUES (4, NULL)")
    assert set(failures(db)) == {"0"} and set(quarantine.vectors()) == {1, 2, 3}


def test_backfill_with_failures(quarantine: Table) -> None:
    """Rows that fail every time must not keep others from their turn."""
    db = quarantine.db
    with without_triggers(db):
        quarantine.insert(*range(20, 30))
        db.execute("UPDATE t SET image = %s WHERE id = 1", (quarantine.files[1],))
    counts = [db.execute("SELECT backfill('t', 4)").fetchone() for _ in range(4)]
    assert counts == [(4,), (4,), (3,), (0,)]
    assert set(failures(db)) == {"3"}
    assert db.execute(
        "SELECT rows_embedded, failures FROM collection_status WHERE collection = 't'"
    ).fetchone() == (14, 1)


def test_quarantine_inside_a_block_with_exceptions(quarantine: Table) -> None:
    quarantine.db.execute(
        "DO $$ BEGIN INSERT INTO t VALUES (9, 'junk'); EXCEPTION WHEN others THEN RAISE; END $$"
    )
    assert set(failures(quarantine.db)) == {"1", "3", "9"}


def test_progress_of_backfill_is_reported_at_most_now_and_then(
    db: Connection, pictures: Pictures
) -> None:
    notices = notices_of(db)
    db.execute("SET session_replication_role = replica")
    insert_images(db, pictures.files[:50])
    assert one(db, "SELECT backfill()") == 50
    assert notices == []
