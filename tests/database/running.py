"""A statement under way in a session of its own, which may wait for others."""

from __future__ import annotations

import threading
import time
from typing import Any

from tests.conftest import Connect
from tests.support import PATIENCE, one


class Running:
    """A statement under way in a session of its own."""

    def __init__(
        self, connect: Connect, statement: str, values: Any = (), warm_up: int = 0
    ) -> None:
        self.session = connect()
        for _ in range(warm_up):
            self.session.execute(statement, values or None)
        self.error: BaseException | None = None
        self.rows: list[Any] = []
        self._statement, self._values = statement, values
        self._pid = self.session.info.backend_pid
        self._watch = connect()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> Running:
        """Start it."""
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            cursor = self.session.execute(self._statement, self._values or None)
            self.rows = cursor.fetchall() if cursor.description else []
        except BaseException as error:
            self.error = error

    def waits(self) -> bool:
        """Let it go on until it waits for a lock or is done; returns which."""
        deadline = time.monotonic() + PATIENCE
        while self._thread.is_alive():
            assert time.monotonic() < deadline, "neither done nor waiting"
            query = "SELECT cardinality(pg_blocking_pids(%s)) > 0"
            if one(self._watch, query, self._pid) is True:
                return True
            time.sleep(0.01)
        return False

    def error_at_the_end(self) -> BaseException | None:
        """Wait for the end; returns its error, if any."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "waits without end"
        return self.error

    def result(self) -> list[Any]:
        """Wait for the end; returns the rows, or raises the error."""
        error = self.error_at_the_end()
        if error is not None:
            raise error
        return self.rows
