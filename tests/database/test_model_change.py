"""Another model for a collection in use: its vectors are made beside, and searches switch over."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from functools import partial
from typing import Any

import psycopg
import pytest

from tests.conftest import Connect, Connection, NewRole, Pictures
from tests.database.running import Running
from tests.database.tables import insert_rows, make_collection, register_grid, without_triggers
from tests.support import column_of, one, rows_of, sql_error, wait_until

OPERATORS = {"medical": "<=>", "grid": "<->"}
COUNTS = """
SELECT c.name, m.name, c.embed, (SELECT count(*) FROM siamese.embedding_2),
    (SELECT count(*) FROM siamese.embedding_3)
FROM siamese.collections AS c JOIN siamese.models AS m USING (model_id)
WHERE c.relation = 't'::regclass ORDER BY c.name
"""


AT_WORK = "SELECT count(*) FROM progress WHERE kind = 'worker'"


@pytest.fixture
def t(db: Connection, pictures: Pictures, embed: str) -> Connection:
    """Table ``t`` with 20 rows in an index, and the model that comes next."""
    return filled(db, pictures, embed)


def filled(db: Connection, pictures: Pictures, embed: str = "sync", count: int = 20) -> Connection:
    register_grid(db)
    make_collection(db, more=", label text DEFAULT 'x'", embed=embed)
    insert_rows(db, range(count), pictures.files[:count])
    db.execute("SELECT embed_pending()")
    db.execute("SELECT build_index('t')")
    return db


def embed_all(db: Connection) -> None:
    """Embed what waits, in whatever collection, and build the index of the companion."""
    db.execute("SELECT embed_pending()")
    db.execute("SELECT build_index(name) FROM siamese.collections WHERE companion_of IS NOT NULL")


def check(db: Connection, model: str, collection: str = "t") -> None:
    """Searches in all engines are those of a model, and find each row."""
    key = one(db, "SELECT min(id) FROM t")
    query = (
        f"SELECT b.id, siamese.embed_image(b.image, %(model)s) {OPERATORS[model]}"
        " siamese.embed_image((SELECT image FROM t WHERE id = %(key)s), %(model)s)"
        " FROM t AS b WHERE b.id <> %(key)s"
    )
    truth = dict(db.execute(query, {"model": model, "key": key}).fetchall())
    for engine in ("faiss", "pgvector", "auto"):
        found = rows_of(
            db,
            "SELECT image_id, distance FROM similar_images(image_id => %s, k => 1000,"
            " collection => %s, engine => %s)",
            key,
            collection,
            engine,
        )
        assert dict(found) == pytest.approx(truth, abs=1e-4), (engine, model)


def write(db: Connection, pictures: Pictures, first: int) -> None:
    """Insert, change and delete rows."""
    insert_rows(db, range(first, first + 3), pictures.files[first : first + 3])
    db.execute("UPDATE t SET image = %s WHERE id = %s", (pictures.files[first + 3], first))
    db.execute("DELETE FROM t WHERE id = %s", (first + 1,))
    db.execute("UPDATE t SET id = id + 1000 WHERE id = %s", (first + 2,))


def test_there_and_back(t: Connection, pictures: Pictures, embed: str) -> None:
    assert rows_of(t, "SELECT change_model('t', 'grid')") == [(20,)]
    expected = [("t", "medical", embed, 20, 0), ("t (next)", "grid", "deferred", 20, 0)]
    assert rows_of(t, COUNTS) == expected
    progress = "SELECT collection, kind, phase, done, total FROM progress"
    assert rows_of(t, progress) == [("t", "change_model", "embedding", 0, 20)]
    check(t, "medical")
    write(t, pictures, 30)
    embed_all(t)
    assert rows_of(t, progress) == []
    check(t, "medical")
    check(t, "grid", "t (next)")
    write(t, pictures, 40)
    t.execute("SELECT embed_pending('t')" if embed == "deferred" else "SELECT 1")
    t.execute("SELECT switch_model('t')")  # which embeds the rest
    expected = [("t", "grid", embed, 24, 24), ("t (previous)", "medical", "deferred", 24, 24)]
    assert rows_of(t, COUNTS) == expected
    check(t, "grid")
    write(t, pictures, 50)
    embed_all(t)
    check(t, "grid")
    check(t, "medical", "t (previous)")
    t.execute("SELECT switch_model('t')")
    expected = [("t", "medical", embed, 26, 26), ("t (previous)", "grid", "deferred", 26, 26)]
    assert rows_of(t, COUNTS) == expected
    check(t, "medical")
    write(t, pictures, 60)
    embed_all(t)
    check(t, "medical")
    assert one(t, "SELECT bool_and(ok) FROM self_check(full => true)") is True
    t.execute("SELECT drop_collection('t (previous)')")
    write(t, pictures, 70)
    embed_all(t)
    check(t, "medical")
    assert one(t, "SELECT bool_and(ok) FROM self_check(full => true)") is True


def test_equal_to_a_collection_made_anew(t: Connection, pictures: Pictures, embed: str) -> None:
    t.execute("SELECT change_model('t', 'grid')")
    write(t, pictures, 30)
    embed_all(t)
    t.execute("SELECT switch_model('t', keep_old => false)")
    assert column_of(t, "SELECT name FROM collections ORDER BY 1") == ["images", "t"]
    left = "SELECT relname FROM pg_class WHERE relname ~ '_2$' AND relkind IN ('r', 'v')"
    assert column_of(t, left) == []
    t.execute("SELECT create_collection('fresh', 't', model => 'grid')")
    settings = "SELECT to_jsonb(c) - '{collection_id,name,generation,created_at,embed}'::text[]"
    query = f"{settings} FROM siamese.collections AS c WHERE c.name IN ('t', 'fresh')"
    one_setting, other = column_of(t, query)
    assert one_setting == other
    differences = rows_of(
        t,
        "SELECT a.key, b.key FROM vectors_t AS a FULL JOIN vectors_fresh AS b USING (key)"
        " WHERE (a.embedding <-> b.embedding < 1e-6) IS NOT TRUE",
    )
    assert differences == []
    assert one(t, "SELECT embed FROM collections WHERE name = 't'") == embed


def test_all_frames(db: Connection, pictures: Pictures) -> None:
    register_grid(db)
    make_collection(db, frames="all")
    insert_rows(db, range(12), pictures.files[:12])
    db.execute("SELECT change_model('t', 'grid')")
    embed_all(db)
    db.execute("SELECT switch_model('t')")
    assert one(db, "SELECT count(*) FROM vectors_t WHERE frame = 1") == 12
    insert_rows(db, [20], [pictures.files[20]])
    assert one(db, "SELECT count(*) FROM vectors_t") == 13


def test_settings_and_names_at_the_switch(db: Connection, pictures: Pictures) -> None:
    filled(db, pictures)
    db.execute("SELECT alter_collection('t', max_pixels => 2000, group_column => 'label')")
    db.execute("SELECT change_model('t', 'grid')")
    db.execute("SELECT alter_collection('t', on_error => 'quarantine', max_bytes => 30000)")
    db.execute("UPDATE siamese.collections SET name = 'pets' WHERE name = 't'")
    embed_all(db)
    # One table, and still one collection as far as searches by a row are concerned.
    assert len(rows_of(db, "SELECT similar_rows(NULL::t, key => 3)")) == 10
    named = "SELECT similar_rows(NULL::t, key => 3, collection => 't (next)')"
    assert len(rows_of(db, named)) == 10
    db.execute("SELECT switch_model('pets')")
    row = db.execute(
        "SELECT on_error, max_bytes, max_pixels, group_column FROM collections WHERE name = 'pets'"
    ).fetchone()
    assert row == ("quarantine", 30000, 2000, "label")
    views = "SELECT viewname FROM pg_views WHERE viewname LIKE 'vectors%' ORDER BY 1"
    assert column_of(db, views) == ["vectors_images", "vectors_pets", "vectors_pets (previous)"]
    assert one(db, "SELECT vector_dims(embedding) FROM vectors_pets LIMIT 1") == one(
        db, "SELECT dimension FROM models WHERE name = 'grid'"
    )


def test_a_snapshot_from_before_the_switch(
    db: Connection, connect: Connect, pictures: Pictures
) -> None:
    """It goes on with the vectors that it sees, and those are still kept."""
    filled(db, pictures)
    db.execute("SELECT change_model('t', 'grid')")
    embed_all(db)
    session, fresh = connect(), connect()
    check(session, "medical")
    session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    session.execute("SELECT FROM siamese.models")
    db.execute("SELECT switch_model('t')")
    write(db, pictures, 30)
    check(session, "medical")
    session.execute("COMMIT")
    for each in (session, fresh):
        check(each, "grid")


def test_the_switch_waits_for_writers(db: Connection, connect: Connect, pictures: Pictures) -> None:
    filled(db, pictures)
    db.execute("SELECT change_model('t', 'grid')")
    embed_all(db)
    writer = connect()
    writer.execute("BEGIN")
    write(writer, pictures, 30)
    switch = Running(connect, "SELECT switch_model('t')").start()
    assert switch.waits()
    search = Running(connect, "SELECT * FROM similar_images(image_id => 3, collection => 't')")
    assert search.start().waits()  # it sees the vectors of before
    writer.execute("COMMIT")
    switch.result()
    assert len(search.result()) == 10
    check(db, "grid")


def test_a_switch_that_is_rolled_back(db: Connection, connect: Connect, pictures: Pictures) -> None:
    filled(db, pictures)
    db.execute("SELECT change_model('t', 'grid')")
    embed_all(db)
    before = rows_of(db, COUNTS)
    session = connect()
    session.execute("BEGIN")
    session.execute("SELECT switch_model('t')")
    session.execute("ROLLBACK")
    assert rows_of(db, COUNTS) == before
    write(db, pictures, 30)
    embed_all(db)
    check(db, "medical")
    db.execute("SELECT switch_model('t')")
    check(db, "grid")


def test_rows_that_triggers_did_not_see(db: Connection, pictures: Pictures) -> None:
    """And that only the vectors in use were mended for."""
    filled(db, pictures)
    db.execute("SELECT change_model('t', 'grid')")
    embed_all(db)
    with without_triggers(db):
        insert_rows(db, range(30, 35), pictures.files[30:35])
        db.execute("UPDATE t SET image = %s WHERE id = 5", (pictures.files[40],))
        db.execute("DELETE FROM t WHERE id = 6")
    db.execute("SELECT backfill('t')")
    db.execute("SELECT switch_model('t')")
    check(db, "grid")


def test_what_keeps_a_switch_from_being_made(db: Connection, pictures: Pictures) -> None:
    filled(db, pictures)
    with sql_error("55000", 'collection "t" has no companion', "change_model"):
        db.execute("SELECT switch_model('t')")
    db.execute("SELECT change_model('t', 'grid')")
    with sql_error("55000", 'collection "t (next)" has no index', "build_index"):
        db.execute("SELECT switch_model('t')")
    embed_all(db)
    # A row that the new model alone can't embed.
    db.execute("SELECT alter_collection('t (next)', max_pixels => 1)")
    insert_rows(db, [30], [pictures.files[30]])
    for _ in range(2):
        with sql_error("55000", '"t (next)" lacks the vectors of 1 rows', "embedding_failures"):
            db.execute("SELECT switch_model('t')")
        db.execute("SELECT embed_pending('t (next)')")
    db.execute("DELETE FROM t WHERE id = 30")
    db.execute(
        "INSERT INTO siamese.queue_3 (keys) SELECT array_agg(n) FROM generate_series(1, 600) AS n"
    )
    with sql_error("55000", "lacks the vectors of 600 rows"):
        db.execute("SELECT switch_model('t')")
    db.execute("SELECT alter_collection('t (next)', max_pixels => -1), embed_pending()")
    db.execute("SELECT create_collection('t (previous)', 't')")
    with sql_error("42710", 'collection "t (previous)" already exists'):
        db.execute("SELECT switch_model('t')")
    db.execute("SELECT drop_collection('t (previous)')")
    with sql_error("25001", "cannot run in a REPEATABLE READ transaction"):
        db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT switch_model('t')")
    db.execute("ROLLBACK")
    db.execute("SELECT switch_model('t')")
    check(db, "grid")


def test_failures_of_both_models(db: Connection, pictures: Pictures) -> None:
    """A bad image has no vector to lose."""
    register_grid(db)
    make_collection(db, on_error="quarantine")
    insert_rows(db, range(6), [*pictures.files[:5], b"no image"])
    db.execute("SELECT change_model('t', 'grid'), embed_pending()")
    db.execute("SELECT switch_model('t')")
    failures = "SELECT collection, key FROM embedding_failures ORDER BY 1"
    assert rows_of(db, failures) == [("t", "5"), ("t (previous)", "5")]


def test_what_cannot_be_changed(
    db: Connection, connect: Connect, new_role: NewRole, pictures: Pictures
) -> None:
    filled(db, pictures)
    for call, sqlstate, text in (
        ("change_model(NULL, 'grid')", "22004", "collection is null"),
        ("change_model('t', NULL)", "22004", "model is null"),
        ("change_model('none', 'grid')", "42704", 'collection "none" does not exist'),
        ("change_model('t', 'none')", "42704", 'model "none" does not exist'),
        ("change_model('t', 'medical')", "22023", 'collection "t" already has this model'),
        ("switch_model(NULL)", "22004", "collection is null"),
        ("switch_model('t', NULL)", "22004", "keep_old is null"),
    ):
        with sql_error(sqlstate, text):
            db.execute(f"SELECT {call}")
    db.execute("SELECT change_model('t', 'grid')")
    with sql_error("55000", "already has a companion", '"t (next)"', "drop_collection"):
        db.execute("SELECT change_model('t', 'grid')")
    with sql_error("55000", '"t (next)" is a companion', 'collection "t"'):
        db.execute("SELECT change_model('t (next)', 'medical')")
    with sql_error("2BP01", 'cannot drop collection "t"', '"t (next)"'):
        db.execute("SELECT drop_collection('t')")
    with sql_error("2BP01", 'cannot drop model "grid"'):
        db.execute("SELECT drop_model('grid')")
    role = new_role()
    db.execute("SELECT grant_admin(%s)", (role,))
    stranger = connect(user=role)
    for call in ("change_model('t', 'grid')", "switch_model('t')"):
        with sql_error("42501", "must be owner of table"):
            stranger.execute(f"SELECT {call}")
    assert rows_of(stranger, "SELECT * FROM progress") != []  # administrators see it
    # The change is called off.
    db.execute("SELECT drop_collection('t (next)'), drop_model('grid'), drop_collection('t')")


def test_an_owner_who_is_no_superuser(
    db: Connection, connect: Connect, new_role: NewRole, pictures: Pictures
) -> None:
    filled(db, pictures)
    role = new_role()
    db.execute("SELECT grant_admin(%s)", (role,))
    db.execute(f"ALTER TABLE t OWNER TO {role}")
    owner = connect(user=role)
    for call, model in (
        ("change_model('t', 'grid')", "medical"),
        ("embed_pending('t (next)'), build_index('t (next)')", "medical"),
        ("switch_model('t')", "grid"),
        ("switch_model('t')", "medical"),
        ("switch_model('t', keep_old => false)", "grid"),
    ):
        owner.execute(f"SELECT {call}")
        check(owner, model)
        write(owner, pictures, one(owner, "SELECT max(id) + 1 FROM t WHERE id < 1000"))
        check(owner, model)


class Load:
    """Sessions that write and search in table ``t``, and workers that are killed."""

    def __init__(self, db: Connection, connect: Connect, files: list[bytes]) -> None:
        self.connect = connect
        self.files = files
        self.errors: list[BaseException] = []
        self.models: deque[str] = deque(maxlen=8)  # that answered the last searches
        self.writes = 0
        self._stop = threading.Event()
        db.execute(
            "CREATE TABLE public.truth AS SELECT m.name AS model, md5(f.image) AS digest,"
            " siamese.embed_image(f.image, m.name) AS vector"
            " FROM siamese.models AS m CROSS JOIN unnest(%s::bytea[]) AS f (image)",
            (files,),
        )
        bodies = [self.write] * 4 + [self.search] * 4
        self.threads = [
            threading.Thread(target=self.guarded, args=(body, number))
            for number, body in enumerate(bodies)
        ]

    def __enter__(self) -> Load:
        self.sessions = [self.connect() for _ in self.threads]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self.threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def goes_on(self, model: str, writes: int) -> bool:
        """Whether a model answers, and so many writes were made; or something failed."""
        answers = len(self.models) == 8 and set(self.models) == {model}
        return bool(self.errors) or (answers and self.writes > writes)

    def guarded(self, body: Any, number: int) -> None:
        try:
            chance = random.Random(number)
            while not self._stop.is_set():
                body(self.sessions[number], chance, number)
        except BaseException as error:
            self.errors.append(error)

    def write(self, session: Connection, chance: random.Random, number: int) -> None:
        """Change some rows of this session's keys, now and then to no avail."""
        keys = [4 * chance.randrange(20) + number for _ in range(3)]
        with suppress(ZeroDivisionError), session.transaction():
            session.execute("DELETE FROM t WHERE id = ANY(%s)", (keys[:2],))
            insert = "INSERT INTO t (id, image) VALUES (%s, %s) ON CONFLICT (id) DO NOTHING"
            session.execute(insert, (keys[0], chance.choice(self.files)))
            update = "UPDATE t SET image = %s WHERE id = %s"
            session.execute(update, (chance.choice(self.files), keys[2]))
            if chance.random() < 0.1:
                raise ZeroDivisionError
        self.writes += 1
        time.sleep(0.02)

    def search(self, session: Connection, chance: random.Random, number: int) -> None:
        """All rows, with the distances of the model in use, as one snapshot has them."""
        image = chance.choice(self.files)
        row = session.execute(
            "WITH used AS (SELECT m.name FROM siamese.collections AS c"
            " JOIN siamese.models AS m USING (model_id) WHERE c.name = 't')"
            " SELECT (SELECT name FROM used), (SELECT jsonb_object_agg(b.id,"
            "  CASE WHEN x.model = 'medical' THEN x.vector <=> q.vector"
            "   ELSE x.vector <-> q.vector END)"
            "  FROM t AS b JOIN truth AS x ON x.digest = md5(b.image)"
            "  JOIN truth AS q ON q.digest = md5(%(image)s) AND q.model = x.model"
            "  WHERE x.model = (SELECT name FROM used)),"
            " (SELECT jsonb_object_agg(s.image_id, s.distance)"
            "  FROM similar_images(%(image)s::bytea, 1000, 't') AS s)",
            {"image": image},
        ).fetchone()
        assert row is not None
        model, truth, found = row
        assert found == pytest.approx(truth, abs=1e-4), model
        self.models.append(model)
        time.sleep(0.02)


