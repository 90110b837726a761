"""DICOM files by the command line: a table for them, its columns, and each instance once."""

from __future__ import annotations

import csv
import hmac
import os
import random
import re
import shlex
import zipfile
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo
from pydicom.fileset import FileSet

from pg_siamese.client import dicom_loading
from pg_siamese.client.connection import connect
from pg_siamese.client.dicom_columns import COLUMNS
from pg_siamese.client.dicom_loading import load_instances
from pg_siamese.client.dicom_sources import Instance
from pg_siamese.client.loading import find_target
from pg_siamese.datasets.places import data_folders
from tests import damaged_dicom, dicom_files
from tests.conftest import Connection
from tests.database.commands import fails, run, works
from tests.server import login_role
from tests.support import column_of, one, rows_of
from tools.project import ROOT

KEY = "a key of at least sixteen bytes"
SERIES = next((path for path in data_folders("dicom_series") if path.is_dir()), None)
needs_series = pytest.mark.skipif(
    SERIES is None, reason="needs the DICOM series beside the project (shared/data/dicom_series)"
)


def file(number: int, **elements: Any) -> bytes:
    return dicom_files.written(dicom_files.instance(number, **elements))


def folder_of(folder: Path, *contents: bytes) -> Path:
    """Write files that have numbers for names, some to a folder."""
    for number, data in enumerate(contents):
        place = folder / f"series{number // 4}" / f"{number:08}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return folder


@pytest.fixture
def films(dsn: str) -> str:
    """Make the table, and return the connection string."""
    works(dsn, "create-dicom-table", "public.films")
    return dsn


def load(dsn: str, path: Path, *options: str) -> str:
    return works(dsn, "load", str(path), "-c", "films", *options)


def tree(dsn: str, path: Path, *options: str) -> str:
    return load(dsn, path, "--recursive", *options)


def test_the_table(films: str, db: Connection) -> None:
    row = db.execute(
        "SELECT relation::text, key_column, image_column, embed, group_column,"
        " (SELECT a.attstorage FROM pg_attribute AS a"
        "  WHERE a.attrelid = relation AND a.attname = 'image')"
        " FROM siamese.collections"
        " WHERE name = 'films'"
    ).fetchone()
    assert row == ("films", "image_id", "image", "sync", "patient_id", "e")
    columns = dict(
        rows_of(
            db,
            "SELECT attname::text, format_type(atttypid, atttypmod) FROM pg_attribute"
            " WHERE attrelid = 'films'::regclass AND attnum > 2",
        )
    )
    assert columns == {name: column.type for name, column in COLUMNS.items()}
    indexed = column_of(
        db,
        "SELECT string_agg(a.attname, ',') FROM pg_index AS i JOIN pg_attribute AS a"
        " ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)"
        " WHERE i.indrelid = 'films'::regclass GROUP BY i.indexrelid",
    )
    assert {"patient_id", "sop_uid"} <= set(indexed)
    assert "already exists" in fails(films, "create-dicom-table", "films")


def test_the_tables_options(dsn: str, db: Connection) -> None:
    options = ["-c", "other", "--deferred", "--model", "medical", "--frames", "all"]
    works(dsn, "create-dicom-table", '"My films"', *options, "--window", "lung")
    row = db.execute(
        "SELECT relation::text, embed, frames, dicom_window FROM siamese.collections"
        " WHERE name = 'other'"
    ).fetchone()
    assert row == ('"My films"', "deferred", "all", "lung")
    assert "does not exist" in fails(dsn, "create-dicom-table", "films", "--model", "nothing")
    assert one(db, "SELECT to_regclass('films')") is None  # both or neither
    assert "parts" in fails(dsn, "create-dicom-table", "a.b.c")


