"""The command line against a real server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import psycopg
import pytest
from PIL import Image
from psycopg.conninfo import make_conninfo
from typer.testing import CliRunner

from pg_siamese import datasets
from pg_siamese.cli.demo import things_to_try
from pg_siamese.cli.main import app
from pg_siamese.client.connection import connect, schema_prefix
from pg_siamese.client.sources import png
from tests.conftest import Connection
from tests.server import login_role
from tests.support import grid_encoder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typer.testing import Result


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


def works(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: str) -> str:
    """Run a command that must fail as it should; return its error, which is one line."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    # Progress bars are on stderr too.
    lines = [line for line in result.stderr.splitlines() if not re.search(r"━|\d% ", line)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def count(db: Connection, table: str = "siamese.images") -> int:
    row = db.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert row is not None
    return int(row[0])


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
    assert "6 images stored" in works("load", str(folder), "--dsn", dsn)
    rows = db.execute(
        "SELECT source, label, dataset, split, image FROM siamese.images ORDER BY image_id"
    ).fetchall()
    assert len(rows) == 6
    for source, label, dataset, split, image in rows:
        file = folder / source.removeprefix("file:pets/")
        assert image == file.read_bytes()
        assert (label, dataset, split) == (file.parent.name, "pets", None)


def test_what_goes_in_is_embedded_by_the_trigger(dsn: str, db: Connection, tmp_path: Path) -> None:
    works("load", str(picture_folder(tmp_path / "pets")), "--dsn", dsn)
    status = db.execute("SELECT rows_embedded, pending FROM siamese.collection_status").fetchone()
    assert status == (6, 6)


def test_npz_splits_and_a_second_run(dsn: str, db: Connection, tmp_path: Path) -> None:
    file = str(medical_set(tmp_path / "breastmnist.npz"))
    assert "10 images stored" in works("load", file, "--split", "val", "--dsn", dsn)
    db.execute("DELETE FROM siamese.images WHERE source = 'medmnist:breastmnist/val/4'")
    output = works("load", file, "--split", "train", "--split", "val", "--dsn", dsn)
    assert "31 images stored" in output
    assert "already stored: 9" in output
    assert "0 images stored" in works(
        "load", file, "--split", "train", "--split", "val", "--dsn", dsn
    )
    assert count(db) == 40
    labels = db.execute("SELECT DISTINCT label FROM siamese.images ORDER BY 1").fetchall()
    assert labels == [("malignant",), ("normal, benign",)]


def test_a_rejected_image_names_its_file(dsn: str, db: Connection, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pets")
    broken = folder / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    line = fails("load", str(folder), "--dsn", dsn)
    assert str(broken) in line
    assert "4 images stored" in line
    assert count(db) == 4
    result = run("load", str(folder), "--skip-rejected", "--dsn", dsn)
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
    result = run("load", str(folder), "--dsn", dsn)
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
    assert str(huge) in fails("load", str(folder), "--dsn", dsn)
    assert count(db) == 3


def test_own_tables(dsn: str, db: Connection, tmp_path: Path) -> None:
    """A table with other names and types, a collection made on it, and keys that are uuids."""
    db.execute(
        'CREATE TABLE "My scans" (scan uuid PRIMARY KEY DEFAULT gen_random_uuid(), '
        '"the image" bytea NOT NULL, label integer)'
    )
    file = str(medical_set(tmp_path / "other.npz"))
    table = ["--table", '"My scans"', "--image-column", "the image"]
    assert "10 images stored" in works("load", file, "--split", "val", *table, "--dsn", dsn)
    db.execute(
        "SELECT siamese.create_collection('scans', '\"My scans\"', 'scan', 'the image', 'medical')"
    )
    works("load", file, "--split", "test", "-c", "scans", "--dsn", dsn)
    assert count(db, '"My scans"') == 15
    row = db.execute('SELECT scan, label FROM "My scans" LIMIT 1').fetchone()
    assert row is not None
    output = works("query", "--id", str(row[0]), "-k", "3", "-c", "scans", "--dsn", dsn)
    keys = [uuid.UUID(line.split()[1]) for line in output.splitlines()[1:]]
    assert len(keys) == 3
    assert row[0] not in keys


def test_what_cannot_be_loaded_into(dsn: str, tmp_path: Path) -> None:
    folder = str(picture_folder(tmp_path / "pets"))
    assert 'table "nothing" does not exist' in fails(
        "load", folder, "--table", "nothing", "--dsn", dsn
    )
    assert 'no column "image"' in fails("load", folder, "--table", "pg_class", "--dsn", dsn)
    line = fails("load", folder, "--collection", "nothing", "--dsn", dsn)
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
    # A shell's background job may have SIGINT ignored, and a child would inherit that.
    process = subprocess.Popen(
        [*command, "--dsn", dsn],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    sleeping = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE application_name = 'pg_siamese' AND wait_event = 'PgSleep'"
        " AND datname = current_database()"
    )

    def sleepers() -> int:
        row = db.execute(sleeping).fetchone()
        assert row is not None
        return int(row[0])

    deadline = time.monotonic() + 60
    while not sleepers() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
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
    works("load", str(file), "--split", "train", "--split", "val", "--dsn", dsn)
    return dsn


def answers(output: str) -> list[list[str]]:
    """The cells of the table that query prints."""
    lines = [line.strip() for line in output.splitlines()[1:]]
    return [re.split(r"\s{2,}", line) for line in lines if line[:1].isdigit()]


def test_a_stored_image_finds_itself_by_file_but_not_by_id(
    loaded: str, db: Connection, tmp_path: Path
) -> None:
    row = db.execute("SELECT image_id, image FROM siamese.images LIMIT 1").fetchone()
    assert row is not None
    file = tmp_path / "query.png"
    file.write_bytes(row[1])
    by_file = answers(works("query", str(file), "-k", "5", "--dsn", loaded))
    assert [cells[0] for cells in by_file] == ["1", "2", "3", "4", "5"]
    assert by_file[0][1] == str(row[0])
    assert float(by_file[0][2]) == pytest.approx(0, abs=1e-3)
    by_id = answers(works("query", "--id", str(row[0]), "-k", "5", "--dsn", loaded))
    assert len(by_id) == 5
    assert str(row[0]) not in [cells[1] for cells in by_id]


@pytest.mark.parametrize("engine", ["auto", "pgvector"])
def test_filters_hold_for_every_row(loaded: str, db: Connection, engine: str) -> None:
    row = db.execute(
        "SELECT min(image_id) FROM siamese.images WHERE label <> 'malignant'"
    ).fetchone()
    assert row is not None
    options = ["--filter", '{"label": "malignant"}', "--engine", engine]
    found = answers(works("query", "--id", str(row[0]), *options, "-k", "30", "--dsn", loaded))
    assert len(found) == 20
    assert {cells[-1] for cells in found} == {"malignant"}


def test_the_sheet(loaded: str, db: Connection, tmp_path: Path) -> None:
    row = db.execute("SELECT image_id, image FROM siamese.images LIMIT 1").fetchone()
    assert row is not None
    file, sheet = tmp_path / "query.png", tmp_path / "new" / "sheet.png"
    file.write_bytes(row[1])
    for query in ([str(file)], ["--id", str(row[0])]):
        output = works("query", *query, "-k", "3", "--sheet", str(sheet), "--dsn", loaded)
        assert str(sheet) in output
        with Image.open(sheet) as image:
            assert image.format == "PNG"
            assert image.width > 800
        sheet.unlink()


def test_bad_queries_are_one_line(loaded: str, tmp_path: Path) -> None:
    junk = tmp_path / "junk.png"
    junk.write_bytes(b"no image")
    assert str(junk) in fails("query", str(junk), "--dsn", loaded)
    assert "999999" in fails("query", "--id", "999999", "--dsn", loaded)
    assert "not a valid key" in fails("query", "--id", "abc", "--dsn", loaded)
    fails("query", "--id", "1", "-k", "0", "--dsn", loaded)
    fails("query", "--id", "1", "--filter", '{"colour": 1}', "--dsn", loaded)
    # No index has been built yet.
    fails("query", "--id", "1", "--engine", "faiss", "--dsn", loaded)


# --- status, build-index, register-model ---------------------------------------------------------


def test_status_and_build_index(loaded: str) -> None:
    before = works("status", "--dsn", loaded)
    assert re.search(r"pending +40\b", before)
    assert re.search(r"model +medical\b", before)
    result = run("build-index", "--dsn", loaded)
    assert result.exit_code == 0, result.output
    assert "is current" in result.stdout
    assert "100%" in result.stderr
    after = works("status", "--dsn", loaded)
    assert re.search(r"pending +0\b", after)
    assert len(answers(works("query", "--id", "1", "--engine", "faiss", "--dsn", loaded))) == 10


def test_build_index_of_what_is_not_there(dsn: str) -> None:
    assert 'collection "nothing" does not exist' in fails(
        "build-index", "-c", "nothing", "--dsn", dsn
    )


def test_rebuild_file_is_for_standbys(dsn: str) -> None:
    """What it does there, tests/operations shows."""
    assert "not a standby" in fails("rebuild-file", "--dsn", dsn)
    assert 'collection "nothing" does not exist' in fails(
        "rebuild-file", "-c", "nothing", "--dsn", dsn
    )


def foreign_encoder(file: Path) -> Path:
    """Write an encoder that says nothing of its input: float32, channels first, any size."""
    from onnx import TensorProto, helper, save

    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["pixels"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["vector"], axis=1),
        ],
        "colours",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["n", 3])],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="test"
    )
    save(model, str(file))
    return file


