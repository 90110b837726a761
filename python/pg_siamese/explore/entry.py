"""How a session begins and ends: by a link of the command, or by a form."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from functools import partial

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from pg_siamese.client.connection import CommandError
from pg_siamese.explore.failures import PageError, explain
from pg_siamese.explore.sessions import Session, log_in, open_connection
from pg_siamese.explore.visits import check_token, form_fields, render, session_of

# Guessing a password takes at least this long, and goes on one at a time.
SECONDS_PER_FAILURE = 1.0


class Invitation:
    """The token of a link that opens one session. The next link has another one."""

    def __init__(self, announce: Callable[[str], object] = lambda token: None) -> None:
        self._announce = announce
        self.token = ""
        self.renew()

    def renew(self) -> None:
        """Make a new token and announce it."""
        self.token = secrets.token_urlsafe(32)
        self._announce(self.token)

    def accept(self, token: str) -> bool:
        """Return whether a token is right. Then it is used up."""
        if not secrets.compare_digest(token.encode(), self.token.encode()):
            return False
        self.renew()
        return True


async def start(request: Request) -> Response:
    """Begin a session of the command's own connection, by the link that the command shows."""
    state = request.app.state
    if state.form or not state.invitation.accept(request.query_params.get("token", "")):
        raise PageError(403, "This link was used already.", "The command shows the next one.")
    again = partial(open_connection, state.dsn)
    session = Session(await run_in_threadpool(again), again)
    # Not a redirect: a browser that comes from elsewhere would not send a strict cookie there.
    return _entered(request, session, render(request, "start.html"))


async def login_form(request: Request) -> Response:
    """Show the form, or say where the link is."""
    nonce = secrets.token_urlsafe(16)
    answer = render(request, "login.html", token=_signed(request, nonce), problem=None, role="")
    _set_cookie(request, answer, _form_cookie(request), nonce)
    return answer


async def login(request: Request) -> Response:
    """Begin a session of the role that the form names."""
    state = request.app.state
    fields = dict(form_fields(await request.body()))
    nonce = request.cookies.get(_form_cookie(request), "")
    given, signed = fields.get("csrf", ""), _signed(request, nonce)
    if not state.form or not nonce or not secrets.compare_digest(given.encode(), signed.encode()):
        raise PageError(403, "This form is too old.", "Open the page again.")
    role, password = fields.get("role", ""), fields.get("password", "")
    async with state.logins:
        try:
            connection = await run_in_threadpool(log_in, state.dsn, role, password)
        except CommandError as error:
            await anyio.sleep(state.seconds_per_failure)
            problem = _refusal(error)
            return render(request, "login.html", 403, token=signed, problem=problem, role=role)
    return _entered(request, Session(connection), RedirectResponse("/", 303))


async def logout(request: Request) -> Response:
    """End the session."""
    state = request.app.state
    session = session_of(request)
    if session is not None:
        check_token(request, session, await request.body())
        await run_in_threadpool(state.sessions.end, request.cookies[state.cookie])
    answer = RedirectResponse("/login", 303, headers={"Clear-Site-Data": '"cache", "storage"'})
    answer.delete_cookie(state.cookie)
    return answer


def _entered(request: Request, session: Session, answer: Response) -> Response:
    """Give the browser its cookie, in place of that of an earlier session."""
    state = request.app.state
    state.sessions.end(request.cookies.get(state.cookie))
    _set_cookie(request, answer, state.cookie, state.sessions.add(session))
    return answer


def _set_cookie(request: Request, answer: Response, name: str, value: str) -> None:
    secure = request.url.scheme == "https"
    answer.set_cookie(name, value, path="/", secure=secure, httponly=True, samesite="strict")


def _form_cookie(request: Request) -> str:
    return f"{request.app.state.cookie}_form"


def _signed(request: Request, nonce: str) -> str:
    return hmac.digest(request.app.state.secret, nonce.encode(), "sha256").hex()


def _refusal(error: CommandError) -> str:
    """Return why nobody was let in, without a word on which roles there are."""
    text = str(error)
    if "FATAL" in text or "authentication" in text or text.startswith("enter"):
        return "The database did not accept this role and password."
    return explain(error).message
