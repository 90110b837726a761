"""Who may do what, and that nobody sees rows of the base table that are not for them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.conftest import Connect, Connection, NewRole, Pictures, insert_images
from tests.database.tables import EVIL, make_collection
from tests.server import login_role
from tests.support import assert_exact, column_of, exact_distances, one, rows_of, sql_error

# Members of the schema, but for those of pgvector, where that is installed in the same one.
OWN = """
    NOT EXISTS (SELECT FROM pg_depend AS d JOIN pg_extension AS x ON x.oid = d.refobjid
        WHERE d.objid = o.oid AND d.deptype = 'e' AND x.extname = 'vector')
"""
FUNCTIONS = f"""
    SELECT concat('siamese.', proname, '(', (SELECT string_agg(CASE WHEN u = 'anyelement'::regtype
            THEN 'NULL::siamese.images' WHEN u = 'bytea[]'::regtype AND provariadic <> 0
            THEN 'VARIADIC NULL::bytea[]'
            -- Types of the extension can't be named without the schema.
            WHEN u::regtype::text ~ '^(siamese[.])?(filter|key|embedding_result|collections)'
            THEN 'NULL'
            ELSE concat('NULL::', u::regtype) END, ', ')
        FROM unnest(proargtypes) AS u), ')')
    FROM pg_proc AS o
    WHERE pronamespace = 'siamese'::regnamespace AND prorettype <> 'trigger'::regtype AND {OWN}
        -- Those of types: strict, so that a call with NULL is none.
        AND prolang <> (SELECT l.oid FROM pg_language AS l WHERE l.lanname = 'internal')
    ORDER BY 1
"""
TABLES = f"""
    SELECT concat('siamese.', relname) FROM pg_class AS o
    WHERE relnamespace = 'siamese'::regnamespace AND relkind = ANY(%s::"char"[]) AND {OWN}
    ORDER BY 1
"""
FOR_READERS = """
_caller _classify_image _collection_counts _compare_images _contact_sheet _dicom_tag _dicom_tags
_embed_image _estimate _explain_search _generation_file _is_waiting _leaks _load _match_line
_may_see _measure_recall _model_id _near_duplicates _nearest _no_collection _progress _queue_counts
_raise _retrieval_quality _similar_images _similar_keys _similar_pairs _similarity_map _thumbnail
_warm_up any_two_match classify_image contact_sheet data_uri dicom_tag dicom_tags embed_image
explain_search image_distance leaks measure_recall near_duplicates nearest retrieval_quality
same_class similar_images similar_pairs similar_rows similarity_map thumbnail warm_up
"""


def names(db: Connection, query: str, *values: object) -> list[str]:
    return [row[0] for row in db.execute(query, values or None)]


def denied(session: Connection, statement: str) -> bool:
    """Whether a statement ends in "permission denied" (or "must be owner")."""
    try:
        session.execute(statement)
    except Exception as error:
        return getattr(error, "sqlstate", None) == "42501"
    return False


@dataclass
class Roles:
    """A session of each role of the test's database."""

    nobody: Connection
    reader: Connection
    admin: Connection


@pytest.fixture
def roles(db: Connection, new_role: NewRole, connect: Connect, pictures: Pictures) -> Roles:
    """Collection ``images`` with 30 rows; the reader and the administrator have their grants."""
    insert_images(db, pictures.files[:25], pictures.labels[:25])
    db.execute("SELECT build_index()")
    insert_images(db, pictures.files[25:30])
    nobody, reader, admin = new_role(), new_role(), new_role()
    db.execute("SELECT grant_usage(%s), grant_admin(%s)", (reader, admin))
    for role in (nobody, reader, admin):
        db.execute(f"GRANT CREATE ON SCHEMA public TO {role}")
    return Roles(connect(user=nobody), connect(user=reader), connect(user=admin))


@pytest.mark.parametrize("sees_schema", [False, True])
def test_without_grants_nothing_works(db: Connection, roles: Roles, sees_schema: bool) -> None:
    if sees_schema:
        db.execute(f"GRANT USAGE ON SCHEMA siamese TO {roles.nobody.info.user}")
    functions, tables = names(db, FUNCTIONS), names(db, TABLES, ["r", "v", "S"])
    assert len(functions) > 30 and len(tables) > 10
    statements = [f"SELECT {name}" for name in functions]
    statements += [f"SELECT FROM {name}" for name in tables]
    for name in names(db, TABLES, ["r"]):
        statements += [f"DELETE FROM {name}", f"TRUNCATE {name}"]
    assert [one for one in statements if not denied(roles.nobody, one)] == []