def test_columns_and_a_second_time(films: str, db: Connection, tmp_path: Path) -> None:
    elements = {
        "ImageLaterality": "L",
        "Laterality": "R",
        "ViewPosition": "MLO",
        "AcquisitionDate": "20240301",
    }
    contents = [file(1, patient="p 7", **elements), *(file(number) for number in range(2, 7))]
    folder = folder_of(tmp_path / "a", *contents)
    assert "6 images stored in films" in tree(films, folder, "--patient-ids", "keep")
    columns = ", ".join(COLUMNS)
    row = db.execute(f"SELECT image, {columns} FROM films ORDER BY sop_uid".encode()).fetchone()
    assert row == (
        contents[0],
        "p 7",
        "1.2.826.0.2.7",
        "1.2.826.0.3.7",
        "1.2.826.0.1.1",
        "CT",
        "CHEST",
        "L",
        "MLO",
        date(2024, 2, 29),
        date(2024, 3, 1),
        "Maker",
        "Model 7",
    )
    assert one(db, "SELECT count(*) FROM siamese.vectors_films") == 6
    before = rows_of(db, "SELECT xmin::text, films FROM films ORDER BY 2")
    elsewhere = folder_of(tmp_path / "b", *reversed(contents))
    assert "0 images stored in films (already stored: 6)" in tree(films, elsewhere)
    assert rows_of(db, "SELECT xmin::text, films FROM films ORDER BY 2") == before
    more = folder_of(tmp_path / "c", *contents, file(9))
    assert "1 image stored in films (already stored: 6)" in tree(films, more)


def test_other_bytes_are_never_overwritten(films: str, db: Connection, tmp_path: Path) -> None:
    """Neither those of an earlier load, nor those of the same one."""
    folder = folder_of(tmp_path / "a", file(1), file(2), file(2, Modality="MR"))
    result = run(films, "load", str(folder), "-c", "films", "--recursive")
    assert "2 images stored" in result.stdout
    assert "1 file left out: 1 stored before with other bytes" in result.stdout
    assert "00000002: its SOP Instance UID is stored with other bytes" in result.stderr
    other = folder_of(tmp_path / "b", file(1, Modality="MR"))
    assert "1 stored before with other bytes" in tree(films, other)
    assert rows_of(db, "SELECT sop_uid, image, modality FROM films ORDER BY 1") == [
        ("1.2.826.0.1.1", file(1), "CT"),
        ("1.2.826.0.1.2", file(2), "CT"),
    ]


def test_a_broken_twin_does_not_cost_the_good_one(
    films: str, db: Connection, tmp_path: Path
) -> None:
    """The header of the broken one is fine, so that only the server finds out."""
    good = file(1)
    folder = folder_of(tmp_path, good[:-50], good)
    output = tree(films, folder)
    assert "1 image stored" in output and "1 file left out: 1 broken" in output
    assert one(db, "SELECT image FROM films") == good


def test_patient_ids(
    films: str, db: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "a", file(1), file(2), file(3, patient="p 2"))
    output = tree(films, folder)
    assert "patient_id is left empty: --patient-ids" in output
    assert one(db, "SELECT count(patient_id) FROM films") == 0
    db.execute("TRUNCATE films")
    monkeypatch.setenv("PG_SIAMESE_HASH_KEY", KEY + "\n")  # as in a file
    assert "left empty" not in tree(films, folder, "--patient-ids", "hash")
    wanted = [
        hmac.new(KEY.encode(), patient.encode(), "sha256").hexdigest()[:32]
        for patient in ("p 1", "p 1", "p 2")
    ]
    assert column_of(db, "SELECT patient_id FROM films ORDER BY sop_uid") == wanted
    db.execute("TRUNCATE films")
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    key.chmod(0o600)
    monkeypatch.setenv("PG_SIAMESE_HASH_KEY", "another key that does not count")
    tree(films, folder, "--patient-ids", "hash", "--hash-key", str(key))
    assert column_of(db, "SELECT patient_id FROM films ORDER BY sop_uid") == wanted
    assert not column_of(
        db, "SELECT films::text FROM films WHERE to_jsonb(films) - 'image' @@ '$.* == \"p 1\"'"
    )