def test_a_foreign_encoder_with_its_input(dsn: str, db: Connection, tmp_path: Path) -> None:
    file = str(foreign_encoder(tmp_path / "colours.onnx"))
    options = ["--size", "64x32", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
    options += ["--resize", "crop", "--dsn", dsn]
    first = works("register-model", file, *options)
    assert 'model "colours" is registered' in first
    assert works("register-model", file, *options) == first
    works("register-model", file, "--name", "other", *options)
    row = db.execute("SELECT siamese.embed_image(%s, 'colours')::text", (picture(1),)).fetchone()
    assert row is not None
    assert len(row[0].split(",")) == 3


def test_a_model_with_its_weights_beside_it(dsn: str, db: Connection, tmp_path: Path) -> None:
    model = onnx.load_from_string(grid_encoder(("n", 3, 8, 8), pool=4))
    tensor = model.graph.initializer[0]
    (tmp_path / "m.onnx.data").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="m.onnx.data")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    works(
        *("register-model", str(tmp_path / "m.onnx"), "--input-range", "0,4095", "--dsn", dsn),
        *("--threshold", "0.5", "--mean", "0.1,0.2,0.3"),
    )
    row = db.execute(
        "SELECT specification -> 'input' -> 'input_range', dimension FROM models WHERE name = 'm'"
    ).fetchone()
    assert row == ([0, 4095], 12)
    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
        data = (tmp_path / "m.onnx").read_bytes()
        db.execute("SELECT register_model('other', %s)", (data,))
    assert "external_data=False" in str(caught.value.diag.message_hint)


