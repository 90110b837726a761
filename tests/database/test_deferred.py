"""Deferred embedding: statements queue keys, embed_pending takes them; vectors stay right."""

from __future__ import annotations

import threading
from functools import partial

import psycopg
import pytest

from pg_siamese_server.writing.deferred import Result
from tests.conftest import Connect, Connection, NewRole, Pictures, insert_images
from tests.database.tables import Deferred, insert_rows, make_collection, register_grid
from tests.support import column_of, in_threads, notices_of, one, sql_error


@pytest.fixture
def table(db: Connection, pictures: Pictures) -> Deferred:
    """Rows 0 to 9 are embedded."""
    table = Deferred.create(db, pictures.files)
    table.insert(*range(10))
    assert table.embed() == 10
    return table


def test_insert_queues_and_embed_pending_embeds(table: Deferred) -> None:
    table.insert(*range(100, 200))
    assert len(table.vectors()) == 10
    assert table.waiting() == 100
    assert table.queued() == list(range(100, 200))
    assert table.value("SELECT embed_pending('t', 70)") == 70
    assert (table.waiting(), len(table.vectors())) == (30, 80)
    assert table.value("SELECT embed_pending()") == 30
    assert table.value("SELECT count(*) FROM siamese.queue_2") == 0
    assert table.value("SELECT embed_pending()") == 0
    table.check()


def test_tickets_are_few(table: Deferred) -> None:
    """What keeps an insert cheap: a ticket holds many keys, in the order of the rows."""
    table.insert(*range(100, 300))
    rows = table.db.execute("SELECT keys FROM siamese.queue_2 ORDER BY ticket").fetchall()
    assert [len(keys) for (keys,) in rows] == [64, 64, 64, 8]
    assert [key for (keys,) in rows for key in keys] == list(range(100, 300))


@pytest.mark.parametrize(
    ("key_type", "key"),
    [
        ("integer", "-i"),
        ("bigint", "i * 5000000000"),
        ("uuid", "md5(i::text)::uuid"),
        ("text", "concat('it''s \"', chr(92), i, ',{}')"),
        ('text COLLATE "C"', "nullif(concat('ä', i), 'ä1')"),
    ],
)
def test_key_types(db: Connection, pictures: Pictures, key_type: str, key: str) -> None:
    make_collection(db, key=key_type, embed="deferred")
    statement = f"INSERT INTO t SELECT {key}, %s FROM generate_series(2, 81) AS i"
    db.execute(statement, (pictures.files[0],))
    assert one(db, "SELECT waiting FROM collection_status WHERE embed = 'deferred'") == 80
    assert one(db, "SELECT embed_pending('t', 70)") == 70
    db.execute("UPDATE t SET image = %s", (pictures.files[1],))
    assert one(db, "SELECT count(*) FROM siamese.embedding_2") == 0
    assert one(db, "SELECT embed_pending()") == 80
    db.execute(f"DELETE FROM t WHERE id = (SELECT {key} FROM (VALUES (7)) AS v (i))")
    found = db.execute(
        "SELECT e.embedding <=> embed_image(t.image) < 1e-5 FROM t"
        " JOIN siamese.embedding_2 AS e ON e.key = t.id"
    ).fetchall()
    assert found == [(True,)] * 79
    assert one(db, "SELECT count(*) FROM siamese.embedding_2") == 79


@pytest.mark.parametrize("key_type", ["text", "bigint"])
def test_many_rows_in_one_statement(db: Connection, key_type: str) -> None:
    """Each key is in one ticket, and none holds many."""
    make_collection(db, key=key_type, embed="deferred")
    db.execute("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 20001) AS i")
    assert db.execute(
        "SELECT count(*), count(DISTINCT key), max(cardinality(keys)), count(DISTINCT ticket)"
        " FROM siamese.queue_2 CROSS JOIN unnest(keys) AS u (key)"
    ).fetchone() == (20001, 20001, 64, 313)


def test_changes_while_queued(table: Deferred) -> None:
    table.insert(*range(100, 110))
    table.db.execute("UPDATE t SET image = %s WHERE id = 101", (table.files[200],))
    table.db.execute("UPDATE t SET id = 202 WHERE id = 102")
    table.db.execute("DELETE FROM t WHERE id = 103")
    table.db.execute("UPDATE t SET note = 'seen'")
    table.check_vectors()
    assert table.embed() == 9
    table.check()


