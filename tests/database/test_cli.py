"""The command line against a real server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import psycopg
import pytest
from PIL import Image
from psycopg.conninfo import make_conninfo

from pg_siamese import datasets
from pg_siamese.cli.demo import things_to_try
from pg_siamese.client.connection import connect, schema_prefix
from pg_siamese.client.sources import png
from tests import dicom_files
from tests.conftest import Connection
from tests.database.commands import fails, run, works
from tests.server import login_role, pg_environment
from tests.support import (
    column_of,
    graph,
    grid_encoder,
    heeding_interrupts,
    one,
    rows_of,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


def count(db: Connection, table: str = "siamese.images") -> int:
    return int(one(db, f"SELECT count(*) FROM {table}"))


def picture(number: int) -> bytes:
    rng = np.random.default_rng(number)
    return png(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8))


def picture_folder(folder: Path, per_label: int = 3) -> Path:
    """Write a folder of PNG files with two labels."""
    for number, label in enumerate(("cat", "dog")):
        (folder / label).mkdir(parents=True)
        for index in range(per_label):
            (folder / label / f"{index}.png").write_bytes(picture(100 * number + index))
    return folder


def medical_set(file: Path, counts: tuple[int, int, int] = (30, 10, 5)) -> Path:
    """Write an npz file in MedMNIST's layout, of two classes that are easy to tell apart."""
    rng = np.random.default_rng(7)
    arrays: dict[str, Any] = {}
    for split, size in zip(("train", "val", "test"), counts, strict=True):
        labels = np.arange(size) % 2
        images = rng.integers(0, 80, (size, 28, 28)) + 150 * labels[:, None, None]
        arrays[f"{split}_images"] = images.astype(np.uint8)
        arrays[f"{split}_labels"] = labels[:, None].astype(np.uint8)
    np.savez(file, **arrays)
    return file


# --- load --------------------------------------------------------------------------------------


