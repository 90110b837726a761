"""A collection as a data set: its images, classes and groups, and training on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import psycopg
import pytest

from pg_siamese import datasets
from pg_siamese.datasets import DataFormatError, DataNotFoundError, DataSplits
from pg_siamese_server.encoding.images import decode_image
from pg_siamese_server.encoding.specification import InputSpec
from tests import dicom_files
from tests.conftest import Connection, Pictures
from tests.database.tables import make_collection
from tests.unit.training.test_commands import run, settings

SIZE = InputSpec(width=20, height=16)
COUNT = 90


@pytest.fixture
def scans(
    db: Connection, dsn: str, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> Connection:
    """Table ``t`` with 30 patients of three images, on the server that the environment names."""
    more = ", finding text, patient text"
    make_collection(db, more=more, group_column="patient", backfill=False)
    db.execute("ALTER TABLE t DISABLE TRIGGER USER")
    for number in range(COUNT):
        label = ("healthy", "ill")[number // 3 % 2]
        db.execute(
            "INSERT INTO t VALUES (%s, %s, %s, %s)",
            (number, pictures.files[number], label, f"p{number // 3}"),
        )
    for name, value in psycopg.conninfo.conninfo_to_dict(dsn).items():
        variable = "PGDATABASE" if name == "dbname" else f"PG{name.upper()}"
        monkeypatch.setenv(variable, str(value))
    return db


def opened(text: str = "collection:t/finding") -> DataSplits:
    return datasets.open_dataset(text, input_spec=SIZE)


def test_images_classes_and_patients(scans: Connection, pictures: Pictures) -> None:
    found = opened()
    assert found.name == "t" and found.train.classes == ("healthy", "ill")
    seen: dict[str, int] = {}
    for part in (found.train, found.val, found.test):
        assert part.groups is not None
        for image, label, group in zip(part.images, part.labels, part.groups, strict=True):
            number = int(group.removeprefix("p"))
            assert label == number % 2
            place = 3 * number + seen.setdefault(group, 0)
            assert np.array_equal(image, decode_image(pictures.files[place], SIZE))
            seen[group] += 1
    assert seen == {f"p{number}": 3 for number in range(COUNT // 3)}
    assert len(found.val) >= 6 and len(found.test) >= 6


def test_rows_without_label_image_or_patient(scans: Connection) -> None:
    scans.execute("UPDATE t SET finding = NULL WHERE id < 3")
    scans.execute("UPDATE t SET image = NULL WHERE id BETWEEN 3 AND 5")
    scans.execute("UPDATE t SET patient = NULL WHERE id BETWEEN 6 AND 8")
    found = opened()
    groups = np.concatenate([part.groups for part in (found.train, found.val, found.test)])
    assert len(groups) == COUNT - 6
    assert len(set(groups)) == COUNT // 3 - 3 + 3  # each is a patient of its own


def test_without_a_group_column(scans: Connection) -> None:
    scans.execute("SELECT siamese.alter_collection('t', group_column => '')")
    assert not opened().has_groups
    named = opened("collection:t/finding/patient")
    assert named.train.groups is not None
    assert set(named.train.groups) <= {f"p{number}" for number in range(COUNT // 3)}


def test_another_group_column_than_the_collections(scans: Connection) -> None:
    scans.execute("ALTER TABLE t ADD study text")
    scans.execute("UPDATE t SET study = 's' || id / 6")
    found = opened("collection:t/finding/study")
    parts = [part.groups for part in (found.train, found.val, found.test)]
    groups = [set(part) for part in parts if part is not None]
    assert set.union(*groups) == {f"s{number}" for number in range(COUNT // 6)}
    assert sum(map(len, groups)) == COUNT // 6


def test_the_collections_window(db: Connection, scans: Connection) -> None:
    values = np.tile(np.linspace(-1000, 1000, 64).astype(np.int16), (64, 1))
    files = [
        dicom_files.image(values + shift, Modality="CT", RescaleIntercept="0", RescaleSlope="1")
        for shift in range(8)
    ]
    make_collection(db, "ct", more=", finding text", dicom_window="lung", backfill=False)
    for number, file in enumerate(files):
        db.execute("INSERT INTO ct VALUES (%s, %s, %s)", (number, file, "ab"[number % 2]))
    found = opened("collection:ct/finding")
    shown = decode_image(files[0], SIZE)
    windowed = np.concatenate([part.images for part in (found.train, found.val, found.test)])
    assert not (windowed == shown).all(axis=(1, 2, 3)).any()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("collection:t", "NAME/COLUMN"),
        ("collection:nothing/finding", "no such collection"),
        ("collection:t/nothing", 'no column "nothing"'),
    ],
)
def test_what_is_not_there(scans: Connection, text: str, said: str) -> None:
    with pytest.raises((DataNotFoundError, DataFormatError), match=said):
        opened(text)


def test_other_errors(scans: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataFormatError, match="say the size"):
        datasets.open_dataset("collection:t/finding")
    scans.execute("UPDATE t SET image = 'no image' WHERE id = 5")
    with pytest.raises(DataFormatError, match="row id = 5 of table t"):
        opened()
    scans.execute("UPDATE t SET finding = 'ill'")
    scans.execute("DELETE FROM t WHERE id = 5")
    with pytest.raises(DataFormatError, match="1 classes"):
        opened()
    monkeypatch.setenv("PGDATABASE", "nothing")
    with pytest.raises(DataNotFoundError, match="nothing"):
        opened()


def test_training_and_evaluation_keep_patients_apart(scans: Connection, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="training needs PyTorch")
    toml = settings(tmp_path / "tiny.toml")
    model = tmp_path / "a.onnx"
    data = ("--from-collection", "t", "--label-column", "finding", "--group-column", "patient")
    run("train", toml, *data, "--runs", tmp_path / "runs", "--threads", 1, "--output", model)
    output = tmp_path / "results.json"
    said = run("evaluate", model, "--output", output)
    assert "No group of t is among both queries and neighbours" in " ".join(said.split())
    assert list(json.loads(output.read_text())["data"]) == ["t"]
