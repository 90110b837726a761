"""Connect as thinly as libpq, to time the server and not the driver."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psycopg
from psycopg import pq
from psycopg.adapt import PyFormat, Transformer

BIGINT = 20
BYTEA = 17
_BINARY = pq.Format.BINARY
_SUCCESS = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK, pq.ExecStatus.COPY_IN)


class QueryError(RuntimeError):
    """The server refused a statement, or sent a warning that a benchmark must not ignore."""


class Session:
    """One connection over the Unix socket, with prepared statements in the binary format.

    Args:
        dsn: connection string.
        settings: configuration settings of the session.
    """

    def __init__(self, dsn: str, **settings: str) -> None:
        self.connection = pq.PGconn.connect(dsn.encode())
        if self.connection.status != pq.ConnStatus.OK:
            raise QueryError(self.connection.error_message.decode().strip())
        self.notices: list[str] = []
        self.connection.notice_handler = lambda result: self.notices.append(
            (result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"").decode()
        )
        for name, value in settings.items():
            self.set(name, value)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self.connection.finish()

    @property
    def pid(self) -> int:
        """The backend's process id."""
        return self.connection.backend_pid

    def set(self, name: str, value: str) -> None:
        """Change a setting of this session."""
        self.run("SELECT pg_catalog.set_config($1, $2, false)", name.encode(), value.encode())

    def run(self, sql: str, *values: bytes) -> list[tuple[str | None, ...]]:
        """Run one statement with text parameters, and return its rows as text."""
        result = _check(self.connection.exec_params(sql.encode(), values))
        return [
            tuple(
                None if (item := result.get_value(row, column)) is None else item.decode()
                for column in range(result.nfields)
            )
            for row in range(result.ntuples)
        ]

    def timed(self, sql: str) -> float:
        """Run one statement and return how many seconds it took."""
        began = time.perf_counter()
        self.run(sql)
        return time.perf_counter() - began

    def prepare(self, name: str, sql: str, *types: int) -> Prepared:
        """Prepare a statement. ``types`` are the OIDs of its parameters."""
        _check(self.connection.prepare(name.encode(), sql.encode(), types))
        return Prepared(self.connection, name.encode(), len(types))

    def prepare_insert(self, table: str) -> Prepared:
        """Prepare the insert of an array of image files."""
        statement = f"INSERT INTO {table} (image) SELECT * FROM unnest($1::bytea[])"
        return self.prepare(table, statement, 0)

    def copy(self, table: str, parts: Iterable[bytes]) -> None:
        """Load rows in COPY's binary format, joined from ``parts``."""
        _check(self.connection.exec_(f"COPY {table} FROM STDIN (FORMAT binary)".encode()))
        for part in parts:
            self.connection.put_copy_data(part)
        self.connection.put_copy_end()
        while (result := self.connection.get_result()) is not None:
            _check(result)


class Prepared:
    """A prepared statement with binary parameters and results."""

    def __init__(self, connection: Any, name: bytes, parameters: int) -> None:
        self.connection = connection
        self.name = name
        self.formats = [_BINARY] * parameters

    def __call__(self, *values: bytes) -> Any:
        """Execute. Raises ``QueryError``."""
        return _check(self.connection.exec_prepared(self.name, values, self.formats, _BINARY))


def _check(result: Any) -> Any:
    if result.status not in _SUCCESS:
        raise QueryError(result.error_message.decode().strip())
    return result


def bigint(value: int) -> bytes:
    """Return the binary form of a bigint."""
    return struct.pack(">q", value)


def bytea_array(values: list[bytes]) -> bytes:
    """Return the binary form of a bytea[]."""
    (data,) = Transformer().dump_sequence([values], [PyFormat.BINARY])
    assert data is not None
    return bytes(data)


def first_bigints(result: Any) -> list[int]:
    """Return the first column, of type bigint, of a binary result."""
    return [
        struct.unpack(">q", bytes(result.get_value(row, 0)))[0] for row in range(result.ntuples)
    ]


def private_bytes(pid: int, *, with_files: bool = True) -> int:
    """Return the memory that a process shares with no other.

    Pages of files that no other process has read now count as well. The system can take them back
    at any time.
    """
    kinds = ("Private_Clean:", "Private_Dirty:") if with_files else ("Private_Dirty:",)
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(kinds):
            total += int(line.split()[1]) * 1024
    return total


def connect(dsn: str) -> psycopg.Connection[Any]:
    """Open an ordinary connection, for work that is not timed."""
    return psycopg.connect(dsn, autocommit=True)


def first_row(admin: psycopg.Connection[Any], query: str, *values: object) -> Any:
    """Return the first row of a query, which must have one."""
    row = admin.execute(query, values or None).fetchone()
    assert row is not None, query
    return row
