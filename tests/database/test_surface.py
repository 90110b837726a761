"""What analysts meet: arguments that are NULL, names of columns, moved schemas, messages."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from tests.conftest import Connection, Pictures, insert_images
from tests.support import notices_of, sql_error
from tools.project import ROOT


@pytest.fixture
def ids(db: Connection, pictures: Pictures) -> list[int]:
    """Thirty images in the index, ten more pending."""
    first = insert_images(db, pictures.files[:30], pictures.labels[:30])
    db.execute("SELECT build_index()")
    return first + insert_images(db, pictures.files[30:40], pictures.labels[30:40])


# An argument that is NULL never widens an answer.


@pytest.mark.law(14)
@pytest.mark.parametrize(
    "search",
    [
        "similar_images(image => {image}, candidates => {none})",
        "similar_images(image_id => 1, candidates => {none})",
        "similar_rows(NULL::images, {image}, candidates => {none})",
        "similar_rows(NULL::images, key => 1, candidates => {none})",
    ],
)
@pytest.mark.parametrize(
    "none",
    [
        "NULL",
        "NULL::bigint[]",
        "(SELECT array_agg(image_id) FROM images WHERE label = 'mine')",
        "ARRAY(SELECT image_id FROM images WHERE label = 'mine')",
        "ARRAY[NULL]::bigint[]",
        "'{{NULL}}'",
    ],
)
def test_no_candidates_are_no_rows(
    db: Connection, ids: list[int], pictures: Pictures, search: str, none: str
) -> None:
    call = search.format(image="%s::bytea", none=none)
    values = (pictures.files[0],) * call.count("%s")
    assert db.execute(f"SELECT count(*) FROM {call}", values).fetchone() == (0,)


@pytest.mark.law(14)
@pytest.mark.parametrize(
    "call",
    [
        "similar_images(image_id => 1, {})",
        "similar_rows(NULL::images, key => 1, {})",
        "classify_image(image_id => 1, {})",
        "build_index({})",
        "backfill({})",
        "embed_pending({})",
        "embed_image('', {})",
        "image_distance('', '', {})",
        "same_class('', '', {})",
        "warm_up({})",
        "rebuild_file({})",
    ],
)
def test_arguments_that_are_null(db: Connection, ids: list[int], call: str) -> None:
    """Each argument that has a default, which NULL is not: it is refused by its name."""
    name = call.partition("(")[0]
    row = db.execute(
        "SELECT proargnames, pronargs, pronargdefaults FROM pg_proc"
        " WHERE pronamespace = 'siamese'::regnamespace AND proname = %s",
        (name,),
    ).fetchone()
    assert row is not None
    names = set(row[0][row[1] - row[2] : row[1]]) - {"image", "image_id", "key", "candidates"}
    assert names
    for argument in names:
        with sql_error("22004", f"{argument} is null"):
            db.execute(f"SELECT siamese.{call.format(f'{argument} => NULL')}")


def test_neither_or_both_of_image_and_key(
    db: Connection, ids: list[int], pictures: Pictures
) -> None:
    for call in ("similar_images()", "similar_rows(NULL::images)", "classify_image()"):
        with sql_error("22004", "image is null", "key of a stored one"):
            db.execute(f"SELECT {call}")
    for call in (
        "similar_images(image_id => 1, image => %s)",
        "similar_rows(NULL::images, %s, key => 1)",
        "classify_image(%s, image_id => 1)",
    ):
        with sql_error("22023", "an image and the key of a stored one are given"):
            db.execute(f"SELECT {call}", (pictures.files[0],))


def test_candidates_of_two_dimensions(db: Connection, ids: list[int], pictures: Pictures) -> None:
    """As array_agg makes them of arrays."""
    rows = db.execute(
        "SELECT image_id FROM similar_images(%s, candidates => '{{1,2},{3,NULL}}')",
        (pictures.files[0],),
    ).fetchall()
    assert {row[0] for row in rows} == {1, 2, 3}


# Searches by a stored key, of every type.


@pytest.mark.parametrize(
    ("type_name", "keys"),
    [
        ("integer", ["1", "2", "3"]),
        ("bigint", ["1", "9007199254740993", "3"]),
        ("uuid", [f"00000000-0000-0000-0000-00000000000{n}" for n in "abc"]),
        ("text", ["a", 'it\'s "b" \\ {c}, NULL', "NULL"]),
    ],
)
def test_rows_by_a_stored_key(
    db: Connection, pictures: Pictures, type_name: str, keys: list[str]
) -> None:
    db.execute(f"CREATE TABLE t (id {type_name} PRIMARY KEY, image bytea, label text)")
    db.execute("SELECT create_collection('t', 't')")
    for place, key in enumerate(keys):
        db.execute(
            f"INSERT INTO t VALUES (%s::text::{type_name}, %s, %s)",
            (key, pictures.files[place], "ab"[place % 2]),
        )
    for index in (False, True):
        if index:
            db.execute("SELECT build_index('t')")
        for engine in ("auto", "pgvector"):
            for key in keys:
                rows = db.execute(
                    "SELECT (item).id::text, distance FROM similar_rows(NULL::t,"
                    f" key => %s::text::{type_name}, engine => %s)",
                    (key, engine),
                ).fetchall()
                assert {row[0] for row in rows} == set(keys) - {key}
                by_image = db.execute(
                    "SELECT (item).id::text, distance FROM similar_rows(NULL::t,"
                    f" (SELECT image FROM t WHERE id = %s::text::{type_name}), engine => %s)"
                    f" WHERE (item).id <> %s::text::{type_name}",
                    (key, engine, key),
                ).fetchall()
                assert [row[0] for row in rows] == [row[0] for row in by_image]
                chosen = db.execute(
                    "SELECT (item).id::text FROM similar_rows(NULL::t,"
                    f" key => %s::text::{type_name}, candidates => %s::text[]::{type_name}[])",
                    (key, keys[:2]),
                ).fetchall()
                assert {row[0] for row in chosen} == set(keys[:2]) - {key}
    rows = db.execute(
        f"SELECT label, votes FROM classify_image(image_id => %s::text::{type_name},"
        " collection => 't')",
        (keys[0],),
    ).fetchall()
    assert sorted(rows) == [("a", 1), ("b", 1)]
    lateral = (
        "SELECT q.id::text, (n.item).id::text FROM t AS q"
        " CROSS JOIN LATERAL similar_rows(NULL::t, key => q.id, k => 1) AS n"
    )
    assert {row[0] for row in db.execute(lateral)} == set(keys)


def test_a_key_of_the_wrong_type(db: Connection, ids: list[int]) -> None:
    with sql_error("22P02", 'invalid input syntax for type bigint: "abc"'):
        db.execute("SELECT similar_rows(NULL::images, key => 'abc')")
    with sql_error("P0002", 'image 99 is not in collection "images"'):
        db.execute("SELECT similar_rows(NULL::images, key => 99)")


# Rows without a vector.


@pytest.mark.parametrize("embed", ["sync", "deferred"])
def test_lateral_over_rows_without_a_vector(
    db: Connection, connect: Callable[..., Connection], pictures: Pictures, embed: str
) -> None:
    """A row that is quarantined or waits has no neighbours; one that isn't there is an error."""
    db.execute("CREATE TABLE t (id int PRIMARY KEY, image bytea)")
    db.execute(
        "SELECT create_collection('t', 't', on_error => 'quarantine', embed => %s)", (embed,)
    )
    db.execute(
        "INSERT INTO t SELECT * FROM unnest('{1,2,3}'::int[], %s::bytea[])",
        ([pictures.files[0], pictures.files[1], b"bad"],),
    )
    if embed == "deferred":
        db.execute("SELECT embed_pending()")
        db.execute("INSERT INTO t VALUES (4, %s)", (pictures.files[2],))
    session = connect()
    told = notices_of(session)
    for search in (
        "similar_images(image_id => t.id, k => 1, collection => 't')",
        "similar_rows(NULL::t, key => t.id, k => 1)",
    ):
        rows = session.execute(f"SELECT t.id FROM t CROSS JOIN LATERAL {search} ORDER BY 1")
        assert rows.fetchall() == [(1,), (2,)]
        rows = session.execute(f"SELECT t.id FROM t LEFT JOIN LATERAL {search} ON true ORDER BY 1")
        assert [row[0] for row in rows] == [1, 2, 3, *([4] if embed == "deferred" else [])]
    assert len([text for text in told if "has no vector" in text]) == 1
    with sql_error("P0002", 'image 9 is not in collection "t"'):
        session.execute("SELECT similar_images(image_id => 9, collection => 't')")