def test_patient_ids_with_a_backslash(films: str, db: Connection, tmp_path: Path) -> None:
    """They are several values by the standard, and one ID of another patient in fact."""
    ids = ("HOSPITAL\\1", "HOSPITAL\\2", "HOSPITAL", " padded ", "")
    files = [file(number, PatientID=patient) for number, patient in enumerate(ids)]
    tree(films, folder_of(tmp_path, *files), "--patient-ids", "keep")
    found = column_of(db, "SELECT patient_id FROM films ORDER BY sop_uid")
    assert found == [*ids[:3], "padded", None]


def test_keys_that_are_no_good(films: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "a", file(1))
    command = ("load", str(folder), "--recursive", "-c", "films")
    monkeypatch.delenv("PG_SIAMESE_HASH_KEY", raising=False)
    hashed = (*command, "--patient-ids", "hash")
    assert "set PG_SIAMESE_HASH_KEY" in fails(films, *hashed)
    monkeypatch.setenv("PG_SIAMESE_HASH_KEY", "short")
    line = fails(films, *hashed)
    assert "shorter than 16 bytes" in line and "short:" not in line
    key = tmp_path / "key"
    key.write_text(KEY)
    key.chmod(0o644)
    assert "chmod 600" in fails(films, *hashed, "--hash-key", str(key))
    assert "No such file" in fails(films, *hashed, "--hash-key", str(tmp_path / "nothing"))
    assert "needs --patient-ids hash" in fails(films, *command, "--hash-key", str(key))
    key.chmod(0o600)
    line = fails(films, "load", str(folder), "--recursive", *hashed[5:], "--hash-key", str(key))
    assert 'has no column "patient_id"' in line


def test_what_is_left_out_is_counted(films: str, db: Connection, tmp_path: Path) -> None:
    segmentation = dicom_files.instance(3)
    segmentation.SOPClassUID = "1.2.840.10008.5.1.4.1.1.66.4"
    contents = [
        file(1),
        dicom_files.written(dicom_files.report(2)),
        dicom_files.written(segmentation),
        file(4).replace(b"1.2.826.0.1.4", bytes(13)),
        b"notes",
        file(5)[:400],
        file(6)[:-100],
        file(7) + bytes(40_000_000),
        file(1),
    ]
    result = run(films, "load", str(folder_of(tmp_path, *contents)), "-c", "films", "--recursive")
    assert result.exit_code == 0, result.output
    assert "1 image stored in films (already stored: 1)" in result.stdout
    found = re.search(r"7 files left out: (.*)", result.stdout)
    assert found is not None, result.stdout
    assert sorted(found[1].split(", ")) == [
        "1 a DICOM object without pixels: Basic Text SR Storage",
        "1 a segmentation in DICOM",
        "1 not DICOM",
        "1 too large",
        "1 without SOP Instance UID",
        "2 broken",
    ]
    for name in ("00000003", "00000005", "00000006", "00000007"):
        assert f"{name}: " in result.stderr
    assert one(db, "SELECT count(*) FROM films") == 1


def test_the_summary_of_privacy(films: str, tmp_path: Path) -> None:
    contents = [
        file(1, BurnedInAnnotation="YES", PatientIdentityRemoved="YES"),
        file(2, BurnedInAnnotation="NO", RecognizableVisualFeatures="YES"),
        file(3, PatientIdentityRemoved="NO"),
        file(4),
    ]
    folder = folder_of(tmp_path, *contents)
    output = tree(films, folder)
    assert (
        "burned-in annotation: 1 YES, 2 absent; recognizable visual features: 1 YES;"
        " patient identity removed: 3 not YES" in output
    )
    assert "stored as they are, with all names and dates in them" in output
    assert "burned-in" not in tree(films, folder)  # nothing new


def test_dates_that_are_none(films: str, db: Connection, tmp_path: Path) -> None:
    bad = file(1, StudyDate="20240230", AcquisitionDate="20240301").replace(
        b"20240301", b"tomorrow"
    )
    tree(films, folder_of(tmp_path, bad, file(2, AcquisitionDateTime="20240301101530.5")))
    assert rows_of(db, "SELECT study_date, acquisition_date FROM films ORDER BY sop_uid") == [
        (None, None),
        (date(2024, 2, 29), date(2024, 3, 1)),
    ]