def test_what_is_no_model_is_one_line(dsn: str, tmp_path: Path) -> None:
    file = tmp_path / "junk.onnx"
    file.write_bytes(b"junk")
    fails("register-model", str(file), "--dsn", dsn)


# --- the connection ------------------------------------------------------------------------------


def test_the_extension_may_be_missing(dsn: str) -> None:
    line = fails("status", "--dsn", make_conninfo(dsn, dbname="template1"))
    assert "CREATE EXTENSION" in line


def test_a_database_that_is_not_there(dsn: str) -> None:
    line = fails("status", "--dsn", make_conninfo(dsn, dbname="not there"))
    assert 'database "not there" does not exist' in line
    assert "start the server" not in line


def test_the_pg_variables_are_enough(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = psycopg.conninfo.conninfo_to_dict(dsn)
    names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "dbname": "PGDATABASE"}
    names["password"] = "PGPASSWORD"
    for name, variable in names.items():
        if name in settings:
            monkeypatch.setenv(variable, str(settings[name]))
    assert "images" in works("status")


# --- the demo ----------------------------------------------------------------------------------


def test_the_demo_twice(
    dsn: str, db: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("breastmnist", "ham10000_28", "retinamnist"):
        medical_set(tmp_path / f"{name}.npz", (60, 20, 10))
    monkeypatch.setattr(datasets, "medmnist_folders", lambda: [tmp_path])
    sheet = tmp_path / "sheet.png"
    first = works("demo", "--sheet", str(sheet), "--dsn", dsn)
    assert "ham10000_28 stands in for dermamnist" in first
    assert "left out, because not found: pneumoniamnist" in first
    assert "240 images inserted" in first
    assert "similar_images(image => $1, k => 4)" in first
    assert "the index is built" in first
    assert "psql 'host=" in first or "psql 'user=" in first
    assert "make " not in first
    assert sheet.stat().st_size > 10_000
    sheet.unlink()
    second = works("demo", "--sheet", str(sheet), "--dsn", dsn)
    assert "240 images already stored" in second
    assert "the index is up to date" in second
    assert sheet.exists()
    assert count(db) == 240
    row = db.execute("SELECT pending FROM siamese.collection_status").fetchone()
    assert row == (0,)
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
    works("load", str(file), "--split", "val", "--dsn", dsn)
    output = works("demo", "--sheet", str(tmp_path / "sheet.png"), "--dsn", dsn)
    assert "30 images inserted" in output
    assert "10 images already stored" in output
    assert count(db) == 40


def test_the_demo_leaves_a_collection_of_another_model_alone(
    dsn: str, db: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works("register-model", str(foreign_encoder(tmp_path / "colours.onnx")), "--size", "28",
          "--dsn", dsn)  # fmt: skip
    db.execute("SELECT siamese.drop_collection('images')")
    db.execute(
        "SELECT siamese.create_collection('images', 'siamese.images', 'image_id',"
        " model => 'colours')"
    )
    medical_set(tmp_path / "breastmnist.npz")
    monkeypatch.setattr(datasets, "medmnist_folders", lambda: [tmp_path])
    line = fails_at_the_end("demo", "--dsn", dsn)
    assert 'has model "colours", the demo needs "medical"' in line
    assert count(db) == 0


def fails_at_the_end(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    return result.stderr.splitlines()[-1]


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
    found = answers(works("query", "--id", "1", "-k", "3", "--sheet", str(sheet), "--dsn", reader))
    assert len(found) == 3
    assert sheet.exists()
    assert "permission denied" in fails("build-index", "--dsn", reader)
    assert "rows_embedded" in works("status", "--dsn", reader)
    folder = str(picture_folder(tmp_path / "pets"))
    assert "permission denied" in fails("load", folder, "--dsn", reader)
