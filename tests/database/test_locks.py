"""Who locks several objects of a collection never waits in a circle, and meets no half-dropped one.

Another session holds the table, so that two statements wait in an order that is known. Each finds
out at once whether it is in a deadlock, which PostgreSQL looks for after ``deadlock_timeout`` only.
"""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql

from tests.conftest import Connect, Connection, NewRole, Pictures, insert_images
from tests.database.running import Running
from tests.database.tables import insert_rows, make_collection, register_grid
from tests.support import one, rows_of, sql_error


def behind(connect: Connect, first: str, *statements: str) -> list[Running]:
    """Start statements that wait for a transaction of ``first``, and commit that."""
    holder = connect()
    holder.execute(f"BEGIN; {first}")
    late = [Running(connect, statement).start() for statement in statements]
    assert all([each.waits() for each in late])
    holder.execute("COMMIT")
    return late


@pytest.fixture
def t(db: Connection, pictures: Pictures) -> Connection:
    """Table ``t`` with deferred collection 2, with an index, vectors beside it, and a queue.

    New sessions look for deadlocks at once.
    """
    name = sql.Identifier(db.info.dbname)
    db.execute(sql.SQL("ALTER DATABASE {} SET deadlock_timeout = '50ms'").format(name))
    make_collection(db, more=", label text DEFAULT 'x'", embed="deferred")
    for keys in (range(10), range(10, 15)):
        fill(db, keys, pictures)
        db.execute("SELECT embed_pending()")
        if keys.start == 0:
            db.execute("SELECT build_index('t')")
    fill(db, range(20, 25), pictures)
    return db


def fill(db: Connection, keys: range, pictures: Pictures) -> None:
    insert_rows(db, keys, [pictures.files[key] for key in keys])


def left_over(db: Connection, name: str = "t", number: int = 2) -> list[str]:
    """Return what there is of a collection."""
    rows = db.execute(
        "SELECT relname::text FROM pg_class WHERE relname ~ %(end)s AND relnamespace ="
        " 'siamese'::regnamespace UNION ALL SELECT proname FROM pg_proc WHERE proname ~ %(end)s"
        " AND pronamespace = 'siamese'::regnamespace"
        " UNION ALL SELECT tgname FROM pg_trigger WHERE tgname ~ %(start)s"
        " UNION ALL SELECT relname FROM pg_class WHERE relname = %(view)s"
        " UNION ALL SELECT 'collection' FROM siamese.collections WHERE collection_id = %(number)s"
        " UNION ALL SELECT 'batch' FROM siamese.embedding_batches WHERE collection_id = %(number)s"
        " UNION ALL SELECT 'try' FROM siamese.embedding_attempts WHERE collection_id = %(number)s",
        {
            "end": f"_{number}$",
            "start": f"^pg_siamese_{number}_",
            "view": f"vectors_{name}",
            "number": number,
        },
    )
    return [row[0] for row in rows.fetchall()]


STRONG = {
    "drop": "SELECT drop_collection('t')",
    "renew": "SELECT renew_collections()",
    "drop table": "DROP TABLE t CASCADE",
}
WORKERS = {
    "take tickets": "SELECT * FROM siamese._take_tickets(2, 10)",
    "isolate tickets": "SELECT siamese._isolate_tickets(2)",
    "queued collections": "SELECT * FROM siamese._queued_collections()",
    "build if needed": "SELECT siamese._build_if_needed(2, 1, 0.1)",
    "embed_pending": "SELECT embed_pending('t')",
    "embed_pending of all": "SELECT embed_pending()",
    "backfill": "SELECT backfill('t')",
    "build_index": "SELECT build_index('t')",
    "self_check": "SELECT * FROM self_check()",
    "status": "SELECT * FROM collection_status",
    "queue status": "SELECT * FROM embedding_queue_status",
    "progress": "SELECT * FROM progress",
}
SEARCHES = {
    "by image": "SELECT * FROM similar_images((SELECT image FROM images), 3, 't')",
    "by key": "SELECT * FROM similar_images(image_id => 3, collection => 't')",
    "by pgvector": (
        "SELECT * FROM similar_images(image_id => 3, collection => 't', engine => 'pgvector')"
    ),
    "with a filter": (
        "SELECT * FROM similar_images(image_id => 3, collection => 't', filter => '{\"label\": 0}')"
    ),
    "similar_rows": "SELECT * FROM similar_rows(NULL::t, key => 3)",
    "classify_image": "SELECT * FROM classify_image(image_id => 3, collection => 't')",
    "explain_search": "SELECT * FROM explain_search(image_id => 3, collection => 't')",
    "measure_recall": "SELECT * FROM measure_recall('t', queries => 1)",
    "retrieval_quality": "SELECT * FROM retrieval_quality('t', sample => 1)",
    "nearest": "SELECT * FROM nearest('t', keys => '{3}')",
    "similarity_map": (
        "SELECT similarity_map(image_id => 3, neighbour_id => 4, collection => 't', masks => 20)"
    ),
    "contact_sheet": "SELECT contact_sheet('t', '{3}')",
    "vectors": "SELECT count(*) FROM vectors_t",
}
OTHERS = {
    "insert": "INSERT INTO t VALUES (100, 'x')",
    "delete": "DELETE FROM t WHERE id = 1",
    "truncate": "TRUNCATE t",
    "rename table": "ALTER TABLE t RENAME TO v",
    "alter": "SELECT alter_collection('t', max_pixels => 1000000)",
    "rename": "UPDATE siamese.collections SET name = 'u' WHERE name = 't'",
    "create another": "SELECT create_collection('other', 't', embed => 'deferred')",
    **STRONG,
}
# What comes of a collection, a view or a table that is gone.
CLEAN = ("42704", "42P01")


