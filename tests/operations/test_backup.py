"""Dumps, base backups and point-in-time recovery: what comes back is right, at once and later."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.catalog import describe
from tests.conftest import Connection, Pictures, insert_images
from tests.database.test_upgrade import RELEASED, Databases
from tests.database.test_upgrade import fill as fill_upgraded
from tests.operations.servers import (
    K,
    check,
    connect,
    embedding_ids,
    fill,
    index_files,
    remove_files,
    server,
    wait_for,
)
from tests.support import grid_encoder, notices_of, one, sql_error
from tools.cluster import DATABASE, Cluster
from tools.project import version

ON_PATH = "-c search_path=public,siamese"
ROLES = "CREATE ROLE analyst LOGIN; CREATE ROLE owner LOGIN"
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def origin(onnx: bytes, pictures: Pictures) -> Iterator[Cluster]:
    """A cluster that archives its WAL, with collections of all kinds, in all states."""
    with server() as cluster:
        archive = cluster.folder / "archive"
        cluster.settings |= {
            "archive_mode": "on",
            "archive_command": f"test -d {archive} || mkdir {archive}; cp %p {archive}/%f",
        }
        cluster.start()
        fill(cluster, onnx, pictures.files[:200], pictures.labels[:200])
        with connect(cluster) as db:
            populate(db, pictures)
        yield cluster


def populate(db: Connection, pictures: Pictures) -> None:
    """Add what a database gathers in its life; some of it is there to be lost by a restore."""
    files = pictures.files
    db.execute(ROLES)
    # Numbers that are not those of the rows: what is dropped leaves gaps.
    db.execute("SELECT register_model('lost', %s)", (small_encoder(0.5),))
    db.execute("SELECT register_model('small', %s)", (small_encoder(0.0),))
    db.execute("SELECT drop_model('lost')")
    db.execute("CREATE TABLE public.lost (id integer PRIMARY KEY, image bytea)")
    db.execute("SELECT create_collection('lost', 'public.lost', model => 'small')")
    db.execute("SELECT drop_collection('lost'); DROP TABLE public.lost")
    db.execute("SELECT build_index(); SELECT build_index()")

    # Of another owner, with row-level security, in a schema whose name must be quoted.
    db.execute(
        'CREATE SCHEMA "Röntgen" AUTHORIZATION owner; GRANT USAGE ON SCHEMA "Röntgen" TO public'
    )
    db.execute(
        'CREATE TABLE "Röntgen"."Bilder" ("der Schlüssel" text PRIMARY KEY, seen boolean,'
        ' "das Bild" bytea)'
    )
    db.execute('ALTER TABLE "Röntgen"."Bilder" OWNER TO owner')
    db.execute('ALTER TABLE "Röntgen"."Bilder" ENABLE ROW LEVEL SECURITY')
    db.execute('CREATE POLICY seen ON "Röntgen"."Bilder" FOR SELECT USING (seen)')
    db.execute('GRANT SELECT ON "Röntgen"."Bilder" TO analyst')
    db.execute(
        "SELECT create_collection('bilder', '\"Röntgen\".\"Bilder\"', image_column => 'das Bild',"
        " model => 'small', on_error => 'quarantine')"
    )
    db.execute("SELECT grant_usage('analyst')")
    db.execute(
        'INSERT INTO "Röntgen"."Bilder" SELECT format(\'Nr. %%s\', n), n %% 2 = 0, f'
        " FROM unnest(%s::bytea[]) WITH ORDINALITY AS u (f, n)",
        (files[:40],),
    )
    db.execute("INSERT INTO \"Röntgen\".\"Bilder\" VALUES ('bad', true, 'no image')")
    db.execute("SELECT build_index('bilder')")

    db.execute(
        "CREATE TABLE public.late (id uuid DEFAULT gen_random_uuid() PRIMARY KEY, image bytea)"
    )
    db.execute(
        "SELECT create_collection('late', 'public.late', model => 'medical', embed => 'deferred')"
    )
    db.execute("INSERT INTO late (image) SELECT unnest(%s::bytea[])", (files[:30],))
    db.execute("SELECT embed_pending('late')")
    db.execute("INSERT INTO late (image) SELECT unnest(%s::bytea[])", (files[30:40],))

    # What no generation holds, and what is dead in it; transactions ran in between.
    insert_images(db, files[200:220], pictures.labels[200:220])
    db.execute("DELETE FROM images WHERE image_id % 10 = 3")
    db.execute("UPDATE images SET image = %s WHERE image_id = 8", (files[230],))


def small_encoder(offset: float) -> bytes:
    """An encoder of 16 numbers."""
    return grid_encoder((1, 28, 28, 1), pool=7, offset=offset, dtype=2)


def contents(db: Connection) -> dict[str, Any]:
    """All rows of the schema siamese, whatever number relations have here."""
    names = db.execute(
        "SELECT c.relname FROM pg_class AS c WHERE c.relnamespace = 'siamese'::regnamespace"
        " AND c.relkind = 'r' AND c.relname <> 'embedding_batches' ORDER BY 1"
    ).fetchall()
    # Numbers of transactions are drawn anew, and meant to be.
    query = sql.SQL("SELECT (to_jsonb(t) - 'xact_id')::text FROM {} AS t ORDER BY 1")
    return {
        name: db.execute(query.format(sql.Identifier("siamese", name))).fetchall()
        for (name,) in names
    }


def run(cluster: Cluster, name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of PostgreSQL's client programs."""
    command = [cluster.installation.bin / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def program(cluster: Cluster, name: str, *arguments: str | Path) -> None:
    """Run one that must succeed, and have nothing to say."""
    done = run(cluster, name, *arguments)
    assert (done.returncode, done.stderr) == (0, "")


# Options of pg_dump, and of pg_restore (or psql). What is dumped in parallel is not restored so:
# pg_restore -j loads an extension's tables in any order, foreign keys or not.
CUSTOM = ("-Fc", "--exit-on-error")
AT_ONCE = ("-Fc", "-1")
IN_PARALLEL = ("-Fd -j2", "--exit-on-error")
PLAIN = ("-Fp", "-Xqo /dev/null -v ON_ERROR_STOP=1 -f")


def restored(origin: Cluster, target: Cluster, way: tuple[str, str], folder: Path) -> str:
    """Dump a database to ``dump`` in a folder, restore it into a new one, and return its name."""
    database = f"restored_{next(_numbers)}"
    with connect(target, "postgres") as admin:
        admin.execute(f"CREATE DATABASE {database} TEMPLATE template0")
    dump, restore = (options.split() for options in way)
    program(origin, "pg_dump", *dump, "-f", folder / "dump", "-d", origin.dsn())
    name = "psql" if way is PLAIN else "pg_restore"
    program(origin, name, "-d", target.dsn(database), *restore, folder / "dump")
    return database


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Cluster]:
    """Another cluster, which has seen far fewer transactions, with the same roles."""
    with server() as cluster:
        cluster.start()
        cluster.sql(ROLES, "postgres")
        yield cluster