def test_rows_without_a_label_have_no_vote(
    db: Connection, ids: list[int], pictures: Pictures
) -> None:
    nearest = db.execute("SELECT image_id FROM similar_images(image_id => 1, k => 3)").fetchall()
    db.execute("UPDATE images SET label = 'x'")
    db.execute(
        "UPDATE images SET label = NULL WHERE image_id = ANY(%s)", ([r[0] for r in nearest],)
    )
    rows = db.execute("SELECT label, votes, share FROM classify_image(image_id => 1, k => 5)")
    assert rows.fetchall() == [("x", 5, 1.0)]
    db.execute("UPDATE images SET label = 'own' WHERE image_id = 1")
    rows = db.execute("SELECT label FROM classify_image(image_id => 1, k => 40)")
    assert rows.fetchall() == [("x",)]
    db.execute("UPDATE images SET label = NULL")
    assert db.execute("SELECT * FROM classify_image(image_id => 1)").fetchall() == []


# Names of columns.

# Every alias and variable of the SQL that the extension makes; the first ones are those that stand
# beside a user's columns.
ALIASES = [
    "b",
    "k",
    "e",
    "n",
    "o",
    "c",
    "g",
    "f",
    "u",
    "s",
    "r",
    "t",
    "v",
    "a",
    "q",
    "p",
    "x",
    "y",
    "i",
    "key",
    "image",
    "item",
    "distance",
    "rank",
    "keys",
    "embedding",
    "new_rows",
    "old_rows",
    "added",
    "gone",
]
NAMES = [
    "d",
    "l",
    "m",
    "w",
    "z",
    "embedding_id",
    "dead",
    "single",
    "failed",
    "again",
    "label",
    "votes",
    "share",
    "place",
    "wanted",
    "state",
    "changed",
    "there",
    "settled",
    "opened",
    "snapshot",
    "query_id",
    "generation",
    "deleted",
    "xact_id",
    "first",
    "number",
    "collection",
    "relation",
    "candidates",
    "filter",
    "engine",
    "max_distance",
    "found",
    "answer",
    "known",
    "of_table",
    "user",
    "order",
    "select",
    "table",
]


