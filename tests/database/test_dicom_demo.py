"""The demo on DICOM files."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from pg_siamese import datasets
from pg_siamese.cli import dicom_demo
from pg_siamese.client.connection import connect
from tests import dicom_files
from tests.conftest import Connection
from tests.database.commands import run, works
from tests.database.test_cli import medical_set
from tests.support import column_of, one


def test_the_demo_of_dicom_twice(
    dsn: str, db: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without files at hand, it makes some of MedMNIST's pictures."""
    medical_set(tmp_path / "breastmnist.npz", (60, 20, 10))
    monkeypatch.setattr(datasets, "medmnist_folders", lambda: [tmp_path])
    monkeypatch.setattr(dicom_demo, "data_folders", lambda name: [tmp_path / name])
    sheet = tmp_path / "sheet.png"
    first = works(dsn, "demo", "--dicom", "--sheet", str(sheet))
    assert "Patients and studies are made up" in first
    assert "20 images stored" in first
    assert "group_by => 'patient_id', own_group => false" in first
    assert sheet.stat().st_size > 10_000
    assert column_of(db, "SELECT DISTINCT modality FROM dicom_images") == ["US"]
    assert one(db, "SELECT count(DISTINCT patient_id) FROM dicom_images") == 10
    assert one(db, "SELECT min(study_date) FROM dicom_images") == date(2024, 2, 29)
    second = works(dsn, "demo", "--dicom", "--sheet", str(sheet))
    assert "20 images already stored" in second and "images stored in" not in second
    assert "the index is up to date" in second
    # What it prints works as it stands, and shows each other patient once.
    statements = re.findall(r"^(SELECT s\.rank.*?);$", second, re.M | re.S)
    assert len(statements) == 4
    for number, statement in enumerate(statements):
        with connect(dsn) as connection:
            patients = [row[4] for row in connection.execute(statement.encode())]
        assert len(patients) == 4
        if number % 2:
            query = re.findall(r"of patient (\S+):", second)[number]
            assert len({*patients, query}) == 5


def test_the_demo_of_a_folder_of_dicom(dsn: str, db: Connection, tmp_path: Path) -> None:
    picture = np.arange(1024, dtype=np.uint8).reshape(32, 32)
    for number in range(6):
        file = dicom_files.image(
            np.roll(picture, number),
            SOPInstanceUID=f"1.2.{number}",
            StudyInstanceUID=f"1.3.{number}",
            PatientID=f"p{number // 2}",
        )
        (tmp_path / f"image {number}").write_bytes(file)
    (tmp_path / "notes.txt").write_text("not DICOM")
    (tmp_path / "broken").write_bytes(file[:-100].replace(b"1.2.5", b"1.2.6"))
    sheet = tmp_path / "sheet.png"
    arguments = ["demo", "--dicom", "--folder", str(tmp_path), "--sheet", str(sheet)]
    output = works(dsn, *arguments)
    assert "6 images stored" in output
    assert "1 broken" in output
    assert sheet.exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    result = run(dsn, "demo", "--dicom", "--folder", str(empty))
    assert result.exit_code == 1
    assert "no DICOM files are in this folder" in result.stderr
    result = run(dsn, "demo", "--folder", str(empty))
    assert result.exit_code == 1
    assert "--folder is of use with --dicom only" in result.stderr
