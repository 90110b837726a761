"""docs/pictures.md and docs/notebook.ipynb: every block and every cell runs."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import Connection, Pictures, insert_images
from tests.server import pg_environment
from tests.support import rows_of
from tools.project import ROOT

DOCS = ROOT / "docs"
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```$", (DOCS / "pictures.md").read_text(), re.MULTILINE | re.DOTALL
)
NOTEBOOK = json.loads((DOCS / "notebook.ipynb").read_text())


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


@pytest.fixture
def filled(db: Connection, pictures: Pictures) -> Connection:
    insert_images(db, pictures.files[:20], pictures.labels[:20])
    return db


@pytest.fixture
def environment(dsn: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of commands, and of this process, that name no server."""
    for name, value in pg_environment(dsn).items():
        monkeypatch.setenv(name, value)
    return dict(os.environ)


def test_no_block_is_left_out() -> None:
    assert {name for name, _ in BLOCKS} == {"sql", "sh", "psql", "python"}


def test_sql(filled: Connection) -> None:
    statements = [
        statement
        for block in blocks("sql")
        for statement in block.split(";\n")
        if statement.strip()
    ]
    assert len(statements) == 7
    for statement in statements:
        cursor = filled.execute(statement.encode())
        if cursor.description is None:
            continue
        for row in cursor.fetchall():
            if isinstance(row[-1], bytes):
                assert Image.open(io.BytesIO(row[-1])).format == "PNG"
            else:
                assert row[-1].startswith("data:image/png;base64,iVBOR")
    assert len(rows_of(filled, "SELECT preview FROM public.previews")) == 20


@pytest.mark.usefixtures("filled")
def test_psql(environment: dict[str, str], tmp_path: Path) -> None:
    (command,), (script,) = blocks("sh"), blocks("psql")
    (tmp_path / "script.sql").write_text(script)
    for line in (command, "psql -X -v ON_ERROR_STOP=1 -f script.sql"):
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, ""), line
    for name in ("sheet.png", "thumbnail.png"):
        assert Image.open(tmp_path / name).format == "PNG"


class Session:
    """Runs code as Jupyter does, and keeps what it would display."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.displayed: list[Any] = []

    def run(self, code: str) -> None:
        """Run a cell, or each of several expressions as the last one of a cell."""
        for statement in ast.parse(code).body:
            if isinstance(statement, ast.Expr):
                expression = compile(ast.Expression(statement.value), "cell", "eval")
                self.displayed.append(eval(expression, self.names))
            else:
                exec(compile(ast.Module([statement], []), "cell", "exec"), self.names)


@pytest.mark.usefixtures("filled", "environment")
def test_python() -> None:
    session = Session()
    (block,) = blocks("python")
    session.run(block)
    session.names["connection"].close()
    rows, neighbours = session.displayed
    assert rows._repr_html_().count("<img ") == 5 and len(neighbours) == 5


@pytest.mark.usefixtures("filled", "environment")
def test_notebook() -> None:
    session = Session()
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            session.run("".join(cell["source"]))
    session.names["connection"].close()
    rows, neighbours, found, sheet = session.displayed
    assert rows._repr_html_().count("<img ") == 5 and not rows.is_complete
    assert len(neighbours) == 5
    assert found._repr_html_().count("<img ") == 5 and found.is_complete
    assert sheet._repr_html_().count("<img ") == 1


def test_notebook_is_valid() -> None:
    """Of format 4.5, without outputs, which may show what is nobody's business."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert set(NOTEBOOK) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[a-zA-Z0-9_-]{1,64}", each) for each in ids)
    for cell in NOTEBOOK["cells"]:
        wanted = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            wanted |= {"execution_count", "outputs"}
            assert cell["outputs"] == [] and cell["execution_count"] is None
        else:
            assert cell["cell_type"] == "markdown"
        assert set(cell) == wanted and cell["metadata"] == {}
        lines = cell["source"]
        assert all(line.endswith("\n") for line in lines[:-1]) and not lines[-1].endswith("\n")
