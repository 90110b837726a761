"""Models: registering, refusing, dropping; encoders of other kinds give the vectors they should."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from PIL import Image

from tests.conftest import Connection, Pictures, insert_images
from tests.database.tables import insert_rows, make_collection
from tests.scenarios.gallery import DIMENSION
from tests.support import Array, encode, grid, grid_encoder, one, rows_of, sql_error

SMALL = grid_encoder(("n", 3, 8, 8), pool=4)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def embedding(db: Connection, image: bytes, model: str) -> Array:
    return np.array(one(db, "SELECT embed_image(%s, %s)::real[]", image, model))


@pytest.fixture(scope="module")
def photograph() -> Array:
    """uint8 (60, 90, 3)."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((90, 60), Image.Resampling.BICUBIC))


def test_metadata_is_read(db: Connection, onnx: bytes) -> None:
    row = db.execute(
        "SELECT sha256, dimension, metadata ->> 'name', specification -> 'input' ->> 'width',"
        " specification ->> 'metric', specification -> 'calibration' ->> 'weight',"
        " (specification ->> 'threshold')::real, onnx = %s FROM models WHERE name = 'medical'",
        (onnx,),
    ).fetchone()
    assert row
    assert row[0] == hashlib.sha256(onnx).hexdigest()
    assert (row[1], row[2], row[3], row[4]) == (DIMENSION, "medical", "28", "cosine")
    assert row[5] is not None and row[6] > 0 and row[7]


def test_registering_again(db: Connection, onnx: bytes) -> None:
    first = db.execute("SELECT model_id FROM models WHERE name = 'medical'").fetchone()
    again = db.execute("SELECT register_model('medical', %s)", (onnx,)).fetchone()
    other = db.execute("SELECT register_model('copy', %s)", (onnx,)).fetchone()
    assert again == first != other
    with sql_error("42710", 'model "medical" already exists', "under a new name"):
        db.execute("SELECT register_model('medical', %s, resize => 'crop')", (onnx,))
    with sql_error("42710", 'model "medical" already exists'):
        db.execute("SELECT register_model('medical', %s)", (SMALL,))


def test_foreign_encoder(db: Connection, photograph: Array) -> None:
    """float32 NCHW of another size, with mean, standard deviation and interpolation."""
    model = grid_encoder(("n", 3, 32, 40), pool=8)
    db.execute(
        "SELECT register_model('foreign', %s, mean => %s::real[], std => %s::real[],"
        " interpolation => 'bilinear')",
        (model, MEAN, STD),
    )
    shown = Image.fromarray(photograph).resize((40, 32), Image.Resampling.BILINEAR)
    found = embedding(db, encode(photograph), "foreign")
    np.testing.assert_allclose(found, grid(np.asarray(shown), 8, MEAN, STD), atol=1e-4)


def test_resize_modes(db: Connection, photograph: Array) -> None:
    model = grid_encoder(("n", 3, 30, 30), pool=10)
    image, padded = Image.fromarray(photograph), Image.new("RGB", (30, 30))
    padded.paste(image.resize((30, 20)), (0, 5))
    for mode, shown in (
        ("stretch", image.resize((30, 30))),
        ("crop", image.resize((30, 30), box=(15, 0, 75, 60))),
        ("pad", padded),
    ):
        db.execute("SELECT register_model(%s, %s, resize => %s)", (mode, model, mode))
        found = embedding(db, encode(photograph), mode)
        expected = grid(np.asarray(shown), 10, [0.0] * 3, [1.0] * 3)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (("n", 3, "h", "w"), TensorProto.FLOAT),
        (("n", "h", "w", 3), TensorProto.UINT8),
        (("n", 1, "h", "w"), TensorProto.FLOAT),
        ((1, 3, 16, 24), TensorProto.FLOAT),
        ((4, 16, 24, 3), TensorProto.FLOAT),
    ],
    ids=str,
)
def test_layouts(
    db: Connection, photograph: Array, shape: tuple[int | str, ...], dtype: int
) -> None:
    """Dynamic sizes, NHWC, one channel, and batches of a fixed size."""
    model = grid_encoder(shape, dtype, pool=8)
    db.execute(
        "SELECT register_model('layout', %s, image_width => 24, image_height => 16)", (model,)
    )
    image = Image.fromarray(photograph)
    channels = 1 if 1 in shape[1:] else 3
    small = np.asarray(image.convert("L" if channels == 1 else "RGB").resize((24, 16)))
    scale = 1.0 if dtype == TensorProto.FLOAT else 1 / 255
    expected = grid(small.reshape(16, 24, channels), 8, [0.0] * channels, [scale] * channels)
    np.testing.assert_allclose(embedding(db, encode(photograph), "layout"), expected, atol=1e-4)


