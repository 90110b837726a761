"""A session that outlives the extension: another one, with the same numbers, takes its place."""

from __future__ import annotations

import pytest

from tests.conftest import Connect, Connection, Pictures
from tests.database.tables import insert_rows, make_collection, register_grid
from tests.support import column_of

SEARCH = "SELECT (item).id FROM siamese.similar_rows(NULL::t, %s, k => 5) AS s"


@pytest.mark.parametrize("is_tidy", [True, False])
@pytest.mark.parametrize("other", ["medical", "grid"])
def test_drop_extension_and_create_it_again(
    db: Connection, connect: Connect, pictures: Pictures, onnx: bytes, other: str, is_tidy: bool
) -> None:
    make_collection(db)
    insert_rows(db, range(1, 101), pictures.files[:100])
    db.execute("SELECT siamese.build_index('t')")
    session = connect()
    for query in pictures.files[:3]:
        column_of(session, SEARCH, query)
    if is_tidy:
        db.execute("SELECT siamese.drop_collection('t'), siamese.drop_collection('images')")
    db.execute("DROP EXTENSION pg_siamese CASCADE")
    db.execute("DELETE FROM t")
    db.execute("CREATE EXTENSION pg_siamese")
    db.execute("SELECT siamese.register_model('medical', %s)", (onnx,))
    db.execute("SELECT siamese.create_collection()")
    if other == "grid":
        register_grid(db)
    db.execute("SELECT siamese.create_collection('t', 'public.t', model => %s)", (other,))
    insert_rows(db, range(1, 101), pictures.files[100:200])
    db.execute("SELECT siamese.build_index('t')")
    for query in pictures.files[100:110]:
        exact = column_of(db, SEARCH.replace("k =>", "engine => 'pgvector', k =>"), query)
        assert column_of(session, SEARCH, query) == exact
