"""From a PACS into the database: a service in this process, and a real Orthanc."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread

from pg_siamese.client import dicomweb
from pg_siamese.client.dicomweb import PASSWORD, USER
from pg_siamese.datasets.places import data_folders
from tests import dicom_files, orthanc
from tests.conftest import Connect, Connection
from tests.database.commands import fails, run, works
from tests.dicomweb_service import Handler, Service, Stored, running
from tests.orthanc import Orthanc
from tests.support import column_of, one, rows_of, wait_until
from tools.project import ROOT

SERIES = next((path for path in data_folders("dicom_series") if path.is_dir()), None)


def file(number: int, **elements: Any) -> bytes:
    """Return an instance of one of six patients, in one of four transfer syntaxes."""
    patient = f"p {number % 6}"
    syntax = dicom_files.SYNTAXES[number % 4]
    return dicom_files.written(dicom_files.instance(number, patient=patient, **elements), syntax)


def large_file(number: int) -> bytes:
    """Return an instance of which 60 need several statements."""
    instance = dicom_files.instance(number, patient=f"p {number % 6}")
    pixels = np.frombuffer(instance.PixelData, np.uint16).reshape(instance.Rows, -1)
    instance.PixelData = np.kron(pixels, np.ones((16, 16), np.uint16)).tobytes()
    instance.Rows, instance.Columns = 16 * instance.Rows, 16 * instance.Columns
    return dicom_files.written(instance)


def stored(number: int) -> Stored:
    patient = number % 6
    return Stored(
        f"1.2.826.0.2.{patient}",
        f"1.2.826.0.3.{patient}",
        uid(number),
        file(number),
        f"p {patient}",
    )


def uid(number: int) -> str:
    return f"1.2.826.0.1.{number}"


@pytest.fixture
def films(dsn: str) -> str:
    """Make the table, and return the connection string."""
    works(dsn, "create-dicom-table", "public.films")
    return dsn


@pytest.fixture
def service() -> Iterator[Service]:
    with running(Service([stored(number) for number in range(12)])) as found:
        yield found


@pytest.fixture(scope="module")
def archive() -> Iterator[Orthanc]:
    with orthanc.running() as found:
        yield found


@pytest.fixture
def login(archive: Orthanc, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the commands what Orthanc asks for, and empty it at the end."""
    monkeypatch.setenv(USER, orthanc.USER)
    monkeypatch.setenv(PASSWORD, archive.password)
    yield
    archive.clear()


def load(dsn: str, url: str, *options: str) -> str:
    return works(dsn, "load", f"dicomweb:{url}", "-c", "films", *options)


def contents(db: Connection) -> dict[str, bytes]:
    return dict(rows_of(db, "SELECT sop_uid, image FROM films"))


def assert_found(db: Connection, files: dict[str, bytes]) -> None:
    """Check that each of these files is stored once, unchanged, and is its own nearest one."""
    assert contents(db) == files
    for sop_uid, data in files.items():
        found = column_of(
            db,
            "SELECT f.sop_uid FROM siamese.similar_images(%s, 1, collection => 'films') AS s"
            " JOIN films AS f ON f.image_id = s.image_id WHERE s.distance < 1e-5",
            data,
        )
        assert found == [sop_uid]


# --- a service that misbehaves -----------------------------------------------------------------


def test_columns_and_conditions(films: str, db: Connection, service: Service) -> None:
    output = load(films, service.url, "--patient", "p 1", "--patient-ids", "keep")
    assert "2 images stored in films" in output
    assert rows_of(db, "SELECT DISTINCT patient_id, modality FROM films") == [("p 1", "CT")]
    assert "0 images stored" in load(films, service.url, "--since", "2024-03-01")
    assert "2 images stored" in load(films, service.url, "--study", "1.2.826.0.2.3")
    assert "8 images stored in films (already stored: 4)" in load(films, service.url)
    assert contents(db) == {each.sop: each.data for each in service.stored}


def test_what_is_stored_is_not_fetched_again(films: str, db: Connection, service: Service) -> None:
    load(films, service.url)
    service.asked.clear()
    service.stored.append(stored(12))
    assert "1 image stored in films (already stored: 12)" in load(films, service.url)
    assert service.fetched() == [uid(12)]


def test_a_table_without_sop_uid(dsn: str, db: Connection, service: Service) -> None:
    """The instance's address says whether it is stored."""
    output = works(dsn, "load", f"dicomweb:{service.url}", "--dataset", "pacs")
    assert "12 images stored in " in output
    first = service.stored[0]
    source = f"{service.url}/studies/{first.study}/series/{first.series}/instances/{first.sop}"
    query = "SELECT image, dataset FROM siamese.images WHERE source = %s"
    assert rows_of(db, query, source) == [(first.data, "pacs")]
    service.asked.clear()
    assert "already stored: 12" in works(dsn, "load", f"dicomweb:{service.url}")
    assert service.fetched() == []