@pytest.mark.law(8)
@pytest.mark.parametrize("batch", ["n", 1, 4])
def test_collection_of_a_foreign_encoder(
    db: Connection, pictures: Pictures, batch: int | str
) -> None:
    """Whole batches, part batches and single images give the same vectors."""
    model = grid_encoder((batch, 3, 32, 32), pool=8)
    db.execute("SELECT register_model('foreign', %s, metric => 'l2')", (model,))
    make_collection(db, model="foreign")
    insert_rows(db, range(70), pictures.files[:70])
    ((farthest, count),) = rows_of(
        db,
        "SELECT max(e.embedding <-> embed_image(t.image, 'foreign')), count(*)"
        " FROM t JOIN siamese.embedding_2 AS e ON e.key = t.id",
    )
    assert farthest < 1e-4 and count == 70


def test_limits_of_a_model(db: Connection, photograph: Array) -> None:
    db.execute("SELECT register_model('small', %s, max_pixels => 5399)", (SMALL,))
    db.execute("SELECT register_model('short', %s, max_bytes => 100)", (SMALL,))
    with sql_error("54000", "image", "is too large", "5399 pixels"):
        embedding(db, encode(photograph), "small")
    with sql_error("54000", "bytes is too large", "100 bytes"):
        embedding(db, encode(photograph), "short")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an ONNX file"),
        (b"junk", "not an ONNX file"),
        (grid_encoder(("n", 4, 8, 8), pool=4), "not a batch of images"),
        (grid_encoder(("n", 3, 8, 8), TensorProto.INT64, pool=4), "not a batch of images"),
        (grid_encoder(("n", 3, "h", "w"), pool=4), "image_width and image_height"),
        (grid_encoder(("n", 3, 8, 8), pool=4, offset=float("nan")), "not finite"),
    ],
)
def test_refused(shared: Connection, data: bytes, message: str) -> None:
    with sql_error("22023", message):
        shared.execute("SELECT register_model('bad', %s)", (data,))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("metric => 'dot'", 'unknown metric "dot"'),
        ("resize => 'zoom'", 'unknown resize mode "zoom"'),
        ("interpolation => 'cubic'", 'unknown interpolation "cubic"'),
        ("image_width => 9", "width of 8, not 9"),
        ("mean => '{0,0}'", "mean must have 3"),
        ("std => '{1,1,0}'", "std must be positive"),
        ("calibration => '{\"weight\": 1}'", "both a weight and a bias"),
        ("threshold => 'NaN'", "threshold must be a finite number"),
        ("max_bytes => 0", "must be positive"),
        ("input_range => '{0}'", "input_range must be two different"),
        ("input_range => '{0,NaN}'", "input_range must be two different"),
        ("input_range => '{0,NULL}'", "input_range must be two different"),
        ("input_range => '{{0,1}}'", "input_range must be two different"),
        ("threshold => 1e300", "must be a finite number"),
    ],
)
def test_wrong_argument(shared: Connection, argument: str, message: str) -> None:
    with sql_error("22023", message):
        shared.execute(f"SELECT register_model('bad', %s, {argument})", (SMALL,))


