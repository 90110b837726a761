"""Vectors follow images, whatever the statement; and backfill catches what triggers could not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import Connection, Pictures, insert_images
from tests.support import sql_error


class Table:
    """Table ``t (id, image, note)`` with a collection, and a look at whether it is in step."""

    def __init__(self, db: Connection, files: list[bytes]) -> None:
        self.db = db
        self.files = files

    def insert(self, *places: int) -> None:
        """Insert pictures under their place as key, in one statement."""
        self.db.execute(
            "INSERT INTO t SELECT * FROM unnest(%s::int[], %s::bytea[])",
            (list(places), [self.files[place] for place in places]),
        )

    def vectors(self) -> dict[int, int]:
        """Key to embedding_id."""
        return dict(self.db.execute("SELECT key, embedding_id FROM siamese.embedding_2").fetchall())

    def images(self) -> dict[int, int]:
        """Key to the place of its picture."""
        rows = self.db.execute("SELECT id, image FROM t ORDER BY id", binary=True).fetchall()
        return {key: self.files.index(image) for key, image in rows}

    def check(self) -> None:
        """Each row has the vector of its image and no other; searches agree."""
        wrong = self.db.execute(
            "SELECT t.id, e.key, e.embedding <=> embed_image(t.image) FROM t"
            " FULL JOIN siamese.embedding_2 AS e ON e.key = t.id"
            " WHERE t.id IS NULL OR e.key IS NULL OR e.embedding <=> embed_image(t.image) > 1e-5"
        ).fetchall()
        assert wrong == []
        for key, place in self.images().items():
            for engine in ("auto", "pgvector"):
                found = self.db.execute(
                    "SELECT image_id FROM similar_images(%s, k => 100, collection => 't',"
                    " max_distance => 1e-5::real, engine => %s)",
                    (self.files[place], engine),
                ).fetchall()
                assert (key,) in found


@pytest.fixture
def table(db: Connection, pictures: Pictures) -> Iterator[Table]:
    """Rows 0 to 9 are in an index; whatever a test does, the table is in step at its end."""
    db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea, note text)")
    db.execute("SELECT create_collection('t', 't')")
    table = Table(db, pictures.files[:40])
    table.insert(*range(10))
    db.execute("SELECT build_index('t')")
    yield table
    table.check()


def test_insert(table: Table) -> None:
    table.insert(20)
    table.insert(21, 22, 23)
    table.db.execute("INSERT INTO t SELECT 30, image FROM t WHERE id = 3")
    table.db.execute("INSERT INTO t SELECT id, image FROM t WHERE false")
    assert len(table.vectors()) == 15


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


def test_on_conflict(table: Table) -> None:
    before = table.vectors()
    upsert = (
        "INSERT INTO t SELECT * FROM unnest(%s::int[], %s::bytea[])"
        " ON CONFLICT (id) DO UPDATE SET image = excluded.image"
    )
    table.db.execute(upsert, ([1, 2, 20], [table.files[1], table.files[22], table.files[20]]))
    after = table.vectors()
    assert set(after) == {*range(10), 20}
    assert after[1] == before[1] and after[2] != before[2]  # the image of 1 is the same
    table.db.execute("INSERT INTO t VALUES (3, 'x') ON CONFLICT DO NOTHING")
    assert table.vectors() == after


def test_copy(table: Table) -> None:
    with (
        table.db.cursor() as cursor,
        cursor.copy("COPY t (id, image) FROM STDIN (FORMAT BINARY)") as copy,
    ):
        copy.set_types(["int4", "bytea"])
        for place in range(20, 25):
            copy.write_row((place, table.files[place]))
    assert len(table.vectors()) == 15


def test_merge(table: Table) -> None:
    table.db.execute(
        "MERGE INTO t USING (SELECT * FROM unnest(%s::int[], %s::bytea[])) AS s (id, image)"
        " ON t.id = s.id"
        " WHEN MATCHED AND s.id = 1 THEN DELETE"
        " WHEN MATCHED THEN UPDATE SET image = s.image"
        " WHEN NOT MATCHED THEN INSERT VALUES (s.id, s.image)",
        ([1, 2, 20], [table.files[place] for place in (1, 22, 20)]),
    )
    assert table.images() == {0: 0, 2: 22, **{key: key for key in range(3, 10)}, 20: 20}


def test_update_of_an_image(table: Table) -> None:
    before = table.vectors()
    table.db.execute("UPDATE t SET image = %s WHERE id IN (1, 2)", (table.files[30],))
    after = table.vectors()
    assert {key for key in before if before[key] != after[key]} == {1, 2}


def test_update_of_another_column(table: Table) -> None:
    before = table.vectors()
    table.db.execute("UPDATE t SET note = 'seen', image = image")
    assert table.vectors() == before
    assert table.db.execute("SELECT count(*) FROM siamese.pending_2").fetchone() == (0,)


def test_update_of_keys(table: Table) -> None:
    table.db.execute("UPDATE t SET id = id + 100 WHERE id < 5")
    assert table.images() == {
        **{key: key for key in range(5, 10)},
        **{k + 100: k for k in range(5)},
    }
    table.db.execute("UPDATE t SET id = id - 100, image = %s WHERE id >= 103", (table.files[30],))


def test_keys_changed_around(table: Table) -> None:
    """Each key is there before and after, but with another row's image."""
    table.db.execute("ALTER TABLE t DROP CONSTRAINT t_pkey")
    table.db.execute("UPDATE t SET id = 9 - id")
    table.db.execute("ALTER TABLE t ADD PRIMARY KEY (id)")
    assert table.images() == {key: 9 - key for key in range(10)}


