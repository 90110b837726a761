"""A streaming replica: it answers, with files of its own, while it replays; and can take over."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import psycopg
import pytest
from typer.testing import CliRunner

from pg_siamese.cli.main import app
from tests.conftest import Connection, Pictures, insert_images
from tests.database.running import Running
from tests.operations.servers import (
    K,
    catch_up,
    check,
    connect,
    embedding_ids,
    fill,
    index_files,
    remove_files,
    search,
    server,
)
from tests.scenarios.gallery import filled_up
from tests.support import assert_exact, exact_distances, in_threads, notices_of, one, sql_error
from tools.cluster import Cluster

SETTINGS = {"max_standby_streaming_delay": "-1"}  # no conflict ends what the tests look at


@dataclass
class Pair:
    """A primary, its standby, and a connection to each."""

    primary: Cluster
    standby: Cluster
    db: Connection
    replica: Connection

    def catch_up(self) -> None:
        """Wait until the standby is where the primary is."""
        catch_up(self.db, self.replica)

    def build(self) -> int:
        """Build a generation on the primary, and let the standby know."""
        generation = int(one(self.db, "SELECT build_index()"))
        self.catch_up()
        return generation


@pytest.fixture(scope="module")
def pair(onnx: bytes, pictures: Pictures) -> Iterator[Pair]:
    """300 images and a generation, whose file comes with the copy."""
    # What autovacuum removes, a standby with an older snapshot waits to replay.
    with server({"autovacuum": "off"}) as primary, server(SETTINGS) as standby:
        primary.start()
        fill(primary, onnx, pictures.files[:300], pictures.labels[:300])
        with connect(primary) as db:
            db.execute("SELECT build_index()")
            standby.copy(primary, "-R", "--no-sync")
            standby.start()
            with connect(standby) as replica:
                yield Pair(primary, standby, db, replica)


@pytest.fixture
def fresh(pair: Pair) -> Iterator[Connection]:
    """A new session on the standby, which has replayed all."""
    pair.catch_up()
    with connect(pair.standby) as session:
        yield session


@pytest.mark.law(1)
def test_a_standby_makes_a_file_of_its_own(
    pair: Pair, fresh: Connection, queries: Pictures
) -> None:
    generation = pair.build()
    before = pair.db.execute("SELECT * FROM siamese.generations").fetchall()
    if index_files(pair.standby).exists():
        remove_files(pair.standby)
    said = notices_of(fresh)
    check(fresh, *queries.files[:5])
    assert len(said) == 1
    assert "is missing" in said[0]
    assert "rebuild_file" in said[0]
    with sql_error("55000", "is missing"):
        search(fresh, queries.files[0], "faiss")
    assert one(fresh, "SELECT generation_file FROM collection_status") == "missing"
    lines = fresh.execute("SELECT detail FROM self_check() WHERE NOT ok").fetchall()
    assert len(lines) == 1
    assert "call rebuild_file" in lines[0][0]

    assert one(fresh, "SELECT rebuild_file()") == generation
    check(fresh, *queries.files[:5], engine="faiss")
    assert len(said) == 1
    assert one(fresh, "SELECT generation_file FROM collection_status") == "present"
    assert one(fresh, "SELECT bool_and(ok) FROM self_check()")
    # A second call finds it whole, and leaves it alone.
    files = {path: path.stat().st_ino for path in index_files(pair.standby).rglob("*.*")}
    assert len(files) == 2
    assert one(fresh, "SELECT rebuild_file()") == generation
    assert {path: path.stat().st_ino for path in index_files(pair.standby).rglob("*.*")} == files
    # A damaged one is replaced.
    path = next(path for path in files if path.suffix == ".faiss")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with connect(pair.standby) as another:
        with sql_error("55000", "is damaged"):
            search(another, queries.files[0], "faiss")
        assert one(another, "SELECT rebuild_file()") == generation
        check(another, queries.files[0], engine="faiss")
    pair.catch_up()
    assert pair.db.execute("SELECT * FROM siamese.generations").fetchall() == before


def test_rebuild_file_on_the_command_line(pair: Pair, fresh: Connection, queries: Pictures) -> None:
    generation = pair.build()
    remove_files(pair.standby)
    result = CliRunner().invoke(app, ["rebuild-file", "--dsn", pair.standby.dsn()])
    assert result.exit_code == 0, result.output
    assert f"images: generation {generation} is present" in result.stdout
    check(fresh, queries.files[0], engine="faiss")


def test_progress_on_a_standby(pair: Pair, fresh: Connection) -> None:
    """Other sessions of the standby see a rebuild, and those of the primary don't."""
    generation = pair.build()
    query = "SELECT collection, kind, phase FROM progress"
    lock = "SELECT {}(hashtext('pg_siamese build'), 1)"
    with connect(pair.standby) as holder:
        holder.execute(lock.format("pg_advisory_lock"))
        running = Running(partial(connect, pair.standby), "SELECT rebuild_file()")
        assert running.start().waits()
        line = ("images", "rebuild_file", "waiting for another build")
        assert fresh.execute(query).fetchall() == [line]
        assert pair.db.execute(query).fetchall() == []
        holder.execute(lock.format("pg_advisory_unlock"))
    assert running.result() == [(generation,)]
    running.session.close()
    assert fresh.execute(query).fetchall() == []


