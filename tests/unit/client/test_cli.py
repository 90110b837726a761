"""The command line without a server: its errors, its options and the statements that it makes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from pg_siamese.cli.failures import describe_failure
from pg_siamese.cli.main import app
from pg_siamese.cli.reference import commands, reference
from pg_siamese.client.connection import (
    PROGRESS_NOTICE,
    CommandError,
    connect,
    describe_error,
)
from pg_siamese.client.queries import Collection, Examples, display_pixels, search_statement
from pg_siamese.client.sources import png
from tools.project import ROOT

COMMANDS = [name for name, _ in commands()]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def fails(*arguments: str) -> str:
    """Run a command that must fail as it should; return its one line."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A connection string that no server answers."""
    for name in ("PGHOST", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE"):
        monkeypatch.delenv(name, raising=False)
    return f"host={tmp_path} user=nobody dbname=none"


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_the_reference_is_up_to_date(pytestconfig: pytest.Config) -> None:
    file = ROOT / "docs" / "cli.md"
    if pytestconfig.getoption("renew_golden"):
        file.write_text(reference(), encoding="utf-8")
    assert file.read_text(encoding="utf-8") == reference(), "renew it with --renew-golden"


def test_start_up_imports_nothing_heavy() -> None:
    script = (
        "import sys, pg_siamese.cli.main;"
        "heavy = {'torch', 'matplotlib', 'numpy', 'PIL', 'onnxruntime'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    "arguments", [["status"], ["build-index"], ["rebuild-file"], ["query", "--id", "1"], ["demo"]]
)
def test_no_server_is_one_line(arguments: list[str], no_server: str) -> None:
    line = fails(*arguments, "--dsn", no_server)
    assert "connection to server" in line
    assert "--dsn" in line
    assert "start the server" in line


def test_the_pg_variables_say_where_the_server_is(
    tmp_path: Path, no_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGHOST", str(tmp_path / "elsewhere"))
    assert "elsewhere" in fails("status")


def test_a_bad_connection_string_is_one_line() -> None:
    assert "bad connection string" in fails("status", "--dsn", "nonsense")


def test_several_addresses_are_one_line() -> None:
    with pytest.raises(CommandError) as caught:
        connect("host=127.0.0.1,127.0.0.1 port=1,1 user=nobody dbname=none")
    assert "\n" not in str(caught.value)
    assert "Connection refused" in str(caught.value)


def test_files_are_looked_at_before_the_server(tmp_path: Path, no_server: str) -> None:
    missing = str(tmp_path / "missing")
    for command in ("load", "query", "register-model"):
        assert "o such file" in fails(command, missing, "--dsn", no_server)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no image in this folder" in fails("load", str(empty), "--dsn", no_server)


def test_query_takes_an_image_or_an_id_or_examples() -> None:
    for words in ([], ["image.png", "--id", "4"], ["image.png", "--like", "4"]):
        assert "an image file, --id with" in fails("query", *words)
    assert "--unlike needs --like" in fails("query", "--id", "4", "--unlike", "5")
    for region in ("1,2,3", "a,b,c,d"):
        assert "--region is not four numbers" in fails("query", "--id", "4", "--region", region)


def test_a_similarity_map_takes_an_image_or_an_id() -> None:
    assert "--image or --id" in fails("similarity-map", "map.png", "--neighbour-id", "2")
    given = ["--id", "1", "--neighbour-id", "2"]
    assert "--neighbour or" in fails("similarity-map", "map.png", *given, "--neighbour", "a.png")


@pytest.mark.parametrize(("value", "message"), [("{", "not JSON"), ("[1]", "not a JSON object")])
def test_bad_filters(value: str, message: str) -> None:
    assert message in fails("query", "--id", "1", "--filter", value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--size", "big", "WIDTHxHEIGHT"),
        ("--size", "1x2x3", "WIDTHxHEIGHT"),
        ("--size", "0", "WIDTHxHEIGHT"),
        ("--mean", "a,b", "list of numbers"),
        ("--std", "", "list of numbers"),
    ],
)
def test_bad_model_options(option: str, value: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"model")
    assert message in fails("register-model", str(file), option, value)


def test_bugs_keep_their_traceback() -> None:
    assert describe_failure(KeyError("x")) is None
    assert describe_failure(ValueError("x")) is None
    assert describe_failure(psycopg.errors.UndefinedTable("no table")) == "no table"
    assert describe_failure(CommandError("so")) == "so"


def test_errors_of_the_server_are_one_line() -> None:
    assert describe_error(psycopg.OperationalError("the server\nis gone ")) == "the server is gone"
    assert describe_error(psycopg.OperationalError()) == "OperationalError"


@pytest.mark.parametrize(
    ("notice", "done", "total"),
    [
        ('building index of collection "images": 40% (28000 of 70000 vectors)', "28000", "70000"),
        ('embedding collection "x": 40% (400 of 1000 rows)', "400", "1000"),
    ],
)
def test_progress_notices_are_understood(notice: str, done: str, total: str) -> None:
    found = PROGRESS_NOTICE.match(notice)
    assert found is not None
    assert (found["done"], found["total"]) == (done, total)


def test_other_notices_are_not_taken_for_progress() -> None:
    assert PROGRESS_NOTICE.match('index file of collection "images" is missing') is None


def collection(**changes: str) -> Collection:
    settings: dict[str, Any] = {
        "name": "images",
        "model": "medical",
        "relation": "images",
        "key_type": "bigint",
    }
    settings |= dict.fromkeys(("key_column", "key_name"), "image_id")
    settings |= dict.fromkeys(("image_column", "image_name"), "image")
    return Collection(**(settings | changes), shown_columns=("label",))


def test_the_plain_search() -> None:
    search = search_statement(collection(), image=b"x", k=4, prefix="")
    assert search.sql == (
        "SELECT s.rank, i.image_id, s.distance, s.similarity, i.label\n"
        "  FROM similar_images(image => $1, k => 4) AS s\n"
        "  JOIN images AS i USING (image_id)\n"
        " ORDER BY s.rank"
    )
    assert search.parameters == (b"x",)


def test_every_option_of_a_search() -> None:
    search = search_statement(
        collection(name="o'clock", relation="s.t", key_column="k"),
        key="17",
        k=4,
        filter={"label": "l'été"},
        engine="faiss",
    )
    assert (
        "siamese.similar_images(image_id => $1, k => 4, collection => 'o''clock', "
        "filter => '{\"label\": \"l''été\"}', engine => 'faiss')"
    ) in search.sql
    assert "JOIN s.t AS i ON i.k = s.image_id" in search.sql
    assert search.parameters == (17,)


def test_other_keys_go_through_similar_rows() -> None:
    search = search_statement(collection(key_type="uuid", relation="p"), image=b"x", k=4)
    call = "siamese.similar_rows(NULL::p, image => $1, k => 4, collection => 'images')"
    assert call in search.sql
    search = search_statement(collection(key_type="uuid", relation="p"), key="abc", k=4)
    assert "similar_rows(NULL::p, key => $1, k => 4," in search.sql
    assert search.parameters == ("abc",)


def test_a_search_among_frames() -> None:
    found = replace(collection(), has_frames=True)
    search = search_statement(found, image=b"x", k=4, frame=3)
    assert "SELECT s.rank, i.image_id, s.distance, s.similarity, i.label, s.frame\n" in search.sql
    assert "similar_images(image => $1, k => 4, query_frame => 3) AS s" in search.sql
    found = replace(collection(key_type="uuid", relation="p"), has_frames=True)
    search = search_statement(found, image=b"x", k=4)
    assert search.sql.endswith("ORDER BY s.distance, (s.item).image_id, s.frame")


def test_a_search_by_examples() -> None:
    examples = Examples(["17", b"x", "3"], [b"y"], strategy="best", penalty=0.5)
    search = search_statement(collection(), k=4, examples=examples)
    assert (
        "similar_images(like => $1, like_images => $2, unlike_images => $3, strategy => 'best',"
        " penalty => 0.5, k => 4)"
    ) in search.sql
    assert search.parameters == ([17, 3], [b"x"], [b"y"])
    search = search_statement(
        collection(key_type="uuid", relation="p"), examples=Examples(["abc"], ["def"])
    )
    assert (
        "similar_rows(NULL::p, like => $1, unlike => $2, strategy => 'mean', k => 10," in search.sql
    )
    assert search.parameters == (["abc"], ["def"])


def test_a_search_for_a_part() -> None:
    search = search_statement(collection(), key="3", region=(0.25, 0.0, 1.0, 0.1))
    assert "image_id => $1, k => 10, region => '0.25,0.0,1.0,0.1')" in search.sql
    pixels = np.random.default_rng(0).integers(0, 256, (28, 20, 3), dtype=np.uint8)
    assert np.array_equal(display_pixels(png(pixels), region=(2, 3, 12, 28)), pixels[3:, 2:12])


def test_a_key_of_the_wrong_kind_is_said_so() -> None:
    with pytest.raises(CommandError, match='"abc" is not a valid key: keys are integers'):
        search_statement(collection(), key="abc")


def test_a_search_is_by_image_or_by_key() -> None:
    with pytest.raises(ValueError, match="not both"):
        search_statement(collection())


def test_images_are_shown_at_their_own_size_up_to_a_limit() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 20, 3), dtype=np.uint8)
    assert np.array_equal(display_pixels(png(pixels)), pixels)
    assert display_pixels(png(np.zeros((1000, 500), np.uint8))).shape == (512, 256, 3)


def test_turned_photographs_are_shown_upright(tmp_path: Path) -> None:
    file = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(file, exif=exif)
    assert display_pixels(file.read_bytes()).shape == (40, 20, 3)


def test_what_is_no_image_cannot_be_shown() -> None:
    with pytest.raises(CommandError, match="not an image"):
        display_pixels(b"%!PS-Adobe-3.0 EPSF-3.0")
