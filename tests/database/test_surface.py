"""What analysts meet: arguments that are NULL, names of columns, moved schemas, messages."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from tests.conftest import Connect, Connection, NewRole, Pictures, insert_images
from tests.database.tables import blocks_read, make_collection
from tests.support import column_of, notices_of, one, rows_of, sql_error
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
    assert one(db, f"SELECT count(*) FROM {call}", *values) == 0


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
        "explain_search(image_id => 1, {})",
        "measure_recall({})",
        "retrieval_quality({})",
        "similarity_map(image_id => 1, neighbour_id => 2, {})",
        "thumbnail('', {})",
        "contact_sheet('images', '{{1}}', {})",
    ],
)
def test_arguments_that_are_null(db: Connection, ids: list[int], call: str) -> None:
    """Each argument that has a default, which NULL is not: it is refused by its name."""
    query = (
        "SELECT proargnames[pronargs - pronargdefaults + 1:pronargs] FROM pg_proc"
        " WHERE pronamespace = 'siamese'::regnamespace AND proname = %s"
    )
    names = set(one(db, query, call.partition("(")[0]))
    names -= {"image", "image_id", "key", "candidates", "neighbour", "neighbour_id"}
    assert names
    for argument in names:
        with sql_error("22004", f"{argument} is null"):
            db.execute(f"SELECT siamese.{call.format(f'{argument} => NULL')}")


def test_neither_or_both_of_image_and_key(
    db: Connection, ids: list[int], pictures: Pictures
) -> None:
    for call in (
        "similar_images()",
        "similar_rows(NULL::images)",
        "classify_image()",
        "explain_search()",
        "similarity_map(neighbour_id => 1)",
    ):
        with sql_error("22004", "image is null", "key of a stored one"):
            db.execute(f"SELECT {call}")
    with sql_error("22004", "neighbour is null", "key of a stored one"):
        db.execute("SELECT similarity_map(image_id => 1)")
    for call in (
        "similar_images(image_id => 1, image => %s)",
        "similar_rows(NULL::images, %s, key => 1)",
        "classify_image(%s, image_id => 1)",
        "similarity_map(%s, image_id => 1, neighbour_id => 1)",
        "similarity_map(image_id => 1, neighbour => %s, neighbour_id => 1)",
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
    make_collection(db, key=type_name, more=", label text")
    for place, key in enumerate(keys):
        db.execute(
            f"INSERT INTO t VALUES (%s::text::{type_name}, %s, %s)",
            (key, pictures.files[place], "ab"[place % 2]),
        )
    a_key = f"%s::text::{type_name}"
    rows = "SELECT (item).id::text FROM similar_rows(NULL::t, {}, engine => %s)"
    for index in (False, True):
        if index:
            db.execute("SELECT build_index('t')")
        for engine in ("auto", "pgvector"):
            for key in keys:
                found = column_of(db, rows.format(f"key => {a_key}"), key, engine)
                assert set(found) == set(keys) - {key}
                image = f"(SELECT image FROM t WHERE id = {a_key})"
                query = f"{rows.format(image)} WHERE (item).id <> {a_key}"
                assert found == column_of(db, query, key, engine, key)
                chosen = f"key => {a_key}, candidates => %s::text[]::{type_name}[]"
                found = column_of(db, rows.format(chosen), key, keys[:2], engine)
                assert set(found) == set(keys[:2]) - {key}
    votes = f"SELECT label, votes FROM classify_image(image_id => {a_key}, collection => 't')"
    assert sorted(rows_of(db, votes, keys[0])) == [("a", 1), ("b", 1)]
    lateral = (
        "SELECT q.id::text, (n.item).id::text FROM t AS q"
        " CROSS JOIN LATERAL similar_rows(NULL::t, key => q.id, k => 1) AS n"
    )
    assert set(column_of(db, lateral)) == set(keys)


def test_a_key_of_the_wrong_type(db: Connection, ids: list[int]) -> None:
    with sql_error("22P02", 'invalid input syntax for type bigint: "abc"'):
        db.execute("SELECT similar_rows(NULL::images, key => 'abc')")
    with sql_error("P0002", 'image 99 is not in collection "images"'):
        db.execute("SELECT similar_rows(NULL::images, key => 99)")


# Rows without a vector.


def test_lateral_over_rows_without_a_vector(
    db: Connection, connect: Connect, pictures: Pictures, embed: str
) -> None:
    """A row that is quarantined or waits has no neighbours; one that isn't there is an error."""
    make_collection(db, on_error="quarantine", embed=embed)
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
    assert rows_of(db, "SELECT label FROM classify_image(image_id => 1, k => 40)") == [("x",)]
    db.execute("UPDATE images SET label = NULL")
    assert db.execute("SELECT * FROM classify_image(image_id => 1)").fetchall() == []


