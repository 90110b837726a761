"""Images outside what the encoder is calibrated for: no probability is claimed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from pg_siamese.datasets import DataNotFoundError, open_dataset
from pg_siamese_server.encoding.specification import InputSpec
from tests.conftest import Connect, Connection, Pictures, insert_images
from tests.support import encode, one, saved


@pytest.fixture(scope="module")
def page() -> bytes:
    """A page of text, as a scanner makes it."""
    image = Image.new("L", (850, 1100), 255)
    draw = ImageDraw.Draw(image)
    for line in range(30):
        draw.text(
            (60, 50 + 32 * line), "Findings and impression. " * 4, 0, ImageFont.load_default(22)
        )
    return saved(image, "PNG")


@pytest.fixture(scope="module")
def others(page: bytes) -> list[bytes]:
    """Pictures of other kinds: a page, noise, a plain colour, photographs where there are any."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    files = [page, encode(noise), encode(np.full((28, 28), 200, np.uint8))]
    try:
        photographs = open_dataset("imagenette", input_spec=InputSpec(224, 224)).test
    except DataNotFoundError:
        return files
    return files + [encode(photo) for photo in photographs.images[::100]]


@pytest.fixture(scope="module")
def known(pictures: Pictures) -> list[bytes]:
    """X-rays, which the medical encoder knows."""
    if pictures.name != "pneumoniamnist":
        pytest.skip("the medical images are not here")
    return pictures.files[:60]


def similarities(db: Connection, query: bytes | int, **arguments: Any) -> list[float | None]:
    """The column ``similarity`` of the nearest five, after a look at the distances."""
    named = "".join(f", {name} => %s" for name in arguments)
    rows = db.execute(
        "SELECT distance, similarity"
        f" FROM similar_images({'image' if isinstance(query, bytes) else 'image_id'} => %s,"
        f" k => 5{named})",
        (query, *arguments.values()),
    ).fetchall()
    assert len(rows) == 5
    assert all(row[0] is not None for row in rows)
    return [row[1] for row in rows]


def test_same_class(shared: Connection, known: list[bytes], others: list[bytes]) -> None:
    assert one(shared, "SELECT same_class(%s, %s)", known[0], known[0]) > 0.5
    for other in others:
        assert one(shared, "SELECT same_class(%s, %s)", known[0], other) is None
        assert one(shared, "SELECT same_class(%s, %s, 'medical')", other, known[0]) is None
        # Not even of itself: what it shows, the encoder can't tell.
        assert one(shared, "SELECT same_class(%s, %s)", other, other) is None
        assert one(shared, "SELECT image_distance(%s, %s)", known[0], other) > 0


def test_most_known_images_are_inside(
    shared: Connection, known: list[bytes], queries: Pictures
) -> None:
    for files in (known, queries.files):
        found = one(
            shared,
            "SELECT array_agg(same_class(f, f) IS NULL) FROM unnest(%s::bytea[]) AS f",
            files,
        )
        assert sum(found) <= 0.05 * len(files)


def test_any_two_match(shared: Connection, known: list[bytes], others: list[bytes]) -> None:
    def match(*images: bytes) -> bool | None:
        found: bool | None = one(shared, "SELECT any_two_match(VARIADIC %s::bytea[])", list(images))
        return found

    page = others[0]
    assert match(known[0], known[0]) is True
    assert match(known[0], page, known[0]) is True
    # Of no pair anything is known.
    assert match(page, page) is None
    assert match(known[0], page) is None
    assert match(known[0], *others) is None


def test_any_two_match_leaves_unknown_images_out(
    shared: Connection, known: list[bytes], page: bytes
) -> None:
    threshold = one(shared, "SELECT (specification ->> 'threshold')::real FROM models")
    far = next(
        file
        for file in known
        if one(shared, "SELECT image_distance(%s, %s)", known[0], file) > threshold
        and one(shared, "SELECT same_class(%s, %s)", file, file) is not None
    )
    assert one(shared, "SELECT any_two_match(%s, %s)", known[0], far) is False
    assert one(shared, "SELECT any_two_match(%s, %s, %s, %s)", page, known[0], far, page) is False


@pytest.mark.parametrize("engine", ["faiss", "pgvector", "auto"])
def test_similarity(db: Connection, known: list[bytes], others: list[bytes], engine: str) -> None:
    ids = insert_images(db, [*known, *others])
    db.execute("SELECT build_index()")
    for _ in range(2):  # the second search of a session is another path
        assert None not in similarities(db, known[1], engine=engine)
        assert None not in similarities(db, ids[1], engine=engine)
        for place, other in enumerate(others):
            assert similarities(db, other, engine=engine) == [None] * 5
            assert similarities(db, ids[len(known) + place], engine=engine) == [None] * 5


def test_similarity_of_rows_that_no_index_holds(
    db: Connection, known: list[bytes], page: bytes
) -> None:
    insert_images(db, known[:30])
    db.execute("SELECT build_index()")
    (pending,) = insert_images(db, [page])
    assert similarities(db, pending) == [None] * 5
    assert similarities(db, pending, filter='{"label": null}') == [None] * 5
    (inside,) = insert_images(db, [known[31]])
    assert None not in similarities(db, inside)


def test_models_without_a_domain_are_as_before(
    connect: Connect, known: list[bytes], page: bytes
) -> None:
    """As models that an earlier version has registered."""
    connect().execute("UPDATE models SET specification = specification - 'domain'")
    db = connect()
    insert_images(db, known[:20])
    assert one(db, "SELECT same_class(%s, %s)", page, page) > 0.5
    assert one(db, "SELECT any_two_match(%s, %s)", page, page) is True
    assert None not in similarities(db, page)


def test_the_specification_holds_the_domain(shared: Connection, onnx: bytes) -> None:
    stored, said = shared.execute(
        "SELECT specification -> 'domain', metadata -> 'domain' FROM models"
    ).fetchone() or (None, None)
    assert stored == said
    assert stored
    assert len(str(stored)) < 16_384
    # The same file is the same model.
    assert one(shared, "SELECT register_model('medical', %s)", onnx) == 1
