"""``thumbnail`` and ``data_uri``: images as small PNG files, and these as text."""

from __future__ import annotations

import base64
import io

import numpy as np
import psycopg
import pytest
from PIL import Image

from pg_siamese_server.encoding import drawing
from pg_siamese_server.encoding.specification import InputSpec
from tests import dicom_files
from tests.conftest import Connection, Pictures
from tests.database import test_frames as films
from tests.database.tables import make_collection
from tests.support import Array, encode, one, rows_of, saved, sql_error


def shown(db: Connection, arguments: str, *values: object) -> Array:
    image = Image.open(io.BytesIO(one(db, f"SELECT thumbnail({arguments})", *values)))
    assert image.format == "PNG"
    return np.asarray(image)


def test_as_outside_the_server(shared: Connection, pictures: Pictures) -> None:
    wide = encode(np.repeat(pictures.pixels[0], 30, axis=1))
    for file in (*pictures.files[:3], wide):
        assert one(shared, "SELECT thumbnail(%s)", file) == drawing.thumbnail(file, 128)
        assert one(shared, "SELECT thumbnail(%s, 20)", file) == drawing.thumbnail(file, 20)


def test_dicom(shared: Connection) -> None:
    values = np.linspace(-1000, 1000, 64 * 64).round().astype(np.int16).reshape(64, 64)
    ct = {"Modality": "CT", "RescaleSlope": "1", "RescaleIntercept": "0"}
    data = dicom_files.image(values, WindowCenter="0", WindowWidth="2000", **ct)
    for arguments, window in (("%s", (0, 2000)), ("%s, dicom_window => 'lung'", (-600, 1500))):
        wanted = dicom_files.windowed(values, *window)
        assert np.array_equal(shown(shared, arguments, data), wanted)
    with sql_error("22023", 'unknown window "lungs"'):
        shown(shared, "%s, dicom_window => 'lungs'", data)


def test_frames(shared: Connection) -> None:
    file = films.file(1, 3)
    first, last = (shown(shared, f"%s, frame => {frame}", file) for frame in (1, 3))
    assert not np.array_equal(first, last)
    with sql_error("22023", "frame 4 is out of range"):
        shown(shared, "%s, frame => 4", file)


def test_limits_and_window_of_a_collection(db: Connection) -> None:
    make_collection(db, "small", max_pixels=500)
    make_collection(db, "chests", dicom_window="lung")
    file = encode(np.zeros((28, 28), np.uint8))
    assert shown(db, "%s", file).shape == (28, 28)
    with sql_error("54000", "28 x 28 pixels is too large", "limit is 500 pixels"):
        shown(db, "%s, collection => 'small'", file)
    values = np.linspace(-1000, 1000, 64 * 64).round().astype(np.int16).reshape(64, 64)
    data = dicom_files.image(values, Modality="CT", RescaleSlope="1", RescaleIntercept="0")
    lung = dicom_files.windowed(values, -600, 1500)
    assert np.array_equal(shown(db, "%s, collection => 'chests'", data), lung)
    bone = shown(db, "%s, collection => 'chests', dicom_window => 'bone'", data)
    assert np.array_equal(bone, dicom_files.windowed(values, 400, 1800))


def test_limits_without_a_collection(shared: Connection) -> None:
    spec = InputSpec(1, 1)
    large = saved(Image.new("1", (5001, 5000)), "PNG")
    assert spec.max_pixels < 5001 * 5000
    with sql_error("54000", "5001 x 5000 pixels is too large"):
        shown(shared, "%s", large)
    with sql_error("54000", "is too large", f"limit is {spec.max_bytes} bytes"):
        shown(shared, "repeat('x', %s)::bytea", spec.max_bytes + 1)


def test_refused(shared: Connection, pictures: Pictures) -> None:
    for given, *error in (
        ("size => 15", "22023", "size must be between 16 and 1024"),
        ("size => 1025", "22023", "size must be between 16 and 1024"),
        ("collection => 'scans'", "42704", 'collection "scans" does not exist'),
    ):
        with sql_error(*error):
            shown(shared, f"%s, {given}", pictures.files[0])
    for file, message in ((b"no image", "image cannot be decoded"), (b"", "image is empty")):
        with sql_error("22P03", message):
            shown(shared, "%s", file)


@pytest.mark.law(14)
def test_no_image_has_no_thumbnail(shared: Connection) -> None:
    assert one(shared, "SELECT thumbnail(NULL)") is None
    with sql_error("22004", "size is null"):
        shared.execute("SELECT thumbnail(NULL, NULL)")


@pytest.mark.law(5)
def test_it_stops(db: Connection) -> None:
    random = np.random.default_rng(0)
    file = encode(random.integers(0, 256, (1500, 1500, 3), dtype=np.uint8))
    one(db, "SELECT thumbnail(%s)", file)  # the first use of a session loads its packages
    db.execute("SET statement_timeout = '20ms'")
    with pytest.raises(psycopg.errors.QueryCanceled):
        one(db, "SELECT thumbnail(%s, 1024)", file)  # which takes several times as long
    db.execute("RESET statement_timeout")
    assert one(db, "SELECT thumbnail(%s)", file)


def test_data_uri(shared: Connection, pictures: Pictures) -> None:
    for file in (pictures.files[0], encode(np.zeros((500, 1), np.uint8))):
        found = one(shared, "SELECT data_uri(%s)", file)
        head, _, text = found.partition(",")
        assert head == "data:image/png;base64" and base64.b64decode(text, validate=True) == file
    assert one(shared, "SELECT data_uri(NULL)") is None


@pytest.mark.parametrize(
    "file", [b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", encode(np.zeros((9, 9)) > 1, "BMP")]
)
def test_only_png_becomes_a_data_uri(shared: Connection, file: bytes) -> None:
    with sql_error("22023", "png is not a PNG file", "data_uri(thumbnail(image))"):
        shared.execute("SELECT data_uri(%s)", (file,))


def test_on_many_rows(shared: Connection, pictures: Pictures) -> None:
    rows = rows_of(
        shared,
        "SELECT data_uri(thumbnail(i, 16)) FROM unnest(%s::bytea[]) AS i",
        pictures.files[:20],
    )
    assert len({row[0] for row in rows}) == 20