def test_nothing_is_for_everybody(db: Connection) -> None:
    found = names(
        db,
        f"SELECT oid::regprocedure::text FROM pg_proc AS o"
        f" WHERE pronamespace = 'siamese'::regnamespace AND {OWN}"
        " AND has_function_privilege('public', oid, 'EXECUTE')",
    )
    assert found == []
    found = names(
        db,
        f"SELECT oid::regclass::text FROM pg_class AS o"
        f" WHERE relnamespace = 'siamese'::regnamespace AND relkind IN ('r', 'v') AND {OWN}"
        " AND has_table_privilege('public', oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE')",
    )
    assert found == []


def test_functions_of_the_definer_have_a_locked_search_path(db: Connection) -> None:
    rows = db.execute(
        "SELECT proname, proconfig FROM pg_proc"
        " WHERE pronamespace = 'siamese'::regnamespace AND prosecdef"
    ).fetchall()
    assert len(rows) >= 10
    for name, settings in rows:
        assert "search_path=pg_catalog, pg_temp" in (settings or []), name


def test_reader(roles: Roles, db: Connection, queries: Pictures) -> None:
    """May search, and read what searches need; nothing else."""
    query = queries.files[0]
    truth = exact_distances(db, query)
    for engine in ("faiss", "pgvector", "auto"):
        rows = roles.reader.execute(
            "SELECT * FROM similar_images(%s, engine => %s)", (query, engine)
        ).fetchall()
        assert_exact(rows, truth, 10)
    for call in (
        "similar_images(image_id => 1::bigint)",
        "similar_images(image_id => 1, filter => '{}'::text)",
        "similar_images(image_id => 1, filter => '{}'::json)",
        "similar_rows(NULL::images, %(q)s)",
        "similar_rows(NULL::images, key => 1, candidates => ARRAY['2']::text[])",
        "classify_image(%(q)s)",
        "classify_image(image_id => 1)",
        "embed_image(%(q)s)",
        "image_distance(%(q)s, %(q)s)",
        "same_class(%(q)s, %(q)s)",
        "dicom_tags(%(q)s)",
        "dicom_tag(%(q)s, 'Modality')",
        "any_two_match(%(q)s, %(q)s)",
        "warm_up()",
        "explain_search(%(q)s)",
        "measure_recall(queries => 3)",
        "retrieval_quality(sample => 3)",
        "similarity_map(%(q)s, %(q)s)",
        "data_uri(thumbnail(%(q)s))",
        "contact_sheet('images', '{1,2}')",
    ):
        assert roles.reader.execute(f"SELECT {call}", {"q": query}).fetchall()


def test_reader_may_not_write_or_administer(roles: Roles, db: Connection) -> None:
    statements = [
        "INSERT INTO images (image) VALUES ('x')",
        "UPDATE images SET label = 'x'",
        "DELETE FROM images",
        "TRUNCATE images",
    ]
    statements += [f"DELETE FROM {table}" for table in names(db, TABLES, ["r"])]
    for_readers = ("siamese.collection_status", "siamese.progress", "siamese.vectors_images")
    views = [name for name in names(db, TABLES, ["v"]) if name not in for_readers]
    statements += [f"SELECT FROM {table}" for table in views]
    statements += ["SELECT FROM siamese.failures"]
    for function in names(db, FUNCTIONS):
        if function.removeprefix("siamese.").split("(")[0] not in FOR_READERS.split():
            statements.append(f"SELECT {function}")
    assert [one for one in statements if not denied(roles.reader, one)] == []


def test_reader_without_the_base_table(roles: Roles, db: Connection, queries: Pictures) -> None:
    """grant_usage lets a role search; which tables, their owners say."""
    db.execute(f"REVOKE SELECT ON images FROM {roles.reader.info.user}")
    for engine in ("faiss", "pgvector", "auto"):
        with sql_error("42501", "permission denied for table images"):
            roles.reader.execute(
                "SELECT similar_images(%s, engine => %s)", (queries.files[0], engine)
            )
    with sql_error("42501", "permission denied for table images"):
        roles.reader.execute("SELECT similar_images(image_id => 1::bigint)")
    with sql_error("42501", "permission denied for table images"):
        roles.reader.execute("SELECT key FROM siamese.embedding_1")