@pytest.mark.parametrize("strong", STRONG)
@pytest.mark.parametrize("who", ["workers", "searches", "warm searches", "others"])
def test_who_comes_while_a_strong_lock_is_waited_for(
    t: Connection, connect: Connect, pictures: Pictures, new_role: NewRole, strong: str, who: str
) -> None:
    insert_images(t, pictures.files[:1])
    t.execute("INSERT INTO siamese.embedding_attempts SELECT 2, ticket, 2 FROM siamese.queue_2")
    statements = {"workers": WORKERS, "others": OTHERS}.get(who, SEARCHES)
    session: dict[str, str] = {}
    warm_up = 0
    if statements is SEARCHES:
        # Not a superuser, so that policies are part of what is read.
        session["user"] = new_role()
        t.execute("SELECT grant_usage(%s)", (session["user"],))
        t.execute(f"GRANT SELECT ON t, images TO {session['user']}")
    if who == "warm searches":
        # With nothing pending, sessions remember how they searched.
        t.execute("SELECT embed_pending('t'), build_index('t')")
        warm_up = 6
    holder = connect()
    late = {
        name: Running(lambda: connect(**session), statement, warm_up=warm_up)
        for name, statement in statements.items()
        # PostgreSQL locks views before their tables, and a table's type not at all.
        if strong != "drop table" or name not in ("vectors", "similar_rows")
    }
    holder.execute("BEGIN; LOCK TABLE t IN ROW SHARE MODE")
    first = Running(connect, STRONG[strong]).start()
    assert first.waits()
    for running in late.values():
        running.start().waits()
    holder.execute("COMMIT")
    first.result()
    for name, running in late.items():
        error = running.error_at_the_end()
        if error is not None:
            assert isinstance(error, psycopg.Error), (name, error)
            assert error.sqlstate in CLEAN, (name, error.sqlstate, error)
            assert "NULL" not in str(error)
            assert strong != "renew" or statements is OTHERS, (name, error)
    if strong == "drop":
        assert left_over(t) == []


# Two statements of one transaction: the first holds the table when the drop comes.
# The second needs more.
TWO_STEPS = {
    "bad image": ("INSERT INTO q VALUES (1, %(good)s)", "INSERT INTO q VALUES (2, 'x')"),
    "truncate": ("INSERT INTO q VALUES (1, %(good)s)", "TRUNCATE q"),
    "vectors, then table": ("SELECT FROM vectors_q", "SELECT FROM q"),
    "read, then search": ("SELECT FROM q", "SELECT * FROM similar_images(%(good)s, 1, 'q')"),
    "search, then write": (
        "SELECT * FROM similar_images(%(good)s, 1, 'q')",
        "INSERT INTO q VALUES (2, 'x')",
    ),
}