def test_a_connection_that_stays_broken(
    films: str, db: Connection, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was fetched before is stored, and the same command continues."""
    monkeypatch.setattr(dicomweb, "ATTEMPTS", 2)

    def fault(handler: Handler) -> bool:
        if is_broken := len(set(service.fetched())) > 7:
            handler.close_connection = True
        return is_broken

    service.fault = fault
    error = fails(films, "load", f"dicomweb:{service.url}", "-c", "films")
    assert "7 images stored by this command; run the same command to continue" in error
    assert len(contents(db)) == 7
    service.fault = lambda handler: False
    service.asked.clear()
    assert "5 images stored in films (already stored: 7)" in load(films, service.url)
    assert len(service.fetched()) == 5


def test_instances_that_are_left_out(films: str, db: Connection, service: Service) -> None:
    report = dicom_files.written(dicom_files.report(1))
    service.stored[0] = Stored("1.1", "1.1.1", "1.1.1.1", report, modality="SR")

    def fault(handler: Handler) -> bool:
        is_lost = handler.path.endswith((uid(1), uid(2)))
        if is_lost:
            handler.answer(500)
        return is_lost

    service.fault = fault
    result = run(films, "load", f"dicomweb:{service.url}", "-c", "films")
    assert "9 images stored in films" in result.stdout
    assert "3 files left out: 2 not delivered, 1 a DICOM object without pixels" in result.stdout
    assert f"instances/{uid(1)}: HTTP 500" in result.stderr


def test_the_documentation(films: str, db: Connection, service: Service) -> None:
    text = (ROOT / "docs" / "dicom.md").read_text()
    commands = re.findall(r"^pg_siamese (load dicomweb:.*)$", text, re.M)
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command.replace("https://pacs.example.org/dicom-web", service.url))
        assert " stored in films" in works(films, *words)
    assert len(contents(db)) == len(service.stored)


def test_mistakes(
    dsn: str, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "need a PACS as the source" in fails(dsn, "load", str(tmp_path), "--patient", "p 1")
    url = f"dicomweb:{service.url}"
    assert "--recursive" in fails(dsn, "load", url, "--recursive")
    assert "--split" in fails(dsn, "load", url, "--split", "train")
    assert "must not contain credentials" in fails(dsn, "load", "dicomweb:http://a:secret@b")
    assert "no study that meets all conditions: 1.9" in fails(dsn, "load", url, "--study", "1.9")
    monkeypatch.setitem(sys.modules, "dicomweb_client", None)
    monkeypatch.delitem(sys.modules, "pg_siamese.client.dicomweb")
    monkeypatch.delattr("pg_siamese.client.dicomweb", raising=False)
    assert "extra packages of pg_siamese[dicomweb]" in fails(dsn, "load", url)


# --- Orthanc -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("login")
def test_sixty_instances_and_ten_more(films: str, db: Connection, archive: Orthanc) -> None:
    files = {uid(number): file(number) for number in range(70)}
    first = dict(list(files.items())[:60])
    archive.store(*first.values())
    assert "60 images stored in films" in load(films, archive.url)
    assert_found(db, first)
    archive.store(*files.values())
    assert "10 images stored in films (already stored: 60)" in load(films, archive.url)
    assert_found(db, files)
    assert "0 images stored in films (already stored: 70)" in load(films, archive.url)


@pytest.mark.usefixtures("login")
def test_a_loader_that_is_killed(
    films: str, db: Connection, connect: Connect, archive: Orthanc
) -> None:
    """It is killed while the second statement waits in the server."""
    files = {uid(number): large_file(number) for number in range(60)}
    archive.store(*files.values())
    db.execute(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF EXISTS (SELECT FROM films) THEN PERFORM pg_advisory_lock(13); END IF;"
        " RETURN NULL; END $$"
    )
    db.execute(
        "CREATE TRIGGER wait BEFORE INSERT ON films FOR EACH STATEMENT EXECUTE FUNCTION wait()"
    )
    holder = connect()
    holder.execute("SELECT pg_advisory_lock(13)")
    command = [sys.executable, "-m", "pg_siamese", "load", f"dicomweb:{archive.url}", "-c", "films"]
    with subprocess.Popen([*command, "--dsn", films], stderr=subprocess.DEVNULL) as process:
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        wait_until(lambda: one(db, waiting) or process.poll() is not None, "nothing waits")
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    holder.close()
    db.execute("DROP TRIGGER wait ON films")
    before = len(contents(db))
    assert 0 < before < 60
    output = load(films, archive.url)
    assert f"{60 - before} images stored in films (already stored: {before})" in output
    assert contents(db) == files


@pytest.mark.usefixtures("login")
@pytest.mark.skipif(SERIES is None, reason="needs the DICOM series beside the project")
def test_real_series(films: str, db: Connection, archive: Orthanc) -> None:
    """Fifty instances in 56 files: Orthanc keeps the first of those with the same UID."""
    assert SERIES is not None
    expected: dict[str, bytes] = {}
    for path in sorted(SERIES.rglob("*.dcm")):
        data = path.read_bytes()
        archive.store(data)
        expected.setdefault(str(dcmread(path, stop_before_pixels=True).SOPInstanceUID), data)
    assert len(expected) == 50
    assert "50 images stored in films" in load(films, archive.url)
    assert contents(db) == expected
    assert "0 images stored" in load(films, archive.url)


def test_orthanc_wants_a_password(films: str, archive: Orthanc) -> None:
    assert "HTTP 401" in fails(films, "load", f"dicomweb:{archive.url}", "-c", "films")
    assert os.environ.get(USER) is None