@pytest.mark.parametrize("embed", ["sync", "deferred"])
@pytest.mark.parametrize("role", ["key and image", "others"])
def test_names_of_columns(db: Connection, pictures: Pictures, embed: str, role: str) -> None:
    """A column may have any name, as a key, as an image, or beside them."""
    files = pictures.files
    pairs = list(zip(ALIASES, [*ALIASES[1:], ALIASES[0]], strict=True))
    if role == "others":
        pairs = [("the_key", "the_image")]
    for number, (key, image) in enumerate(pairs):
        others = [] if role != "others" else [*ALIASES, *NAMES]
        table = sql.Identifier(f"names_{number}")
        columns = [sql.SQL("{} int").format(sql.Identifier(name)) for name in others]
        db.execute(
            sql.SQL("CREATE TABLE public.{} ({})").format(
                table,
                sql.SQL(", ").join(
                    [
                        sql.SQL("{} int PRIMARY KEY").format(sql.Identifier(key)),
                        sql.SQL("{} bytea").format(sql.Identifier(image)),
                        *columns,
                    ]
                ),
            )
        )
        name = f"names_{number}"
        db.execute(
            "SELECT create_collection(%s, %s::regclass, image_column => %s, embed => %s,"
            " on_error => 'quarantine')",
            (name, f"public.{name}", image, embed),
        )
        insert = sql.SQL("INSERT INTO public.{} ({}, {}) VALUES (1, %s), (2, %s), (3, %s)").format(
            table, sql.Identifier(key), sql.Identifier(image)
        )
        db.execute(insert, files[:3])
        update = sql.SQL("UPDATE public.{} SET {} = %s WHERE {} = 2").format(
            table, sql.Identifier(image), sql.Identifier(key)
        )
        db.execute(update, (files[3],))
        delete = sql.SQL("DELETE FROM public.{} WHERE {} = 3").format(table, sql.Identifier(key))
        db.execute(delete)
        for other in others:
            db.execute(sql.SQL("UPDATE public.{} SET {} = 5").format(table, sql.Identifier(other)))
        if embed == "deferred":
            assert db.execute("SELECT embed_pending(%s)", (name,)).fetchone() == (2,)
        assert db.execute("SELECT backfill(%s)", (name,)).fetchone() == (0,)
        if number % 10 == 0:
            db.execute("SELECT build_index(%s)", (name,))
        rows = sql.SQL(
            "SELECT (n.item).{}, (n.item).{}, n.distance < 1e-5"
            " FROM similar_rows(NULL::public.{}, %s) AS n"
        ).format(sql.Identifier(key), sql.Identifier(image), table)
        found = db.execute(rows, (files[3],)).fetchall()
        assert [row[0] for row in found] == [2, 1] and found[0][1:] == (files[3], True)
        for column in [key, *others]:
            value = 2 if column == key else 5
            answers = db.execute(
                "SELECT image_id FROM similar_images(%s, collection => %s, filter => %s::jsonb)",
                (files[0], name, f'{{"{column}": {value}}}'),
            ).fetchall()
            assert (2,) in answers
            db.execute(
                "SELECT classify_image(image_id => 1, collection => %s, label_column => %s)",
                (name, column),
            )
        db.execute("SELECT drop_collection(%s)", (name,))