def test_keys_swapped_in_one_transaction(table: Table) -> None:
    with table.db.transaction():
        for old, new in ((1, -1), (2, 1), (-1, 2)):
            table.db.execute("UPDATE t SET id = %s WHERE id = %s", (new, old))
        table.check()
    assert table.images()[1] == 2 and table.images()[2] == 1


def test_delete(table: Table) -> None:
    table.db.execute("DELETE FROM t WHERE id < 3")
    assert set(table.vectors()) == set(range(3, 10))
    table.insert(1)


def test_truncate(table: Table) -> None:
    table.db.execute("TRUNCATE t")
    assert table.vectors() == {}
    assert table.db.execute("SELECT count(*) FROM siamese.pending_2").fetchone() == (0,)
    table.insert(1, 2)
    table.check()
    table.db.execute("SELECT build_index('t')")
    with table.db.transaction(force_rollback=True):
        table.db.execute("TRUNCATE t")
        table.insert(3)
        table.check()


def test_truncate_by_cascade(table: Table) -> None:
    table.db.execute("CREATE TABLE parent (id int PRIMARY KEY)")
    table.db.execute("INSERT INTO parent SELECT id FROM t")
    table.db.execute("ALTER TABLE t ADD FOREIGN KEY (id) REFERENCES parent")
    table.db.execute("TRUNCATE parent CASCADE")
    assert table.vectors() == {}


def test_delete_by_cascade(table: Table) -> None:
    table.db.execute("CREATE TABLE parent (id int PRIMARY KEY)")
    table.db.execute("INSERT INTO parent SELECT id FROM t")
    table.db.execute(
        "ALTER TABLE t ADD FOREIGN KEY (id) REFERENCES parent ON DELETE CASCADE ON UPDATE CASCADE"
    )
    table.db.execute("DELETE FROM parent WHERE id IN (2, 4)")
    table.db.execute("UPDATE parent SET id = 50 WHERE id = 6")
    assert set(table.vectors()) == {0, 1, 3, 5, 7, 8, 9, 50}


def test_deleted_and_inserted_in_one_statement(table: Table) -> None:
    """Both triggers run at the end of the statement, and the key is there for both."""
    table.db.execute("ALTER TABLE t DROP CONSTRAINT t_pkey")
    table.db.execute("CREATE INDEX ON t (id)")
    table.db.execute(
        "WITH gone AS (DELETE FROM t WHERE id IN (1, 2) RETURNING id)"
        " INSERT INTO t SELECT id, %s FROM gone WHERE id = 1",
        (table.files[30],),
    )
    assert table.images()[1] == 30 and 2 not in table.images()
    table.check()
    table.db.execute(
        "WITH new AS (INSERT INTO t VALUES (3, %s)) DELETE FROM t WHERE id = 3", (table.files[31],)
    )
    assert table.images()[3] == 31


def test_replaced_row_in_one_statement(table: Table) -> None:
    table.db.execute(
        """
        CREATE FUNCTION replace(key int, new bytea) RETURNS void LANGUAGE sql AS $$
            DELETE FROM t WHERE id = key;
            INSERT INTO t VALUES (key, new);
        $$
        """
    )
    table.db.execute("SELECT replace(id, %s) FROM t WHERE id < 3", (table.files[30],))
    assert [table.images()[key] for key in range(4)] == [30, 30, 30, 3]


