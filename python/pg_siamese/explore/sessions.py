"""Sessions of the page: each a database role, its connections, and what the visitor brought."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

import psycopg
from psycopg.conninfo import make_conninfo

from pg_siamese.client.connection import CommandError, connect
from pg_siamese.explore.failures import PageError

Connection = psycopg.Connection[Any]
Item = TypeVar("Item")
IDLE_SECONDS = 30 * 60
ABSOLUTE_SECONDS = 12 * 60 * 60
MOST_SESSIONS = 32
MOST_CONNECTIONS = 4
STATEMENT_SECONDS = 30
MOST_FILES_BYTES = 256 * 1024 * 1024
MOST_KEPT = 16
# Without "trust" and "peer", which would let in anybody who can open the page.
PASSWORD_METHODS = "password,md5,scram-sha-256"
_WITHDRAWN = """
    SELECT NOT r.rolcanlogin OR coalesce(r.rolvaliduntil <= pg_catalog.now(), false)
    FROM pg_catalog.pg_roles AS r WHERE r.rolname = session_user
"""


class SessionEnded(Exception):
    """The visitor has to log in again."""


def open_connection(dsn: str | None) -> Connection:
    """Open a connection as every command does, that only reads and gives up in time."""
    connection = connect(dsn)
    connection.execute("SET default_transaction_read_only = on")
    connection.execute(f"SET statement_timeout = '{STATEMENT_SECONDS}s'")
    return connection


def log_in(dsn: str | None, role: str, password: str) -> Connection:
    """Open a connection as a role with its password.

    Raises:
        CommandError: the server refuses them.
    """
    if not role or not password:
        raise CommandError("enter a role and its password")
    # An empty password, a password file or a certificate would be those of the page's own user.
    own = {"user": role, "password": password, "passfile": "/dev/null", "sslcertmode": "disable"}
    return open_connection(
        make_conninfo(dsn or "", **own, gssencmode="disable", require_auth=PASSWORD_METHODS)
    )


class Kept(Generic[Item]):
    """The last few things that a visitor brought, by random names."""

    def __init__(self, size: Callable[[Item], int] = lambda item: 0) -> None:
        self._items: OrderedDict[str, Item] = OrderedDict()
        self._size = size
        self._lock = threading.Lock()

    def add(self, item: Item) -> str:
        """Keep a thing and return its name. The oldest ones go if there are too many."""
        name = secrets.token_hex(8)
        with self._lock:
            self._items[name] = item
            while len(self._items) > MOST_KEPT or (
                len(self._items) > 1
                and sum(map(self._size, self._items.values())) > MOST_FILES_BYTES
            ):
                self._items.popitem(last=False)
        return name

    def get(self, name: str) -> Item:
        """Return a thing by its name. Raises ``PageError`` if it is gone."""
        try:
            return self._items[name]
        except KeyError:
            raise PageError(
                410, "The page no longer has this.", "Choose the file or the rows again."
            ) from None


class Session:
    """One visitor.

    The session of a form opens further connections with the password that the first one keeps.
    ``again`` opens those of the command's own connection.

    Attributes:
        role: name of the database role.
        csrf: a token that each form carries.
        files: image files to search with.
        sets: keys that were chosen on the map, as text.
        maps: what the map shows, by collection and settings.
        tables: when a collection was looked up, and what was found, by its name.
        jobs: work in the background, by name.
        began, used: seconds of the clock of ``Sessions``.
    """

    def __init__(self, first: Connection, again: Callable[[], Connection] | None = None) -> None:
        self.role = first.info.user
        self.csrf = secrets.token_urlsafe(32)
        self.files: Kept[bytes] = Kept(len)
        self.sets: Kept[Sequence[str]] = Kept()
        self.maps: OrderedDict[Any, Any] = OrderedDict()
        self.tables: dict[str, Any] = {}
        self.jobs: dict[str, Any] = {}
        self.began = self.used = 0.0
        self._again = again or self._with_its_password
        self._lock = threading.Lock()
        self._free = [first]
        self._all = [first]
        self._places = threading.Semaphore(MOST_CONNECTIONS)
        self.ended = False

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Give a connection that nobody else uses meanwhile.

        Raises:
            SessionEnded: the role may no longer log in, or the session has ended.
        """
        with self._places:
            connection = self._checked()
            try:
                yield connection
            finally:
                self._put_back(connection)

    def open(self) -> Connection:
        """Open another connection of the same role, for work in the background."""
        if self.ended:
            raise SessionEnded
        connection = self._again()
        with self._lock:
            self._all = [each for each in (*self._all, connection) if not each.closed]
        return connection

    def end(self) -> None:
        """Close the connections, and cancel what they do. Their users then close them."""
        with self._lock:
            self.ended = True
            free, self._free = self._free, []
            busy = [each for each in self._all if each not in free and not each.closed]
        for connection in free:
            connection.close()
        for connection in busy:
            with suppress(psycopg.Error):
                connection.cancel_safe(timeout=2)

    def _checked(self) -> Connection:
        """Take a connection that works, or open one."""
        while True:
            with self._lock:
                if self.ended:
                    raise SessionEnded
                connection = self._free.pop() if self._free else None
            is_new = connection is None
            connection = connection or self.open()
            try:
                row = connection.execute(_WITHDRAWN).fetchone()
            except psycopg.OperationalError:
                connection.close()
                if is_new:
                    raise
                continue
            if row is None or row[0]:
                connection.close()
                self.end()
                raise SessionEnded
            return connection

    def _with_its_password(self) -> Connection:
        with self._lock:
            known = next((each for each in self._all if not each.closed), None)
        if known is None:
            raise SessionEnded
        return log_in(known.info.dsn, known.info.user, known.info.password)

    def _put_back(self, connection: Connection) -> None:
        with self._lock:
            if not self.ended and not connection.closed:
                self._free.append(connection)
                return
        connection.close()


class Sessions:
    """All sessions, by their random tokens, which the browsers have as cookies."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}

    def add(self, session: Session) -> str:
        """Keep a session and return its token."""
        token = secrets.token_urlsafe(32)
        session.began = session.used = self._clock()
        with self._lock:
            self._sessions[token] = session
        self.sweep(MOST_SESSIONS)
        return token

    def find(self, token: str | None) -> Session | None:
        """Return the session of a token, unless it has ended."""
        self.sweep()
        with self._lock:
            session = self._sessions.get(token or "")
            if session is not None:
                session.used = self._clock()
        return session

    def end(self, token: str | None) -> None:
        """End a session, if there is one of this token."""
        with self._lock:
            session = self._sessions.pop(token or "", None)
        if session is not None:
            session.end()

    def sweep(self, most: int | None = None) -> None:
        """End what was idle or open for too long, and the least used ones above ``most``."""
        now = self._clock()
        with self._lock:
            over = {
                token
                for token, session in self._sessions.items()
                if session.ended
                or now - session.used > IDLE_SECONDS
                or now - session.began > ABSOLUTE_SECONDS
            }
            if most is not None:
                rest = sorted(
                    self._sessions.keys() - over, key=lambda token: self._sessions[token].used
                )
                over.update(rest[: max(0, len(rest) - most)])
            ended = [self._sessions.pop(token) for token in over]
        for session in ended:
            session.end()

    def end_all(self) -> None:
        """End every session."""
        with self._lock:
            ended = list(self._sessions.values())
            self._sessions.clear()
        for session in ended:
            session.end()
