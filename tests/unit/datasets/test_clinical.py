"""Clinical images: a zip file with a table, in published splits that share groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pg_siamese.client.sources import png
from pg_siamese.datasets import DataFormatError, DataNotFoundError, DataSplits, open_dataset
from pg_siamese.datasets.places import data_folders
from pg_siamese_server.encoding.images import decode_image
from pg_siamese_server.encoding.specification import InputSpec
from tests.unit.datasets.files import write_clinical


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PG_SIAMESE_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "clinical"


def write_set(folder: Path, name: str, rows: Sequence[str], columns: str = "") -> None:
    write_clinical(folder, name, rows, [pixels(number) for number in range(len(rows))], columns)


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (16, 16), np.uint8)


def groups_of(opened: DataSplits) -> list[str]:
    parts = (opened.train, opened.val, opened.test)
    return [str(group) for part in parts if part.groups is not None for group in part.groups]


BREAST = [
    "train,0,train/1/a.jpg,1,g1",
    "train,1,train/0/b.jpg,0,",
    "train,2,train/0/c.jpg,0,g2",
    "val,0,val/0/a.jpg,0,g2",
    "test,0,test/1/a.jpg,1,g1",
    "test,1,test/0/b.jpg,0,",
]


def test_a_set_is_read_as_its_table_says(folder: Path) -> None:
    write_set(folder, "breast_224", BREAST)
    size = InputSpec(width=8, height=8, resize="stretch")
    opened = open_dataset("clinical:breast_224", input_spec=size)
    assert (opened.name, opened.published) == ("breast_224", True)
    assert opened.train.classes == ("malignant", "normal, benign")
    assert [len(part) for part in (opened.train, opened.val, opened.test)] == [3, 1, 2]
    assert opened.train.labels.tolist() == [1, 0, 0]
    assert (opened.test.images[0] == decode_image(png(pixels(4)), size)).all()
    assert [file.name for file in opened.files] == ["breast_224.zip", "breast_224.csv"]


def test_images_without_a_group_are_alone(folder: Path) -> None:
    write_set(folder, "breast_224", BREAST)
    one, other, third, *held = groups_of(open_dataset("clinical:breast_224"))
    assert held[:2] == [third, one]
    assert len({one, other, third, held[2]}) == 4


def test_patients_are_joined_by_repeated_pictures(folder: Path) -> None:
    rows = [
        "train,train/0/a.jpeg,0,p1,0,",
        "train,train/0/b.jpeg,0,p2,1,d1",
        "train,train/1/c.jpeg,1,p3,2,d2",
        "train,train/1/d.jpeg,1,d1,3,",
        "val,val/0/a.jpeg,0,p4,0,d1",
        "val,val/1/b.jpeg,1,p4,1,d2",
        "test,test/0/a.jpeg,0,p1,,",
        "test,test/1/b.jpeg,1,p5,0,",
    ]
    write_set(folder, "pneumonia_224", rows)
    a, b, c, d, *val, first, last = groups_of(open_dataset("clinical:pneumonia_224"))
    assert a == first
    assert {b, c, *val} == {b}, "p4 has both repeated pictures"
    assert len({a, b, d, last}) == 4, "a patient called d1 is not the repeated picture d1"


def test_the_official_test_split_lacks_what_only_kaggle_has(folder: Path) -> None:
    rows = [
        "train,train/0/a.jpeg,0,p1,,",
        "train,train/1/b.jpeg,1,p2,0,",
        "val,val/0/a.jpeg,0,p3,,",
        "test,test/0/a.jpeg,0,p4,,",
        "test,test/1/b.jpeg,1,p5,0,",
    ]
    write_set(folder, "pneumonia_224", rows)
    opened = open_dataset("clinical:pneumonia_224/official")
    assert opened.name == "pneumonia_224_official"
    assert [len(part) for part in (opened.train, opened.val, opened.test)] == [2, 1, 1]
    assert opened.test.labels.tolist() == [1]
    assert len(open_dataset("clinical:pneumonia_224").test) == 2


def test_training_leaves_out_what_is_held_out(folder: Path) -> None:
    write_set(folder, "breast_224", BREAST)
    opened = open_dataset("clinical:breast_224")
    kept = opened.for_training()
    assert kept.labels.tolist() == [0]
    assert (kept.images[0] == opened.train.images[1]).all()
    assert len(opened.train) == 3


def test_sets_that_are_wrong_or_missing_are_named(folder: Path) -> None:
    def refused(message: str, error: type[Exception] = DataFormatError) -> None:
        with pytest.raises(error, match=message):
            open_dataset("clinical:breast_224")

    with pytest.raises(DataFormatError, match="clinical:lung: there are: breast_224, pneumonia"):
        open_dataset("clinical:lung")
    refused(f"breast_224.zip is in {folder}", DataNotFoundError)
    write_set(folder, "breast_224", BREAST, "split,row28,file,label,patient")
    refused("breast_224.csv: lacks the columns split and file and label and group")
    write_set(folder, "breast_224", [*BREAST, "test,2,test/2/a.jpg,2,"])
    refused('breast_224.csv: row 8 has file "test/2/a.jpg", split "test" and label "2"')
    write_set(folder, "breast_224", BREAST)
    table = folder / "breast_224.csv"
    table.write_text(table.read_text() + "test,2,test/0/gone.jpg,0,\n")
    refused("breast_224.zip: test/0/gone.jpg: .*no item named")
    table.unlink()
    refused(f"{table} is missing", DataNotFoundError)


@pytest.mark.parametrize(
    ("name", "counts", "held_out"),
    [
        ("breast_224", (546, 78, 156), 119),
        ("pneumonia_224", (4708, 524, 624), 594),
        ("pneumonia_224/official", (4708, 524, 557), 594),
        ("ham10000_224", (4189, 597, 1198), 0),
    ],
)
def test_the_real_sets(name: str, counts: tuple[int, ...], held_out: int) -> None:
    stem = name.partition("/")[0]
    if not any((place / f"{stem}.zip").is_file() for place in data_folders("clinical")):
        pytest.skip(f"clinical/{stem}.zip is not here")
    opened = open_dataset(f"clinical:{name}", input_spec=InputSpec(width=8, height=8))
    assert tuple(len(part) for part in (opened.train, opened.val, opened.test)) == counts
    assert len(opened.train) - len(opened.for_training()) == held_out