# Tables and pgvector under another name.


@pytest.mark.parametrize("indexed", [False, True])
def test_schemas_that_are_renamed_or_moved(
    db: Connection, connect: Callable[..., Connection], pictures: Pictures, indexed: bool
) -> None:
    """Sessions that have searched go on."""
    db.execute("CREATE SCHEMA app; CREATE TABLE app.t (id int PRIMARY KEY, image bytea)")
    db.execute("SELECT create_collection('t', 'app.t')")
    db.execute("INSERT INTO app.t SELECT * FROM unnest(%s::int[], %s::bytea[])", (
        list(range(5)), pictures.files[:5]))  # fmt: skip
    if indexed:
        db.execute("SELECT build_index('t')")
        db.execute("INSERT INTO app.t VALUES (5, %s)", (pictures.files[5],))
    session, image = connect(), pictures.files[0]

    def check() -> None:
        for engine in ("auto", "pgvector"):
            for by, value in (("image", image), ("image_id", 3)):
                for _ in range(2):
                    rows = session.execute(
                        f"SELECT image_id FROM siamese.similar_images({by} => %s,"
                        " collection => 't', engine => %s)",
                        (value, engine),
                    ).fetchall()
                    assert len(rows) == 5 + indexed - (by == "image_id")
        session.execute("SELECT siamese.embed_image(%s)", (image,))

    check()
    db.execute("ALTER SCHEMA app RENAME TO app2")
    check()
    db.execute("CREATE SCHEMA extensions; ALTER EXTENSION vector SET SCHEMA extensions")
    check()
    session.execute("INSERT INTO app2.t VALUES (99, %s)", (image,))
    session.execute("DELETE FROM app2.t WHERE id = 99")
    db.execute("ALTER TABLE app2.t SET SCHEMA public")
    check()
    db.execute("ALTER EXTENSION vector SET SCHEMA public")
    check()


# Reads in proportion to k.


def test_rows_read_only_what_they_return(db: Connection, pictures: Pictures) -> None:
    """Whatever the size of the table: counted in blocks of its TOAST table."""
    db.execute("CREATE TABLE t (id int PRIMARY KEY, image bytea, scan bytea)")
    db.execute("ALTER TABLE t ALTER scan SET STORAGE EXTERNAL")
    db.execute("SELECT create_collection('t', 't')")
    db.execute(
        "INSERT INTO t SELECT n, f.image, convert_to(repeat('x', 200000), 'UTF8')"
        " FROM unnest(%s::bytea[]) WITH ORDINALITY AS f (image, n)",
        (pictures.files[:200],),
    )
    db.execute("SELECT build_index('t')")
    reads = "SELECT toast_blks_read + toast_blks_hit FROM pg_statio_user_tables WHERE relname = 't'"

    def blocks(call: str) -> int:
        def count() -> int:
            db.execute("SELECT pg_stat_force_next_flush()")
            row = db.execute(reads).fetchone()
            assert row is not None
            return int(row[0])

        before = count()
        db.execute(f"SELECT (item).id FROM similar_rows(NULL::t, {call})", (pictures.files[0],))
        return count() - before

    blocks("%s, k => 1")
    one = 200_000 // 2000  # blocks of a row's scan, with some to spare for its index
    for k in (1, 5, 20):
        assert 0 < blocks(f"%s, k => {k}") < 2 * k * one
    db.execute("ANALYZE t")
    assert blocks("%s, k => 5") < 2 * 5 * one


