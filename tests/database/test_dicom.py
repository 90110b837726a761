"""DICOM files in the image column: embedded, searched and refused like any other image."""

from __future__ import annotations

import io
import re

import numpy as np
import psycopg
import pytest
from PIL import Image
from pydicom import uid

from tests import dicom_files
from tests.conftest import Connection
from tests.support import sql_error
from tools.project import ROOT

SHAPE = (64, 64)


def pictures(count: int) -> list[np.ndarray]:
    """Return pictures of 12 bits: blobs at different places."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    places = np.random.default_rng(3).uniform(10, 54, (count, 2))
    return [
        (4095 * np.exp(-((y - top) ** 2 + (x - left) ** 2) / 200)).astype(np.uint16)
        for top, left in places
    ]


def dicom(values: np.ndarray, syntax: str = uid.ExplicitVRLittleEndian) -> bytes:
    window = {"WindowCenter": "2048", "WindowWidth": "4096"}
    return dicom_files.image(values, syntax, BitsStored=12, **window)


def png(values: np.ndarray) -> bytes:
    target = io.BytesIO()
    shares = (values - 2047.5) / 4095 + 0.5
    Image.fromarray(np.floor(shares * 255 + 0.5).astype(np.uint8)).save(target, "PNG")
    return target.getvalue()


def test_found_by_its_picture(db: Connection) -> None:
    parts = pictures(12)
    insert = "INSERT INTO siamese.images (image) VALUES (%s) RETURNING image_id"
    keys = []
    for number, values in enumerate(parts):
        syntax = dicom_files.SYNTAXES[number % 4 if number % 4 != 2 else 0]
        row = db.execute(insert, (dicom(values, syntax),)).fetchone()
        assert row is not None
        keys.append(row[0])
    db.execute("SELECT siamese.build_index()")
    for key, values in zip(keys, parts, strict=True):
        found = db.execute(
            "SELECT image_id, distance FROM siamese.similar_images(%s, 1)", (png(values),)
        ).fetchone()
        assert found is not None
        assert found[0] == key and found[1] < 1e-5


def test_the_documentation(db: Connection) -> None:
    text = (ROOT / "docs" / "dicom.md").read_text()
    block = re.findall(r"^```sql\n(.*?)^```", text, re.M | re.S)[0]
    file = dicom(pictures(1)[0])
    lines = re.sub(r" *--.*", "", block).replace("$1", "%s")
    insertion, search = lines.strip().rstrip(";").split(";\n")
    db.execute(insertion.encode(), (file,))
    found = db.execute(search.encode(), (file,)).fetchall()
    assert [(row[0], row[2]) for row in found] == [(1, pytest.approx(0, abs=1e-6))]


def test_a_bad_one_is_refused_by_name(db: Connection) -> None:
    whole = dicom(pictures(1)[0])
    insert = "INSERT INTO siamese.images (image) VALUES (%s)"
    with sql_error("22P03", "DICOM image cannot be decoded", "cut short"):
        db.execute(insert, (whole[:-100],))
    db.execute("SELECT siamese.alter_collection('images', on_error => 'quarantine')")
    db.execute(insert, (whole[:-100],))
    db.execute(insert, (whole,))
    row = db.execute("SELECT sqlstate, message FROM siamese.embedding_failures").fetchone()
    assert row is not None
    assert row[0] == "22P03" and row[1].startswith("DICOM image cannot be decoded")
    assert db.execute("SELECT count(*) FROM siamese.embedding_1").fetchone() == (1,)


def test_a_cancel_ends_a_long_file(db: Connection) -> None:
    """Very many elements: the reader looks at interrupts."""
    data = dicom(pictures(1)[0])
    place = data.index(b"\x28\0\2\0")
    data = data[:place] + bytes.fromhex("0900101053480000") * 150_000 + data[place:]
    with db.transaction(), pytest.raises(psycopg.errors.QueryCanceled):
        db.execute("SET LOCAL statement_timeout = '50ms'")
        db.execute("SELECT siamese.embed_image(%s)", (data,))
