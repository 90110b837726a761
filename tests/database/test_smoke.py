"""The main job in one test: images go in, similar images come out."""

from __future__ import annotations

import numpy as np

from pg_siamese_server.encoding.encoder import Encoder
from pg_siamese_server.encoding.images import decode_image
from pg_siamese_server.encoding.registration import inspect_model
from tests.conftest import Connection, Pictures, insert_images
from tests.support import Array, sql_error


def test_similar_images(db: Connection, pictures: Pictures, queries: Pictures, onnx: bytes) -> None:
    """Answers are those of ONNX Runtime and NumPy alone: by a scan, by an index, after changes."""
    spec, _, _ = inspect_model(onnx, {})
    encoder = Encoder(onnx, spec)
    rows = dict(enumerate(zip(pictures.files, pictures.labels, strict=True), 1))
    rows = {key: rows[key] for key in range(1, 201)}
    asked = list(zip(queries.files, queries.labels, strict=True))[:40]

    def embed(files: list[bytes]) -> Array:
        return encoder.embed(np.stack([decode_image(file, spec.input) for file in files]))

    def check(engine: str) -> None:
        keys = np.array(list(rows))
        stored = embed([file for file, _ in rows.values()])
        vectors = embed([file for file, _ in asked])
        hits = 0
        for (query, label), truth in zip(asked, 1 - vectors @ stored.T, strict=True):
            found = db.execute(
                "SELECT * FROM similar_images(%s, k => 4, engine => %s)", (query, engine)
            ).fetchall()
            assert [row[0] for row in found] == [1, 2, 3, 4]
            own = [float(truth[keys == row[1]][0]) for row in found]
            for distances in (own, [row[2] for row in found]):
                np.testing.assert_allclose(distances, np.sort(truth)[:4], atol=1e-4)
            hits += rows[found[0][1]][1] == label
        # The medical encoder knows X-rays better than clothes, which stand in for them.
        assert hits >= (0.7 if queries.name == "pneumoniamnist" else 0.5) * len(asked)

    files, labels = zip(*rows.values(), strict=True)
    assert insert_images(db, list(files), list(labels)) == list(rows)
    check("auto")
    db.execute("SELECT build_index()")
    for engine in ("faiss", "pgvector"):
        check(engine)
    db.execute("DELETE FROM images WHERE image_id < 50")
    rows = {key: row for key, row in rows.items() if key >= 50} | {50: asked[0]}
    db.execute("UPDATE images SET (image, label) = (%s, %s) WHERE image_id = 50", asked[0])
    rows[201] = asked[1]
    assert insert_images(db, [asked[1][0]], [asked[1][1]]) == [201]
    with sql_error("22P03", "image cannot be decoded"):
        insert_images(db, [b"no image"])
    check("auto")
    assert db.execute("SELECT * FROM self_check() WHERE NOT ok").fetchall() == []
