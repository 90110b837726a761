"""The commands that explain a search, and measure recall and quality."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Connection
from tests.database.commands import fails, works
from tests.database.test_duplicates import drawn, fill, saved
from tests.support import rows_of


@pytest.fixture
def labelled(db: Connection) -> Connection:
    """Table ``t`` of eight pictures, the last two of another patient."""
    fill(db, {number: saved(drawn(number)) for number in range(8)})
    db.execute("UPDATE t SET split = CASE WHEN id < 6 THEN 'train' ELSE 'test' END")
    db.execute("UPDATE t SET patient = CASE WHEN id IN (1, 2, 6) THEN 'a' ELSE 'b' END")
    return db


def test_explain(dsn: str, labelled: Connection, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(saved(drawn(20)))
    filtered = ["-c", "t", "-k", "3", "--filter", '{"split": "train"}']
    for query in (["--id", "3"], [str(file)]):
        shown = works(dsn, "explain", *query, *filtered)
        facts = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.strip()}
        assert facts["engine"][:1] == ["pgvector"]
        assert facts["returned"][:1] == ["3"]
    assert "specify an image file, or --id" in fails(dsn, "explain", "-c", "t")


def test_recall(dsn: str, labelled: Connection) -> None:
    shown = works(dsn, "recall", "-c", "t", "--queries", "4", "-k", "2")
    assert shown.startswith("4 searches for 2 neighbours\n")
    assert "recall          1.0000, at least 1.0000" in shown


def test_quality(dsn: str, labelled: Connection) -> None:
    options = ["--label-column", "patient", "--queries", '{"split": "test"}']
    shown = works(dsn, "quality", "-c", "t", *options, "--gallery", '{"split": "train"}')
    (wanted,) = rows_of(
        labelled,
        "SELECT sampled, map5, mmv5, acc1, acc3, acc5 FROM retrieval_quality('t', 'patient',"
        ' queries => \'{"split": "test"}\', gallery => \'{"split": "train"}\')',
    )
    count, *figures = shown.splitlines()
    assert count == "2 queries"
    assert [line.split()[1] for line in figures] == [f"{value:.2f}" for value in wanted[1:]]
    assert "--gallery is not JSON" in fails(dsn, "quality", "-c", "t", "--gallery", "{")
