"""Vectors follow images, whatever the statement: embedded at once, or later."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Connect, Connection, Pictures
from tests.database.tables import Deferred, Table, insert_rows, without_triggers
from tests.support import one, sql_error


@pytest.fixture(params=[Table, Deferred], ids=["sync", "deferred"])
def kind(request: pytest.FixtureRequest) -> type[Table]:
    """When the collection is embedded: by the statement, or by embed_pending."""
    chosen: type[Table] = request.param
    return chosen


@pytest.fixture
def table(db: Connection, pictures: Pictures, kind: type[Table]) -> Iterator[Table]:
    """Rows 0 to 9 are in an index; whatever a test does, the table is in step at its end."""
    table = kind.indexed(db, pictures.files[:40])
    yield table
    table.check()


def test_insert(table: Table) -> None:
    table.insert(20)
    table.insert(21, 22, 23)
    table.db.execute("INSERT INTO t SELECT 30, image FROM t WHERE id = 3")
    table.db.execute("INSERT INTO t SELECT id, image FROM t WHERE false")
    table.embed()
    assert len(table.vectors()) == 15


def test_on_conflict(table: Table) -> None:
    before = table.vectors()
    upsert = (
        "INSERT INTO t SELECT * FROM unnest(%s::int[], %s::bytea[])"
        " ON CONFLICT (id) DO UPDATE SET image = excluded.image"
    )
    table.db.execute(upsert, ([1, 2, 20], [table.files[1], table.files[22], table.files[20]]))
    table.embed()
    after = table.vectors()
    assert set(after) == {*range(10), 20}
    assert after[1] == before[1] and after[2] != before[2]  # the image of 1 is the same
    table.db.execute("INSERT INTO t VALUES (3, 'x') ON CONFLICT DO NOTHING")
    table.embed()
    assert table.vectors() == after


@pytest.mark.parametrize("form", ["text", "binary"])
def test_copy(table: Table, form: str) -> None:
    with (
        table.db.cursor() as cursor,
        cursor.copy(f"COPY t (id, image) FROM STDIN (FORMAT {form})") as copy,
    ):
        copy.set_types(["int4", "bytea"])
        for place in range(20, 25):
            copy.write_row((place, table.files[place]))
    assert len(table.images()) == 15


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
    table.embed()
    after = table.vectors()
    assert {key for key in before if before[key] != after[key]} == {1, 2}


def test_update_of_another_column(table: Table) -> None:
    before = table.vectors()
    table.db.execute("UPDATE t SET note = 'seen', image = image")
    assert table.vectors() == before
    assert one(table.db, "SELECT count(*) FROM siamese.pending_2") == 0


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
    table.insert(20, 21)
    table.db.execute("TRUNCATE t")
    assert (table.vectors(), table.waiting()) == ({}, 0)
    assert one(table.db, "SELECT count(*) FROM siamese.pending_2") == 0
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
    assert set(table.images()) == {0, 1, 3, 5, 7, 8, 9, 50}


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
    assert set(table.images()) == {0, 1, *range(3, 10), 20}


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


@pytest.mark.law(2)
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
    found = "SELECT distance FROM similar_images(%s, 100, 't') WHERE image_id = 20"
    distance = one(table.db, "SELECT image_distance(%s, %s)", table.files[20], table.files[33])
    assert one(table.db, found, table.files[20]) == pytest.approx(distance, abs=1e-5)


@pytest.mark.law(2)
def test_other_sessions_see_commits_at_once(table: Table, connect: Connect) -> None:
    """With no wait for a rebuild, and nothing of what is not committed."""
    reader = type(table)(connect(), table.files)
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
    with without_triggers(db):
        db.execute("DELETE FROM t WHERE id < 5")
    before = table.vectors()
    db.execute("INSERT INTO t VALUES (0, %s)", (table.files[30],))
    table.insert(1, 20)
    db.execute("INSERT INTO t VALUES (2, NULL), (3, %s)", (table.files[3],))
    db.execute("INSERT INTO t VALUES (4, NULL)")
    table.embed()
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
def test_places_of_columns(
    db: Connection, pictures: Pictures, kind: type[Table], columns: str
) -> None:
    """Whatever the order, and when columns go or get each other's names in a session."""
    db.execute("CREATE TABLE t (first integer DEFAULT 200)")
    for column in columns.split(", "):
        db.execute(f"ALTER TABLE t ADD COLUMN {column}")
    embed = "sync" if kind is Table else "deferred"
    db.execute("SELECT create_collection('t', 't', key_column => 'id', embed => %s)", (embed,))
    insert_rows(db, [1, 2], pictures.files[1:3])
    db.execute("ALTER TABLE t DROP COLUMN first")
    insert_rows(db, [3, 4], pictures.files[3:5])
    db.execute("ALTER TABLE t ADD COLUMN other integer DEFAULT 300")
    insert_rows(db, [5], pictures.files[5:6])
    with db.transaction(force_rollback=True):
        db.execute("ALTER TABLE t RENAME id TO was; ALTER TABLE t RENAME other TO id")
        with sql_error("55000", "no longer matches its table", "create it again"):
            db.execute("INSERT INTO t (was, id, image) VALUES (6, 7, %s)", (pictures.files[6],))
    insert_rows(db, [6], pictures.files[6:7])
    db.execute("ALTER TABLE t DROP COLUMN IF EXISTS note")
    insert_rows(db, [7], pictures.files[7:8])
    kind(db, pictures.files).embed()
    db.execute("CREATE TABLE wanted AS SELECT id, embed_image(image) AS embedding FROM t")
    wrong = db.execute(
        "SELECT w.id, e.key FROM wanted AS w FULL JOIN siamese.embedding_2 AS e ON e.key = w.id"
        " WHERE e.embedding IS NULL OR w.embedding IS NULL OR e.embedding <=> w.embedding > 1e-5"
    ).fetchall()
    assert wrong == []


def test_replica_role_and_backfill(table: Table) -> None:
    with without_triggers(table.db):
        table.insert(*range(20, 30))
        table.db.execute("DELETE FROM t WHERE id < 3")
    found = table.db.execute(
        "SELECT image_id FROM similar_images(%s, k => 100, collection => 't')", (table.files[0],)
    ).fetchall()
    assert {row[0] for row in found} == set(range(3, 10))
    state = dict(table.db.execute("SELECT subject, detail FROM self_check()").fetchall())
    assert state['collection "t": rows without vector'] == "10; call backfill"
    assert state['collection "t": vectors without row'] == "3; call backfill"
    assert one(table.db, "SELECT backfill('t', 4)") == 4
    assert one(table.db, "SELECT backfill('t')") == 6
    assert one(table.db, "SELECT backfill('t')") == 0
    table.embed()
    assert set(table.vectors()) == set(range(3, 10)) | set(range(20, 30))


def test_disabled_trigger_shows(table: Table) -> None:
    table.db.execute("ALTER TABLE t DISABLE TRIGGER pg_siamese_2_update")
    row = table.db.execute("SELECT ok, detail FROM self_check() WHERE subject ~ 't.: triggers'")
    assert row.fetchone() == (False, "missing or disabled: pg_siamese_2_update")
    table.db.execute("ALTER TABLE t ENABLE TRIGGER pg_siamese_2_update")