# Names of columns.

# Every alias and variable of the SQL that the extension makes; the first ones are those that stand
# beside a user's columns.
ALIASES = """
b k e n o c g f u s r t v a q p x y i key image item distance rank keys embedding new_rows old_rows
added gone
"""
NAMES = """
d l m w z embedding_id dead single failed again label votes share place wanted state changed there
settled opened snapshot query_id generation deleted xact_id first number collection relation
candidates filter engine max_distance found answer known of_table user order select table
"""


@pytest.mark.parametrize("role", ["key and image", "others"])
def test_names_of_columns(db: Connection, pictures: Pictures, embed: str, role: str) -> None:
    """A column may have any name, as a key, as an image, or beside them."""
    files = pictures.files
    aliases = ALIASES.split()
    pairs = list(zip(aliases, [*aliases[1:], aliases[0]], strict=True))
    others: list[str] = []
    if role == "others":
        pairs, others = [("the_key", "the_image")], [*aliases, *NAMES.split()]
    for number, (key, image) in enumerate(pairs):
        name = f"names_{number}"
        table = f"public.{name}"
        columns = "".join(f', "{other}" int' for other in others)
        db.execute(f'CREATE TABLE {table} ("{key}" int PRIMARY KEY, "{image}" bytea{columns})')
        db.execute(
            "SELECT create_collection(%s, %s::regclass, image_column => %s, embed => %s,"
            " on_error => 'quarantine')",
            (name, table, image, embed),
        )
        insert = f'INSERT INTO {table} ("{key}", "{image}") VALUES (1, %s), (2, %s), (3, %s)'
        db.execute(insert, files[:3])
        db.execute(f'UPDATE {table} SET "{image}" = %s WHERE "{key}" = 2', (files[3],))
        db.execute(f'DELETE FROM {table} WHERE "{key}" = 3')
        for other in others:
            db.execute(f'UPDATE {table} SET "{other}" = 5')
        if embed == "deferred":
            assert one(db, "SELECT embed_pending(%s)", name) == 2
        assert one(db, "SELECT backfill(%s)", name) == 0
        if number % 10 == 0:
            db.execute("SELECT build_index(%s)", (name,))
        found = rows_of(
            db,
            f'SELECT (n.item)."{key}", (n.item)."{image}", n.distance < 1e-5'
            f" FROM similar_rows(NULL::{table}, %s) AS n",
            files[3],
        )
        assert [row[0] for row in found] == [2, 1] and found[0][1:] == (files[3], True)
        for column in [key, *others]:
            answers = column_of(
                db,
                "SELECT image_id FROM similar_images(%s, collection => %s, filter => %s::jsonb)",
                files[0],
                name,
                f'{{"{column}": {2 if column == key else 5}}}',
            )
            assert 2 in answers
            db.execute(
                "SELECT classify_image(image_id => 1, collection => %s, label_column => %s)",
                (name, column),
            )
        db.execute("SELECT drop_collection(%s)", (name,))


# Tables and pgvector under another name.


