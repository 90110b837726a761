"""DICOM files in the image column: embedded, searched and refused like any other image."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import psycopg
import pytest
from PIL import Image
from pydicom import uid

from pg_siamese.worker import Options, Worker
from pg_siamese_server.encoding import windows
from tests import dicom_files
from tests.conftest import Connect, Connection
from tests.support import column_of, one, sql_error
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


def test_the_documentation_of_tags(db: Connection) -> None:
    text = (ROOT / "docs" / "dicom.md").read_text()
    blocks = re.findall(r"^```sql\n(.*?)^```", text, re.M | re.S)
    (block,) = [each for each in blocks if "dicom_tags" in each]
    db.execute(block.encode())
    db.execute("INSERT INTO films (id, image) VALUES (1, %s)", (tagged(),))
    row = db.execute("SELECT patient, taken FROM films").fetchone()
    assert row == ("p 17", "2024-02-29")
    found = tags(db, tagged())
    assert found["StudyDate"] == "2024-02-29" and "Manufacturer" not in found


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


# --- tags ----------------------------------------------------------------------------------------


def tagged(**elements: Any) -> bytes:
    given = {
        "PatientName": "Müller^Anna",
        "PatientID": "p 17",
        "StudyDate": "20240229",
        "StudyTime": "101530.5",
        "Modality": "MG",
        "Manufacturer": "Maker",
        "PixelSpacing": ["0.5", "0.25"],
        "KVP": "28",
        "SpecificCharacterSet": "ISO_IR 192",
        **elements,
    }
    data = dicom_files.dataset(pictures(1)[0], **given)
    block = data.private_block(0x0009, "maker", create=True)
    block.add_new(1, "LO", "secret")
    return dicom_files.written(data)


def tags(db: Connection, image: bytes) -> Any:
    row = db.execute("SELECT siamese.dicom_tags(%s)", (image,)).fetchone()
    assert row is not None
    return row[0]


def test_tags_of_the_list(db: Connection) -> None:
    found = tags(db, tagged())
    assert found["Modality"] == "MG" and found["KVP"] == 28
    assert found["PixelSpacing"] == [0.5, 0.25] and found["Rows"] == 64
    text = str(found)
    for private in ("Anna", "p 17", "secret", "2024", "PixelData"):
        assert private not in text
    db.execute(
        "INSERT INTO siamese.dicom_keywords VALUES ('PatientName', true), ('StudyDate', true),"
        " ('StudyTime', true), ('Manufacturer', false)"
    )
    found = tags(db, tagged())
    assert found["PatientName"] == {"Alphabetic": "Müller^Anna"}
    assert found["StudyDate"] == "2024-02-29" and found["StudyTime"] == "10:15:30.5"
    assert "Manufacturer" not in found and "PatientID" not in found
    db.execute("INSERT INTO siamese.dicom_keywords VALUES ('Patient', true)")
    with sql_error("22023", '"Patient" is not a DICOM keyword', "PS3.6"):
        tags(db, tagged())


def test_tags_of_what_is_no_dicom(db: Connection) -> None:
    assert tags(db, png(pictures(1)[0])) is None
    assert tags(db, tagged()[:200]) is None
    broken = tagged(KVP="28").replace(b"DS\x02\x0028", b"DS\x02\x00xy")
    found = tags(db, broken)
    assert "KVP" not in found and found["Modality"] == "MG"


def test_tags_of_what_is_no_dicom_load_nothing(db: Connection) -> None:
    picture = png(pictures(1)[0])
    db.execute(
        "SELECT siamese.dicom_tags(i), siamese.dicom_tag(i, 'PatientID')"
        " FROM (VALUES (%s::bytea), (NULL)) AS v (i)",
        (picture,),
    )
    # Fails if the package is there.
    db.execute("DO LANGUAGE plpython3u $$ import sys; assert 'pydicom' not in sys.modules $$")
    assert tags(db, tagged())
    with pytest.raises(psycopg.errors.ExternalRoutineException):
        db.execute("DO LANGUAGE plpython3u $$ import sys; assert 'pydicom' not in sys.modules $$")


def test_a_tag_in_a_generated_column(db: Connection) -> None:
    db.execute(
        "CREATE TABLE public.films (id bigint PRIMARY KEY, image bytea,"
        " patient text GENERATED ALWAYS AS (siamese.dicom_tag(image, 'PatientID')) STORED)"
    )
    db.execute(
        "INSERT INTO public.films (id, image) VALUES (1, %s), (2, %s), (3, NULL)",
        (tagged(), png(pictures(1)[0])),
    )
    rows = db.execute("SELECT id, patient FROM public.films ORDER BY id").fetchall()
    assert rows == [(1, "p 17"), (2, None), (3, None)]
    for keyword, expected in (
        ("PatientName", "Müller^Anna"),
        ("StudyDate", "2024-02-29"),
        ("PixelSpacing", "[0.5, 0.25]"),
        ("KVP", "28"),
        ("PixelData", None),
        ("BodyPartExamined", None),
    ):
        row = db.execute("SELECT siamese.dicom_tag(%s, %s)", (tagged(), keyword)).fetchone()
        assert row == (expected,)


# --- windows -------------------------------------------------------------------------------------


def slices(count: int) -> list[bytes]:
    """Return CT images of 12 bits in Hounsfield units."""
    given = {"Modality": "CT", "RescaleIntercept": "-1024", "RescaleSlope": "1"}
    window = {"WindowCenter": "40", "WindowWidth": "400"}
    return [
        dicom_files.image(values, BitsStored=12, **given, **window) for values in pictures(count)
    ]


def embedded(db: Connection, image: bytes, *arguments: str) -> str:
    places = ", ".join(("%s", *arguments))
    return str(one(db, f"SELECT siamese.embed_image({places})::text", image))


def test_a_window_by_argument(db: Connection) -> None:
    (image,) = slices(1)
    own = embedded(db, image)
    assert embedded(db, image, "dicom_window => ''") == own
    assert embedded(db, image, "dicom_window => '40/400'") == own
    assert embedded(db, image, "'', 'LUNG'") == embedded(db, image, "'', '-600/1500'") != own
    picture = png(pictures(1)[0])
    assert embedded(db, picture, "dicom_window => 'lung'") == embedded(db, picture)


def test_the_documentation_of_windows(db: Connection) -> None:
    text = (ROOT / "docs" / "dicom.md").read_text()
    (block,) = (
        each for each in re.findall(r"^```sql\n(.*?)^```", text, re.M | re.S) if "chests" in each
    )
    db.execute("CREATE TABLE public.chests (id bigint PRIMARY KEY, image bytea)")
    creation, embedding = block.strip().rstrip(";").split(";\n")
    db.execute(creation.encode())
    (image,) = slices(1)
    row = db.execute(embedding.replace("$1", "%s").encode(), (image,)).fetchone()
    assert row == (embedded(db, image),)
    presets = re.findall(r"^\| `(\w+)` \| (-?\d+) \| (\d+) \|$", text, re.M)
    assert {name: (float(centre), float(width)) for name, centre, width in presets} == (
        windows.PRESETS
    )


@pytest.mark.parametrize(
    "call",
    [
        "embed_image('', dicom_window => {})",
        "create_collection('films', 'public.films', dicom_window => {})",
    ],
)
def test_windows_that_are_refused(db: Connection, call: str) -> None:
    db.execute("CREATE TABLE public.films (id bigint PRIMARY KEY, image bytea)")
    with sql_error("22023", 'unknown window "lungs"', "lung, mediastinum"):
        db.execute("SELECT siamese." + call.format("'lungs'"))
    with sql_error("22004", "dicom_window is null"):
        db.execute("SELECT siamese." + call.format("NULL"))


def test_a_collection_renders_all_its_images_with_its_window(
    db: Connection, connect: Connect, dsn: str, embed: str
) -> None:
    images = slices(6)
    session = connect()
    db.execute("CREATE TABLE public.t (id bigint PRIMARY KEY, image bytea)")
    db.execute("INSERT INTO public.t VALUES (0, %s)", (images[0],))
    db.execute(
        "SELECT siamese.create_collection('t', 'public.t', embed => %s, dicom_window => 'lung')",
        (embed,),
    )
    for number, image in enumerate(images[1:], 1):
        db.execute("INSERT INTO public.t VALUES (%s, %s)", (number, image))
        if number == 3:
            db.execute("SELECT siamese.embed_pending()")
    Worker(Options(dsn, once=True, rebuild_pending=None)).run()
    vectors = "SELECT e.embedding <=> siamese.embed_image(t.image, dicom_window => %s)"
    vectors += " FROM public.t AS t JOIN siamese.embedding_2 AS e ON e.key = t.id ORDER BY t.id"
    assert column_of(db, vectors, "lung") == [pytest.approx(0, abs=1e-6)] * 6
    assert min(column_of(db, vectors, "")) > 1e-3
    db.execute("SELECT siamese.build_index('t')")
    search = "SELECT image_id, distance FROM siamese.similar_images(%s, 1, 't')"
    for number, image in enumerate(images):  # the fast path comes with the third
        assert session.execute(search, (image,)).fetchone() == (number, pytest.approx(0, abs=1e-6))
    assert one(db, "SELECT dicom_window FROM collection_status WHERE collection = 't'") == "lung"