@pytest.mark.parametrize(
    ("way", "is_elsewhere"),
    [
        (CUSTOM, False),
        (CUSTOM, True),
        (AT_ONCE, False),
        (IN_PARALLEL, False),
        (PLAIN, True),
    ],
)
def test_dump_and_restore(
    origin: Cluster,
    elsewhere: Cluster,
    way: tuple[str, str],
    is_elsewhere: bool,
    pictures: Pictures,
    queries: Pictures,
    tmp_path: Path,
) -> None:
    target = elsewhere if is_elsewhere else origin
    database = restored(origin, target, way, tmp_path)
    with (
        connect(origin, options=ON_PATH) as before,
        connect(target, database, options=ON_PATH) as after,
    ):
        assert contents(after) == contents(before)
        assert differences(describe(before), describe(after)) == []
        check_restored(target, database, before, after, pictures, queries)
        # The database that was dumped goes on as it was, with its own file.
        check(before, queries.files[0], engine="faiss")


def differences(one: dict[str, str], other: dict[str, str]) -> list[tuple[str, str, str]]:
    return [
        (name, one.get(name, "none"), other.get(name, "none"))
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]


def seen(cluster: Cluster, database: str, image: bytes) -> list[str]:
    """What a reader under row-level security finds, from the nearest on."""
    with connect(cluster, database, user="analyst", options=ON_PATH) as db:
        rows = db.execute(
            'SELECT (item)."der Schlüssel" FROM similar_rows('
            'NULL::"Röntgen"."Bilder", image => %s, k => 100)',
            (image,),
        )
        return [row[0] for row in rows]


