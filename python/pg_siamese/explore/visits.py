"""One request of a visitor who has a session, and how an answer to it is made."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from urllib.parse import parse_qsl

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from pg_siamese.client.queries import in_words
from pg_siamese.explore.failures import PageError, explain
from pg_siamese.explore.sessions import Connection, Session, SessionEnded
from pg_siamese.explore.tables import Table, find_table

MOST_FORM_FIELDS = 500
# For this long, a session knows a table's columns and settings. Each picture needs them.
TABLE_SECONDS = 10
TEMPLATES = Environment(
    loader=PackageLoader("pg_siamese.explore"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["in_words"] = in_words


@dataclass
class Visit:
    """A request, with the session and one of its connections.

    ``body`` is what was sent, checked for its token.
    """

    request: Request
    session: Session
    connection: Connection
    body: bytes = b""

    @cached_property
    def form(self) -> Mapping[str, str]:
        """The fields of a form. Of several with one name, the last counts."""
        return dict(form_fields(self.body))

    @property
    def may_write(self) -> bool:
        """Whether the page was started with ``--write``."""
        return bool(self.request.app.state.write)

    def parameter(self, name: str, default: str = "") -> str:
        """Return a parameter of the address."""
        return self.request.query_params.get(name, default)

    def table(self) -> Table:
        """Return the collection that the address or the form names. Raises ``PageError``."""
        name = self.parameter("c") or (self.form.get("c", "") if self.body else "")
        if not name:
            raise PageError(400, "The address names no collection.")
        known = self.session.tables.get(name)
        if known is None or time.monotonic() - known[0] > TABLE_SECONDS:
            # What is read of the table itself is checked each time, by the database.
            known = self.session.tables[name] = time.monotonic(), find_table(self.connection, name)
        return known[1]

    def render(self, template: str, **values: Any) -> Response:
        """Return a page, or a part of one."""
        return render(self.request, template, **values)


def session_of(request: Request) -> Session | None:
    """Return the session of a request, None if there is none that goes on."""
    state = request.app.state
    found: Session | None = state.sessions.find(request.cookies.get(state.cookie))
    return found


def render(request: Request, template: str, status: int = 200, **values: Any) -> Response:
    """Return a page, for a visitor with or without a session."""
    state, session = request.app.state, session_of(request)
    common = {
        "collection": "",
        "csrf": "" if session is None else session.csrf,
        "form": state.form,
        "path": request.url.path,
        "session": session,
        "write": state.write,
    }
    return HTMLResponse(TEMPLATES.get_template(template).render(common | values), status)


def form_fields(body: bytes) -> list[tuple[str, str]]:
    """Return the fields of a form that was sent. Raises ``PageError``."""
    try:
        return parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=MOST_FORM_FIELDS,
        )
    except ValueError:
        raise PageError(400, "The form can't be read.") from None


def check_token(request: Request, session: Session, body: bytes) -> None:
    """Refuse what does not carry the token of the session. Raises ``PageError``."""
    given = request.headers.get("x-csrf-token")
    if given is None:
        given = dict(form_fields(body)).get("csrf", "")
    if not secrets.compare_digest(given.encode(), session.csrf.encode()):
        raise PageError(403, "This page is of an earlier session.", "Reload it, and try again.")


Handler = Callable[[Visit], Response]


def page(handler: Handler) -> Callable[[Request], Any]:
    """Return the endpoint that runs a handler in a thread, for visitors with a session."""

    async def endpoint(request: Request) -> Response:
        session = session_of(request)
        if session is None:
            return to_login(request)
        body = await request.body()
        if request.method == "POST":
            check_token(request, session, body)
        try:
            return await run_in_threadpool(partial(_answer, handler, request, session, body))
        except SessionEnded:
            return to_login(request)
        except Exception as error:
            raise explain(error) from error

    return endpoint


def _answer(handler: Handler, request: Request, session: Session, body: bytes) -> Response:
    with session.connection() as connection:
        return handler(Visit(request, session, connection, body))


def to_login(request: Request) -> Response:
    """Send a visitor without a session where one begins."""
    if "hx-request" in request.headers:
        return Response(status_code=401, headers={"HX-Redirect": "/login"})
    return RedirectResponse("/login", 303)