def test_a_graph_is_made_again(pair: Pair, fresh: Connection) -> None:
    """Of 12,000 vectors, of which every seventh is not in it any more, and some come twice."""
    pair.db.execute("CREATE TABLE public.many (id integer PRIMARY KEY, image bytea)")
    pair.db.execute("SELECT create_collection('many', 'public.many', backfill => false)")
    number = one(pair.db, "SELECT collection_id FROM siamese.collections WHERE name = 'many'")
    values = filled_up(np.random.default_rng(0).normal(size=(12_000, 64))).astype(np.float32)
    values[11_000:] = values[:1000]
    with pair.db.transaction(), pair.db.cursor() as cursor:
        cursor.execute("SET LOCAL session_replication_role = replica")
        cursor.execute("INSERT INTO many SELECT n, '' FROM generate_series(0, 11999) AS n")
        with cursor.copy(f"COPY siamese.embedding_{number} (key, embedding) FROM STDIN") as copy:
            for key, vector in enumerate(values.tolist()):
                copy.write_row((key, str(vector)))
    pair.db.execute("SELECT build_index('many', m => 16)")
    pair.db.execute("DELETE FROM many WHERE id % 7 = 3")
    pair.catch_up()
    assert one(fresh, "SELECT rebuild_file('many')") is not None

    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    alive = np.flatnonzero(np.arange(12_000) % 7 != 3)
    hits = 0
    for key in range(0, 11_900, 119):
        rows = fresh.execute(
            "SELECT image_id FROM similar_images(image_id => %s, collection => 'many',"
            " engine => 'faiss')",
            (key,),
        ).fetchall()
        near = alive[np.argsort(-(unit[alive] @ unit[key]), kind="stable")]
        truth = near[near != key][:K]
        hits += len(np.intersect1d([row[0] for row in rows], truth))
        assert len(rows) == K
    assert hits > 0.95 * 100 * K
    pair.db.execute("SELECT drop_collection('many')")


def test_only_standbys_rebuild_files_and_only_primaries_build(
    pair: Pair, fresh: Connection
) -> None:
    with sql_error("55000", "not a standby", "build_index"):
        pair.db.execute("SELECT rebuild_file()")
    with sql_error("25006", "standby cannot build", "rebuild_file"):
        fresh.execute("SELECT build_index()")
    with sql_error("42704", 'collection "nothing" does not exist'):
        fresh.execute("SELECT rebuild_file('nothing')")


