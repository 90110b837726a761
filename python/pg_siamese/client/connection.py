"""Connecting to the database, and turning failures into one line that says what to do."""

from __future__ import annotations

import re

import psycopg

EXTENSION = "pg_siamese"
SCHEMA = "siamese"
CONNECT_TIMEOUT_SECONDS = 10
# 'building index of collection "images": 40% (28000 of 70000 vectors)'
PROGRESS_NOTICE = re.compile(r"^(?P<what>.+): \d+% \((?P<done>\d+) of (?P<total>\d+) \w+\)")


class CommandError(Exception):
    """A failure that a user can act on. It is shown as one line, without a traceback.

    ``exit_code`` is the exit status of the command: 1, or 130 after Ctrl-C.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class NoServerError(CommandError):
    """No server answers, or it accepts no connections at the moment."""


def connect(dsn: str | None = None) -> psycopg.Connection[tuple[object, ...]]:
    """Open an autocommit connection to a database that has the extension.

    Args:
        dsn: libpq connection string or URI. The ``PG*`` variables fill in what it omits.

    Raises:
        NoServerError: no server answers.
        CommandError: the string is malformed, or the extension is missing.
    """
    try:
        settings = psycopg.conninfo.conninfo_to_dict(dsn or "", application_name=EXTENSION)
        # libpq waits without a limit by default. PGCONNECT_TIMEOUT and the string take precedence.
        settings.setdefault("connect_timeout", CONNECT_TIMEOUT_SECONDS)
        connection = psycopg.connect(
            psycopg.conninfo.make_conninfo(**settings),  # type: ignore[arg-type]
            autocommit=True,
        )
    except psycopg.ProgrammingError as error:
        raise CommandError(f"bad connection string: {one_line(str(error))}") from None
    except psycopg.OperationalError as error:
        raise NoServerError(_describe_refusal(str(error))) from None
    try:
        _require_extension(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _require_extension(connection: psycopg.Connection[tuple[object, ...]]) -> None:
    query = "SELECT 1 FROM pg_catalog.pg_extension WHERE extname = %s"
    if connection.execute(query, (EXTENSION,)).fetchone() is None:
        raise CommandError(
            f'database "{connection.info.dbname}" has no extension {EXTENSION}: '
            f"run CREATE EXTENSION {EXTENSION} CASCADE in it"
        )


def _describe_refusal(message: str) -> str:
    """Reduce libpq's several lines to the one that names the server and the reason."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    attempts = [line for line in lines if "connection to server" in line or "FATAL:" in line]
    reason = (attempts or lines or ["no reason given"])[0]
    reason = reason.removeprefix("connection failed: ").removeprefix("connection is bad: ")
    if "FATAL:" in reason:  # A server answered: advice on starting one is no help.
        return reason
    return f"{reason}; start the server, or name another one with --dsn or the PG* variables"


def describe_error(error: psycopg.Error) -> str:
    """Return an error of the server as one line: the message, its DETAIL and its HINT."""
    primary = error.diag.message_primary
    if primary is None:
        return one_line(str(error)) or type(error).__name__
    parts = [one_line(primary)]
    if error.diag.message_detail:
        parts.append(f"detail: {one_line(error.diag.message_detail)}")
    if error.diag.message_hint:
        parts.append(f"hint: {one_line(error.diag.message_hint)}")
    return "; ".join(parts)


def one_line(text: str) -> str:
    """Return ``text`` with every run of white space, line ends included, as one space."""
    return " ".join(text.split())


def schema_prefix(connection: psycopg.Connection[tuple[object, ...]]) -> str:
    """Return ``'siamese.'``, or nothing if the schema is on the search path, for SQL to show."""
    row = connection.execute(
        "SELECT %s = ANY (pg_catalog.current_schemas(false))", (SCHEMA,)
    ).fetchone()
    return "" if row is not None and row[0] else f"{SCHEMA}."