# Messages.


def test_names_that_are_nearly_right(db: Connection, ids: list[int]) -> None:
    db.execute("CREATE TABLE public.scans (id int PRIMARY KEY, image bytea)")
    db.execute("SELECT create_collection('chest scans', 'public.scans')")
    for name, meant in (
        ("imagse", '"images"'),
        ("Images", '"images"'),
        ("siamese.images", '"images"'),
        ("scans", '"chest scans"'),
        ("public.scans", '"chest scans"'),
        ("chest_scans", '"chest scans"'),
    ):
        with sql_error(
            "42704", f'collection "{name}" does not exist', f"Perhaps you meant {meant}"
        ):
            db.execute("SELECT similar_images(image_id => 1, collection => %s)", (name,))
    with sql_error("42704", "siamese.collections lists them"):
        db.execute("SELECT similar_images(image_id => 1, collection => 'zzz')")


@pytest.mark.parametrize("function", ["drop_collection", "alter_collection", "backfill"])
def test_nearly_right_names_in_other_calls(shared: Connection, function: str) -> None:
    with sql_error("42704", 'collection "imagse" does not exist', 'Perhaps you meant "images"'):
        shared.execute(f"SELECT siamese.{function}('imagse')")
    with sql_error("42704", 'collection "zzz" does not exist', "siamese.collections lists them"):
        shared.execute(f"SELECT siamese.{function}('zzz')")


def test_permission_errors_are_plain(
    db: Connection, ids: list[int], connect: Callable[..., Connection], new_role: Callable[[], str]
) -> None:
    role = new_role()
    db.execute("SELECT grant_usage(%s)", (role,))
    db.execute(sql.SQL("REVOKE SELECT ON siamese.images FROM {}").format(sql.Identifier(role)))
    with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
        connect(user=role).execute("SELECT siamese.similar_images(image_id => 1)")
    assert caught.value.diag.message_primary == "permission denied for table images"


def test_dropping_a_collection_is_quiet(db: Connection, pictures: Pictures) -> None:
    told = notices_of(db)
    for number, embed in enumerate(("sync", "deferred")):
        name = f"t{number}"
        db.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, image bytea)")
        db.execute("SELECT create_collection(%s, %s::regclass, embed => %s)", (name, name, embed))
        db.execute("SELECT drop_collection(%s)", (name,))
    assert told == []


# Views.


def test_view_of_vectors(db: Connection, ids: list[int], pictures: Pictures) -> None:
    rows = db.execute(
        "SELECT key FROM siamese.vectors_images"
        " ORDER BY embedding <=> embed_image(%s), key LIMIT 5",
        (pictures.files[0],),
    ).fetchall()
    nearest = db.execute(
        "SELECT image_id FROM similar_images(%s, k => 5, engine => 'pgvector')",
        (pictures.files[0],),
    ).fetchall()
    assert rows == nearest
    # As after a dump of an earlier version.
    db.execute("DROP VIEW siamese.vectors_images; SELECT renew_grants()")
    assert db.execute("SELECT count(*) FROM siamese.vectors_images").fetchone() == (40,)
    db.execute("UPDATE siamese.collections SET name = 'renamed' WHERE name = 'images'")
    assert db.execute("SELECT count(*) FROM siamese.vectors_renamed").fetchone() == (40,)
    db.execute("SELECT drop_collection('renamed')")
    row = db.execute("SELECT count(*) FROM pg_class WHERE relname ~ '^vectors_'").fetchone()
    assert row == (0,)


def test_names_of_views_of_vectors(db: Connection, pictures: Pictures) -> None:
    """Collections may have longer names than views, and any characters in them."""
    long = 'ä"b. ' * 30
    for number, name in enumerate((long, long + "2", "x", "vectors_x")):
        db.execute(f"CREATE TABLE t{number} (id uuid PRIMARY KEY, image bytea)")
        db.execute("SELECT create_collection(%s, %s::regclass)", (name, f"t{number}"))
    views = db.execute(
        "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'v' AND relname ~ '^vectors_'"
    ).fetchall()
    assert len(views) == 5
    for (view,) in views:
        assert db.execute(f"SELECT count(*) FROM {view}").fetchone() == (0,)
    for name in (long, long + "2", "x", "vectors_x"):
        db.execute("SELECT drop_collection(%s)", (name,))


