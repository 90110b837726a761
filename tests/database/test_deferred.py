"""Deferred embedding: statements queue keys, embed_pending takes them; vectors stay right."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Connection, Pictures


class Deferred:
    """Table ``t (id, image, note)`` with a deferred collection of number 2."""

    def __init__(self, db: Connection, files: list[bytes]) -> None:
        self.db = db
        self.files = files

    def insert(self, *places: int) -> None:
        self.db.execute(
            "INSERT INTO t SELECT * FROM unnest(%s::int[], %s::bytea[])",
            (list(places), [self.files[place] for place in places]),
        )

    def value(self, sql: str, *values: object) -> Any:
        row = self.db.execute(sql, values or None).fetchone()
        return row[0] if row else None

    def embed(self, *arguments: object) -> int:
        return int(self.value("SELECT embed_pending('t')"))

    def vectors(self) -> set[int]:
        return {row[0] for row in self.db.execute("SELECT key FROM siamese.embedding_2")}

    def waiting(self) -> int:
        return int(self.value("SELECT waiting FROM embedding_queue_status"))

    def queued(self) -> list[int]:
        rows = self.db.execute("SELECT unnest(keys) FROM siamese.queue_2 ORDER BY 1")
        return [row[0] for row in rows]

    def check_vectors(self) -> None:
        """Every vector that is there is that of the image that is there; none is without a row."""
        wrong = self.db.execute(
            "SELECT e.key FROM siamese.embedding_2 AS e LEFT JOIN t ON t.id = e.key"
            " WHERE t.id IS NULL OR e.embedding <=> embed_image(t.image) > 1e-5"
        ).fetchall()
        assert wrong == []

    def check(self) -> None:
        """After embedding, every row has its vector, and nothing waits."""
        self.check_vectors()
        self.embed()
        self.check_vectors()
        keys = {row[0] for row in self.db.execute("SELECT id FROM t")}
        assert self.vectors() == keys
        assert self.waiting() == 0


@pytest.fixture
def table(db: Connection, pictures: Pictures) -> Deferred:
    db.execute("CREATE TABLE t (id integer PRIMARY KEY, image bytea, note text)")
    db.execute("SELECT create_collection('t', 't', embed => 'deferred')")
    return Deferred(db, pictures.files)


def test_insert_queues_and_embed_pending_embeds(table: Deferred) -> None:
    table.insert(*range(200))
    assert table.vectors() == set()
    assert table.waiting() == 200
    assert table.queued() == list(range(200))
    assert table.value("SELECT embed_pending('t', 70)") == 70
    assert (table.waiting(), len(table.vectors())) == (130, 70)
    assert table.value("SELECT embed_pending()") == 130
    assert table.value("SELECT count(*) FROM siamese.queue_2") == 0
    table.check()