@pytest.mark.parametrize("steps", TWO_STEPS)
@pytest.mark.parametrize(
    "strong", ["drop_collection('q')", "renew_collections()", "switch_model('q')"]
)
def test_drop_while_a_transaction_goes_on(
    t: Connection, connect: Connect, pictures: Pictures, strong: str, steps: str
) -> None:
    make_collection(t, "q", on_error="quarantine")
    if strong.startswith("switch"):
        register_grid(t)
        t.execute("SELECT change_model('q', 'grid')")
    session = connect()
    session.execute("BEGIN")
    first, second = TWO_STEPS[steps]
    session.execute(first, {"good": pictures.files[0]})
    other = Running(connect, f"SELECT {strong}").start()
    other.waits()
    session.execute(second, {"good": pictures.files[0]})
    session.execute("COMMIT")
    other.result()
    if strong.startswith("drop"):
        assert left_over(t, "q", 3) == []


def test_drop_while_a_worker_stores_failures(t: Connection, connect: Connect) -> None:
    """A failure refers to its collection, and so locks its row."""
    t.execute("UPDATE t SET image = 'x'")
    session = connect()
    session.execute("BEGIN")
    tickets = session.execute("SELECT ticket FROM siamese._take_tickets(2, 100)").fetchall()
    drop = Running(connect, STRONG["drop"]).start()
    assert drop.waits()
    session.execute(
        "SELECT siamese._store_vectors(2, (SELECT sha256 FROM siamese.models), %s::bigint[],"
        " '{20}', ARRAY[('20', sha256('x'), NULL, '22P03', 'bad', false, NULL, NULL)]"
        "::siamese.embedding_result[])",
        ([row[0] for row in tickets],),
    )
    assert session.execute("SELECT key FROM siamese.failures").fetchall() == [("20",)]
    session.execute("COMMIT")
    drop.result()
    assert left_over(t) == []


def test_drop_waits_for_a_build_and_holds_nobody_up(
    t: Connection, connect: Connect, pictures: Pictures
) -> None:
    builder = connect()
    builder.execute("BEGIN")
    builder.execute("SELECT pg_advisory_xact_lock(hashtext('pg_siamese build'), 2)")
    builder.execute("SELECT FROM siamese.embedding_2")  # as far as a build gets soon
    drop = Running(connect, STRONG["drop"]).start()
    assert drop.waits()
    t.execute("SET lock_timeout = '1s'")
    fill(t, range(100, 102), pictures)
    t.execute("SELECT * FROM similar_images(image_id => 3, collection => 't')")
    builder.execute("SELECT build_index('t')")
    builder.execute("COMMIT")
    drop.result()
    assert left_over(t) == []


def test_what_waits_for_a_drop_finds_it_gone(t: Connection, connect: Connect) -> None:
    t.execute("SET lock_timeout = '10s'")
    dropper = connect()
    dropper.execute("BEGIN")
    dropper.execute(STRONG["drop"])
    # What looks at all collections goes on with the others.
    assert t.execute("SELECT * FROM siamese._queued_collections()").fetchall() == []
    assert t.execute("SELECT siamese._build_if_needed(2, 1, 0.1)").fetchone() == (None,)
    statements = (
        "SELECT drop_collection('t')",
        "SELECT alter_collection('t', max_pixels => 1000)",
        "SELECT build_index('t')",
        "SELECT backfill('t')",
        "SELECT embed_pending('t')",
        "SELECT * FROM similar_images(image_id => 3, collection => 't')",
    )
    late = [Running(connect, statement).start() for statement in statements]
    for each in late:
        assert each.waits()
    tickets = Running(connect, "SELECT * FROM siamese._take_tickets(2, 10)").start()
    everything = Running(connect, "SELECT embed_pending()").start()
    status = Running(connect, "SELECT collection, pending FROM collection_status").start()
    assert tickets.waits() and everything.waits() and status.waits()
    dropper.execute("COMMIT")
    for each in late:
        with sql_error("42704", 'collection "t" does not exist'):
            each.result()
    assert tickets.result() == []
    assert everything.result() == [(0,)]
    assert ("images", 0) in status.result()


def test_two_create_a_collection_of_one_name(t: Connection, connect: Connect) -> None:
    t.execute("SELECT drop_collection('images'); DROP TABLE images")
    create = "SELECT create_collection(model => 'medical')"
    (second,) = behind(connect, create, create)
    with sql_error("42710", 'collection "images" already exists'):
        second.result()


def test_a_model_that_is_dropped_while_it_is_chosen(t: Connection, connect: Connect) -> None:
    register_grid(t)
    t.execute("CREATE TABLE u (id integer PRIMARY KEY, image bytea)")
    create, drop = (
        "SELECT create_collection('u', 'u', model => 'grid')",
        "SELECT drop_model('grid')",
    )
    (late,) = behind(connect, drop, create)
    with sql_error("42704", 'model "grid" does not exist'):
        late.result()
    register_grid(t)
    (late,) = behind(connect, create, drop)
    with sql_error("2BP01", "collections depend on it"):
        late.result()