@pytest.mark.law(4)
def test_readers_see_vectors_and_state_of_what_they_may_read(
    db: Connection,
    ids: list[int],
    connect: Callable[..., Connection],
    new_role: Callable[[], str],
    pictures: Pictures,
) -> None:
    for name in ("secret", "open", "gone"):
        db.execute(f"CREATE TABLE public.{name} (id int PRIMARY KEY, image bytea)")
        db.execute("SELECT create_collection(%s, %s::regclass)", (name, name))
        db.execute(f"INSERT INTO public.{name} VALUES (1, %s), (2, %s)", pictures.files[:2])
    before, after = new_role(), new_role()
    db.execute("SELECT grant_usage(%s)", (before,))
    db.execute("CREATE TABLE public.later (id int PRIMARY KEY, image bytea)")
    db.execute("SELECT create_collection('later', 'later')")
    db.execute("SELECT grant_usage(%s)", (after,))
    for role in (before, after):
        reader = sql.Identifier(role)
        db.execute(sql.SQL("GRANT SELECT ON public.open, public.later TO {}").format(reader))
    db.execute("ALTER TABLE public.open ENABLE ROW LEVEL SECURITY")
    db.execute("CREATE POLICY one ON public.open USING (id = 1)")
    for role in (before, after):
        session = connect(user=role)
        rows = session.execute("SELECT collection, rows_embedded FROM siamese.collection_status")
        assert dict(rows.fetchall()) == {"images": 40, "open": 2, "later": 0}
        assert session.execute("SELECT key FROM siamese.vectors_open").fetchall() == [(1,)]
        assert session.execute("SELECT count(*) FROM siamese.vectors_later").fetchone() == (0,)
        with sql_error("42501", "permission denied"):
            session.execute("SELECT * FROM siamese.vectors_secret")
        for function in ("_collection_counts", "_queue_counts"):
            row = db.execute(
                "SELECT collection_id FROM siamese.collections WHERE name = 'secret'"
            ).fetchone()
            with sql_error("42501", "permission denied for table"):
                session.execute(f"SELECT siamese.{function}(%s)", row)
    admin = new_role()
    db.execute("SELECT grant_admin(%s)", (admin,))
    rows = connect(user=admin).execute("SELECT collection FROM siamese.collection_status")
    assert {row[0] for row in rows} == {"images", "secret", "open", "later", "gone"}
    for name in ("secret", "open", "later", "gone"):
        db.execute("SELECT drop_collection(%s)", (name,))


# JIT.


def test_nothing_pays_for_jit(db: Connection, ids: list[int], pictures: Pictures) -> None:
    """With the costs that PostgreSQL's JIT has by default, and with next to none."""
    views = db.execute(
        "SELECT oid::regclass::text FROM pg_class"
        " WHERE relkind = 'v' AND relnamespace = 'siamese'::regnamespace"
    ).fetchall()
    assert len(views) >= 5
    for (view,) in views:
        plan = db.execute(f"EXPLAIN SELECT * FROM {view}").fetchall()
        assert "JIT" not in str(plan), view
    db.execute("LOAD 'auto_explain'; SET auto_explain.log_min_duration = 0")
    db.execute("SET auto_explain.log_nested_statements = on; SET auto_explain.log_level = notice")
    db.execute("SET jit = on; SET jit_above_cost = 2; SET jit_inline_above_cost = 2")
    told = notices_of(db)
    outer = len(told)
    for call in (
        "similar_images(image_id => 1)",
        "similar_images(image_id => 1, engine => 'pgvector')",
        "similar_rows(NULL::images, key => 1)",
        "classify_image(image_id => 1)",
        "build_index()",
        "backfill()",
        "embed_pending()",
        "self_check()",
        "_collection_counts(1)",
        "_queue_counts(1)",
    ):
        del told[outer:]
        db.execute(f"SELECT siamese.{call}")
        nested = [text for text in told if "plan:" in text and f"siamese.{call}" not in text]
        assert nested and not [text for text in nested if "JIT:" in text], call


# Documentation.