def test_a_file_made_amid_changes(
    pair: Pair, fresh: Connection, pictures: Pictures, queries: Pictures
) -> None:
    """Pending vectors stay out of it, deleted ones are not in the tables any more."""
    pair.build()
    added = insert_images(pair.db, pictures.files[300:340])
    pair.db.execute("DELETE FROM images WHERE image_id % 11 = 0")
    pair.db.execute("UPDATE images SET image = %s WHERE image_id = 5", (pictures.files[341],))
    pair.catch_up()
    if index_files(pair.standby).exists():
        remove_files(pair.standby)
    fresh.execute("SELECT rebuild_file()")
    images = [*queries.files[:10], *pictures.files[300:303], pictures.files[341]]
    check(fresh, *images, engine="faiss")
    # And changes after it, of rows of all kinds.
    pair.db.execute("DELETE FROM images WHERE image_id = ANY(%s)", (added[:10],))
    pair.db.execute("DELETE FROM images WHERE image_id % 13 = 0")
    pair.db.execute("UPDATE images SET image = %s WHERE image_id = 5", (pictures.files[5],))
    insert_images(pair.db, pictures.files[350:360])
    pair.catch_up()
    with connect(pair.standby) as another:
        for db in (fresh, another):
            check(db, *images, engine="faiss")
            for key in one(db, "SELECT array_agg(image_id) FROM images WHERE image_id < 20"):
                found = db.execute(
                    "SELECT * FROM similar_images(image_id => %s, engine => 'faiss')", (key,)
                ).fetchall()
                image = one(db, "SELECT image FROM images WHERE image_id = %s", key)
                truth = exact_distances(db, image)
                truth.pop(key)
                assert_exact(found, truth, K)


def test_a_snapshot_older_than_the_file(
    pair: Pair, fresh: Connection, pictures: Pictures, queries: Pictures
) -> None:
    """What it sees, and the file no longer holds, is not missed."""
    pair.build()
    remove_files(pair.standby)
    image = queries.files[0]
    with fresh.transaction():
        fresh.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        nearest = [row[1] for row in search(fresh, image, "pgvector", 20)]
        pair.db.execute("DELETE FROM images WHERE image_id = ANY(%s)", (nearest[:5],))
        pair.catch_up()
        with connect(pair.standby) as another:
            another.execute("SELECT rebuild_file()")
            check(another, image, engine="faiss")
            assert not set(nearest[:5]) & {row[1] for row in search(another, image)}
        said = notices_of(fresh)
        check(fresh, image)
        assert [row[1] for row in search(fresh, image)] == nearest[:K]
        assert len(said) == 1
        assert "after this transaction began" in said[0]
    check(fresh, image, engine="faiss")


def test_a_new_generation_does_not_use_the_file_of_the_old_one(
    pair: Pair, fresh: Connection, pictures: Pictures, queries: Pictures
) -> None:
    old = pair.build()
    fresh.execute("SELECT rebuild_file()")
    image = queries.files[1]
    with connect(pair.standby) as earlier, earlier.transaction():
        earlier.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        check(earlier, image, engine="faiss")
        insert_images(pair.db, pictures.files[360:380])
        new = pair.build()
        said = notices_of(fresh)
        check(fresh, image)
        assert f"{new}.meta" in said[0]
        with sql_error("55000", "is missing"):
            search(fresh, image, "faiss")
        assert one(fresh, "SELECT rebuild_file()") == new
        check(fresh, image, engine="faiss")
        # The snapshot before still has its own generation, also in the file.
        check(earlier, image, engine="faiss")
    folder = next(index_files(pair.standby).glob("*/1"))
    assert {path.stem for path in folder.iterdir()} == {str(old), str(new)}
    newer = pair.build()
    fresh.execute("SELECT rebuild_file()")
    assert {path.stem for path in folder.iterdir()} == {str(new), str(newer)}