def test_changes_of_embedded_rows(table: Deferred) -> None:
    """A replaced image's vector is gone with the statement, not with the embedding."""
    before = table.vectors()
    table.db.execute("UPDATE t SET image = %s WHERE id IN (1, 2)", (table.files[30],))
    table.db.execute("UPDATE t SET note = 'seen', image = image")
    table.db.execute("UPDATE t SET id = 33 WHERE id = 3")
    table.db.execute("DELETE FROM t WHERE id = 4")
    after = table.vectors()
    assert set(after) == {0, 5, 6, 7, 8, 9}
    assert all(before[key] == after[key] for key in after)
    assert table.waiting() >= 3
    table.check()
    assert table.value("SELECT count(*) FROM siamese.pending_2 WHERE deleted") == 4


def test_search_finds_what_is_embedded(table: Deferred) -> None:
    search = "SELECT image_id FROM similar_images(%s, k => 3, collection => 't')"
    table.insert(20)
    assert (20,) not in table.db.execute(search, (table.files[20],)).fetchall()
    by_id = "SELECT image_id FROM similar_images(image_id => 20, collection => 't')"
    assert table.db.execute(by_id).fetchall() == []
    table.embed()
    assert table.db.execute(search, (table.files[20],)).fetchall()[0] == (20,)


@pytest.mark.law(2)
def test_old_image_never_answers(table: Deferred, connect: Connect) -> None:
    """Also for sessions that have read its vector, with an index and without."""
    other = connect()
    search = "SELECT image_id FROM similar_images(%s, k => 100, collection => 't')"
    for step in ("SELECT 1", "SELECT build_index('t')"):
        table.db.execute(step)
        assert (3,) in other.execute(search, (table.files[3],)).fetchall()
        table.db.execute("UPDATE t SET image = %s WHERE id = 3", (table.files[50],))
        assert (3,) not in other.execute(search, (table.files[3],)).fetchall()
        table.embed()
        found = other.execute(
            "SELECT image_id, distance < 1e-5 FROM similar_images(%s, k => 100, collection => 't')",
            (table.files[50],),
        ).fetchall()
        assert found[0] == (3, True) and len(found) == 10
        table.db.execute("UPDATE t SET image = %s WHERE id = 3", (table.files[3],))
        table.embed()


def test_searches_say_that_rows_wait(table: Deferred, connect: Connect) -> None:
    """Once a session, and of every answer that is short."""
    session = connect()
    notices = notices_of(session)
    search = "SELECT similar_images(%s, k => %s, collection => 't')"
    session.execute(search, (table.files[0], 100))
    assert notices == []
    table.insert(20)
    for _ in range(3):
        session.execute(search, (table.files[0], 5))
    assert len(notices) == 1 and 'collection "t" has queued rows' in notices[0]
    session.execute(search, (table.files[0], 100))
    assert len(notices) == 2
    table.embed()
    session.execute(search, (table.files[0], 100))
    assert len(notices) == 2


@pytest.mark.law(9)
def test_bad_images_go_to_the_failures(table: Deferred) -> None:
    """Nothing can be rejected any more, whatever on_error says; the others are not concerned."""
    images = [table.files[20], b"junk", None, table.files[21], b""]
    insert_rows(table.db, range(20, 25), images)
    assert table.embed() == 2
    failures = "SELECT key, sqlstate, message FROM embedding_failures ORDER BY key"
    assert table.db.execute(failures).fetchall() == [
        ("21", "22P03", "image cannot be decoded"),
        ("24", "22P03", "image is empty"),
    ]
    status = "SELECT waiting, retrying, failures FROM embedding_queue_status"
    assert table.db.execute(status).fetchone() == (0, 0, 2)
    table.db.execute("UPDATE t SET image = %s WHERE id = 21", (table.files[22],))
    table.db.execute("UPDATE t SET note = 'seen'")
    table.db.execute("DELETE FROM t WHERE id = 22")
    assert column_of(table.db, failures) == ["24"]
    assert table.embed() == 1
    table.db.execute("DELETE FROM t WHERE id = 24")
    table.check()


def store(db: Connection, key: str, digest: bytes) -> int:
    """Call _store_vectors for one row that failed and may be tried again."""
    tickets = column_of(db, "SELECT ticket FROM siamese._take_tickets(2, 10)")
    call = (
        "siamese._store_vectors(2, (SELECT sha256 FROM siamese.models), %s::bigint[],"
        " %s::text[], %s::siamese.embedding_result[])"
    )
    result = Result(key, digest, None, "XX000", "graph failed", True)
    return int(one(db, f"SELECT {call}", tickets, [key], [result]))


