"""A vector belongs to the bytes it was made of: changes behind the triggers' back, NULL."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Connect, Connection, Pictures
from tests.database.tables import Table, without_triggers
from tests.support import one, rows_of, sql_error

STALE = "vectors of other images"
BEHIND = ("SET session_replication_role = replica", "RESET session_replication_role")
DISABLED = ("ALTER TABLE t DISABLE TRIGGER USER", "ALTER TABLE t ENABLE TRIGGER USER")


class Checked(Table):
    """With a look at the hashes, and at what self_check says of them."""

    def embed(self) -> int:
        return int(self.value("SELECT embed_pending()"))

    def line(self, what: str, full: bool = False) -> tuple[bool, str]:
        query = "SELECT ok, detail FROM self_check(full => %s) WHERE subject = %s"
        ((ok, detail),) = rows_of(self.db, query, full, f'collection "t": {what}')
        return ok, detail

    def backfill(self, max_rows: int = 1_000_000) -> int:
        return int(self.value("SELECT backfill('t', %s)", max_rows))

    def check(self) -> None:
        """Each row with an image has its vector, with the hash of the image, and no other has."""
        wrong = (
            "SELECT t.id, e.key FROM (SELECT * FROM t WHERE image IS NOT NULL) AS t"
            " FULL JOIN siamese.embedding_2 AS e ON e.key = t.id"
            " WHERE t.id IS NULL OR e.key IS NULL OR e.embedding <=> embed_image(t.image) > 1e-5"
            " OR e.image_hash IS DISTINCT FROM substring(sha256(t.image) FROM 1 FOR 16)"
        )
        assert rows_of(self.db, wrong) == []
        for full in (False, True):
            bad = "SELECT subject, detail FROM self_check(full => %s) WHERE NOT ok"
            assert self.db.execute(bad, (full,)).fetchall() == []


@pytest.fixture
def table(db: Connection, pictures: Pictures, embed: str) -> Checked:
    return Checked.indexed(db, pictures.files, embed=embed)


@pytest.mark.law(11)
def test_every_way_in_stores_the_hash(table: Checked) -> None:
    table.db.execute("UPDATE t SET image = %s WHERE id = 1", (table.files[20],))
    table.db.execute("INSERT INTO t VALUES (50, %s)", (table.files[50],))
    table.db.execute("DELETE FROM siamese.embedding_2 WHERE key = 2")
    table.db.execute("SELECT embed_pending()")
    table.backfill()
    table.check()


@pytest.mark.law(11)
@pytest.mark.parametrize("off_and_on", [BEHIND, DISABLED], ids=["replica", "disabled"])
def test_changes_behind_the_triggers_back(table: Checked, off_and_on: tuple[str, str]) -> None:
    """As replication, migration tools and pg_restore --disable-triggers write."""
    before = table.vectors()
    table.db.execute(off_and_on[0])
    table.db.execute("UPDATE t SET image = %s WHERE id IN (1, 2)", (table.files[20],))
    table.db.execute("UPDATE t SET note = 'seen', id = 103 WHERE id = 3")
    table.db.execute("UPDATE t SET image = NULL WHERE id = 4")
    table.db.execute(off_and_on[1])
    for full in (False, True):
        assert table.line(STALE, full)[0] is False
        assert table.line(STALE, full)[1].startswith("2 of ")
    assert table.backfill() == 3
    assert {key for key, number in table.vectors().items() if before.get(key) == number} == {
        0, 5, 6, 7, 8, 9,
    }  # fmt: skip
    found = table.db.execute(
        "SELECT image_id FROM similar_images(%s, k => 2, collection => 't')", (table.files[20],)
    ).fetchall()
    assert sorted(found) == [(1,), (2,)]
    table.check()
    assert table.backfill() == 0


@pytest.mark.law(11)
def test_images_exchanged_behind_the_triggers_back(table: Checked) -> None:
    """Of equal size, too: nothing but their bytes tells."""
    with without_triggers(table.db):
        table.db.execute(
            "UPDATE t SET image = o.image FROM t AS o WHERE t.id IN (1, 2) AND o.id = 3 - t.id"
        )
    assert table.line(STALE) == (False, "2 of 10 rows, drawn by chance; call backfill")
    assert table.backfill() == 2
    table.check()


@pytest.mark.law(11)
def test_changed_behind_the_triggers_back_while_queued(db: Connection, pictures: Pictures) -> None:
    table = Checked.indexed(db, pictures.files, embed="deferred")
    db.execute("UPDATE t SET image = %s WHERE id IN (1, 2)", (table.files[20],))
    with without_triggers(db):
        db.execute("UPDATE t SET image = %s WHERE id IN (2, 3)", (table.files[30],))
    assert one(db, "SELECT embed_pending()") == 2
    assert table.line(STALE)[1].startswith("1 of")
    assert table.backfill() == 1
    table.check()


def test_a_sample_has_its_bounds(db: Connection, pictures: Pictures) -> None:
    """By default a hundred rows at most are read, and no more images than 16 MB together hold."""
    table = Checked.indexed(db, pictures.files)
    db.execute(
        "INSERT INTO t SELECT i, %s FROM generate_series(100, 399) AS i", (pictures.files[0],)
    )
    ok, detail = table.line(STALE)
    assert ok and 60 <= int(detail.split()[2]) <= 100
    assert table.line(STALE, full=True) == (True, "0 of all rows")
    with without_triggers(db):
        db.execute("UPDATE t SET image = %s WHERE id >= 100", (pictures.files[1],))
    assert not table.line(STALE)[0]
    assert table.line(STALE, full=True) == (False, "300 of all rows; call backfill")
    assert [table.backfill(max_rows=200) for _ in range(3)] == [200, 100, 0]
    db.execute("TRUNCATE t")
    # Random bytes that nobody decodes: the hashes are made here.
    with without_triggers(db):
        db.execute(
            "INSERT INTO t SELECT i, decode(repeat(md5(i::text), 65536), 'hex')"
            " FROM generate_series(1, 40) AS i"
        )
        db.execute(
            "INSERT INTO siamese.embedding_2 (key, embedding, image_hash) SELECT id, (SELECT"
            " embedding FROM embed_image(%s) AS embedding), substring(sha256(image) FROM 1 FOR 16)"
            " FROM t",
            (pictures.files[0],),
        )
    assert table.line(STALE) == (True, "0 of 16 rows, drawn by chance")


def test_vectors_from_before_there_were_hashes(table: Checked) -> None:
    """Backfill embeds them again: those that are right get their hash and stay, others go."""
    table.db.execute("UPDATE siamese.embedding_2 SET image_hash = NULL WHERE key < 8")
    table.db.execute(
        "UPDATE siamese.embedding_2 SET embedding = embed_image(%s) WHERE key = 5",
        (table.files[40],),
    )
    before = table.vectors()
    assert table.line(STALE) == (
        True,
        "0 of 2 rows, drawn by chance; 8 vectors have no hash yet, call backfill",
    )
    assert [table.backfill(max_rows=5) for _ in range(3)] == [5, 3, 0]
    after = table.vectors()
    assert {key for key in before if before[key] != after[key]} == {5}
    table.check()


@pytest.mark.law(11)
def test_bad_images_behind_the_triggers_back(db: Connection, pictures: Pictures) -> None:
    table = Checked.indexed(db, pictures.files, on_error="quarantine")
    with without_triggers(db):
        db.execute("UPDATE t SET image = 'junk' WHERE id = 1")
    db.execute("SELECT alter_collection('t', on_error => 'reject')")
    with sql_error("22P03", "row id = 1 of table public.t"):
        table.backfill()
    assert 1 in table.vectors()
    db.execute("SELECT alter_collection('t', on_error => 'quarantine')")
    assert table.backfill() == 0
    assert 1 not in table.vectors()
    assert db.execute("SELECT key FROM embedding_failures").fetchall() == [("1",)]
    assert table.line(STALE)[0] and table.line("rows without vector")[0]
    db.execute("UPDATE t SET image = %s WHERE id = 1", (pictures.files[1],))
    table.check()


def test_locked_rows_are_left_alone(table: Checked, connect: Connect) -> None:
    with without_triggers(table.db):
        table.db.execute("UPDATE t SET image = %s WHERE id IN (1, 2)", (table.files[20],))
    other = connect()
    with other.transaction():
        other.execute("UPDATE t SET note = 'busy' WHERE id = 1")
        assert table.backfill() == 1
    assert table.backfill() == 1
    table.check()


@pytest.mark.parametrize("attach", ["partition", "child"])
def test_changes_through_a_parent(table: Checked, attach: str) -> None:
    """A table that becomes a partition later: statements on the parent fire its triggers only."""
    if attach == "partition":
        table.db.execute(
            "CREATE TABLE p (LIKE t) PARTITION BY RANGE (id);"
            " ALTER TABLE p ATTACH PARTITION t DEFAULT"
        )
    else:
        table.db.execute("CREATE TABLE p (LIKE t); ALTER TABLE t INHERIT p")
    table.db.execute("UPDATE p SET image = %s WHERE id = 3", (table.files[30],))
    table.db.execute("DELETE FROM p WHERE id = 4")
    table.db.execute("UPDATE p SET id = 105 WHERE id = 5")
    ok, detail = table.line("table")
    assert not ok and "backfill" in detail
    assert not table.line(STALE)[0]
    assert table.backfill() == 2
    assert table.line(STALE) == (True, "0 of 9 rows, drawn by chance")
    if attach == "partition":
        table.db.execute("ALTER TABLE p DETACH PARTITION t")
    else:
        table.db.execute("ALTER TABLE t NO INHERIT p")
    table.check()


@pytest.mark.parametrize("on_error", ["reject", "quarantine"])
def test_rows_without_an_image(
    db: Connection, pictures: Pictures, embed: str, on_error: str
) -> None:
    """NULL is no bad image: no vector, no failure, no error, nothing that waits."""
    table = Checked.indexed(db, pictures.files, embed=embed, on_error=on_error)

    def state() -> Any:
        return db.execute(
            "SELECT rows_embedded, failures, waiting FROM collection_status WHERE collection = 't'"
        ).fetchone()

    db.execute("INSERT INTO t VALUES (20, NULL), (21, NULL)")
    db.execute("INSERT INTO t (id) SELECT generate_series(30, 130)")
    assert state() == (10, 0, 0)
    db.execute("UPDATE t SET image = NULL WHERE id IN (1, 20)")
    db.execute("UPDATE t SET note = 'seen' WHERE id > 5")
    db.execute("SELECT embed_pending()")
    assert state() == (9, 0, 0)
    found = db.execute(
        "SELECT image_id FROM similar_images(%s, k => 100, collection => 't')", (table.files[1],)
    ).fetchall()
    assert {row[0] for row in found} == {0, *range(2, 10)}
    by_id = "SELECT similar_images(image_id => 1, collection => 't')"
    assert db.execute(by_id).fetchall() == []  # nothing is similar to a row without a vector
    assert table.backfill() == 0
    table.check()
    db.execute("UPDATE t SET image = %s WHERE id = 20", (table.files[20],))
    db.execute("UPDATE t SET id = 22 WHERE id = 21; DELETE FROM t WHERE id = 22")
    db.execute("SELECT embed_pending()")
    assert state() == (10, 0, 0)
    table.check()
    # A new collection on the same rows.
    again = "SELECT create_collection('again', 't', embed => %s, on_error => %s)"
    assert one(db, again, embed, on_error) == 10
    db.execute("SELECT embed_pending()")
    table.check()


def test_an_image_that_is_erased_while_queued(db: Connection, pictures: Pictures) -> None:
    table = Checked.indexed(db, pictures.files, embed="deferred")
    db.execute("INSERT INTO t VALUES (20, %s)", (pictures.files[20],))
    db.execute("UPDATE t SET image = NULL WHERE id = 20")
    assert one(db, "SELECT embed_pending()") == 0
    assert db.execute("SELECT waiting, failures FROM embedding_queue_status").fetchone() == (0, 0)
    table.check()