def check_restored(
    target: Cluster,
    database: str,
    before: Connection,
    after: Connection,
    pictures: Pictures,
    queries: Pictures,
) -> None:
    """Answers at once, writes that conflict with nothing, a rebuild, and answers again."""
    # No number is from the other cluster's future, where it would never be settled.
    assert one(
        after,
        "SELECT bool_and(xact_id < pg_snapshot_xmax(pg_current_snapshot())) FROM siamese.pending_1",
    )
    said = notices_of(after)
    images = [*queries.files[:4], pictures.files[3], pictures.files[210], pictures.files[230]]
    check(after, *images)
    assert len(said) == 1
    assert "is missing" in said[0]
    assert not (index_files(target) / str(oid(after))).exists()
    assert seen(target, database, images[0]) == seen(target_of(before), DATABASE, images[0])
    failing = after.execute("SELECT subject, detail FROM self_check() WHERE NOT ok").fetchall()
    assert {row[0].split(": ")[1] for row in failing} == {"index"}

    # New numbers everywhere, and new vectors for new images only.
    known = contents(after)
    vectors = embedding_ids(after)
    keys = insert_images(after, pictures.files[300:320])
    assert not vectors & embedding_ids(after, "key = ANY(%s)", keys)
    assert contents(after)["embedding_1"][0] in known["embedding_1"]
    assert one(after, "SELECT count(*) FROM siamese.embedding_1") == len(vectors) + 20
    after.execute("DELETE FROM images WHERE image_id = %s", (keys[0],))
    after.execute("UPDATE images SET image = %s WHERE image_id = 5", (pictures.files[331],))
    images += [pictures.files[300], pictures.files[301], pictures.files[331]]
    check(after, *images)
    assert one(after, "SELECT embed_pending('late')") == 10
    assert one(after, "SELECT waiting FROM embedding_queue_status") == 0
    after.execute("INSERT INTO late (image) VALUES (%s)", (pictures.files[50],))
    assert one(after, "SELECT embed_pending('late')") == 1
    after.execute("CREATE TABLE public.more (id integer PRIMARY KEY, image bytea)")
    after.execute("SELECT register_model('another', %s)", (small_encoder(1.0),))
    after.execute("SELECT create_collection('more', 'public.more', model => 'another')")

    generations = set(one(after, "SELECT array_agg(generation) FROM siamese.generations"))
    for name in ("images", "bilder", "late", "more"):
        assert one(after, "SELECT build_index(%s)", name) not in generations
    check(after, *images, engine="faiss")
    assert seen(target, database, images[0]) == seen(target_of(before), DATABASE, images[0])
    assert one(after, "SELECT bool_and(ok) FROM self_check()")


def oid(db: Connection) -> int:
    return int(one(db, "SELECT oid::int8 FROM pg_database WHERE datname = current_database()"))


def target_of(db: Connection) -> Cluster:
    return Cluster(Path(one(db, "SHOW data_directory")).parent)


def test_data_of_a_table_are_restored_with_its_triggers_off(
    origin: Cluster, pictures: Pictures, queries: Pictures, tmp_path: Path
) -> None:
    """As after a TRUNCATE by mistake: images come from the dump, and backfill embeds them."""
    database = restored(origin, origin, CUSTOM, tmp_path)
    with connect(origin, database, options=ON_PATH) as db:
        count = one(db, "SELECT count(*) FROM images")
        db.execute("TRUNCATE images")
        options = ["--exit-on-error", "--data-only", "--disable-triggers", "-nsiamese", "-timages"]
        program(origin, "pg_restore", *options, "-d", origin.dsn(database), tmp_path / "dump")
        assert one(db, "SELECT count(*) FROM images") == count
        assert one(db, "SELECT backfill()") == count
        check(db, queries.files[0])
        assert one(db, "SELECT build_index()")
        check(db, queries.files[0], engine="faiss")


