"""A collection's table gets another owner, or one who may not read it."""

from __future__ import annotations

import psycopg
import pytest

from tests.conftest import Connect, Connection, NewRole, Pictures
from tests.database.tables import EVIL
from tests.support import one, rows_of, sql_error


class Owned:
    """Table ``t`` with a row, that belongs to one role and then to another."""

    def __init__(self, db: Connection, first: str, second: str, pictures: Pictures) -> None:
        self.db, self.first, self.second = db, first, second
        self.files = pictures.files
        self.rows = 1

    def write(self) -> None:
        """Every kind of write, by the superuser."""
        self.db.execute("INSERT INTO t VALUES (%s, %s)", (self.rows, self.files[self.rows]))
        self.rows += 1
        self.db.execute("UPDATE t SET image = %s WHERE id = 0", (self.files[self.rows],))
        self.db.execute("INSERT INTO t VALUES (99, %s)", (self.files[99],))
        self.db.execute("DELETE FROM t WHERE id = 99")
        self.db.execute("SELECT embed_pending('t')" if self.is_deferred() else "SELECT 1")

    def is_deferred(self) -> bool:
        embed: str = one(self.db, "SELECT embed FROM siamese.collections WHERE name = 't'")
        return embed == "deferred"

    def bad(self) -> list[tuple[str, str]]:
        return rows_of(self.db, "SELECT subject, detail FROM self_check() WHERE NOT ok")

    def check(self) -> None:
        assert self.bad() == []
        assert one(self.db, "SELECT count(*) FROM siamese.embedding_2") == self.rows


@pytest.fixture
def owned(db: Connection, new_role: NewRole, pictures: Pictures, embed: str) -> Owned:
    first, second = new_role(), new_role()
    db.execute(f"GRANT CREATE ON SCHEMA public TO {first}, {second}")
    db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea, note text)")
    db.execute(f"ALTER TABLE t OWNER TO {first}")
    db.execute(f"SELECT create_collection('t', 't', embed => '{embed}')")
    db.execute("INSERT INTO t VALUES (0, %s)", (pictures.files[0],))
    return Owned(db, first, second, pictures)


def owners(db: Connection) -> set[str]:
    """Who owns the functions that read the table."""
    rows = db.execute(
        "SELECT DISTINCT proowner::regrole::text FROM pg_proc"
        " WHERE pronamespace = 'siamese'::regnamespace AND proname ~ '^_(keys|rows|hashes)_2$'"
    )
    return {row[0] for row in rows}


@pytest.mark.parametrize("first_call", ["write", "backfill", "self_check"])
def test_a_new_owner(owned: Owned, first_call: str) -> None:
    """What reads the table follows it; the old owner can go."""
    db = owned.db
    owned.write()
    db.execute(f"ALTER TABLE t OWNER TO {owned.second}")
    if first_call == "write":
        owned.write()
    elif first_call == "backfill":
        db.execute("SELECT backfill('t')")
    else:
        assert owned.bad() == []
    assert owners(db) == {owned.second}
    owned.write()
    owned.check()
    db.execute(f"REVOKE CREATE ON SCHEMA public FROM {owned.first}")
    db.execute(f"REVOKE USAGE ON SCHEMA siamese FROM {owned.first}")
    db.execute(f"DROP OWNED BY {owned.first}")
    owned.write()
    owned.check()


def test_reassigned(owned: Owned) -> None:
    owned.db.execute(f"REASSIGN OWNED BY {owned.first} TO {owned.second}")
    owned.write()
    owned.check()
    assert owners(owned.db) == {owned.second}


def test_functions_that_went_with_the_old_owner(owned: Owned) -> None:
    owned.db.execute(f"ALTER TABLE t OWNER TO {owned.second}")
    owned.db.execute(f"DROP OWNED BY {owned.first}")
    assert owners(owned.db) == set()
    owned.write()
    owned.check()


@pytest.mark.parametrize(
    ("trouble", "remedy"),
    [
        ("REVOKE ALL ON t FROM {first}", "GRANT SELECT, UPDATE ON public.t TO {first}"),
        ("REVOKE SELECT ON t FROM {first}", "GRANT SELECT, UPDATE ON public.t TO {first}"),
        (
            "ALTER TABLE t ENABLE ROW LEVEL SECURITY; ALTER TABLE t FORCE ROW LEVEL SECURITY",
            "ALTER TABLE public.t NO FORCE ROW LEVEL SECURITY",
        ),
    ],
)
def test_an_owner_who_may_not_read(owned: Owned, trouble: str, remedy: str) -> None:
    """The error names the remedy, self_check shows it as one of its lines, and the remedy works."""
    db = owned.db
    remedy = remedy.format(first=owned.first)
    owned.write()
    db.execute(trouble.format(first=owned.first))
    calls = ["SELECT backfill('t')", "DELETE FROM t WHERE id = 1"]
    if owned.is_deferred():
        db.execute("INSERT INTO t VALUES (70, %s)", (owned.files[70],))  # reads nothing
        calls.append("SELECT embed_pending('t')")
    else:
        calls.append("UPDATE t SET image = NULL")
    for call in calls:
        with sql_error("55000", "public.t", remedy):
            db.execute(call)
    bad = owned.bad()
    assert ('collection "t": owner' in dict(bad)) and remedy in dict(bad)['collection "t": owner']
    row = db.execute(
        "SELECT bool_and(ok), count(*) FROM self_check()"
        " WHERE subject ~ 'n .images.:|package|: index|: model|: triggers'"
    ).fetchone()
    assert row and row[0] and row[1] > 8  # all others are checked
    db.execute(remedy)
    db.execute("DELETE FROM t WHERE id = 70")
    owned.write()
    owned.check()


