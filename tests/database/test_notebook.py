"""``pg_siamese.show`` and ``pg_siamese.similar``: pictures and searches in a notebook."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from PIL import Image
from psycopg.rows import dict_row

import pg_siamese
from pg_siamese.client import notebook
from pg_siamese.client.connection import CommandError
from pg_siamese_server.errors import SiameseError
from tests import dicom_files
from tests.conftest import Connection, Pictures, insert_images
from tests.database import test_frames as films
from tests.database.tables import make_collection
from tests.support import encode


class Page(HTMLParser):
    """Tags and texts of the cells of a table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def images(self) -> list[Image.Image]:
        """Return the pictures, each from the data URI of its tag."""
        found: list[Image.Image] = []
        for tag, attributes in self.tags:
            if tag == "img":
                head, _, data = (attributes["src"] or "").partition(",")
                assert head == "data:image/png;base64"
                found.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
        return found


def shown(*arguments: Any, **options: Any) -> Page:
    return Page(notebook.show(*arguments, **options)._repr_html_())


def test_rows_with_pictures(shared: Connection, pictures: Pictures) -> None:
    query = "SELECT n AS number, i AS picture, NULL AS none FROM unnest(%s::bytea[])"
    found = pg_siamese.show(
        shared, query + " WITH ORDINALITY AS u (i, n)", (pictures.files[:3],), size=20
    )
    page = Page(found._repr_html_())
    assert page.texts == ["number", "picture", "none", "1", "2", "3"]
    for image in page.images():
        assert image.format == "PNG" and max(image.size) == 20
    assert len(page.images()) == 3
    lines = repr(found).splitlines()
    assert lines[0].split() == ["number", "picture", "none"] and len(lines) == 4
    assert lines[1].split(maxsplit=1) == ["1", f"image, {len(pictures.files[0]):,} bytes"]


def test_what_is_no_image_is_text(shared: Connection) -> None:
    found = notebook.show(
        shared, "SELECT 'no image'::bytea, ''::bytea, NULL::bytea, '{1,2}'::int[]"
    )
    assert Page(found._repr_html_()).texts[4:] == ["8 bytes", "0 bytes", "[1, 2]"]
    assert not Page(found._repr_html_()).images()