def test_tries_have_a_limit(table: Deferred) -> None:
    """Each comes later than the one before; after the fifth it is a failure."""
    table.insert(20)
    digest = table.value("SELECT sha256(image) FROM t WHERE id = 20")
    queued = table.value("SELECT min(queued_at) FROM siamese.queue_2")
    delays = []
    for attempt in range(1, 5):
        assert store(table.db, "20", digest) == 0
        row = table.db.execute(
            "SELECT keys, attempts, last_error, queued_at,"
            " extract(epoch FROM not_before - clock_timestamp()) FROM siamese.queue_2"
        ).fetchall()
        assert [item[:4] for item in row] == [([20], attempt, "graph failed", queued)]
        delays.append(row[0][4])
        status = "SELECT waiting, retrying, failures FROM embedding_queue_status"
        assert table.db.execute(status).fetchone() == (1, 1, 0)
        assert table.embed() == 0  # not yet
        table.db.execute("UPDATE siamese.queue_2 SET not_before = now()")
    assert delays == sorted(delays) and delays[0] > 5 and delays[-1] > 60 * delays[0] / 2
    store(table.db, "20", digest)
    assert table.waiting() == 0
    assert table.db.execute("SELECT key, sqlstate, message FROM embedding_failures").fetchall() == [
        ("20", "XX000", "graph failed")
    ]
    assert table.value("SELECT backfill('t')") == 1
    table.check()


@pytest.mark.law(11)
def test_a_failure_of_another_image_is_none(table: Deferred) -> None:
    """The image was replaced while the old one was tried: that says nothing of the new one."""
    table.insert(20)
    store(table.db, "20", b"x" * 32)
    assert table.queued() == [20]
    assert table.value("SELECT max(attempts) FROM siamese.queue_2") == 0
    table.db.execute("UPDATE siamese.queue_2 SET not_before = NULL")
    table.check()


@pytest.mark.law(3)
def test_vectors_of_another_model_or_image_are_refused(table: Deferred) -> None:
    table.insert(20, 21)
    vector = table.value("SELECT embed_image(%s)::text", table.files[20])
    call = "SELECT siamese._store_vectors(2, %s, %s, '{20,21}', %s::siamese.embedding_result[])"
    ticket = table.value("SELECT ticket FROM siamese.queue_2")
    digest = table.value("SELECT sha256(image) FROM t WHERE id = 20")
    results = [Result("20", digest, vector), Result("21", b"another", vector)]
    with sql_error("55000", "not of the model"):
        table.db.execute(call, ("0" * 64, [ticket], results))
    model = table.value("SELECT sha256 FROM siamese.models")
    assert table.value(call, model, [ticket], results) == 1
    assert 20 in table.vectors() and table.queued() == [21]
    table.db.execute("UPDATE siamese.queue_2 SET not_before = NULL")
    table.check()


def test_locked_rows_are_left_for_later(table: Deferred, connect: Connect) -> None:
    table.insert(20, 21)
    other = connect()
    with other.transaction():
        other.execute("UPDATE t SET image = %s WHERE id = 20", (table.files[30],))
        assert table.embed() == 1
        assert table.queued() == [20]
    assert table.value("SELECT count(*) FROM siamese.queue_2") == 2  # the update has its own
    table.db.execute("UPDATE siamese.queue_2 SET not_before = NULL")
    assert table.embed() == 1
    table.check()


def test_no_two_take_the_same(table: Deferred, connect: Connect) -> None:
    table.insert(*range(100, 200))
    other = connect()
    with other.transaction():
        assert one(other, "SELECT embed_pending('t', 10)") == 10
        assert table.embed() == 36  # what the first of two tickets leaves
        with sql_error("55P03", "lock"):
            table.db.execute("SELECT FROM siamese.queue_2 FOR UPDATE NOWAIT")
    assert table.embed() == 54
    table.check()


def test_statements_do_not_wait_for_who_embeds(table: Deferred, connect: Connect) -> None:
    """Not even those that change the very rows; but for rows whose vector is stored already."""
    table.insert(*range(100, 110))
    other = connect()
    table.db.execute("SET lock_timeout = '10s'")
    with other.transaction():
        taken = other.execute("SELECT * FROM siamese._take_tickets(2, 10)").fetchall()
        other.execute("SELECT FROM siamese._read_images(2, %s)", (taken[0][1],))
        table.insert(110)
        table.db.execute("UPDATE t SET image = %s WHERE id = 101", (table.files[30],))
        table.db.execute("UPDATE t SET id = 202 WHERE id = 102")
        table.db.execute("DELETE FROM t WHERE id IN (103, 104)")
        table.insert(103)
    table.check()