@pytest.mark.parametrize("released", RELEASED)
def test_a_dump_of_an_earlier_version_is_restored_into_this_one(
    released: str, elsewhere: Cluster, onnx: bytes, pictures: Pictures, tmp_path: Path
) -> None:
    """CREATE EXTENSION in a dump names no version: it makes the current one.

    A privilege on a function that has other arguments now can't be given; renew_grants does so.
    """
    with ExitStack() as stack:
        databases = Databases(elsewhere, stack)
        old = databases.create(released)
        fill_upgraded(old, onnx, pictures)
        old.execute("SELECT grant_usage('analyst'), grant_admin('owner')")
        name = f"restored_{next(_numbers)}"
        databases.admin.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        stack.callback(databases.admin.execute, f"DROP DATABASE {name} WITH (FORCE)")
        file = tmp_path / "old"
        program(elsewhere, "pg_dump", "-Fc", "-f", file, "-d", databases.dsn(old))
        done = run(elsewhere, "pg_restore", "-d", elsewhere.dsn(name), file)
        errors = re.findall(r"error: could not execute query: (.*)", done.stderr)
        assert len(errors) == done.stderr.count("error: could not"), done.stderr
        # Of functions that have other arguments now, and nothing else.
        assert errors
        pattern = re.compile(r"function siamese\.(\w+)\(.*\) does not exist")
        missing = [pattern.search(error) for error in errors]
        assert all(missing), done.stderr
        changed = sorted({found[1] for found in missing if found})
        with connect(elsewhere, name, options=ON_PATH) as new:
            known = "bool_and(to_regproc('siamese.' || f) IS NOT NULL) FROM unnest(%s::text[]) AS f"
            assert one(new, f"SELECT {known}", changed), changed
            query = "SELECT extversion FROM pg_extension WHERE extname = 'pg_siamese'"
            assert one(new, query) == version()
            check(new, *pictures.files[40:44])
            for statement in ("DELETE FROM images", "SELECT backfill('t')"):
                with sql_error("55000", "of an earlier version", "renew_collections()"):
                    new.execute(statement)
            new.execute("SELECT renew_collections(); SELECT renew_collections()")
            insert_images(new, pictures.files[70:80])
            new.execute("INSERT INTO t VALUES ('c', %s)", (pictures.files[3],))
            new.execute("SELECT build_index(), build_index('t')")
            check(new, *pictures.files[40:44], engine="faiss")
            assert one(new, "SELECT bool_and(ok) FROM self_check()")
            new.execute("SELECT renew_grants()")
            new.execute("CREATE TABLE own (id integer PRIMARY KEY, image bytea)")
            new.execute("ALTER TABLE own OWNER TO owner")
        with connect(elsewhere, name, user="owner", options=ON_PATH) as owner:
            owner.execute("SELECT create_collection('own', 'own', model => 'medical')")
        with connect(elsewhere, name, user="analyst", options=ON_PATH) as analyst:
            found = analyst.execute("SELECT * FROM similar_images(%s)", (pictures.files[0],))
            assert len(found.fetchall()) == K


def test_a_role_that_dumps(origin: Cluster, tmp_path: Path) -> None:
    """Vectors are visible with their rows, so a dump needs more than SELECT."""
    with connect(origin) as db:
        db.execute("CREATE ROLE dumper LOGIN; GRANT pg_read_all_data TO dumper")
    source = make_conninfo(origin.dsn(DATABASE), user="dumper")
    dump = (origin, "pg_dump", "-Fc", "-f", tmp_path / "dump", "-d", source)
    done = run(*dump)
    assert done.returncode != 0 and "row-level security" in done.stderr, done.stderr
    with connect(origin) as db:
        db.execute("ALTER ROLE dumper BYPASSRLS")
    done = run(*dump)
    assert done.returncode == 0, done.stderr
    with connect(origin) as db:
        db.execute("DROP OWNED BY dumper; DROP ROLE dumper")


