"""The main job in one test: images go in, similar images come out."""

from __future__ import annotations

from tests.conftest import Connection, Pictures, insert_images


def test_similar_images(db: Connection, pictures: Pictures, queries: Pictures) -> None:
    insert_images(db, pictures.files[:200], pictures.labels[:200])
    db.execute("SELECT build_index()")
    found = db.execute("SELECT * FROM similar_images(%s, k => 4)", (queries.files[0],)).fetchall()
    assert [row[0] for row in found] == [1, 2, 3, 4]
