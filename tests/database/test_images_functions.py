"""Functions on images that are not stored: embedding, distance, the Siamese head."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pg_siamese_server.encoding.encoder import Encoder
from pg_siamese_server.encoding.images import decode_image
from pg_siamese_server.encoding.registration import inspect_model
from tests.conftest import Connect, Connection, Pictures, insert_images
from tests.support import Array, column_of, encode, one, rows_of, sql_error


@pytest.fixture(scope="module")
def outside(onnx: bytes) -> Callable[[bytes], Array]:
    """Embed an image in this process, without PostgreSQL."""
    spec, _, _ = inspect_model(onnx, {})
    encoder = Encoder(onnx, spec)
    return lambda image: encoder.embed(decode_image(image, spec.input)[None])[0]


@pytest.mark.law(8)
def test_embed_image(
    shared: Connection, pictures: Pictures, outside: Callable[[bytes], Array]
) -> None:
    """Inside PostgreSQL and outside, the same pixels give the same vector."""
    for image in pictures.files[:20]:
        found = np.array(one(shared, "SELECT embed_image(%s)::real[]", image))
        assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)
        assert found @ outside(image) >= 0.9999


def test_format_does_not_matter(shared: Connection, pictures: Pictures) -> None:
    for kind in ("BMP", "TIFF", "GIF"):
        other = encode(pictures.pixels[0], kind)
        assert one(shared, "SELECT image_distance(%s, %s)", pictures.files[0], other) < 1e-6


def test_image_distance(
    shared: Connection, pictures: Pictures, outside: Callable[[bytes], Array]
) -> None:
    a, b = pictures.files[:2]
    found = one(shared, "SELECT image_distance(%s, %s)", a, b)
    assert found == pytest.approx(1 - outside(a) @ outside(b), abs=1e-5)
    assert one(shared, "SELECT image_distance(%s, %s)", b, a) == pytest.approx(found, abs=1e-6)
    assert one(shared, "SELECT image_distance(%s, %s, 'medical')", a, b) == found
    assert one(shared, "SELECT image_distance(%s, %s)", a, a) == 0
    assert found == pytest.approx(
        one(shared, "SELECT embed_image(%s) <=> embed_image(%s)", a, b), abs=1e-5
    )


@pytest.fixture
def boundless(connect: Connect) -> Connection:
    """A database whose model claims to know every image, unlike those of test_domain.py."""
    connect().execute("UPDATE models SET specification = specification - 'domain'")
    return connect()


def test_same_class(boundless: Connection, pictures: Pictures) -> None:
    shared = boundless
    head = one(shared, "SELECT specification -> 'calibration' FROM models")
    for other in pictures.files[1:5]:
        distance = one(shared, "SELECT image_distance(%s, %s)", pictures.files[0], other)
        found = one(shared, "SELECT same_class(%s, %s)", pictures.files[0], other)
        assert found == pytest.approx(
            1 / (1 + np.exp(-(head["weight"] * distance + head["bias"]))), rel=1e-4
        )
    assert one(shared, "SELECT same_class(%s, %s)", *pictures.files[:1] * 2) > 0.5


def test_any_two_match(boundless: Connection, pictures: Pictures) -> None:
    shared = boundless
    threshold = one(shared, "SELECT (specification ->> 'threshold')::real FROM models")
    blank, half = np.zeros((28, 28), np.uint8), np.zeros((28, 28), np.uint8)
    half[:, 14:] = 255
    files = [pictures.files[0], encode(blank), encode(half), encode(255 - half)]
    distances = {
        (i, j): one(shared, "SELECT image_distance(%s, %s)", files[i], files[j])
        for i in range(4)
        for j in range(i)
    }
    apart = [pair for pair, distance in distances.items() if distance > threshold]
    assert apart, "the encoder can't tell a picture from a pattern"
    for pair in apart:
        images = [files[place] for place in pair]
        assert one(shared, "SELECT any_two_match(%s, %s)", *images) is False
        # With a copy of one of them, two match, wherever they are in the list.
        assert one(shared, "SELECT any_two_match(%s, %s, %s)", *images, images[0]) is True
        assert one(shared, "SELECT any_two_match(%s, %s, %s)", images[1], *images) is True
        assert one(shared, "SELECT any_two_match(VARIADIC %s::bytea[])", images) is False


def test_limits_of_any_two_match(shared: Connection, pictures: Pictures) -> None:
    with sql_error("22023", "at least two images"):
        one(shared, "SELECT any_two_match(%s)", pictures.files[0])
    with sql_error("22023", "at least two images"):
        one(shared, "SELECT any_two_match(VARIADIC NULL::bytea[])")
    with sql_error("54000", "at most 100 images"):
        one(shared, "SELECT any_two_match(VARIADIC %s::bytea[])", [pictures.files[0]] * 101)


def test_models_without_head(db: Connection, pictures: Pictures, onnx: bytes) -> None:
    db.execute("UPDATE models SET specification = specification - 'calibration' - 'threshold'")
    a, b = pictures.files[:2]
    with sql_error("55000", "no Siamese head", "image_distance"):
        one(db, "SELECT same_class(%s, %s)", a, b)
    with sql_error("55000", "no decision threshold"):
        one(db, "SELECT any_two_match(%s, %s)", a, b)
    insert_images(db, pictures.files[:5])
    assert one(db, "SELECT bool_and(similarity IS NULL) FROM similar_images(%s)", a) is True


def test_classify_image(db: Connection, pictures: Pictures, queries: Pictures) -> None:
    insert_images(db, pictures.files[:100], pictures.labels[:100])
    query = queries.files[0]
    labels = column_of(
        db,
        "SELECT label FROM similar_images(%s, k => 9) JOIN images USING (image_id) ORDER BY rank",
        query,
    )
    expected = [(label, labels.count(label)) for label in dict.fromkeys(labels)]
    expected.sort(key=lambda item: -item[1])
    found = db.execute("SELECT * FROM classify_image(%s, k => 9)", (query,)).fetchall()
    assert [(label, votes) for label, votes, _ in found] == expected
    assert [share for _, _, share in found] == pytest.approx([votes / 9 for _, votes in expected])


def test_classify_by_other_columns(db: Connection, pictures: Pictures) -> None:
    insert_images(db, pictures.files[:10])
    query = pictures.files[0]
    assert rows_of(db, "SELECT * FROM classify_image(%s, k => 4)", query) == []  # none has a label
    db.execute('ALTER TABLE images ADD "Odd ""one""" int DEFAULT 7')
    sql = "SELECT * FROM classify_image(%s, 4, 'images', 'Odd \"one\"')"
    assert db.execute(sql, (query,)).fetchall() == [("7", 4, 1.0)]
    with sql_error("42703", 'column "nothing"'):
        db.execute("SELECT classify_image(%s, label_column => 'nothing')", (query,))
    with sql_error("22004", "label_column is null"):
        db.execute("SELECT classify_image(%s, label_column => NULL)", (query,))
    db.execute("DELETE FROM images")
    assert db.execute("SELECT * FROM classify_image(%s)", (query,)).fetchall() == []