def test_reader_of_some_columns(roles: Roles, db: Connection, queries: Pictures) -> None:
    """The key is enough to search; a filter needs its own column; images need not be readable."""
    user = roles.reader.info.user
    db.execute(f"REVOKE SELECT ON images FROM {user}")
    db.execute(f"GRANT SELECT (image_id, split) ON images TO {user}")
    truth = exact_distances(db, queries.files[0])
    for engine in ("faiss", "pgvector", "auto"):
        sql_ = "SELECT * FROM similar_images(%s, engine => %s, filter => %s::jsonb)"
        values = (queries.files[0], engine)
        assert_exact(roles.reader.execute(sql_, (*values, "{}")).fetchall(), truth, 10)
        assert roles.reader.execute(sql_, (*values, '{"split": "x"}')).fetchall() == []
        with sql_error("42501", "permission denied for table images"):
            roles.reader.execute(sql_, (*values, '{"label": "x"}'))
    with sql_error("42501", "permission denied for table images"):
        roles.reader.execute("SELECT classify_image(%s)", (queries.files[0],))


def test_vectors_under_row_level_security(roles: Roles, db: Connection) -> None:
    """The grant on the vector table leaks nothing: not the vectors, not how many there are."""
    user = roles.reader.info.user
    db.execute("ALTER TABLE images ENABLE ROW LEVEL SECURITY")
    count = "SELECT count(*) FROM siamese.embedding_1"
    assert one(roles.reader, count) == 0
    db.execute(f"CREATE POLICY few ON images TO {user} USING (image_id <= 5)")
    assert sorted(column_of(roles.reader, "SELECT key FROM siamese.embedding_1")) == [1, 2, 3, 4, 5]
    assert one(db, count) == 30


def test_filters_and_candidates_under_row_level_security(
    roles: Roles, db: Connection, queries: Pictures
) -> None:
    db.execute("ALTER TABLE images ENABLE ROW LEVEL SECURITY")
    db.execute(f"CREATE POLICY few ON images TO {roles.reader.info.user} USING (image_id <= 5)")
    for arguments in (
        "k => 100",
        "candidates => ARRAY[3, 4, 10, 11]",
        "filter => '{\"image_id\": [1, 20]}'",
        "filter => '{}', max_distance => 2, k => 50",
    ):
        for engine in ("auto", "pgvector"):
            query = f"SELECT image_id FROM similar_images(%s, engine => %s, {arguments})"
            keys = column_of(roles.reader, query, queries.files[0], engine)
            assert keys and max(keys) <= 5
    rows = roles.reader.execute(
        "SELECT (item).image_id FROM similar_rows(NULL::images, %s)", (queries.files[0],)
    ).fetchall()
    assert {row[0] for row in rows} == {1, 2, 3, 4, 5}


