"""Commands of the command line, run on a database."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from typer.testing import CliRunner

from pg_siamese.cli.main import app

if TYPE_CHECKING:
    from typer.testing import Result


def run(dsn: str, *arguments: str) -> Result:
    """Run a command on a database, or on that of the PG variables."""
    options = ["--dsn", dsn] if dsn else []
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*arguments, *options])


def works(dsn: str, *arguments: str) -> str:
    result = run(dsn, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(dsn: str, *arguments: str) -> str:
    """Run a command that must fail as it should; return its error, which is one line."""
    result = run(dsn, *arguments)
    assert result.exit_code == 1, result.output
    # Progress bars are on stderr too.
    lines = [line for line in result.stderr.splitlines() if not re.search(r"━|\d% ", line)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]