def test_zip_files_and_single_files(films: str, db: Connection, tmp_path: Path) -> None:
    path = tmp_path / "study.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(3):
            archive.writestr(f"study/IM{number}", file(number))
    assert "3 images stored" in load(films, path)
    single = tmp_path / "one.dcm"
    single.write_bytes(file(7))
    assert "1 image stored" in load(films, single)
    assert "already stored: 1" in load(films, single)
    assert "can't be used with DICOM" in fails(films, "load", str(path), "--split", "train")


def test_a_folder_without_recursive(films: str, db: Connection, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, file(1))
    (folder / "top").write_bytes(file(2))
    (folder / "notes.txt").write_bytes(b"notes")
    folder_of(folder / "train", file(3))
    split = ("-c", "films", "--split", "train")
    assert "can't be used with DICOM" in fails(films, "load", str(folder), *split)
    wanted = "3 files left out: 2 sub-folder (--recursive loads them), 1 not DICOM"
    assert wanted in load(films, folder)
    assert column_of(db, "SELECT sop_uid FROM films") == ["1.2.826.0.1.2"]


def test_tables_of_today(dsn: str, db: Connection, tmp_path: Path) -> None:
    """Without columns for tags, the path says which file it is, as for pictures."""
    folder = folder_of(tmp_path / "set", file(1), file(2), b"notes")
    output = works(dsn, "load", str(folder), "--recursive")
    assert "2 images stored in images" in output and "patient_id" not in output
    assert "already stored: 2" in works(dsn, "load", str(folder), "--recursive")
    assert "already stored: 2" in works(dsn, "load", str(folder))
    assert rows_of(db, "SELECT dataset, label, source FROM siamese.images ORDER BY 3") == [
        ("set", None, f"file:set/series0/0000000{number}") for number in range(2)
    ]


def test_columns_of_a_table_of_ones_own(dsn: str, db: Connection, tmp_path: Path) -> None:
    """Columns that pictures can't fill keep their defaults, and identifiers that none asked for."""
    db.execute(
        "CREATE TABLE films (id bigint GENERATED ALWAYS AS IDENTITY, picture bytea,"
        " modality varchar(16) DEFAULT 'unknown', patient_id text DEFAULT 'nobody',"
        " study_date text)"
    )
    table = ("--table", "films", "--image-column", "picture")
    folder = folder_of(tmp_path / "a", file(1))
    works(dsn, "load", str(folder), "--recursive", *table)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.png").write_bytes(b"picture")
    works(dsn, "load", str(tmp_path / "b"), *table)
    assert rows_of(db, "SELECT modality, patient_id, study_date FROM films ORDER BY id") == [
        ("CT", "nobody", "2024-02-29"),
        ("unknown", "nobody", None),
    ]


@pytest.mark.parametrize("kind", ["varchar(9)", "char(9)", "short_text"])
def test_values_are_not_cut(dsn: str, db: Connection, tmp_path: Path, kind: str) -> None:
    """What is too long for its column would be equal to others after a cut."""
    db.execute("CREATE DOMAIN short_text AS varchar(9)")
    db.execute(
        "CREATE TABLE films (id bigint GENERATED ALWAYS AS IDENTITY, image bytea,"
        f" sop_uid {kind} UNIQUE, patient_id {kind})"
    )
    folder = folder_of(
        tmp_path,
        file(1),
        file(2, SOPInstanceUID="1.2.826", patient="number 10"),
        file(3, SOPInstanceUID="1.2.827", patient="number 101"),
    )
    options = ("--recursive", "--table", "films", "--patient-ids", "keep")
    assert "value too long" in fails(dsn, "load", str(folder), *options)
    output = works(dsn, "load", str(folder), *options, "--skip-rejected")
    assert "2 rejected by the table" in output
    assert column_of(db, "SELECT patient_id::text FROM films") == ["number 10"]