@pytest.mark.law(2)
def test_repeatable_read(table: Deferred, connect: Connect) -> None:
    """A vector stored after the transaction's snapshot can't be deleted by it: it must not stay."""
    for change in (
        ("UPDATE t SET image = %s WHERE id = 20", (table.files[30],)),
        ("DELETE FROM t WHERE id = 20", None),
        ("UPDATE t SET id = 21 WHERE id = 20", None),
    ):
        table.db.execute("DELETE FROM t WHERE id >= 20")
        table.insert(20)
        other = connect()
        other.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        with sql_error("40001", "concurrent embedding"), other.transaction():
            other.execute("SELECT FROM t")
            assert table.embed() == 1
            other.execute(*change)
        table.check()
        with other.transaction():
            other.execute(*change)
        table.check()
    assert table.value("SELECT count(*) FROM siamese.embedding_2") == 10 + 1


def test_rows_that_are_there_already(db: Connection, pictures: Pictures) -> None:
    db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea)")
    insert_rows(db, range(100), pictures.files[:100])
    sql_ = "SELECT create_collection(%s, 't', embed => 'deferred', backfill => %s)"
    assert one(db, sql_, "later", False) == 0
    assert one(db, sql_, "now", True) == 100
    status = "SELECT collection, waiting FROM embedding_queue_status ORDER BY 1"
    assert db.execute(status).fetchall() == [("later", 0), ("now", 100)]
    assert one(db, "SELECT count(*) FROM siamese.embedding_3") == 0
    assert one(db, "SELECT backfill('later', 30)") == 30
    assert one(db, "SELECT backfill('later')") == 70
    assert one(db, "SELECT embed_pending()") == 100
    assert db.execute(status).fetchall() == [("later", 0), ("now", 0)]


def test_a_broken_collection_does_not_block_others(
    db: Connection, pictures: Pictures, connect: Connect
) -> None:
    register_grid(db)
    for name in ("a", "b", "c"):
        make_collection(db, name, model="grid" if name == "a" else "medical", embed="deferred")
        db.execute(f"INSERT INTO {name} VALUES (1, %s)", (pictures.files[0],))
    db.execute("UPDATE siamese.models SET onnx = 'x' WHERE name = 'grid'")
    session = connect()
    notices = notices_of(session)
    assert one(session, "SELECT embed_pending()") == 2
    assert len(notices) == 1 and 'collection "a" was not embedded' in notices[0]
    with sql_error("XX001", "SHA-256"):
        session.execute("SELECT embed_pending('a')")
    status = dict(db.execute("SELECT collection, waiting FROM embedding_queue_status").fetchall())
    assert status == {"a": 1, "b": 0, "c": 0}


def test_refusals(db: Connection) -> None:
    db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea)")
    with sql_error("22023", 'invalid value for "embed": "soon"', '"deferred"'):
        db.execute("SELECT create_collection('t', 't', embed => 'soon')")
    with sql_error("22023", "is not deferred", "backfill"):
        db.execute("SELECT embed_pending('images')")
    with sql_error("42704", 'collection "none"'):
        db.execute("SELECT embed_pending('none')")
    with sql_error("22023", "max_rows"):
        db.execute("SELECT embed_pending(max_rows => 0)")


def test_workers_are_woken_once(table: Deferred, connect: Connect) -> None:
    """Commits that notify wait for each other, so only the one that finds nothing queued does."""
    listener = connect()
    listener.execute("LISTEN pg_siamese_queue")
    for place in range(20, 25):
        table.insert(place)
    table.db.execute("UPDATE t SET image = %s WHERE id = 1", (table.files[30],))
    found = list(listener.notifies(timeout=1, stop_after=2))
    assert [notification.payload for notification in found] == ["2"]
    table.embed()
    table.db.execute("UPDATE t SET image = %s WHERE id = 1", (table.files[31],))
    assert [item.payload for item in listener.notifies(timeout=10, stop_after=1)] == ["2"]


def test_table_of_another_owner(table: Deferred, new_role: NewRole, connect: Connect) -> None:
    """Statements of any role queue; who may not read the images sees no vectors either."""
    owner, writer = new_role(), new_role()
    table.db.execute(f"GRANT CREATE ON SCHEMA public TO {owner}; ALTER TABLE t OWNER TO {owner}")
    table.db.execute(f"GRANT INSERT ON t TO {writer}; ALTER TABLE t ENABLE ROW LEVEL SECURITY")
    table.db.execute(f"CREATE POLICY add ON t FOR INSERT TO {writer} WITH CHECK (true)")
    session = connect(user=writer)
    session.execute("INSERT INTO public.t VALUES (20, %s)", (table.files[20],))
    assert table.queued() == [20]
    for statement in ("SELECT FROM siamese.queue_2", "SELECT siamese.embed_pending('t')"):
        with sql_error("42501", "permission denied"):
            session.execute(statement)
    table.check()


