"""The page in a real browser: Debian's Chromium, and a server in a thread."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, sync_playwright

from pg_siamese.explore.app import Settings, create_app
from tests.support import wait_until

CHROMIUM = Path("/usr/bin/chromium")
# Ends what hangs. Nothing depends on speed, on a machine that has much else to do.
PATIENCE_MS = 180_000
REFUSED = re.compile(r"responded with a status of 4|Response Status Error Code 4")
_LOADED = "() => [...document.images].every((image) => image.complete)"


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
        page.set_default_timeout(PATIENCE_MS)
        self.requests: list[str] = []
        self.problems: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self._hear)

    def _hear(self, message: ConsoleMessage) -> None:
        # Chromium and htmx report what is refused, which is for the page to show.
        if message.type == "error" and not REFUSED.search(message.text):
            self.problems.append(message.text)


def settled(page: Page) -> None:
    """Wait until nothing is being fetched, and every picture is there."""
    page.wait_for_load_state("networkidle")
    # Not wait_for_function, which would evaluate a string inside the page, against its policy.
    wait_until(lambda: _has_pictures(page), "a picture does not load")


def _has_pictures(page: Page) -> bool:
    try:
        return bool(page.evaluate(_LOADED))
    except Error:  # It is on its way to another page.
        return False