def test_bytes_of_a_file_from_psql(
    db: Connection, ids: list[int], dsn: str, pictures: Pictures, tmp_path: Path
) -> None:
    """README's two ways, by psql itself."""
    readme = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"^```psql\n(.*?)^```$", readme, re.M | re.S)
    (tmp_path / "query.png").write_bytes(pictures.files[0])
    done = subprocess.run(
        ["psql", "-X", "-q", "-At", "-v", "ON_ERROR_STOP=1", "-d", dsn],
        input=block,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10 and {line.split("|")[0] for line in lines} == set("12345")
    assert [line.split("|")[1] for line in lines].count("1") == 2
    assert db.execute("SELECT count(*) FROM pg_largeobject_metadata").fetchone() == (0,)


@pytest.mark.parametrize("embed", ["sync", "deferred"])
def test_all_identifiers_quoted(db: Connection, pictures: Pictures, embed: str) -> None:
    """As dumps for other versions are made, and as some set it for good."""
    db.execute("SET quote_all_identifiers = on")
    db.execute("CREATE TABLE public.t (id text PRIMARY KEY, image bytea, label text)")
    db.execute("SELECT create_collection('t', 'public.t', embed => %s)", (embed,))
    db.execute("INSERT INTO t VALUES ('a', %s, 'x'), ('b', %s, 'y')", pictures.files[:2])
    db.execute("UPDATE t SET image = %s WHERE id = 'b'", (pictures.files[2],))
    if embed == "deferred":
        db.execute("SELECT embed_pending()")
    db.execute("SELECT build_index('t')")
    db.execute("INSERT INTO t VALUES ('c', %s, 'y')", (pictures.files[3],))
    db.execute("SELECT backfill('t')")
    rows = db.execute("SELECT (item).id FROM similar_rows(NULL::t, key => 'a')").fetchall()
    assert {row[0] for row in rows} == {"b", "c"}
    condition = '{"label": {"<>": "x"}, "id": ["b", "c"]}'
    rows = db.execute(
        "SELECT (item).id FROM similar_rows(NULL::t, %s, filter => %s)",
        (pictures.files[0], condition),
    ).fetchall()
    assert {row[0] for row in rows} == {"b", "c"}
    db.execute("SELECT * FROM classify_image(image_id => 'a', collection => 't')")
    db.execute("SELECT similar_images(%s), embed_image(%s)", (pictures.files[0],) * 2)
    assert db.execute("SELECT subject FROM self_check() WHERE NOT ok").fetchall() == []
    db.execute("SELECT * FROM collection_status")
    db.execute("DELETE FROM t; TRUNCATE t")
    db.execute("SELECT grant_usage(current_user)")
    db.execute("SELECT drop_collection('t')")


@pytest.mark.parametrize("embed", ["sync", "deferred"])
def test_triggers_that_search(db: Connection, pictures: Pictures, embed: str) -> None:
    """When the vectors of a statement are there, as docs/operations.md says."""
    db.execute("CREATE TABLE public.t (id int PRIMARY KEY, image bytea)")
    db.execute("SELECT create_collection('t', 't', embed => %s)", (embed,))
    db.execute("CREATE TABLE public.seen (trigger text, number bigint)")
    db.execute(
        "CREATE FUNCTION public.look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO public.seen SELECT TG_NAME, count(*) FROM siamese.vectors_t;"
        " INSERT INTO public.seen SELECT TG_NAME, count(*)"
        "  FROM siamese.similar_images((SELECT image FROM public.t LIMIT 1), collection => 't');"
        " RETURN NEW; END $$"
    )
    for name, when in (
        ("search_similar", "TRIGGER {} AFTER INSERT ON t FOR EACH STATEMENT"),
        ("before_it", "TRIGGER {} AFTER INSERT ON t FOR EACH STATEMENT"),
        ("z_row", "TRIGGER {} AFTER INSERT ON t FOR EACH ROW"),
        ("z_commit", "CONSTRAINT TRIGGER {} AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW"),
    ):  # fmt: skip
        db.execute(f"CREATE {when.format(name)} EXECUTE FUNCTION public.look()")
    with db.transaction():
        db.execute("INSERT INTO t VALUES (1, %s), (2, %s)", pictures.files[:2])
    seen = db.execute(
        "SELECT trigger, array_agg(DISTINCT number) FROM public.seen GROUP BY 1"
    ).fetchall()
    found = [2] if embed == "sync" else [0]
    assert dict(seen) == {
        "search_similar": found,
        "before_it": [0],
        "z_row": [0],
        "z_commit": found,
    }