def test_every_function_that_reads(pair: Pair, pictures: Pictures, queries: Pictures) -> None:
    pair.db.execute(
        "CREATE TABLE public.late (id uuid DEFAULT gen_random_uuid() PRIMARY KEY,"
        " label text, image bytea)"
    )
    pair.db.execute("SELECT create_collection('late', 'public.late', embed => 'deferred')")
    for file, label in zip(pictures.files[:20], pictures.labels[:20], strict=True):
        pair.db.execute("INSERT INTO public.late (image, label) VALUES (%s, %s)", (file, label))
    pair.db.execute("SELECT embed_pending('late', 15)")
    pair.db.execute("SELECT build_index('late')")
    pair.db.execute("CREATE ROLE analyst LOGIN; CREATE ROLE curator LOGIN")
    pair.db.execute("SELECT grant_usage('analyst'), grant_admin('curator')")
    pair.db.execute("GRANT SELECT ON public.late TO analyst, curator")
    pair.build()
    a, b = queries.files[:2]
    with connect(pair.standby, user="curator") as curator:
        curator.execute("SELECT rebuild_file('images'), rebuild_file('late')")
        assert one(curator, "SELECT bool_and(ok) FROM self_check()")
        for view in ("collection_status", "index_generations", "embedding_queue_status"):
            assert one(curator, f"SELECT count(*) FROM {view}") > 0
        assert one(curator, "SELECT count(*) FROM embedding_failures") == 0
        for statement in ("SELECT embed_pending('late')", "SELECT backfill()"):
            with sql_error("25006"):
                curator.execute(statement)
        with sql_error("25006"):
            curator.execute("INSERT INTO images (image) VALUES (%s)", (a,))
    with connect(pair.standby, user="analyst") as analyst:
        said = notices_of(analyst)
        engines = analyst.execute(
            "SELECT engine FROM warm_up() UNION ALL SELECT engine FROM warm_up('late')"
        ).fetchall()
        assert [row[0] for row in engines] == ["onnxruntime", "faiss"] * 2
        for _ in range(3):  # also the quick way of a session that knows the collection
            for engine in ("auto", "faiss", "pgvector"):
                assert len(search(analyst, a, engine)) == K
        assert len(analyst.execute("SELECT * FROM similar_images(image_id => 1)").fetchall()) == K
        row = "SELECT * FROM similar_rows(NULL::public.late, image => %s, engine => %s)"
        assert len(analyst.execute(row, (a, "faiss")).fetchall()) == K
        assert one(analyst, "SELECT sum(votes) FROM classify_image(%s, 5)", a) == 5
        assert one(analyst, "SELECT embed_image(%s)::text", a) == one(
            pair.db, "SELECT embed_image(%s)::text", a
        )
        for function in ("image_distance", "same_class", "any_two_match"):
            query = f"SELECT {function}(%s, %s)"
            assert one(analyst, query, a, b) == one(pair.db, query, a, b)
        assert [text for text in said if "has queued rows" not in text] == []
        assert len(said) == 1
        with sql_error("42501"):
            analyst.execute("SELECT rebuild_file()")


@pytest.mark.law(2)
def test_searches_while_it_replays(
    pair: Pair, fresh: Connection, pictures: Pictures, queries: Pictures
) -> None:
    """Each answer is that of its own snapshot, whatever file is there."""
    done = threading.Event()

    def look(number: int) -> None:
        with connect(pair.standby) as db:
            seen = 0
            while not done.is_set() or seen < 20:
                with db.transaction():
                    db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
                    check(db, queries.files[(seen + 7 * number) % 40])
                seen += 1

    def rebuild() -> None:
        with connect(pair.standby) as db:
            while not done.is_set():
                db.execute("SELECT rebuild_file()")
                done.wait(0.05)

    def change() -> None:
        try:
            for step in range(12):
                keys = insert_images(pair.db, pictures.files[400 + 10 * step : 410 + 10 * step])
                pair.db.execute("DELETE FROM images WHERE image_id = ANY(%s)", (keys[:4],))
                pair.db.execute(
                    "UPDATE images SET image = %s WHERE image_id = %s",
                    (pictures.files[700 + step], keys[5]),
                )
                pair.db.execute("DELETE FROM images WHERE image_id %% 17 = %s", (step,))
                if step % 3 == 2:
                    pair.build()
        finally:
            done.set()

    assert in_threads(partial(look, 0), partial(look, 1), rebuild, change) == []
    pair.catch_up()
    fresh.execute("SELECT rebuild_file()")
    check(fresh, *queries.files[:10], engine="faiss")
    keys = one(fresh, "SELECT array_agg(image_id ORDER BY image_id) FROM images")
    assert keys == one(pair.db, "SELECT array_agg(image_id ORDER BY image_id) FROM images")