def test_calibration_given_at_registration(db: Connection, photograph: Array) -> None:
    db.execute(
        "SELECT register_model('head', %s, metric => 'l2',"
        """ calibration => '{"weight": -2, "bias": 1}', threshold => 0.25)""",
        (SMALL,),
    )
    one, other = encode(photograph), encode(photograph[:, ::-1].copy())
    row: Any = db.execute(
        "SELECT same_class(%(a)s, %(b)s, 'head'), image_distance(%(a)s, %(b)s, 'head')",
        {"a": one, "b": other},
    ).fetchone()
    assert row[0] == pytest.approx(1 / (1 + np.exp(2 * row[1] - 1)), rel=1e-5)


def test_arguments_as_drivers_send_them(db: Connection) -> None:
    """Double precision and bigint; and what versions before 0.3.0 stored is found the same."""
    model = grid_encoder(("n", 3, "h", "w"), pool=4)
    statement = (
        "SELECT register_model('wide', %s, image_width => 8::{0}, image_height => 8::{0},"
        " mean => ARRAY[0.485, 0.456, 0.406]::{1}[], std => ARRAY[0.229, 0.224, 0.225]::{1}[],"
        " threshold => 0.3::{1}, max_pixels => 9::{0}, max_bytes => 9000::{0})"
    )
    found = {
        db.execute(statement.format(whole, real), (model,)).fetchone()
        for whole in ("smallint", "integer", "bigint")
        for real in ("real", "double precision")
    }
    assert len(found) == 1
    stored = db.execute("SELECT specification -> 'mean' FROM models WHERE name = 'wide'").fetchone()
    assert stored == ([float(np.float32(value)) for value in MEAN],)


def test_input_range(db: Connection) -> None:
    """Values of 12 bits in files of 16, of which nothing in the file tells."""
    db.execute("SELECT register_model('ranged', %s, input_range => ARRAY[0, 4095])", (SMALL,))
    db.execute("SELECT register_model('full', %s)", (SMALL,))
    values = np.random.default_rng(0).integers(0, 4096, (8, 8)).astype(np.uint16)
    eight = np.rint(values / 4095 * 255).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        found = embedding(db, encode(values, kind), "ranged")
        np.testing.assert_allclose(found, embedding(db, encode(eight), "full"), atol=1e-6)
        assert embedding(db, encode(values, kind), "full").max() < 0.07


def test_drop_model(db: Connection, onnx: bytes) -> None:
    db.execute("SELECT register_model('spare', %s)", (onnx,))
    db.execute("SELECT drop_model('spare')")
    assert one(db, "SELECT count(*) FROM models") == 1
    with sql_error("42704", 'model "spare" does not exist'):
        db.execute("SELECT drop_model('spare')")


def test_drop_model_in_use(db: Connection, pictures: Pictures) -> None:
    insert_images(db, pictures.files[:3])
    with sql_error("2BP01", 'cannot drop model "medical"', "images"):
        db.execute("SELECT drop_model('medical')")
    db.execute("SELECT drop_collection('images'), drop_model('medical')")
    assert one(db, "SELECT count(*) FROM models") == 0


@pytest.mark.law(3)
def test_model_whose_bytes_have_changed(db: Connection, pictures: Pictures) -> None:
    """A vector belongs to one model, by its SHA-256."""
    db.execute("UPDATE models SET onnx = onnx || '\\x00'")
    with sql_error("XX001", "SHA-256"):
        insert_images(db, pictures.files[:1])


def test_default_model(db: Connection, onnx: bytes, photograph: Array) -> None:
    image = encode(photograph)
    db.execute("SELECT register_model('other', %s)", (SMALL,))
    row = db.execute("SELECT embed_image(%(i)s) = embed_image(%(i)s, 'medical')", {"i": image})
    assert row.fetchone() == (True,)  # that of collection "images"
    db.execute("SELECT drop_collection('images')")
    with sql_error("22023", "there are 2 models", "Name a model"):
        db.execute("SELECT embed_image(%s)", (image,))
    db.execute("SELECT drop_model('medical')")
    assert one(db, "SELECT vector_dims(embed_image(%s))", image) == 12
    db.execute("SELECT drop_model('other')")
    with sql_error("22023", "there are 0 models", "Register a model first"):
        db.execute("SELECT embed_image(%s)", (image,))
