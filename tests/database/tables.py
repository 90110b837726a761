"""Table ``t`` with a collection of number 2, embedded at once or later; is it in step?"""

from __future__ import annotations

from typing import Any, Self

from tests.conftest import Connection


class Table:
    """Table ``t (id, image, note)``, whose keys are the places of pictures in ``files``."""

    def __init__(self, db: Connection, files: list[bytes]) -> None:
        self.db = db
        self.files = files

    @classmethod
    def create(cls, db: Connection, files: list[bytes], options: str = "") -> Self:
        """Make the table and its collection. ``options`` are more arguments of the latter."""
        db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea, note text)")
        db.execute(f"SELECT create_collection('t', 't' {options})")
        return cls(db, files)

    @classmethod
    def indexed(cls, db: Connection, files: list[bytes], options: str = "") -> Self:
        """Make the table with rows 0 to 9, all of them in an index."""
        table = cls.create(db, files, options)
        table.insert(*range(10))
        table.embed()
        db.execute("SELECT build_index('t')")
        return table

    def insert(self, *places: int) -> None:
        """Insert pictures under their place as key, in one statement."""
        self.db.execute(
            "INSERT INTO t SELECT * FROM unnest(%s::int[], %s::bytea[])",
            (list(places), [self.files[place] for place in places]),
        )

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
    def create(cls, db: Connection, files: list[bytes], options: str = "") -> Self:
        """Make the table and its deferred collection."""
        return super().create(db, files, f", embed => 'deferred' {options}")

    def embed(self) -> int:
        """Embed what is queued; return how many rows."""
        return int(self.value("SELECT embed_pending('t')"))

    def waiting(self) -> int:
        """Return the number of queued rows."""
        return int(self.value("SELECT waiting FROM embedding_queue_status WHERE collection = 't'"))

    def queued(self) -> list[int]:
        """Return the queued keys."""
        rows = self.db.execute("SELECT DISTINCT unnest(keys) FROM siamese.queue_2 ORDER BY 1")
        return [row[0] for row in rows]

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