def check_with_retries(db: Connection, image: bytes) -> None:
    """Try again after a conflict, as clients do: autovacuum's work is replayed any time."""
    for _ in range(20):
        try:
            return check(db, image)
        except psycopg.errors.SerializationFailure:
            if db.closed:
                return None
    raise AssertionError("no search came through")


@pytest.mark.law(5)
def test_a_conflict_with_recovery_ends_the_search_cleanly(pair: Pair, queries: Pictures) -> None:
    """It does not hang, is not taken for an answer, and strikes nothing later."""
    with server({"max_standby_streaming_delay": "0"}) as other:
        other.copy(pair.primary, "-R", "--no-sync")
        other.start()
        with connect(other) as observer, connect(other) as db:
            backend = db.info.backend_pid
            caught: list[psycopg.Error] = []

            def search_on() -> None:
                try:
                    db.execute(
                        "SELECT count(*) FROM generate_series(1, 1000000) AS n"
                        " CROSS JOIN LATERAL similar_images(image => %s, k => 1 + n %% 7)",
                        (queries.files[0],),
                    )
                except psycopg.Error as error:
                    caught.append(error)

            thread = threading.Thread(target=search_on)
            thread.start()
            active = "SELECT state = 'active' FROM pg_stat_activity WHERE pid = %s"
            while not one(observer, active, backend):
                pass
            pair.db.execute("DELETE FROM images WHERE image_id % 19 = 0")
            pair.db.execute("VACUUM (FREEZE) images")
            catch_up(pair.db, observer)
            thread.join()
            assert [error.sqlstate for error in caught] == ["40001"]
            assert "conflict with recovery" in str(caught[0])
            for session in (observer, db):
                if not session.closed:
                    check_with_retries(session, queries.files[0])


def test_promotion(pair: Pair, pictures: Pictures, queries: Pictures) -> None:
    """The file comes with the copy; a standby goes on as a primary, and its sessions with it."""
    pair.build()
    with server() as other:
        other.copy(pair.primary, "-R", "--no-sync")
        other.start()
        with connect(other) as db:
            said = notices_of(db)
            catch_up(pair.db, db)
            assert one(db, "SELECT pg_is_in_recovery()")
            check(db, *queries.files[:5], engine="faiss")
            assert said == []
            remove_files(other)
            insert_images(pair.db, pictures.files[900:910])
            catch_up(pair.db, db)
            generation = one(db, "SELECT rebuild_file()")
            check(db, queries.files[0], engine="faiss")
            other.promote()
            assert not one(db, "SELECT pg_is_in_recovery()")
            with connect(other) as another:
                for session in (db, another):
                    check(session, *queries.files[:3], pictures.files[905], engine="faiss")
            known = embedding_ids(db)
            keys = insert_images(db, pictures.files[910:940])
            db.execute("DELETE FROM images WHERE image_id = %s", (keys[0],))
            assert not known & embedding_ids(db, "key = ANY(%s)", keys)
            images = (*queries.files[:3], *pictures.files[910:912])
            check(db, *images, engine="faiss")
            assert one(db, "SELECT build_index()") > generation
            changes = "SELECT pending + dead FROM collection_status WHERE collection = 'images'"
            assert one(db, changes) == 0
            check(db, *images, engine="faiss")
            sound = "SELECT bool_and(ok) FROM self_check() WHERE subject LIKE '%\"images\"%'"
            assert one(db, sound)