def test_under_load_with_killed_workers(
    db: Connection, dsn: str, connect: Connect, pictures: Pictures
) -> None:
    files = pictures.files[:40]
    register_grid(db)
    make_collection(db)
    insert_rows(db, range(80), [files[key % 40] for key in range(80)])
    db.execute("SELECT build_index('t')")
    command = [sys.executable, "-m", "pg_siamese", "worker", "--batch", "16", "--poll", "0.1"]
    workers: list[subprocess.Popen[bytes]] = []

    def start_worker() -> None:
        workers.append(subprocess.Popen([*command, "--dsn", dsn], stderr=subprocess.DEVNULL))

    def is_switched() -> bool:
        try:
            db.execute("SELECT switch_model('t')")
        except psycopg.errors.ObjectNotInPrerequisiteState:
            time.sleep(0.05)
            return False
        return True

    try:
        with Load(db, connect, files) as load:
            start_worker()
            db.execute("SELECT change_model('t', 'grid')")
            for _ in range(3):  # in the middle of a batch
                start_worker()
                wait_until(lambda: load.errors or one(db, AT_WORK) > 0)
                workers.pop(0).kill()
            db.execute("SELECT build_index('t (next)')")
            for model in ("grid", "medical", "grid"):
                wait_until(lambda: load.errors or is_switched(), "no switch")
                wait_until(
                    partial(load.goes_on, model, load.writes + 20), "the load does not go on"
                )
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    embed_all(db)
    check(db, "grid")
    check(db, "medical", "t (previous)")
    db.execute("SELECT create_collection('fresh', 't', model => 'grid')")
    differences = rows_of(
        db,
        "SELECT a.key, b.key FROM vectors_t AS a FULL JOIN vectors_fresh AS b USING (key)"
        " WHERE (a.embedding <-> b.embedding < 1e-6) IS NOT TRUE",
    )
    assert differences == []