def test_a_folder_goes_in_with_its_own_bytes(dsn: str, db: Connection, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pets")
    assert "6 images stored" in works(dsn, "load", str(folder))
    rows = db.execute(
        "SELECT source, label, dataset, split, image FROM siamese.images ORDER BY image_id"
    ).fetchall()
    assert len(rows) == 6
    for source, label, dataset, split, image in rows:
        file = folder / source.removeprefix("file:pets/")
        assert image == file.read_bytes()
        assert (label, dataset, split) == (file.parent.name, "pets", None)
    # The trigger has embedded them.
    status = "SELECT rows_embedded, pending FROM siamese.collection_status"
    assert db.execute(status).fetchone() == (6, 6)


def test_npz_splits_and_a_second_run(dsn: str, db: Connection, tmp_path: Path) -> None:
    file = str(medical_set(tmp_path / "breastmnist.npz"))
    assert "10 images stored" in works(dsn, "load", file, "--split", "val")
    db.execute("DELETE FROM siamese.images WHERE source = 'medmnist:breastmnist/val/4'")
    output = works(dsn, "load", file, "--split", "train", "--split", "val")
    assert "31 images stored" in output
    assert "already stored: 9" in output
    assert "0 images stored" in works(dsn, "load", file, "--split", "train", "--split", "val")
    assert count(db) == 40
    labels = db.execute("SELECT DISTINCT label FROM siamese.images ORDER BY 1").fetchall()
    assert labels == [("malignant",), ("normal, benign",)]


def test_a_rejected_image_names_its_file(dsn: str, db: Connection, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pets")
    broken = folder / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    line = fails(dsn, "load", str(folder))
    assert str(broken) in line
    assert "4 images stored" in line
    assert count(db) == 4
    result = run(dsn, "load", str(folder), "--skip-rejected")
    assert result.exit_code == 0
    assert f"rejected: {broken}" in result.stderr
    assert "1 image stored" in result.stdout
    assert count(db) == 5


def test_file_names_of_any_bytes(dsn: str, db: Connection, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pets", per_label=1)
    (folder / "cat" / "old.jfif").write_bytes(picture(5))
    (folder / "cat" / "new.heic").write_bytes(b"heic")
    (folder / "cat" / "notes.txt").write_bytes(b"text")
    Path(os.fsdecode(os.fsencode(folder) + b"/cat/caf\xe9.png")).write_bytes(picture(6))
    result = run(dsn, "load", str(folder))
    assert result.exit_code == 0, result.output
    assert "3 images stored" in result.stdout
    assert "3 files left out: " in result.stdout and "1 .heic" in result.stdout
    assert r"caf\xe9.png: its name is not UTF-8" in result.stderr
    assert "new.heic: .heic files are not supported" in result.stderr
    assert "notes.txt" not in result.stderr
    assert count(db) == 3


def test_images_over_a_limit_are_named_too(dsn: str, db: Connection, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pets")
    huge = folder / "cat" / "9.png"
    Image.new("1", (6000, 6000)).save(huge)
    assert str(huge) in fails(dsn, "load", str(folder))
    assert count(db) == 3


def test_own_tables(dsn: str, db: Connection, tmp_path: Path) -> None:
    """A table with other names and types, a collection made on it, and keys that are uuids."""
    db.execute(
        'CREATE TABLE "My scans" (scan uuid PRIMARY KEY DEFAULT gen_random_uuid(), '
        '"the image" bytea NOT NULL, label integer)'
    )
    file = str(medical_set(tmp_path / "other.npz"))
    table = ["--table", '"My scans"', "--image-column", "the image"]
    assert "10 images stored" in works(dsn, "load", file, "--split", "val", *table)
    db.execute(
        "SELECT siamese.create_collection('scans', '\"My scans\"', 'scan', 'the image', 'medical')"
    )
    works(dsn, "load", file, "--split", "test", "-c", "scans")
    assert count(db, '"My scans"') == 15
    scan = one(db, 'SELECT scan FROM "My scans" LIMIT 1')
    output = works(dsn, "query", "--id", str(scan), "-k", "3", "-c", "scans")
    keys = [uuid.UUID(line.split()[1]) for line in output.splitlines()[1:]]
    assert len(keys) == 3 and scan not in keys


def test_what_cannot_be_loaded_into(dsn: str, tmp_path: Path) -> None:
    folder = str(picture_folder(tmp_path / "pets"))
    line = fails(dsn, "load", folder, "--table", "nothing")
    assert 'table "nothing" does not exist' in line
    assert 'no column "image"' in fails(dsn, "load", folder, "--table", "pg_class")
    line = fails(dsn, "load", folder, "--collection", "nothing")
    assert 'collection "nothing" does not exist; available: images' in line


def test_ctrl_c_cancels_in_the_server_and_says_what_is_stored(
    dsn: str, db: Connection, tmp_path: Path
) -> None:
    db.execute(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN IF (SELECT count(*) FROM siamese.images) > 400 THEN PERFORM pg_sleep(60); END IF;"
        " RETURN NULL; END';"
        "CREATE TRIGGER wait AFTER INSERT ON siamese.images EXECUTE FUNCTION wait()"
    )
    file = medical_set(tmp_path / "slow.npz", (1000, 2, 2))
    command = [sys.executable, "-m", "pg_siamese", "load", str(file), "--split", "train"]
    process = subprocess.Popen(
        [*command, "--dsn", dsn],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeding_interrupts,
    )
    sleeping = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE application_name = 'pg_siamese' AND wait_event = 'PgSleep'"
        " AND datname = current_database()"
    )

    def sleepers() -> int:
        return int(one(db, sleeping))

    wait_until(lambda: sleepers() or process.poll() is not None)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "interrupted: the running statement was cancelled; 400 images stored" in stderr
    assert sleepers() == 0
    assert count(db) == 400


# --- query -------------------------------------------------------------------------------------


@pytest.fixture
def loaded(dsn: str, tmp_path: Path) -> str:
    """A database with 40 images of two labels."""
    file = medical_set(tmp_path / "breastmnist.npz")
    works(dsn, "load", str(file), "--split", "train", "--split", "val")
    return dsn


def answers(output: str) -> list[list[str]]:
    """The cells of the table that query prints."""
    lines = [line.strip() for line in output.splitlines()[1:]]
    return [re.split(r"\s{2,}", line) for line in lines if line[:1].isdigit()]


def test_a_stored_image_finds_itself_by_file_but_not_by_id(
    loaded: str, db: Connection, tmp_path: Path
) -> None:
    ((key, stored),) = rows_of(db, "SELECT image_id, image FROM siamese.images LIMIT 1")
    file = tmp_path / "query.png"
    file.write_bytes(stored)
    by_file = answers(works(loaded, "query", str(file), "-k", "5"))
    assert [cells[0] for cells in by_file] == ["1", "2", "3", "4", "5"]
    assert by_file[0][1] == str(key)
    assert float(by_file[0][2]) == pytest.approx(0, abs=1e-3)
    by_id = answers(works(loaded, "query", "--id", str(key), "-k", "5"))
    assert len(by_id) == 5
    assert str(key) not in [cells[1] for cells in by_id]


@pytest.mark.parametrize("engine", ["auto", "pgvector"])
def test_filters_hold_for_every_row(loaded: str, db: Connection, engine: str) -> None:
    key = one(db, "SELECT min(image_id) FROM siamese.images WHERE label <> 'malignant'")
    options = ["--filter", '{"label": "malignant"}', "--engine", engine]
    found = answers(works(loaded, "query", "--id", str(key), *options, "-k", "30"))
    assert len(found) == 20
    assert {cells[-1] for cells in found} == {"malignant"}


def test_the_sheet(loaded: str, db: Connection, tmp_path: Path) -> None:
    ((key, stored),) = rows_of(db, "SELECT image_id, image FROM siamese.images LIMIT 1")
    file, sheet = tmp_path / "query.png", tmp_path / "new" / "sheet.png"
    file.write_bytes(stored)
    for query in ([str(file)], ["--id", str(key)]):
        output = works(loaded, "query", *query, "-k", "3", "--sheet", str(sheet))
        assert str(sheet) in output
        with Image.open(sheet) as image:
            assert image.format == "PNG"
            assert image.width > 800
        sheet.unlink()


def test_the_frame_of_each_answer(dsn: str, db: Connection, tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8)
    file, sheet = tmp_path / "loop.dcm", tmp_path / "sheet.png"
    file.write_bytes(dicom_files.frames(stack))
    db.execute("CREATE TABLE loops (id text PRIMARY KEY, image bytea)")
    db.execute("SELECT siamese.create_collection('loops', 'loops', frames => 'all')")
    db.execute("INSERT INTO loops VALUES ('a', %s)", (file.read_bytes(),))
    query = ["query", str(file), "-c", "loops", "-k", "1", "--sheet", str(sheet)]
    for frame, wanted in ((0, "3"), (2, "2")):
        header, answer, *_ = works(dsn, *query, "--frame", str(frame)).splitlines()
        assert dict(zip(header.split(), answer.split(), strict=False))["frame"] == wanted
    assert "frame 6 is out of range" in fails(dsn, *query, "--frame", "6")


@pytest.mark.parametrize("strategy", ["mean", "best"])
def test_examples(loaded: str, db: Connection, tmp_path: Path, strategy: str) -> None:
    """Keys, and files where there are such."""
    rows = rows_of(db, "SELECT image_id, image FROM siamese.images ORDER BY 1 LIMIT 3")
    (first, _), (second, stored), (third, _) = rows
    file, sheet = tmp_path / "query.png", tmp_path / "sheet.png"
    file.write_bytes(stored)
    words = ["--like", str(first), "--like", str(file), "--unlike", str(third)]
    output = works(
        loaded, "query", *words, "-k", "40", "--strategy", strategy, "--sheet", str(sheet)
    )
    found = [int(cells[1]) for cells in answers(output)]
    assert found == column_of(
        db,
        "SELECT image_id FROM similar_images(like => %s, like_images => %s, unlike => %s,"
        " strategy => %s, k => 40)",
        [first], [stored], [third], strategy,
    )  # fmt: skip
    assert len(found) == 38 and second in found
    assert sheet.exists()


def test_a_part_of_an_image(loaded: str, db: Connection, tmp_path: Path) -> None:
    file, sheet = tmp_path / "query.png", tmp_path / "sheet.png"
    file.write_bytes(picture(5))
    query = ["query", str(file), "--region", "4,5,20,28", "--sheet", str(sheet)]
    found = [int(cells[1]) for cells in answers(works(loaded, *query))]
    statement = "SELECT image_id FROM similar_images(%s, region => '(4,5),(20,28)')"
    assert found == column_of(db, statement, picture(5))
    assert sheet.exists()
    outside = ["query", "--id", "1", "--region", "4,5,29,28"]
    assert "region is not inside the image" in fails(loaded, *outside)


def test_similarity_map(loaded: str, db: Connection, tmp_path: Path) -> None:
    stored = rows_of(db, "SELECT image_id, image FROM siamese.images ORDER BY 1 LIMIT 2")
    file, by_file, by_id = tmp_path / "query.png", tmp_path / "new" / "a.png", tmp_path / "b.png"
    file.write_bytes(stored[0][1])
    neighbour = ["--neighbour-id", str(stored[1][0]), "--masks", "20"]
    output = works(loaded, "similarity-map", str(by_file), "--image", str(file), *neighbour)
    assert str(by_file) in output
    works(loaded, "similarity-map", str(by_id), "--id", str(stored[0][0]), *neighbour)
    assert by_file.read_bytes() == by_id.read_bytes()
    with Image.open(by_id) as image:
        assert image.format == "PNG" and image.width == 512
    missing = ["similarity-map", str(tmp_path / "c.png"), "--id", "999999", *neighbour]
    assert "999999" in fails(loaded, *missing)
    assert not (tmp_path / "c.png").exists()


def test_bad_queries_are_one_line(loaded: str, tmp_path: Path) -> None:
    junk = tmp_path / "junk.png"
    junk.write_bytes(b"no image")
    assert str(junk) in fails(loaded, "query", str(junk))
    assert "999999" in fails(loaded, "query", "--id", "999999")
    assert "not a valid key" in fails(loaded, "query", "--id", "abc")
    fails(loaded, "query", "--id", "1", "-k", "0")
    fails(loaded, "query", "--id", "1", "--filter", '{"colour": 1}')
    # No index has been built yet.
    fails(loaded, "query", "--id", "1", "--engine", "faiss")


# --- status, build-index, register-model ---------------------------------------------------------


def test_status_and_build_index(loaded: str) -> None:
    before = works(loaded, "status")
    assert re.search(r"pending +40\b", before)
    assert re.search(r"model +medical\b", before)
    result = run(loaded, "build-index")
    assert result.exit_code == 0, result.output
    assert "is current" in result.stdout
    assert "100%" in result.stderr
    after = works(loaded, "status")
    assert re.search(r"pending +0\b", after)
    assert len(answers(works(loaded, "query", "--id", "1", "--engine", "faiss"))) == 10


@pytest.mark.parametrize("command", ["build-index", "rebuild-file"])
def test_a_collection_that_is_not_there(dsn: str, command: str) -> None:
    missing = 'collection "nothing" does not exist'
    assert missing in fails(dsn, command, "-c", "nothing")


def test_rebuild_file_is_for_standbys(dsn: str) -> None:
    """What it does there, tests/operations shows."""
    assert "not a standby" in fails(dsn, "rebuild-file")


def foreign_encoder(file: Path) -> Path:
    """Write an encoder that says nothing of its input: float32, channels first, any size."""
    helper = onnx.helper
    nodes = [
        helper.make_node("GlobalAveragePool", ["pixels"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["vector"], axis=1),
    ]
    kind = onnx.TensorProto.FLOAT
    model = graph(nodes, [("pixels", kind, ["n", 3, "h", "w"])], [("vector", kind, ["n", 3])])
    file.write_bytes(model)
    return file


def test_a_foreign_encoder_with_its_input(dsn: str, db: Connection, tmp_path: Path) -> None:
    file = str(foreign_encoder(tmp_path / "colours.onnx"))
    options = ["--size", "64x32", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
    options += ["--resize", "crop"]
    first = works(dsn, "register-model", file, *options)
    assert 'model "colours" is registered' in first
    assert works(dsn, "register-model", file, *options) == first
    works(dsn, "register-model", file, "--name", "other", *options)
    assert (
        len(one(db, "SELECT siamese.embed_image(%s, 'colours')::text", picture(1)).split(",")) == 3
    )


def test_a_model_with_its_weights_beside_it(dsn: str, db: Connection, tmp_path: Path) -> None:
    model = onnx.load_from_string(grid_encoder(("n", 3, 8, 8), pool=4))
    tensor = model.graph.initializer[0]
    (tmp_path / "m.onnx.data").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="m.onnx.data")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    works(
        *(dsn, "register-model", str(tmp_path / "m.onnx"), "--input-range", "0,4095"),
        *("--threshold", "0.5", "--mean", "0.1,0.2,0.3"),
    )
    assert db.execute(
        "SELECT specification -> 'input' -> 'input_range', dimension FROM models WHERE name = 'm'"
    ).fetchone() == ([0, 4095], 12)
    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
        data = (tmp_path / "m.onnx").read_bytes()
        db.execute("SELECT register_model('other', %s)", (data,))
    assert "external_data=False" in str(caught.value.diag.message_hint)


def test_what_is_no_model_is_one_line(dsn: str, tmp_path: Path) -> None:
    file = tmp_path / "junk.onnx"
    file.write_bytes(b"junk")
    fails(dsn, "register-model", str(file))


# --- the connection ------------------------------------------------------------------------------


def test_the_extension_may_be_missing(dsn: str) -> None:
    line = fails(make_conninfo(dsn, dbname="template1"), "status")
    assert "CREATE EXTENSION" in line


def test_a_database_that_is_not_there(dsn: str) -> None:
    line = fails(make_conninfo(dsn, dbname="not there"), "status")
    assert 'database "not there" does not exist' in line
    assert "start the server" not in line


def test_the_pg_variables_are_enough(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in pg_environment(dsn).items():
        monkeypatch.setenv(variable, value)
    assert "images" in works("", "status")


# --- the demo ----------------------------------------------------------------------------------


def test_the_demo_twice(
    dsn: str, db: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("breastmnist", "ham10000_28", "retinamnist"):
        medical_set(tmp_path / f"{name}.npz", (60, 20, 10))
    monkeypatch.setattr(datasets, "medmnist_folders", lambda: [tmp_path])
    sheet = tmp_path / "sheet.png"
    first = works(dsn, "demo", "--sheet", str(sheet))
    assert "ham10000_28 stands in for dermamnist" in first
    assert "left out, because not found: pneumoniamnist" in first
    assert "240 images inserted" in first
    assert "similar_images(image => $1, k => 4)" in first
    assert "the index is built" in first
    assert "psql 'host=" in first or "psql 'user=" in first
    assert "make " not in first
    assert sheet.stat().st_size > 10_000
    sheet.unlink()
    second = works(dsn, "demo", "--sheet", str(sheet))
    assert "240 images already stored" in second
    assert "the index is up to date" in second
    assert sheet.exists()
    assert count(db) == 240
    assert one(db, "SELECT pending FROM siamese.collection_status") == 0
    # What it says to try works as it stands.
    with connect(dsn) as connection:
        statements = things_to_try(connection, schema_prefix(connection))
        assert len(statements) == 3
        for statement in statements.values():
            assert statement in first
            assert connection.execute(statement.encode()).fetchall()


def test_the_demo_goes_on_where_it_stopped(
    dsn: str, db: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = medical_set(tmp_path / "breastmnist.npz")
    monkeypatch.setattr(datasets, "medmnist_folders", lambda: [tmp_path])
    works(dsn, "load", str(file), "--split", "val")
    output = works(dsn, "demo", "--sheet", str(tmp_path / "sheet.png"))
    assert "30 images inserted" in output
    assert "10 images already stored" in output
    assert count(db) == 40


def test_the_demo_leaves_a_collection_of_another_model_alone(
    dsn: str, db: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(foreign_encoder(tmp_path / "colours.onnx"))
    works(dsn, "register-model", file, "--size", "28")
    db.execute("SELECT siamese.drop_collection('images')")
    db.execute(
        "SELECT siamese.create_collection('images', 'siamese.images', 'image_id',"
        " model => 'colours')"
    )
    medical_set(tmp_path / "breastmnist.npz")
    monkeypatch.setattr(datasets, "medmnist_folders", lambda: [tmp_path])
    result = run(dsn, "demo")
    assert result.exit_code == 1, result.output
    line = result.stderr.splitlines()[-1]
    assert 'has model "colours", the demo needs "medical"' in line
    assert count(db) == 0


# --- other roles ---------------------------------------------------------------------------------


@pytest.fixture
def reader(loaded: str, db: Connection) -> Iterator[str]:
    """A connection string for a role that may search."""
    db.execute(login_role("cli_reader"))
    try:
        db.execute("SELECT siamese.grant_usage('cli_reader')")
        yield make_conninfo(loaded, user="cli_reader")
    finally:
        db.execute("DROP OWNED BY cli_reader")
        db.execute("DROP ROLE cli_reader")


def test_a_reader_can_query_and_nothing_else(reader: str, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    found = answers(works(reader, "query", "--id", "1", "-k", "3", "--sheet", str(sheet)))
    assert len(found) == 3
    assert sheet.exists()
    assert "permission denied" in fails(reader, "build-index")
    assert "rows_embedded" in works(reader, "status")
    folder = str(picture_folder(tmp_path / "pets"))
    assert "permission denied" in fails(reader, "load", folder)