def test_writer_under_row_level_security(roles: Roles, db: Connection, pictures: Pictures) -> None:
    """Triggers embed what a role inserts, also where it may not read it."""
    user = roles.reader.info.user
    db.execute(f"GRANT INSERT ON images TO {user}")
    db.execute("ALTER TABLE images ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    db.execute(f"CREATE POLICY add ON images FOR INSERT TO {user} WITH CHECK (true)")
    roles.reader.execute("INSERT INTO images (image) VALUES (%s)", (pictures.files[40],))
    assert one(roles.reader, "SELECT count(*) FROM similar_images(%s)", pictures.files[40]) == 0
    assert one(db, "SELECT distance FROM similar_images(%s, k => 1)", pictures.files[40]) < 1e-5


def test_administrator(roles: Roles, pictures: Pictures, onnx: bytes) -> None:
    """Does everything with a table of its own."""
    admin = roles.admin
    admin.execute("SELECT register_model('own', %s)", (onnx,))
    admin.execute("CREATE TABLE public.t (id int PRIMARY KEY, image bytea)")
    admin.execute("INSERT INTO t VALUES (1, %s)", (pictures.files[0],))
    assert one(admin, "SELECT create_collection('t', 't', model => 'own')") == 1
    admin.execute("INSERT INTO t VALUES (2, %s)", (pictures.files[1],))
    admin.execute("SELECT build_index('t'), backfill('t')")
    for engine in ("faiss", "pgvector"):
        rows = admin.execute(
            "SELECT image_id FROM similar_images(%s, collection => 't', engine => %s)",
            (pictures.files[1], engine),
        )
        assert rows.fetchall() == [(2,), (1,)]
    assert one(admin, "SELECT bool_and(ok) FROM self_check()") is True
    for view in ("collection_status", "index_generations", "embedding_failures"):
        admin.execute(f"SELECT * FROM {view}")
    admin.execute("SELECT grant_usage(%s)", (roles.nobody.info.user,))
    admin.execute("SELECT drop_collection('t'), drop_model('own')")


def test_administrator_of_the_ready_made_table(roles: Roles, pictures: Pictures) -> None:
    new = insert_images(roles.admin, pictures.files[30:33])
    roles.admin.execute(
        "UPDATE images SET image = %s WHERE image_id = %s", (pictures.files[34], new[0])
    )
    roles.admin.execute("DELETE FROM images WHERE image_id = %s", (new[1],))
    roles.admin.execute("SELECT build_index()")
    assert rows_of(
        roles.admin, "SELECT image_id FROM similar_images(%s, k => 1)", pictures.files[34]
    ) == [(new[0],)]


def test_administrator_may_not_touch_tables_of_others(roles: Roles, db: Connection) -> None:
    make_collection(db, "secret")
    with sql_error("42501", "must be owner of table"):
        roles.admin.execute("SELECT create_collection('mine', 'secret')")
    with sql_error("42501", "must be owner of table"):
        roles.admin.execute("SELECT drop_collection('secret')")
    for statement in (
        "SELECT * FROM secret",
        "SELECT similar_images(image_id => 1::bigint, collection => 'secret')",
        "DELETE FROM siamese.models",
        "UPDATE siamese.collections SET relation = 'images'",
        "INSERT INTO siamese.embedding_1 (key) VALUES (99)",
        "DELETE FROM siamese.pending_1",
    ):
        assert denied(roles.admin, statement), statement


def test_ownership_is_that_of_the_role_acted_as(
    roles: Roles, db: Connection, pictures: Pictures
) -> None:
    """SET ROLE counts, and so does membership."""
    db.execute("CREATE TABLE public.t (id int PRIMARY KEY, image bytea)")
    db.execute(f"SET ROLE {roles.admin.info.user}")
    with sql_error("42501", "must be owner of table"):
        db.execute("SELECT create_collection('t', 't')")
    db.execute("RESET ROLE")
    db.execute(f"ALTER TABLE t OWNER TO {roles.nobody.info.user}")
    db.execute(f"GRANT {roles.nobody.info.user} TO {roles.admin.info.user}")
    roles.admin.execute("SELECT create_collection('t', 't')")


def test_roles_granted_before_a_collection_is_made(
    roles: Roles, db: Connection, pictures: Pictures
) -> None:
    make_collection(db)
    db.execute("INSERT INTO t VALUES (1, %s)", (pictures.files[0],))
    db.execute("SELECT build_index('t')")
    db.execute(f"GRANT SELECT ON t TO {roles.reader.info.user}, {roles.admin.info.user}")
    for session in (roles.reader, roles.admin):
        assert rows_of(
            session, "SELECT image_id FROM similar_images(%s, collection => 't')", pictures.files[0]
        ) == [(1,)]


def test_ready_made_table_made_after_the_grants(
    db: Connection, new_role: NewRole, connect: Connect, pictures: Pictures
) -> None:
    db.execute("SELECT drop_collection('images'); DROP TABLE siamese.images")
    reader, admin = new_role(), new_role()
    db.execute("SELECT grant_usage(%s), grant_admin(%s)", (reader, admin))
    db.execute("SELECT create_collection()")
    insert_images(connect(user=admin), pictures.files[:3])
    rows = connect(user=reader).execute("SELECT similar_images(%s)", (pictures.files[0],))
    assert len(rows.fetchall()) == 3


def test_odd_role_names(db: Connection, connect: Connect) -> None:
    name = 'Dr. "No"; DROP TABLE images; --'
    db.execute(login_role(name))
    db.execute("SELECT grant_usage(%s)", (name,))
    connect(user=name).execute("SELECT count(*) FROM images")
    with sql_error("42704", "does not exist"):
        db.execute("SELECT grant_usage('public; --')")


def test_code_in_the_search_path_never_runs(
    roles: Roles, db: Connection, pictures: Pictures, queries: Pictures
) -> None:
    """Functions and operators that match better than PostgreSQL's own, in a schema for all."""
    roles.nobody.execute(
        """
        CREATE FUNCTION public.quote_ident(name) RETURNS text LANGUAGE sql AS 'SELECT 1/0';
        CREATE FUNCTION public.evil(oid, regclass) RETURNS boolean LANGUAGE sql AS 'SELECT 1/0=1';
        CREATE OPERATOR public.= (LEFTARG = oid, RIGHTARG = regclass, FUNCTION = public.evil);
        CREATE FUNCTION public.evil(regclass, oid) RETURNS boolean LANGUAGE sql AS 'SELECT 1/0=1';
        CREATE OPERATOR public.= (LEFTARG = regclass, RIGHTARG = oid, FUNCTION = public.evil);
        CREATE FUNCTION public.evil(regclass, regclass) RETURNS boolean
            LANGUAGE sql AS 'SELECT 1/0=1';
        CREATE OPERATOR public.= (LEFTARG = regclass, RIGHTARG = regclass, FUNCTION = public.evil);
        CREATE FUNCTION public.evil(oid, regtype) RETURNS boolean LANGUAGE sql AS 'SELECT 1/0=1';
        CREATE OPERATOR public.= (LEFTARG = oid, RIGHTARG = regtype, FUNCTION = public.evil);
        """
    )
    for session in (db, roles.reader, roles.admin):
        session.execute("SET search_path = public, siamese")
        for engine in ("faiss", "pgvector"):
            session.execute(
                "SELECT similar_images(%s, filter => '{\"label\": [1]}', engine => %s)",
                (queries.files[0], engine),
            )
        session.execute("SELECT similar_images(image_id => 1::bigint), warm_up()")
        session.execute("SELECT similar_rows(NULL::siamese.images, %s)", (queries.files[0],))
        session.execute("SELECT classify_image(%s)", (queries.files[0],))
    make_collection(db)
    db.execute("SELECT self_check()")
    db.execute("INSERT INTO t VALUES (1, %s)", (pictures.files[0],))
    db.execute("SELECT build_index('t'), backfill('t'), drop_collection('t')")


def test_a_table_that_became_a_view(roles: Roles, db: Connection) -> None:
    """Before PostgreSQL 16 an empty table can; its functions must not run with our rights."""
    admin = roles.admin
    make_collection(admin)
    if db.info.server_version >= 160000:
        pytest.skip("tables can't become views any more")
    admin.execute(
        """
        CREATE FUNCTION public.who() RETURNS boolean LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'ran as %', current_user; END $$
        """
    )
    for event in ("insert", "update", "change", "delete", "truncate"):
        admin.execute(f"DROP TRIGGER pg_siamese_2_{event} ON t")
    admin.execute("ALTER TABLE t DROP CONSTRAINT t_pkey")
    admin.execute("VACUUM t")
    admin.execute(
        'CREATE RULE "_RETURN" AS ON SELECT TO t DO INSTEAD'
        " SELECT 1 AS id, ''::bytea AS image WHERE public.who()"
    )
    for call in ("backfill('t')", "build_index('t')"):
        with sql_error("42704", "no longer exists"):
            admin.execute(f"SELECT {call}")
    admin.execute("SELECT * FROM self_check()")


@pytest.mark.parametrize(
    "definition",
    [
        "CREATE INDEX ON t (id) WHERE public.evil(1)",
        "CREATE STATISTICS s ON (CASE WHEN public.evil(1) THEN id END) FROM t",
    ],
    ids=["predicate", "statistics"],
)
def test_code_of_a_tables_owner_never_runs_as_superuser(
    roles: Roles, pictures: Pictures, definition: str
) -> None:
    """The planner evaluates such functions, with the rights of whoever reads the table."""
    admin = roles.admin
    make_collection(admin)
    admin.execute(EVIL + definition)
    for statement in (
        "INSERT INTO t VALUES (1, %(image)s)",
        "UPDATE t SET image = %(image)s",
        "SELECT backfill('t')",
        "SELECT * FROM self_check()",
        "DELETE FROM t",
    ):
        try:
            admin.execute(statement, {"image": pictures.files[0]})
        except Exception as error:
            assert getattr(error, "sqlstate", None) != "SIAM1", statement