@pytest.mark.parametrize("level", ["ROW", "STATEMENT"])
@pytest.mark.parametrize("name", ["a_first", "z_last"])
def test_user_triggers_that_change_rows_again(table: Table, level: str, name: str) -> None:
    """In one statement a row gets one image from it and another from a trigger."""
    table.db.execute("CREATE TABLE other (image bytea)")
    table.db.execute("INSERT INTO other VALUES (%s)", (table.files[35],))
    table.db.execute(
        f"""
        CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF pg_trigger_depth() = 1 THEN
                UPDATE t SET image = (SELECT image FROM other) WHERE id IN (2, 20);
                DELETE FROM t WHERE id IN (3, 21);
                UPDATE t SET id = id + 200 WHERE id IN (4, 22);
            END IF;
            RETURN NULL;
        END $$;
        CREATE TRIGGER {name} AFTER INSERT OR UPDATE OR DELETE ON t
            FOR EACH {level} EXECUTE FUNCTION again()
        """
    )
    table.insert(20, 21, 22, 23)
    assert {key: table.images()[key] for key in (2, 20, 23, 204, 222)} == {
        2: 35,
        20: 35,
        23: 23,
        204: 4,
        222: 22,
    }
    table.check()
    table.db.execute("UPDATE t SET image = %s WHERE id IN (2, 5, 20)", (table.files[36],))
    assert [table.images()[key] for key in (2, 5, 20)] == [35, 36, 35]


def test_before_triggers_and_generated_keys(table: Table) -> None:
    table.db.execute(
        """
        CREATE FUNCTION rewrite() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            new.id := new.id + 1000;
            new.image := (SELECT image FROM t WHERE id = 0);
            RETURN new;
        END $$;
        CREATE TRIGGER rewrite BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION rewrite()
        """
    )
    table.insert(20)
    assert table.images()[1020] == 0


def test_rules_and_views(table: Table) -> None:
    table.db.execute("CREATE VIEW v AS SELECT id, image FROM t")
    table.db.execute("INSERT INTO v VALUES (20, %s)", (table.files[20],))
    table.db.execute("UPDATE v SET image = %s WHERE id = 1", (table.files[21],))
    table.db.execute("DELETE FROM v WHERE id = 2")
    assert set(table.vectors()) == {0, 1, *range(3, 10), 20}


def test_savepoints(table: Table) -> None:
    with table.db.transaction():
        table.insert(20)
        with table.db.transaction(force_rollback=True):
            table.insert(21)
            table.db.execute("DELETE FROM t WHERE id = 1")
            table.db.execute("UPDATE t SET image = %s WHERE id = 2", (table.files[30],))
            table.check()
        table.check()
        table.insert(22)
        table.check()
    assert table.images() == {**{key: key for key in range(10)}, 20: 20, 22: 22}


def test_rollback_of_rows_that_a_search_has_seen(table: Table) -> None:
    """The same key comes again with another image: the vector seen before must not answer."""
    with table.db.transaction(force_rollback=True):
        table.insert(20)
        table.check()
        table.db.execute("UPDATE t SET image = %s WHERE id = 1", (table.files[31],))
        table.db.execute("DELETE FROM t WHERE id = 2")
        table.check()
    table.check()
    table.db.execute("INSERT INTO t VALUES (20, %s)", (table.files[33],))
    table.check()
    old = table.db.execute(
        "SELECT distance FROM similar_images(%s, k => 100, collection => 't') WHERE image_id = 20",
        (table.files[20],),
    ).fetchone()
    expected = table.db.execute(
        "SELECT image_distance(%s, %s)", (table.files[20], table.files[33])
    ).fetchone()
    assert old and expected and old[0] == pytest.approx(expected[0], abs=1e-5)


def test_failed_statement_leaves_nothing(table: Table) -> None:
    before = table.vectors()
    with sql_error("22P03", "row id = 21 of table public.t"):
        table.db.execute(
            "INSERT INTO t SELECT * FROM unnest(%s::int[], %s::bytea[])",
            ([20, 21], [table.files[20], b"junk"]),
        )
    with sql_error("22P03", "row id = 1 of table public.t"):
        table.db.execute("UPDATE t SET image = 'junk' WHERE id = 1")
    with sql_error("23505", "t_pkey"):
        table.insert(20, 1)
    assert table.vectors() == before


