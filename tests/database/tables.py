"""Table ``t`` with a collection of number 2, embedded at once or later; is it in step?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from tests.conftest import Connection
from tests.support import column_of, grid_encoder, one

# A function that must not run as superuser.
EVIL = """
CREATE FUNCTION public.evil(int) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) THEN
        RAISE EXCEPTION 'ran as superuser' USING ERRCODE = 'SIAM1';
    END IF;
    RETURN true;
END $$;
"""


def make_collection(
    db: Connection, name: str = "t", key: str = "integer", more: str = "", **options: Any
) -> None:
    """Make a table (id, image and ``more``) with a collection of its name."""
    db.execute(f"CREATE TABLE public.{name} (id {key} PRIMARY KEY, image bytea{more})")
    given = "".join(f", {option} => %s" for option in options)
    call = f"siamese.create_collection('{name}', 'public.{name}'{given})"
    db.execute(f"SELECT {call}", list(options.values()))


def insert_rows(db: Connection, keys: Iterable[int], files: Sequence[bytes | None]) -> None:
    """Insert rows into table ``t`` in one statement."""
    insert = "INSERT INTO t (id, image) SELECT * FROM unnest(%s::int[], %s::bytea[])"
    db.execute(insert, (list(keys), list(files)))


def register_grid(db: Connection) -> None:
    """Register model ``grid``, of another metric and dimension than the medical one."""
    model = grid_encoder(("n", 3, 28, 28), pool=7)
    db.execute("SELECT register_model('grid', %s, metric => 'l2')", (model,))


@contextmanager
def without_triggers(db: Connection) -> Iterator[None]:
    """Write as logical replication and pg_restore --disable-triggers do."""
    db.execute("SET session_replication_role = replica")
    yield
    db.execute("RESET session_replication_role")


def blocks_read(db: Connection, table: str) -> int:
    """Return the number of blocks of TOAST that were read so far."""
    db.execute("SELECT pg_stat_force_next_flush()")
    blocks = "SELECT toast_blks_read + toast_blks_hit FROM pg_statio_user_tables"
    return int(one(db, f"{blocks} WHERE relname = %s", table))


class Table:
    """Table ``t (id, image, note)``, whose keys are the places of pictures in ``files``."""

    def __init__(self, db: Connection, files: list[bytes]) -> None:
        self.db = db
        self.files = files

    @classmethod
    def create(cls, db: Connection, files: list[bytes], **options: Any) -> Self:
        """Make the table and its collection. ``options`` are arguments of the latter."""
        make_collection(db, more=", note text", **options)
        return cls(db, files)

    @classmethod
    def indexed(cls, db: Connection, files: list[bytes], **options: Any) -> Self:
        """Make the table with rows 0 to 9, all of them in an index."""
        table = cls.create(db, files, **options)
        table.insert(*range(10))
        table.embed()
        db.execute("SELECT build_index('t')")
        return table

    def insert(self, *places: int) -> None:
        """Insert pictures under their place as key, in one statement."""
        insert_rows(self.db, places, [self.files[place] for place in places])

    def value(self, statement: str, *values: object) -> Any:
        """Return the first value of an answer."""
        row = self.db.execute(statement, values or None).fetchone()
        return row[0] if row else None

    def vectors(self) -> dict[int, int]:
        """Return the embedding_id by key."""
        return dict(self.db.execute("SELECT key, embedding_id FROM siamese.embedding_2").fetchall())

    def images(self) -> dict[int, int]:
        """Return the place of its picture by key."""
        rows = self.db.execute("SELECT id, image FROM t ORDER BY id", binary=True).fetchall()
        return {key: self.files.index(image) for key, image in rows}

    def embed(self) -> int:
        """Embed what is queued; return how many rows."""
        return 0

    def waiting(self) -> int:
        """Return the number of queued rows."""
        return 0

    def check(self) -> None:
        """Each row has the vector of its image and no other; searches for 25 of them agree."""
        self.embed()
        wrong = self.db.execute(
            "SELECT t.id, e.key, e.embedding <=> embed_image(t.image) FROM t"
            " FULL JOIN siamese.embedding_2 AS e ON e.key = t.id"
            " WHERE t.id IS NULL OR e.key IS NULL OR e.embedding <=> embed_image(t.image) > 1e-5"
        ).fetchall()
        assert wrong == []
        for engine in ("auto", "pgvector"):
            missed = self.db.execute(
                "SELECT id FROM (SELECT * FROM t LIMIT 25) AS t WHERE id NOT IN"
                " (SELECT image_id FROM similar_images(image, k => 100, collection => 't',"
                " max_distance => 1e-5::real, engine => %s))",
                (engine,),
            ).fetchall()
            assert missed == []


class Deferred(Table):
    """The same with a deferred collection."""

    @classmethod
    def create(cls, db: Connection, files: list[bytes], **options: Any) -> Self:
        """Make the table and its deferred collection."""
        return super().create(db, files, embed="deferred", **options)

    def embed(self) -> int:
        """Embed what is queued; return how many rows."""
        return int(self.value("SELECT embed_pending('t')"))

    def waiting(self) -> int:
        """Return the number of queued rows."""
        return int(self.value("SELECT waiting FROM embedding_queue_status WHERE collection = 't'"))

    def queued(self) -> list[int]:
        """Return the queued keys."""
        return column_of(self.db, "SELECT DISTINCT unnest(keys) FROM siamese.queue_2 ORDER BY 1")

    def check_vectors(self) -> None:
        """Each vector is that of its row's image; each row without one is queued or failed."""
        wrong = self.db.execute(
            "SELECT t.id, e.key FROM t FULL JOIN siamese.embedding_2 AS e ON t.id = e.key"
            " WHERE t.id IS NULL OR e.embedding <=> embed_image(t.image) > 1e-5"
        ).fetchall()
        assert wrong == []
        lost = self.db.execute(
            "SELECT id FROM t WHERE id NOT IN (SELECT key FROM siamese.embedding_2)"
            " AND id NOT IN (SELECT unnest(keys) FROM siamese.queue_2)"
            " AND id::text NOT IN (SELECT key FROM embedding_failures)"
        ).fetchall()
        assert lost == []

    def check(self) -> None:
        """As above, before all is embedded and then; nothing waits, and all is sound."""
        self.check_vectors()
        super().check()
        assert self.waiting() == 0
        assert self.value("SELECT bool_and(ok) FROM self_check()")