@pytest.mark.law(4)
def test_an_owner_above_row_level_security(owned: Owned) -> None:
    owned.db.execute(
        "ALTER TABLE t ENABLE ROW LEVEL SECURITY; ALTER TABLE t FORCE ROW LEVEL SECURITY"
    )
    owned.db.execute(f"ALTER ROLE {owned.first} BYPASSRLS")
    owned.write()
    assert dict(owned.bad()).keys() <= {'collection "t": table'}


@pytest.mark.law(7)
def test_an_owner_cannot_make_the_superuser_read_the_table(
    owned: Owned, connect: Connect, pictures: Pictures
) -> None:
    """Code in the owner's indexes must not run as superuser, whatever the owner alters."""
    session = connect(user=owned.first)
    session.execute(
        f"""{EVIL}
        CREATE INDEX ON t (id) WHERE public.evil(1);
        CREATE FUNCTION public.pg_get_userbyid(oid) RETURNS name LANGUAGE sql
            AS 'SELECT current_user FROM (SELECT public.evil(1)) AS e';
        CREATE FUNCTION public.evil_equal(name, name) RETURNS boolean LANGUAGE sql
            AS 'SELECT public.evil(1)';
        CREATE OPERATOR public.= (LEFTARG = name, RIGHTARG = name, FUNCTION = public.evil_equal);
        CREATE FUNCTION public.evil_equal(oid, oid) RETURNS boolean LANGUAGE sql
            AS 'SELECT public.evil(1)';
        CREATE OPERATOR public.= (LEFTARG = oid, RIGHTARG = oid, FUNCTION = public.evil_equal);
        """
    )
    for name in ("keys", "present", "rows", "locked_rows", "hashes"):
        query = "SELECT oid::regprocedure::text FROM pg_proc WHERE proname = %s"
        function = one(session, query, f"_{name}_2")
        session.execute(
            f"ALTER FUNCTION {function} SECURITY INVOKER SET search_path = public, pg_catalog"
        )
    keys = "'{1}'::integer[]"
    for call in (
        "_keys_2()",
        f"_present_2({keys})",
        f"_rows_2({keys})",
        f"_locked_rows_2({keys})",
        f"_hashes_2({keys}, 1)",
    ):
        with sql_error("55000", "does not run as its owner"):
            owned.db.execute(f"SELECT siamese.{call}")
    session.execute("UPDATE t SET image = %s", (pictures.files[5],))
    session.execute("DELETE FROM t")
    assert one(owned.db, "SELECT backfill('t')") == 0
    assert owned.bad() == []


@pytest.mark.parametrize("column", ["id", "image"])
@pytest.mark.parametrize("event", ["INSERT", "UPDATE", "DELETE"])
def test_columns_that_change_under_an_old_snapshot(
    owned: Owned, connect: Connect, column: str, event: str
) -> None:
    """Its catalog shows the former ones; code of the owner's types must not run as superuser."""
    session, other = connect(user=owned.first), connect(user=owned.first)
    is_superuser = "(SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user)"
    body = f"LANGUAGE plpgsql AS $$ BEGIN ASSERT NOT {is_superuser}; RETURN"
    other.execute(
        f"""
        CREATE TYPE evil AS ENUM ('x');
        CREATE FUNCTION evil_text(evil) RETURNS text {body} '1'; END $$;
        CREATE FUNCTION evil_integer(evil) RETURNS integer {body} 1; END $$;
        CREATE FUNCTION evil_bytea(evil) RETURNS bytea {body} ''; END $$;
        CREATE CAST (evil AS text) WITH FUNCTION evil_text(evil);
        CREATE CAST (evil AS integer) WITH FUNCTION evil_integer(evil) AS IMPLICIT;
        CREATE CAST (evil AS bytea) WITH FUNCTION evil_bytea(evil) AS IMPLICIT;
        ALTER TABLE t ADD COLUMN other evil NOT NULL DEFAULT 'x'
        """
    )
    session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
    other.execute(f"ALTER TABLE t RENAME {column} TO was; ALTER TABLE t RENAME other TO {column}")
    picture, file = ("image", "was")[column == "image"], owned.files[7]
    key = ("id", "was")[column == "id"]
    try:
        if event == "INSERT":
            session.execute(f"INSERT INTO t ({key}, {picture}) VALUES (7, %s)", (file,))
        elif event == "UPDATE":
            session.execute(f"UPDATE t SET {picture} = %s", (file,))
        else:
            session.execute("DELETE FROM t")
    except psycopg.Error as error:
        assert error.sqlstate in ("40001", "22P02"), error


def test_two_sessions_after_a_change_of_owner(owned: Owned, connect: Connect) -> None:
    """The first one mends; the other one, while that is not committed, waits or reads itself."""
    owned.write()
    owned.db.execute(f"ALTER TABLE t OWNER TO {owned.second}")
    other = connect()
    with other.transaction():
        other.execute("DELETE FROM t WHERE id = 1")
        owned.db.execute("SET lock_timeout = '100ms'")
        with sql_error("55P03"):
            owned.db.execute("DELETE FROM t WHERE id = 0")
        owned.db.execute("RESET lock_timeout")
    owned.rows -= 1
    owned.db.execute("UPDATE t SET note = 'x'")
    owned.check()