@pytest.mark.parametrize("indexed", [False, True])
def test_schemas_that_are_renamed_or_moved(
    db: Connection, connect: Connect, pictures: Pictures, indexed: bool
) -> None:
    """Sessions that have searched go on."""
    db.execute("CREATE SCHEMA app; CREATE TABLE app.t (id int PRIMARY KEY, image bytea)")
    db.execute("SELECT create_collection('t', 'app.t')")
    for place in range(5):
        db.execute("INSERT INTO app.t VALUES (%s, %s)", (place, pictures.files[place]))
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
    make_collection(db, more=", scan bytea")
    db.execute("ALTER TABLE t ALTER scan SET STORAGE EXTERNAL")
    db.execute(
        "INSERT INTO t SELECT n, f.image, convert_to(repeat('x', 200000), 'UTF8')"
        " FROM unnest(%s::bytea[]) WITH ORDINALITY AS f (image, n)",
        (pictures.files[:200],),
    )
    db.execute("SELECT build_index('t')")

    def blocks(call: str) -> int:
        before = blocks_read(db, "t")
        db.execute(f"SELECT (item).id FROM similar_rows(NULL::t, {call})", (pictures.files[0],))
        return blocks_read(db, "t") - before

    blocks("%s, k => 1")
    of_a_row = 200_000 // 2000  # blocks of a row's scan, with some to spare for its index
    for k in (1, 5, 20):
        assert 0 < blocks(f"%s, k => {k}") < 2 * k * of_a_row
    db.execute("ANALYZE t")
    assert blocks("%s, k => 5") < 2 * 5 * of_a_row


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
    db: Connection, ids: list[int], connect: Connect, new_role: NewRole
) -> None:
    role = new_role()
    db.execute("SELECT grant_usage(%s)", (role,))
    db.execute(sql.SQL("REVOKE SELECT ON siamese.images FROM {}").format(sql.Identifier(role)))
    with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
        connect(user=role).execute("SELECT siamese.similar_images(image_id => 1)")
    assert caught.value.diag.message_primary == "permission denied for table images"


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
    assert one(db, "SELECT count(*) FROM siamese.vectors_images") == 40
    db.execute("UPDATE siamese.collections SET name = 'renamed' WHERE name = 'images'")
    assert one(db, "SELECT count(*) FROM siamese.vectors_renamed") == 40
    db.execute("SELECT drop_collection('renamed')")
    assert one(db, "SELECT count(*) FROM pg_class WHERE relname ~ '^vectors_'") == 0


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
        assert one(db, f"SELECT count(*) FROM {view}") == 0
    for name in (long, long + "2", "x", "vectors_x"):
        db.execute("SELECT drop_collection(%s)", (name,))


@pytest.mark.law(4)
def test_readers_see_vectors_and_state_of_what_they_may_read(
    db: Connection, ids: list[int], connect: Connect, new_role: NewRole, pictures: Pictures
) -> None:
    for name in ("secret", "open", "gone"):
        make_collection(db, name)
        db.execute(f"INSERT INTO public.{name} VALUES (1, %s), (2, %s)", pictures.files[:2])
    before, after = new_role(), new_role()
    db.execute("SELECT grant_usage(%s)", (before,))
    make_collection(db, "later")
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
        assert one(session, "SELECT count(*) FROM siamese.vectors_later") == 0
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
    assert one(db, "SELECT count(*) FROM pg_largeobject_metadata") == 0


def test_all_identifiers_quoted(db: Connection, pictures: Pictures, embed: str) -> None:
    """As dumps for other versions are made, and as some set it for good."""
    db.execute("SET quote_all_identifiers = on")
    make_collection(db, key="text", more=", label text", embed=embed)
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
    db.execute("UPDATE t SET image = NULL; DELETE FROM t; TRUNCATE t")
    db.execute("SELECT grant_usage(current_user)")
    db.execute("SELECT drop_collection('t')")


def test_triggers_that_search(db: Connection, pictures: Pictures, embed: str) -> None:
    """When the vectors of a statement are there, as docs/operations.md says."""
    make_collection(db, embed=embed)
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
        ("z_commit", "CONSTRAINT TRIGGER {} AFTER INSERT ON t INITIALLY DEFERRED FOR EACH ROW"),
    ):
        db.execute(f"CREATE {when.format(name)} EXECUTE FUNCTION public.look()")
    with db.transaction():
        db.execute("INSERT INTO t VALUES (1, %s), (2, %s)", pictures.files[:2])
    seen = rows_of(db, "SELECT trigger, array_agg(DISTINCT number) FROM public.seen GROUP BY 1")
    found = [2] if embed == "sync" else [0]
    assert dict(seen) == {
        "search_similar": found,
        "before_it": [0],
        "z_row": [0],
        "z_commit": found,
    }
