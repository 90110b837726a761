"""The page as a Starlette application."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from pg_siamese.client.connection import CommandError
from pg_siamese.explore import entry, health, look, maps, review, searching
from pg_siamese.explore.failures import PageError, explain
from pg_siamese.explore.protection import Protection
from pg_siamese.explore.sessions import MOST_FILES_BYTES, Sessions
from pg_siamese.explore.visits import page, render

LOOPBACK = ("127.0.0.1", "localhost")
SWEEP_SECONDS = 30
MOST_FORM_BYTES = 64 * 1024
MOST_KEYS_BYTES = 8 * 1024 * 1024
STATIC = Path(__file__).parent / "static"


@dataclass(frozen=True)
class Settings:
    """How the page is served.

    Attributes:
        dsn: connection string, as for each command.
        form: visitors log in with a role and its password, and not by the command's link.
        write: whether the page may change the database, as far as the role can.
        hosts: names that the page is reached by.
        port: of the page. It is in the name of the cookie, since cookies are for all ports.
        announce: called with each token of a link.
    """

    dsn: str | None = None
    form: bool = False
    write: bool = False
    hosts: Sequence[str] = LOOPBACK
    port: int = 8765
    announce: Callable[[str], object] = field(default=lambda token: None)


def create_app(settings: Settings, sessions: Sessions | None = None) -> Starlette:
    """Return the application."""
    kept = sessions or Sessions()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_sweep, kept)
            yield
            tasks.cancel_scope.cancel()
        await anyio.to_thread.run_sync(kept.end_all)

    routes = [
        Route("/start", entry.start),
        Route("/login", entry.login_form),
        Route("/login", entry.login, methods=["POST"]),
        Route("/logout", entry.logout, methods=["POST"]),
        Route("/", page(searching.home)),
        Route("/search", page(searching.search)),
        Route("/search.csv", page(searching.as_csv)),
        Route("/search.png", page(searching.as_sheet)),
        Route("/search.sql", page(searching.as_sql)),
        Route("/facet", page(searching.facet)),
        Route(
            "/files",
            page(searching.take_file),
            methods=["POST"],
            max_body_size=MOST_FILES_BYTES,
        ),
        Route("/picture", page(look.picture)),
        Route("/look", page(look.look)),
        Route("/review", page(review.review)),
        Route("/review", page(review.begin), methods=["POST"]),
        Route("/decide", page(review.decide), methods=["POST"]),
        Route("/map", page(maps.show)),
        Route("/map.json", page(maps.points)),
        Route("/among", page(maps.choose), methods=["POST"], max_body_size=MOST_KEYS_BYTES),
        Route("/health", page(health.health)),
        Route("/build", page(health.build), methods=["POST"]),
        Route("/job", page(health.job)),
        Route("/cancel", page(health.cancel), methods=["POST"]),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Protection),
            Middleware(
                TrustedHostMiddleware, allowed_hosts=list(settings.hosts), www_redirect=False
            ),
        ],
        exception_handlers={
            404: _not_found,
            405: _not_found,
            413: _too_large,
            PageError: _failed,
            CommandError: _failed,
        },
        lifespan=lifespan,
        max_body_size=MOST_FORM_BYTES,
    )
    state = app.state
    state.dsn, state.form, state.write = settings.dsn, settings.form, settings.write
    state.sessions = kept
    state.cookie = f"pg_siamese_{settings.port}"
    state.secret = secrets.token_bytes(32)
    state.invitation = entry.Invitation(settings.announce)
    state.logins = anyio.Semaphore(1)
    state.seconds_per_failure = entry.SECONDS_PER_FAILURE
    return app


async def _sweep(sessions: Sessions) -> None:
    while True:
        await anyio.sleep(SWEEP_SECONDS)
        await anyio.to_thread.run_sync(sessions.sweep)


async def _not_found(request: Request, error: Exception) -> Response:
    problem = PageError(404, "There is no such page.")
    return render(request, "error.html", problem.status, problem=problem)


async def _too_large(request: Request, error: Exception) -> Response:
    problem = PageError(413, "What you sent is too large.")
    return render(request, "error.html", problem.status, problem=problem)


async def _failed(request: Request, error: Exception) -> Response:
    problem = explain(error)
    return render(request, "error.html", problem.status, problem=problem)