@pytest.mark.law(7)
def test_types_that_bring_code_are_refused(
    table: Deferred, new_role: NewRole, connect: Connect
) -> None:
    """Casts and comparisons of the owner's own types would run with the trigger's rights."""
    owner = new_role()
    table.db.execute(f"GRANT CREATE ON SCHEMA public TO {owner}; ALTER TABLE t OWNER TO {owner}")
    table.db.execute(f"GRANT USAGE ON SCHEMA siamese TO {owner}")
    session = connect(user=owner)
    session.execute("CREATE TYPE public.sly AS (id int)")
    alter = "ALTER TABLE t ALTER COLUMN {0} TYPE public.sly USING row(1)::public.sly"
    for column in ("id", "image"):
        with sql_error("0A000", "cannot alter type"):
            session.execute(alter.format(column))
    table.db.execute(
        "DROP VIEW siamese.source_2; DROP TRIGGER pg_siamese_2_change ON t;" + alter.format("image")
    )
    table.db.execute("SELECT renew_collections()")
    for statement in (
        "INSERT INTO t VALUES (50, row(50)::public.sly)",
        "UPDATE t SET note = 'x'",
        "DELETE FROM t",
    ):
        with sql_error("55000", 'collection "t" no longer matches its table'):
            session.execute(statement)


def test_renamed_column(table: Deferred) -> None:
    table.db.execute("ALTER TABLE t RENAME COLUMN image TO picture")
    with sql_error("55000", "no longer matches its table", "create it again"):
        table.db.execute("INSERT INTO t (id) VALUES (50)")
    table.db.execute("ALTER TABLE t RENAME COLUMN picture TO image")
    table.check()


def test_status(table: Deferred) -> None:
    columns = "waiting, oldest_age, retrying, failures, rows_per_second > 0"
    status = f"SELECT {columns} FROM embedding_queue_status"
    assert table.db.execute(status).fetchall() == [(0, None, 0, 0, True)]
    table.insert(20, 21)
    rows = table.db.execute(status).fetchall()
    assert rows[0][0] == 2 and rows[0][1].total_seconds() >= 0
    columns = "embed, waiting, rows_embedded"
    rows = table.db.execute(f"SELECT {columns} FROM collection_status ORDER BY 1").fetchall()
    assert rows == [("deferred", 2, 10), ("sync", 0, 0)]


def test_sync_collection_beside_a_deferred_one(db: Connection, pictures: Pictures) -> None:
    """On one table, with one statement."""
    db.execute("SELECT create_collection('later', 'images', embed => 'deferred')")
    ids = insert_images(db, pictures.files[:5])
    counts = "SELECT collection, rows_embedded, waiting FROM collection_status ORDER BY 1"
    assert db.execute(counts).fetchall() == [("images", 5, 0), ("later", 0, 5)]
    db.execute("SELECT embed_pending()")
    db.execute("DELETE FROM images WHERE image_id = %s", (ids[0],))
    assert db.execute(counts).fetchall() == [("images", 4, 0), ("later", 4, 0)]


def test_many_sessions(table: Deferred, connect: Connect) -> None:
    """Writers and embedders at once, on the same rows: in the end all is in step."""
    stop = threading.Event()

    def write(session: Connection) -> None:
        for number in range(60):
            key = 100 + number % 7
            image = table.files[number % 50]
            session.execute(
                "INSERT INTO t VALUES (%s, %s) ON CONFLICT (id) DO UPDATE"
                " SET image = excluded.image",
                (key, image),
            )
            if number % 5 == 0:
                session.execute("DELETE FROM t WHERE id = %s", (key,))

    def embed(session: Connection) -> None:
        while not stop.is_set():
            session.execute("SELECT embed_pending('t')")

    def write_all() -> None:
        errors = in_threads(*[partial(write, connect()) for _ in range(2)])
        stop.set()
        assert errors == []

    assert in_threads(write_all, *[partial(embed, connect()) for _ in range(2)]) == []
    table.check_vectors()
    table.db.execute("UPDATE siamese.queue_2 SET not_before = NULL")
    table.check()


def test_dump_and_restore_keep_the_queue(table: Deferred) -> None:
    """Tickets are rows of an ordinary table, not the extension's."""
    members = "SELECT FROM pg_depend WHERE objid = 'siamese.queue_2'::regclass AND deptype = 'e'"
    assert table.db.execute(members).fetchall() == []