def test_a_folder_whose_name_is_not_utf8(dsn: str, db: Connection, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / os.fsdecode(b"set\xff"), file(1))
    works(dsn, "load", str(folder), "--recursive")
    assert "already stored: 1" in works(dsn, "load", str(folder), "--recursive")
    assert rows_of(db, "SELECT dataset, source FROM siamese.images") == [
        (r"set\xff", r"file:set\xff/series0/00000000")
    ]


def test_constraints_of_the_table(films: str, db: Connection, tmp_path: Path) -> None:
    """A row that the table rejects ends the load, unless it may be skipped."""
    db.execute("ALTER TABLE films ADD CHECK (modality <> 'MR')")
    folder = folder_of(tmp_path, file(1), file(2, Modality="MR"), file(3))
    line = fails(films, "load", str(folder), "-c", "films", "--recursive")
    assert "00000001: " in line and "1 image stored" in line
    output = tree(films, folder, "--skip-rejected")
    assert "1 image stored" in output and "1 rejected by the table" in output


def test_known_instances_are_not_read(films: str, db: Connection) -> None:
    """What a PACS lists is fetched only if it is not stored."""

    def unread() -> bytes:
        raise AssertionError("fetched")

    def instance(number: int, is_read: bool) -> Instance:
        read = partial(file, number) if is_read else unread
        return Instance(f"instance {number}", read, sop_uid=f"1.2.826.0.1.{number}")

    with connect(films) as connection:
        target = find_target(connection, "films")
        steps: list[int] = []
        first = (instance(number, True) for number in range(3))
        report = load_instances(connection, target, first, advance=steps.append)
        assert (report.stored, report.stored_before, sum(steps)) == (3, 0, 3)
        again = (instance(number, number > 2) for number in range(5))
        report = load_instances(connection, target, again, advance=steps.append)
        assert (report.stored, report.stored_before, sum(steps)) == (2, 3, 8)


