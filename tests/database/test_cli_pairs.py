"""The commands that list neighbours, pairs, duplicates and leaks."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Connection
from tests.database.commands import fails, run, works
from tests.database.test_duplicates import copy_of, drawn, fill, saved
from tests.support import one, rows_of

COMMANDS = {
    "nearest": (
        ["-k", "3", "2", "7", "8"],
        "nearest('t', keys => '{2, 7, 8}', k => 3)",
        ["key", "rank", "neighbour", "distance", "frame"],
    ),
    "pairs": (
        ["2"],
        "similar_pairs('t', 2)",
        ["a", "b", "distance"],
    ),
    "duplicates": (
        ["--max-distance", "2"],
        "near_duplicates('t', 2)",
        ["group_number", "key", "representative", "difference", "distance", "is_mirrored"],
    ),
    "leaks": (
        ["--max-distance", "2", "--group-column", "patient"],
        "leaks('t', max_distance => 2, group_column => 'patient')",
        ["kind", "a", "split_a", "b", "split_b", "group_label", "difference"],
    ),
}


@pytest.fixture
def copies(db: Connection) -> Connection:
    """Table ``t`` of six pictures, copies of two of them, and a patient in two splits."""
    pictures = [drawn(seed) for seed in range(6)]
    files = {number: saved(picture) for number, picture in enumerate(pictures)}
    files |= {7: copy_of(pictures[0], "encoded"), 8: copy_of(pictures[1], "small")}
    fill(db, files)
    db.execute("UPDATE t SET split = CASE WHEN id < 6 THEN 'train' ELSE 'test' END")
    db.execute("UPDATE t SET patient = 'p' WHERE id IN (2, 8)")
    return db


def test_rows_as_sql_gives_them(dsn: str, copies: Connection, tmp_path: Path) -> None:
    for command, (arguments, call, names) in COMMANDS.items():
        sheet, file = tmp_path / f"{command}.png", tmp_path / "new" / f"{command}.csv"
        arguments = [command, *arguments, "-c", "t"]
        result = run(dsn, *arguments, "--sheet", str(sheet))
        assert result.exit_code == 0, result.output
        header, *rows = csv.reader(io.StringIO(result.stdout))
        assert header == names
        wanted = rows_of(copies, f"SELECT * FROM {call}")
        shown = [["" if value is None else str(value) for value in row] for row in wanted]
        assert sorted(rows) == sorted(shown)
        assert rows
        assert f"{len(rows):,} rows" in result.stderr
        with Image.open(sheet) as image:
            assert image.format == "PNG"
            assert image.width > 500
        assert works(dsn, *arguments, "-o", str(file)) == ""
        assert sorted(csv.reader(file.open(newline="")))[1:] == sorted([header, *rows])[1:]


def test_neighbours_of_all_rows(dsn: str, copies: Connection) -> None:
    output = works(dsn, "nearest", "-c", "t", "-k", "1", "--group-by", "patient", "--no-own-group")
    rows = list(csv.DictReader(io.StringIO(output)))
    wanted = "nearest('t', k => 1, group_by => 'patient', own_group => false)"
    assert [(row["key"], row["neighbour"]) for row in rows] == rows_of(
        copies, f"SELECT key, neighbour FROM {wanted}"
    )
    assert len(rows) == 8


def test_a_filter_and_no_rows(dsn: str, copies: Connection, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    arguments = ["-c", "t", "--filter", '{"split": "test"}', "--sheet", str(sheet)]
    output = works(dsn, "duplicates", "--max-distance", "2", *arguments)
    assert output.splitlines() == [",".join(COMMANDS["duplicates"][2])]
    assert not sheet.exists()
    assert one(copies, "SELECT count(*) FROM t WHERE split = 'test'") == 2


def test_mistakes(dsn: str, copies: Connection, tmp_path: Path) -> None:
    assert 'collection "tt" does not exist' in fails(dsn, "pairs", "1", "-c", "tt")
    assert "--filter is not JSON" in fails(dsn, "leaks", "-c", "t", "--filter", "{")
    file = tmp_path / "rows.csv"
    error = fails(dsn, "leaks", "-c", "t", "--split-column", "who", "-o", str(file))
    assert 'column "who" of table public.t does not exist' in error
    assert not file.exists()
