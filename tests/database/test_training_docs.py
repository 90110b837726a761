"""The commands of docs/training.md: a folder of a user's own, from training to a search."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pg_siamese.datasets import DataNotFoundError, clinical, open_dataset
from pg_siamese.datasets.places import data_folders
from pg_siamese.training.experiments import experiment_names
from pg_siamese_server.encoding.specification import InputSpec
from tests.conftest import Connection, Pictures
from tests.database.tables import make_collection
from tests.server import pg_environment
from tools.project import ROOT

pytest.importorskip("torch")

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "docs/training.md").read_text(), re.M | re.S)
EACH_CLASS = 40


def commands(first: str) -> list[str]:
    """Return the lines of the block that begins so."""
    return next(text.splitlines() for _, text in BLOCKS if text.startswith(first))


def run(line: str, folder: Path, dsn: str = "", *more: str) -> str:
    """Run a command of the docs in a folder, with the data that this project finds by itself."""
    data = data_folders("medmnist")[-1].parent  # by the folder of the tests, not of the command
    environment = {"PG_SIAMESE_DATA": str(data)} | os.environ
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if dsn:
        environment |= pg_environment(dsn)
    done = subprocess.run(
        [*shlex.split(line, comments=True), *more],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_all_blocks_are_run() -> None:
    """Of the first six all but the fourth are, below. Of the rest, the options are checked."""
    texts = [text for language, text in BLOCKS if language != "csv"]
    assert texts[0].startswith("pg_siamese train folder")
    assert texts[1].startswith("pg_siamese train folder --from-collection")
    assert texts[2].startswith("pg_siamese train medmnist_siamese")
    assert texts[3].startswith("pg_siamese evaluate models/medical.onnx")
    run(f"{texts[3].strip()} --help", ROOT)
    assert set(re.findall(r"--data clinical:(\S+)", texts[3])) == set(clinical.NAMES)
    assert texts[4].startswith("pg_siamese calibrate-domain photos.onnx")
    assert texts[5].startswith("pg_siamese evaluate models/medical.onnx --split val")
    for text in texts[6:]:
        train, evaluate = text.splitlines()
        match = re.fullmatch(
            r"for seed in 0 1 2; do pg_siamese train (\w+) --seed \$seed; done", train
        )
        assert match and match[1] in experiment_names(), text
        assert f" build/training/{match[1]}/seed-{{0,1,2}}/model.onnx " in evaluate
        run(f"{evaluate} --help", ROOT)


def test_a_folder_of_ones_own(
    dsn: str, db: Connection, pictures: Pictures, queries: Pictures, tmp_path: Path
) -> None:
    db.execute("SELECT siamese.drop_collection('images')")
    classes = sorted(set(pictures.labels))[:3]
    for label in classes:
        folder = tmp_path / "photos" / label
        folder.mkdir(parents=True)
        files = [f for f, own in zip(pictures.files, pictures.labels, strict=True) if own == label]
        for place, content in enumerate(files[:EACH_CLASS]):
            (folder / f"{place:02}.png").write_bytes(content)
    (tmp_path / "new.png").write_bytes(queries.files[0])
    lines = commands("pg_siamese train folder")
    assert len(lines) == 4
    answer = ""
    for line in lines:
        more = ["--epochs", "1", "--head-only"] if line.split()[1] == "train" else []
        answer = run(line, tmp_path, dsn, *more)
    (number,) = db.execute("SELECT collection_id FROM siamese.collections").fetchall()[0]
    rows = db.execute(
        f"SELECT m.name, (SELECT count(*)::int FROM siamese.embedding_{number})"
        " FROM siamese.collections AS c JOIN siamese.models AS m USING (model_id)"
    ).fetchall()
    assert rows == [("photos", len(classes) * EACH_CLASS)]
    found = [line for line in answer.splitlines() if any(label in line for label in classes)]
    assert len(found) == 5, answer
    assert (tmp_path / "photos.md").is_file()
    (line,) = commands("pg_siamese calibrate-domain")
    assert "pages of text" in run(line, tmp_path)


def test_a_collection_of_ones_own(
    dsn: str, db: Connection, pictures: Pictures, tmp_path: Path
) -> None:
    more = ", finding text, patient text"
    make_collection(db, "scans", more=more, backfill=False)
    db.execute("ALTER TABLE scans DISABLE TRIGGER USER")
    for number in range(2 * EACH_CLASS):
        label = ("healthy", "ill")[number // 2 % 2]
        row = (number, pictures.files[number], label, f"p{number // 2}")
        db.execute("INSERT INTO scans VALUES (%s, %s, %s, %s)", row)
    (line,) = commands("pg_siamese train folder --from-collection")
    said = run(line, tmp_path, dsn, "--epochs", "1", "--head-only")
    assert "in 2 classes" in said
    card = (tmp_path / "scans.md").read_text()
    assert "Images of scans come in groups." in card


def test_an_experiment(tmp_path: Path) -> None:
    try:
        open_dataset("medmnist:breastmnist")
    except DataNotFoundError as error:
        pytest.skip(f"no MedMNIST here: {error}")
    for line in commands("pg_siamese train medmnist_siamese"):
        more = ["--epochs", "1"] if line.split()[1] == "train" else []
        run(line, tmp_path, "", *more)
    assert (tmp_path / "siamese.onnx").is_file()
    assert (tmp_path / "results/mine.json").is_file()
    assert list((tmp_path / "build/pictures").rglob("*.png"))


def test_changed_images_and_photographs(tmp_path: Path) -> None:
    try:
        for spec in ("medmnist:breastmnist", "imagenette"):
            open_dataset(spec, input_spec=InputSpec(28, 28))
    except DataNotFoundError as error:
        pytest.skip(f"no data here: {error}")
    (tmp_path / "models").symlink_to(ROOT / "models")
    (line,) = commands("pg_siamese evaluate models/medical.onnx --split val")
    said = run(line, tmp_path, "", "--data", "medmnist:breastmnist", "--robustness-queries", "5")
    assert "breastmnist, changed: mAP@5" in said
    assert "imagenette: false matches" in said
    drawn = {picture.name for picture in (tmp_path / "build/pictures").iterdir()}
    assert {"medical-reliability.png", "medical-robustness.png"} <= drawn