def test_a_table_that_is_dropped_while_it_becomes_a_collection(
    t: Connection, connect: Connect
) -> None:
    t.execute("CREATE TABLE u (id integer PRIMARY KEY, image bytea)")
    (create,) = behind(connect, "DROP TABLE u", "SELECT create_collection('u', 'u')")
    with sql_error("42P01", "does not exist"):
        create.result()


def test_a_table_that_is_renamed_while_it_is_waited_for(t: Connection, connect: Connect) -> None:
    calls = ("SELECT backfill('t')", "SELECT embed_pending()")
    late = behind(connect, "ALTER TABLE t RENAME TO v", *calls)
    assert [len(each.result()) for each in late] == [1, 1]
    assert one(t, "SELECT count(*) FROM siamese.embedding_2") == 20


def test_all_tables_are_locked_in_one_order(t: Connection, connect: Connect) -> None:
    make_collection(t, "a", embed="deferred")
    strong = connect()
    strong.execute("BEGIN; SELECT siamese._lock_table(2, 'EXCLUSIVE')")
    late = [
        Running(connect, f"SELECT {call}").start() for call in ("self_check()", "embed_pending()")
    ]
    for each in late:
        assert each.waits()
    strong.execute("SET lock_timeout = '10s'; SELECT siamese._lock_table(3, 'EXCLUSIVE'); COMMIT")
    for each in late:
        each.result()


def store(session: Connection, is_good: bool = True) -> tuple[int, int]:
    """Take a ticket of one row and store its vector or failure; returns its key, vectors stored."""
    take = "SELECT ticket, keys[1] FROM siamese._take_tickets(2, 1)"
    ((ticket, key),) = rows_of(session, take)
    good = "siamese.embed_image(t.image)::text, NULL, NULL, NULL"
    bad = "NULL, '22P03', 'bad', false"
    (stored,) = session.execute(
        "SELECT siamese._store_vectors(2, (SELECT sha256 FROM siamese.models), ARRAY[%(ticket)s],"
        f" ARRAY[%(key)s],"
        f" ARRAY[(%(key)s, sha256(t.image), {good if is_good else bad}, NULL, NULL)]"
        "::siamese.embedding_result[]) FROM t WHERE t.id = %(key)s::integer",
        {"ticket": ticket, "key": key},
    ).fetchall()
    return int(key), int(stored[0])


@pytest.mark.parametrize("is_good", [True, False])
def test_two_workers_meet_the_same_rows(
    t: Connection, connect: Connect, pictures: Pictures, is_good: bool
) -> None:
    """In two tickets, since an image was changed twice: the one leaves them to the other."""
    t.execute("TRUNCATE siamese.queue_2")
    for place, key in enumerate((3, 4, 4, 3), start=30):
        t.execute("UPDATE t SET image = %s WHERE id = %s", (pictures.files[place], key))
    first, second = (connect(options="-c lock_timeout=10s") for _ in range(2))
    for session in (first, second):
        session.execute("BEGIN")
    found = [store(session, is_good) for session in (first, second, first, second)]
    assert found == [(3, int(is_good)), (4, int(is_good)), (4, 0), (3, 0)]
    for session in (first, second):
        session.execute("COMMIT")
    t.execute("UPDATE siamese.queue_2 SET not_before = NULL")
    vectors = "SELECT count(*) FROM siamese.embedding_2 WHERE key IN (3, 4)"
    assert one(t, vectors) == 2 * is_good
    assert one(t, "SELECT embed_pending('t')") == (0 if is_good else 2)
    assert one(t, "SELECT count(*) FROM siamese.queue_2") == 0
    assert one(t, "SELECT count(*) FROM siamese.failures") == 0


def test_drop_of_a_collection_whose_table_is_gone(t: Connection, connect: Connect) -> None:
    """Nobody can lock the table first, so what was made for it has an order, too."""
    t.execute("DROP TABLE t CASCADE")
    reader = connect()
    reader.execute("BEGIN")
    reader.execute("SELECT FROM siamese.pending_2")
    drop = Running(connect, STRONG["drop"]).start()
    assert drop.waits()
    status = Running(connect, "SELECT * FROM collection_status").start()
    assert status.waits()
    reader.execute("SELECT FROM siamese.embedding_2")
    reader.execute("COMMIT")
    drop.result()
    status.result()
    assert left_over(t) == []
