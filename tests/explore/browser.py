"""The page in a real browser: Debian's Chromium, and a server in a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, Error, Page, sync_playwright

from pg_siamese.explore.app import Settings, create_app
from tests.support import wait_until

CHROMIUM = Path("/usr/bin/chromium")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser, or skip the test where there is none."""
    if not CHROMIUM.exists():
        pytest.skip("there is no Chromium (make deps-test as root installs Debian's)")
    with sync_playwright() as playwright:
        try:
            # Root has no other sandbox. Nothing but the page is opened.
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM,
                args=["--no-sandbox", "--disable-background-networking", "--disable-gpu"],
            )
        except Error as error:
            pytest.skip(f"Chromium does not start here: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


@contextmanager
def served(dsn: str, *, form: bool = False, write: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Serve the page; give its address and the tokens of its links, the next one last."""
    tokens: list[str] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        settings = Settings(dsn=dsn, form=form, write=write, port=port, announce=tokens.append)
        server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started, "the page does not start")
        yield f"http://127.0.0.1:{port}", tokens
        server.should_exit = True
        thread.join()


class Watch:
    """What a page asked for and complained of."""

    def __init__(self, page: Page) -> None:
        self.requests: list[str] = []
        self.problems: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on(
            "console",
            lambda message: (
                self.problems.append(message.text) if message.type == "error" else None
            ),
        )


def settled(page: Page) -> None:
    """Wait until nothing is being fetched, and every picture is there."""
    page.wait_for_load_state("networkidle")
    with suppress(Error):
        page.wait_for_function("[...document.images].every((image) => image.complete)")