def test_dicom(shared: Connection) -> None:
    values = np.linspace(-1000, 1000, 32 * 32).round().astype(np.int16).reshape(32, 32)
    data = dicom_files.image(values, Modality="CT", RescaleSlope="1", RescaleIntercept="0")
    (image,) = shown(shared, "SELECT %s::bytea", (data,), dicom_window="lung").images()
    assert np.array_equal(np.asarray(image), dicom_files.windowed(values, -600, 1500))
    with pytest.raises(SiameseError, match='unknown window "lungs"'):
        notebook.show(shared, "SELECT 1", dicom_window="lungs")


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;\x1b[31m\n\u202e$x$"


def test_text_is_escaped(shared: Connection) -> None:
    """Of values and of names, in HTML and for terminals."""
    name = '"' + HOSTILE.replace('"', '""')[:60] + '"'
    query = psycopg.sql.SQL("SELECT %s AS {}, %s::bytea").format(psycopg.sql.SQL(name))
    svg = b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"
    found = notebook.show(shared, query.as_string(shared), (HOSTILE, svg))
    page = Page(found._repr_html_())
    tags = {tag for tag, _ in page.tags}
    assert tags == {"table", "thead", "tbody", "tr", "th", "td"}
    assert page.texts[2].startswith("<script>alert(1)</script>\"'><img")
    classes = page.tags[0][1]["class"]
    assert classes is not None and "mathjax_ignore" in classes.split()
    assert all(character.isprintable() or character == "\n" for character in repr(found))


def test_a_hostile_image_is_drawn_again(shared: Connection) -> None:
    """What follows a picture in its file does not come along."""
    file = encode(np.zeros((9, 9), np.uint8)) + b"<script>alert(1)</script>"
    found = notebook.show(shared, "SELECT %s::bytea", (file,))
    (value,) = found.rows[0]
    assert isinstance(value, notebook.Binary) and value.png is not None
    assert b"script" not in value.png and value._repr_png_() == value.png


def test_rows_are_bounded(shared: Connection) -> None:
    query = "SELECT n, 1 / (52 - n) FROM generate_series(1, 100) AS n"  # the 52nd fails
    found = notebook.show(shared, query, rows=50)
    assert len(found.rows) == 50 and not found.is_complete
    assert found._repr_html_().endswith("first 50 rows")
    assert repr(found).endswith("first 50 rows")
    every = notebook.show(shared, "SELECT n FROM generate_series(1, 50) AS n")
    assert every.is_complete and "first" not in repr(every)
    for rows in (0, 1001):
        with pytest.raises(ValueError, match="rows must be between 1 and 1000"):
            notebook.show(shared, "SELECT 1", rows=rows)
    with pytest.raises(SiameseError, match="size must be between 16 and 1024"):
        notebook.show(shared, "SELECT 1", size=2000)


def test_text_and_pictures_are_bounded(
    shared: Connection, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(notebook.show(shared, "SELECT repeat('a', 100000)")._repr_html_()) < 1000
    monkeypatch.setattr(notebook, "MAX_PICTURE_BYTES", 1000)
    query = "SELECT i FROM unnest(%s::bytea[]) AS i"
    page = shown(shared, query, (pictures.files[:20],))
    assert 0 < len(page.images()) < 5
    assert len(re.findall("[0-9] bytes", " ".join(page.texts))) == 20 - len(page.images())


@pytest.mark.parametrize("autocommit", [False, True])
def test_the_connection_stays_as_it_was(dsn: str, autocommit: bool) -> None:
    """In its transaction, or in none, and with its own kind of rows."""
    with psycopg.connect(dsn, autocommit=autocommit, row_factory=dict_row) as connection:
        connection.execute("CREATE TEMP TABLE t (n int)")
        status = connection.info.transaction_status
        assert notebook.show(connection, "SELECT 1 AS a").rows == ((1,),)
        assert notebook.similar(connection, encode(np.zeros((28, 28), np.uint8))) is not None
        with pytest.raises(psycopg.errors.UndefinedColumn):
            notebook.show(connection, "SELECT nothing")
        assert connection.info.transaction_status == status
        assert connection.execute("SELECT count(*) FROM t").fetchone() == {"count": 0}


# Searches.


@pytest.fixture
def without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)


@pytest.fixture
def filled(db: Connection, pictures: Pictures) -> Connection:
    insert_images(db, pictures.files[:30], pictures.labels[:30])
    return db


@pytest.mark.usefixtures("without_pandas")
def test_similar_rows(filled: Connection, pictures: Pictures, tmp_path: Path) -> None:
    found = pg_siamese.similar(filled, pictures.files[3], 5)
    assert [row.rank for row in found] == [1, 2, 3, 4, 5]
    assert found[0].image_id == 4 and found[0].distance < 1e-5
    assert found[0].label == pictures.labels[3]
    path = tmp_path / "query.png"
    path.write_bytes(pictures.files[3])
    assert pg_siamese.similar(filled, path, 5) == found
    assert pg_siamese.similar(filled, str(path), 5) == found
    assert 4 not in [row.image_id for row in pg_siamese.similar(filled, key=4, k=5)]
    label = pictures.labels[0]
    chosen = pg_siamese.similar(
        filled, pictures.files[3], filter={"label": label}, columns=["label"]
    )
    assert {row.label for row in chosen} == {label}
    assert chosen[0]._fields == ("rank", "image_id", "distance", "similarity", "label")


@pytest.mark.usefixtures("without_pandas")
def test_similar_rows_of_any_key(db: Connection) -> None:
    make_collection(db, "scans", "text", ', "the ""site" text DEFAULT \'left\'', frames="all")
    for number in range(3):
        db.execute("INSERT INTO scans VALUES (%s, %s)", (f"it's {number}", films.file(number, 3)))
    found = notebook.similar(db, key="it's 1", k=4, collection="scans", columns=['the "site'])
    assert len(found) == 4 and {row[4] for row in found} == {"left"}
    assert {row.id for row in found} <= {"it's 0", "it's 2"}
    assert {row.frame for row in found} <= {1, 2, 3}


def test_a_data_frame(
    filled: Connection, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pandas, of which only this is used."""
    pandas = types.ModuleType("pandas")
    pandas.DataFrame = lambda rows, columns: (rows, columns)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    rows, columns = notebook.similar(filled, pictures.files[3], 2)
    assert columns == ["rank", "image_id", "distance", "similarity", "dataset", "split", "label"]
    assert [(row[0], len(row)) for row in rows] == [(1, 7), (2, 7)] and rows[0][1] == 4


def test_a_data_frame_of_pandas(filled: Connection, pictures: Pictures) -> None:
    pytest.importorskip("pandas", reason="needs pandas, which nothing else here does")
    found = notebook.similar(filled, pictures.files[3], 2)
    assert list(found["rank"]) == [1, 2] and found["image_id"][0] == 4


def test_refused(shared: Connection, pictures: Pictures) -> None:
    with pytest.raises(CommandError, match='collection "scans" does not exist; available: images'):
        notebook.similar(shared, pictures.files[0], collection="scans")
    for image, key in ((None, None), (pictures.files[0], 1)):
        with pytest.raises(ValueError, match="give an image, a key or examples"):
            notebook.similar(shared, image, key=key)


def test_names_of_the_package() -> None:
    """They are imported when they are asked for: see also tests/unit/client/test_wheel.py."""
    script = (
        "from pg_siamese import show, similar; import pg_siamese; assert pg_siamese.show is show"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'shows'"):
        _ = pg_siamese.shows
