"""Every code block of the README, run against a real server."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg import sql

from pg_siamese.cli.dicom_demo import prepare_table
from tests import dicom_files
from tests.conftest import Connection, Pictures
from tests.server import pg_environment
from tests.support import grid_encoder, one, rows_of
from tools.project import ROOT

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
ROLES = ("analyst", "curator")


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def test_all_languages_are_run() -> None:
    assert {name for name, _ in BLOCKS} == {"sql", "sh", "python", "psql"}


@pytest.fixture
def filled(db: Connection, pictures: Pictures) -> Iterator[Connection]:
    db.execute(
        "INSERT INTO siamese.images (image, label, dataset, split)"
        " SELECT i, l, 'xrays', 'train' FROM unnest(%s::bytea[], %s::text[]) AS u (i, l)",
        (pictures.files[:100], pictures.labels[:100]),
    )
    db.execute("SELECT siamese.build_index()")
    prepare_table(db)
    db.execute(
        "INSERT INTO dicom_images (image, patient_id, sop_uid)"
        " SELECT i, 'p' || n / 2, n::text FROM unnest(%s::bytea[]) WITH ORDINALITY AS u (i, n)",
        (pictures.files[:20],),
    )
    yield db
    for role in ROLES:
        if db.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (role,)).fetchone():
            db.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
            db.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def test_sql(filled: Connection, queries: Pictures) -> None:
    for block in blocks("sql"):
        for statement in re.split(r";[ ]*(?:--[^\n]*)?\n", block):
            if not statement.strip():
                continue
            values = (queries.files[0],) * statement.count("$1")
            cursor = filled.execute(statement.replace("%", "%%").replace("$1", "%b"), values)
            if cursor.description and "embedding_failures" not in statement:
                assert cursor.fetchall(), statement
    assert rows_of(filled, "SELECT subject, detail FROM self_check() WHERE NOT ok") == []


def test_python(
    filled: Connection,
    dsn: str,
    queries: Pictures,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "query.png").write_bytes(queries.files[0])
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), {"dsn": dsn})
    finally:
        os.chdir(before)
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_shell(
    filled: Connection, dsn: str, pictures: Pictures, queries: Pictures, tmp_path: Path
) -> None:
    (tmp_path / "query.png").write_bytes(queries.files[0])
    for place in range(20):
        folder = tmp_path / "pictures" / pictures.labels[place]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{place}.png").write_bytes(pictures.files[place])
    (tmp_path / "archive").mkdir()
    film = dicom_files.written(dicom_files.instance(1))
    (tmp_path / "archive" / "IM000001").write_bytes(film)
    model = grid_encoder(("batch", 3, 64, 64), pool=32)
    (tmp_path / "resnet.onnx").write_bytes(model)
    environment = os.environ | pg_environment(dsn)
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for block in blocks("sh"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[0] == "make":  # these run the tests themselves: only that they are there
                words, folder = ["make", "-n", *words[1:]], ROOT
            else:
                folder = tmp_path
                words[0] = str(ROOT / words[0])  # as in a clone
            done = subprocess.run(
                words, cwd=folder, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "answer.png").stat().st_size > 1000
    assert one(filled, "SELECT dimension FROM siamese.models WHERE name = 'resnet'") == 12
    assert one(filled, "SELECT image FROM films") == film