@pytest.mark.law(1)
@pytest.mark.parametrize("state", ["whole", "missing", "torn"])
def test_base_backup(origin: Cluster, state: str, pictures: Pictures, queries: Pictures) -> None:
    """The files come with it. They may be torn: a backup copies them while they are written."""
    with server() as cluster:
        cluster.copy(origin, "--no-sync")
        folder = index_files(cluster)
        files = sorted(folder.rglob("1/*.faiss"))
        assert files
        for path in files:
            if state == "torn":
                with path.open("r+b") as file:
                    file.truncate(path.stat().st_size // 2)
        if state == "missing":
            remove_files(cluster)
        cluster.start()
        with connect(cluster) as db, connect(origin) as before:
            assert contents(db) == contents(before)
            said = notices_of(db)
            images = [*queries.files[:4], pictures.files[210]]
            check(db, *images, engine="faiss" if state == "whole" else "auto")
            assert len(said) == (state != "whole")
            insert_images(db, pictures.files[300:310])
            images.append(pictures.files[305])
            check(db, *images)
            db.execute("SELECT build_index()")
            check(db, *images, engine="faiss")
            subject = 'collection "images": index'
            assert one(db, "SELECT ok FROM self_check() WHERE subject = %s", subject)


def restore_to(copy: Cluster, origin: Cluster, target: str, value: str) -> None:
    """Let a copy replay the archive up to a point, and go on from there."""
    copy.settings |= {
        "archive_mode": "off",
        "restore_command": f"cp {origin.folder}/archive/%f %p",
        target: value,
        "recovery_target_action": "promote",
    }
    signal = copy.data / "recovery.signal"
    signal.touch()
    shutil.chown(signal, copy.data.stat().st_uid, copy.data.stat().st_gid)
    copy.start()


def test_recovery_to_a_point_in_time(
    origin: Cluster, pictures: Pictures, queries: Pictures
) -> None:
    """One copy goes to a point by its name, one by its time."""
    with server() as early, server() as late, connect(origin) as db:
        for copy in (early, late):
            copy.copy(origin, "--no-sync")
        db.execute("CREATE TABLE dropped (id integer PRIMARY KEY, image bytea)")
        db.execute("SELECT create_collection('dropped', 'dropped', model => 'small')")
        db.execute("INSERT INTO dropped VALUES (1, %s)", (pictures.files[0],))
        insert_images(db, pictures.files[400:420])
        db.execute("DELETE FROM images WHERE image_id % 10 = 7")
        db.execute("SELECT pg_create_restore_point('first')")
        first = contents(db)
        old = one(db, "SELECT generation FROM siamese.collections WHERE name = 'images'")
        new = one(db, "SELECT build_index()")
        insert_images(db, pictures.files[420:430])
        moment = one(db, "SELECT clock_timestamp()::text")
        second = contents(db)
        # The mistake.
        db.execute("DELETE FROM images WHERE image_id > 100")
        db.execute("SELECT build_index()")
        db.execute("SELECT drop_collection('dropped')")
        segment = one(db, "SELECT pg_walfile_name(pg_switch_wal())")
        wait_for(db, f"SELECT last_archived_wal >= '{segment}' FROM pg_stat_archiver")

        images = [*queries.files[:4], pictures.files[405], pictures.files[425]]
        for copy, target, point, state, generation, has_file in (
            (early, "recovery_target_name", "first", first, old, True),
            (late, "recovery_target_time", moment, second, new, False),
        ):
            restore_to(copy, origin, target, point)
            with connect(copy) as restored:
                wait_for(restored, "SELECT NOT pg_is_in_recovery()")
                assert contents(restored) == state
                current = "SELECT generation FROM siamese.collections WHERE name = 'images'"
                assert one(restored, current) == generation
                said = notices_of(restored)
                check(restored, *images, engine="faiss" if has_file else "auto")
                # The copy has the file of the generation that was current when it was made.
                assert len(said) == (not has_file)
                insert_images(restored, pictures.files[500:510])
                assert one(restored, "SELECT build_index()") > generation
                check(restored, *images, pictures.files[505], engine="faiss")
                sound = "SELECT bool_and(ok) FROM self_check() WHERE subject LIKE '%\"images\"%'"
                assert one(restored, sound)