def test_other_sessions_see_commits_at_once(
    table: Table, connect: Callable[..., Connection]
) -> None:
    """Law 2: with no wait for a rebuild, and nothing of what is not committed."""
    reader = Table(connect(), table.files)
    reader.check()
    with table.db.transaction():
        table.insert(20)
        table.db.execute("DELETE FROM t WHERE id = 1")
        reader.check()
        assert 20 not in reader.images()
    reader.check()
    assert 20 in reader.images()


def test_left_over_vectors_of_inserted_rows(table: Table) -> None:
    """As of rows that went while triggers were off."""
    db = table.db
    db.execute("SET session_replication_role = replica")
    db.execute("DELETE FROM t WHERE id < 5")
    db.execute("RESET session_replication_role")
    before = table.vectors()
    db.execute("INSERT INTO t VALUES (0, %s)", (table.files[30],))
    table.insert(1, 20)
    db.execute("INSERT INTO t VALUES (2, NULL), (3, %s)", (table.files[3],))
    db.execute("INSERT INTO t VALUES (4, NULL)")
    after = table.vectors()
    assert set(after) == {0, 1, 3, *range(5, 10), 20}
    assert all(before[key] != after[key] for key in (0, 1, 3))
    db.execute("DELETE FROM t WHERE image IS NULL")


@pytest.mark.parametrize(
    "columns",
    [
        "id integer PRIMARY KEY, image bytea",
        "image bytea, id integer PRIMARY KEY",
        "image bytea, note integer DEFAULT 100, id integer PRIMARY KEY",
        "note integer DEFAULT 100, id integer PRIMARY KEY, image bytea",
        "note integer DEFAULT 100, image bytea, id integer PRIMARY KEY",
    ],
)
def test_places_of_columns(db: Connection, pictures: Pictures, columns: str) -> None:
    """Whatever the order, and when columns go or get each other's names in a session."""
    insert = "INSERT INTO t (id, image) SELECT * FROM unnest(%s::int[], %s::bytea[])"
    db.execute("CREATE TABLE t (first integer DEFAULT 200)")
    for column in columns.split(", "):
        db.execute(f"ALTER TABLE t ADD COLUMN {column}")
    db.execute("SELECT create_collection('t', 't', key_column => 'id')")
    db.execute(insert, ([1, 2], pictures.files[1:3]))
    db.execute("ALTER TABLE t DROP COLUMN first")
    db.execute(insert, ([3, 4], pictures.files[3:5]))
    db.execute("ALTER TABLE t ADD COLUMN other integer DEFAULT 300")
    db.execute(insert, ([5], pictures.files[5:6]))
    with db.transaction(force_rollback=True):
        db.execute("ALTER TABLE t RENAME id TO was; ALTER TABLE t RENAME other TO id")
        with sql_error("55000", "no longer matches its table"):
            db.execute("INSERT INTO t (was, id, image) VALUES (6, 7, %s)", (pictures.files[6],))
    db.execute(insert, ([6], pictures.files[6:7]))
    db.execute("ALTER TABLE t DROP COLUMN IF EXISTS note")
    db.execute(insert, ([7], pictures.files[7:8]))
    db.execute("CREATE TABLE wanted AS SELECT id, embed_image(image) AS embedding FROM t")
    wrong = db.execute(
        "SELECT w.id, e.key FROM wanted AS w FULL JOIN siamese.embedding_2 AS e ON e.key = w.id"
        " WHERE e.embedding IS NULL OR w.embedding IS NULL OR e.embedding <=> w.embedding > 1e-5"
    ).fetchall()
    assert wrong == []


def test_a_session_meets_what_was_changed(table: Table, connect: Callable[..., Connection]) -> None:
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


def test_replica_role_and_backfill(table: Table) -> None:
    """As logical replication and pg_restore --disable-triggers write: triggers don't fire."""
    table.db.execute("SET session_replication_role = replica")
    table.insert(*range(20, 30))
    table.db.execute("DELETE FROM t WHERE id < 3")
    table.db.execute("RESET session_replication_role")
    found = table.db.execute(
        "SELECT image_id FROM similar_images(%s, k => 100, collection => 't')", (table.files[0],)
    ).fetchall()
    assert {row[0] for row in found} == set(range(3, 10))
    state = dict(table.db.execute("SELECT subject, detail FROM self_check()").fetchall())
    assert state['collection "t": rows without vector'] == "10; call backfill"
    assert state['collection "t": vectors without row'] == "3; call backfill"
    assert table.db.execute("SELECT backfill('t', 4)").fetchone() == (4,)
    assert table.db.execute("SELECT backfill('t')").fetchone() == (6,)
    assert table.db.execute("SELECT backfill('t')").fetchone() == (0,)
    assert set(table.vectors()) == set(range(3, 10)) | set(range(20, 30))