def test_a_race(films: str, db: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another load stores an instance between the look and the INSERT."""
    monkeypatch.setattr(dicom_loading._Reader, "_stored", lambda self, keys, with_digests=False: {})
    with connect(films) as connection:
        target = find_target(connection, "films")
        instances = [Instance(str(number), partial(file, number)) for number in (1, 2)]
        load_instances(connection, target, instances[:1])
        report = load_instances(connection, target, instances)
        assert (report.stored, report.stored_before) == (1, 1)
    assert one(db, "SELECT count(*) FROM films") == 2


def test_two_loads_in_other_orders(films: str, db: Connection, tmp_path: Path) -> None:
    """Each statement stores its instances by their UIDs. In other orders, loads could deadlock."""
    for name, numbers in (("a", (3, 1, 2)), ("b", (6, 4, 5))):
        tree(films, folder_of(tmp_path / name, *map(file, numbers)))
    found = column_of(db, "SELECT sop_uid FROM films ORDER BY image_id")
    assert found == [f"1.2.826.0.1.{number}" for number in range(1, 7)]


def test_nothing_goes_missing(films: str, db: Connection) -> None:
    """Damaged files are stored or counted, one by one."""
    generator = random.Random(5)
    damaged = [damaged_dicom.mutated(file(number), generator) for number in range(150)]
    with connect(films) as connection:
        target = find_target(connection, "films")
        steps: list[int] = []
        instances = (Instance(str(n), partial(bytes, data)) for n, data in enumerate(damaged))
        report = load_instances(connection, target, instances, advance=steps.append)
    assert report.stored == one(db, "SELECT count(*) FROM films") > 30
    assert report.left_out["broken"] > 10
    assert report.stored + report.stored_before + report.left_out.total() == 150
    assert sum(steps) == 150


def test_a_role_that_only_inserts(films: str, db: Connection, tmp_path: Path) -> None:
    role = "loader_of_films"
    db.execute(login_role(role))
    try:
        db.execute(f"GRANT SELECT, INSERT ON films TO {role}")
        output = works(
            make_conninfo(films, user=role),
            *("load", str(folder_of(tmp_path, file(1))), "--recursive", "--table", "films"),
        )
        assert "1 image stored" in output
    finally:
        db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_one_portion_after_the_other(films: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more are listed ahead than a portion, so that a load of a million starts at once."""
    monkeypatch.setattr(dicom_loading, "PORTION", 4)
    listed = 0
    ahead = []

    def fetch(number: int) -> bytes:
        ahead.append(listed - number)
        return file(number)

    def instances() -> Iterator[Instance]:
        nonlocal listed
        for listed in range(1, 11):
            yield Instance(str(listed), partial(fetch, listed))

    with connect(films) as connection:
        load_instances(connection, find_target(connection, "films"), instances())
    assert len(ahead) == 10 and max(ahead) == 3


def test_the_documentation(dsn: str, db: Connection, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "dicom.md").read_text()
    folder_of(tmp_path / "archive", file(1), file(2))
    folder_of(tmp_path / "media" / "cdrom", file(4))
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        archive.writestr("IM1", file(3))
    files = FileSet()
    files.add(dicom_files.filed(dicom_files.instance(5)))
    files.write(tmp_path / "media" / "cdrom")
    (tmp_path / "films.key").write_text(KEY)
    (tmp_path / "films.key").chmod(0o600)
    places = {word: str(tmp_path / word.strip("/~")) for word in text.split() if word[0] in "/~"}
    places["study.zip"] = str(tmp_path / "study.zip")
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
        for line in block.splitlines():
            program, *words = shlex.split(line, comments=True)
            assert program == "pg_siamese"
            works(dsn, *(places.get(word, word) for word in words))
    assert column_of(db, "SELECT right(sop_uid, 2) FROM films ORDER BY 1") == [
        f".{number}" for number in (1, 2, 3, 5)
    ]
    ((table,),) = [re.findall(r"\| column \| from the tag \|\n(.*?)\n\n", text, re.S)]
    rows = [row.strip("|").split("|") for row in table.splitlines()[1:]]
    names = [word for row in rows for word in re.findall(r"`(\w+)`", row[0])]
    keywords = {word for row in rows for word in re.findall(r"`(\w+)`", row[1])}
    assert sorted(names) == sorted(COLUMNS)
    assert keywords == {word for column in COLUMNS.values() for word in column.keywords}
    statement = next(
        block for block in re.findall(r"^```sql\n(.*?)^```", text, re.M | re.S) if "NOT ok" in block
    )
    db.execute("ALTER TABLE films ADD COLUMN patient_name text")
    db.execute("INSERT INTO siamese.dicom_keywords VALUES ('PatientName')")
    assert one(db, "SELECT count(*) FROM siamese.self_check() WHERE NOT ok") == 2
    assert rows_of(db, statement) == []


@needs_series
def test_real_series(films: str, db: Connection) -> None:
    """56 files with 50 UIDs: two pictures are there in four more syntaxes."""
    assert SERIES is not None
    output = tree(films, SERIES, "--patient-ids", "keep")
    assert "50 images stored" in output
    assert "6 stored before with other bytes" in output
    with (SERIES / "index.csv").open() as index:
        described = {row["sop_uid"]: row for row in csv.DictReader(index)}
    stored = rows_of(
        db,
        "SELECT sop_uid, patient_id, study_uid, series_uid, modality,"
        " to_char(study_date, 'YYYYMMDD'), coalesce(manufacturer, '') FROM films",
    )
    names = ("patient_id", "study_uid", "series_uid", "modality", "study_date", "manufacturer")
    assert {uid: tuple(values) for uid, *values in stored} == {
        uid: tuple(row[name] for name in names) for uid, row in described.items()
    }
    assert one(db, "SELECT count(*) FROM films WHERE patient_id = 'dicom2nifti'") == 32
    assert "already stored: 50" in tree(films, SERIES)
    found = db.execute(
        "SELECT count(DISTINCT f.patient_id) FROM siamese.similar_images("
        " image_id => (SELECT min(image_id) FROM films), k => 5, collection => 'films',"
        " group_by => 'patient_id', own_group => false) AS s JOIN films AS f USING (image_id)"
    ).fetchone()
    assert found == (5,)