def test_backfill_leaves_locked_rows_alone(
    table: Table, connect: Callable[..., Connection]
) -> None:
    table.db.execute("SET session_replication_role = replica")
    table.insert(20, 21)
    other, notices = connect(), []
    table.db.add_notice_handler(lambda notice: notices.append(notice.message_primary))
    with other.transaction():
        other.execute("UPDATE t SET note = 'busy' WHERE id = 20")
        assert table.db.execute("SELECT backfill('t')").fetchone() == (1,)
    assert any("1 row " in (notice or "") for notice in notices)
    assert table.db.execute("SELECT backfill('t')").fetchone() == (1,)
    table.db.execute("RESET session_replication_role")


def test_rows_that_change_during_a_backfill(
    table: Table, connect: Callable[..., Connection]
) -> None:
    """Their trigger has stored the vector by the time that the backfill comes to them."""
    table.db.execute("SET session_replication_role = replica")
    table.db.execute(
        "INSERT INTO t SELECT i, %s FROM generate_series(100, 2600) AS i", (table.files[0],)
    )
    table.db.execute("RESET session_replication_role")
    other = connect()
    counts: list[int] = []

    def backfill() -> None:
        counts.extend(row[0] for row in other.execute("SELECT backfill('t')"))

    thread = threading.Thread(target=backfill)
    thread.start()
    busy = "SELECT FROM pg_stat_activity WHERE pid = %s AND state = 'active'"
    while thread.is_alive() and not table.db.execute(busy, (other.info.backend_pid,)).rowcount:
        time.sleep(0.01)
    time.sleep(0.05)
    table.db.execute("UPDATE t SET image = %s WHERE id > 2500", (table.files[1],))
    thread.join()
    assert counts and 2401 <= counts[0] <= 2501
    assert len(table.vectors()) == 2511
    table.db.execute("DELETE FROM t WHERE id BETWEEN 100 AND 2590")


def test_disabled_trigger_shows(table: Table) -> None:
    table.db.execute("ALTER TABLE t DISABLE TRIGGER pg_siamese_2_update")
    row = table.db.execute("SELECT ok, detail FROM self_check() WHERE subject ~ 't.: triggers'")
    assert row.fetchone() == (False, "missing or disabled: pg_siamese_2_update")
    table.db.execute("ALTER TABLE t ENABLE TRIGGER pg_siamese_2_update")


@pytest.fixture
def quarantine(db: Connection, pictures: Pictures) -> Iterator[Table]:
    """Table ``t`` with quarantine and rows 0 to 4, of which 1 and 3 are bad, and 5 has no image."""
    db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea, note text)")
    db.execute("SELECT create_collection('t', 't', on_error => 'quarantine')")
    table = Table(db, pictures.files[:40])
    images = [table.files[0], b"junk", table.files[2], b"", table.files[4], None]
    db.execute("INSERT INTO t SELECT * FROM unnest(%s::int[], %s::bytea[])", ([*range(6)], images))
    yield table


def failures(db: Connection) -> dict[str, tuple[Any, ...]]:
    rows = db.execute("SELECT key, sqlstate, message FROM embedding_failures").fetchall()
    return {row[0]: row[1:] for row in rows}


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
    db.execute("SET session_replication_role = replica")
    db.execute("DELETE FROM t")
    db.execute("RESET session_replication_role")
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
    db.execute("SET session_replication_role = replica")
    quarantine.insert(*range(20, 30))
    db.execute("UPDATE t SET image = %s WHERE id = 1", (quarantine.files[1],))
    db.execute("RESET session_replication_role")
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
    notices: list[str | None] = []
    db.add_notice_handler(lambda notice: notices.append(notice.message_primary))
    db.execute("SET session_replication_role = replica")
    insert_images(db, pictures.files[:50])
    assert db.execute("SELECT backfill()").fetchone() == (50,)
    assert notices == []
