"""The page in a browser: its first rows, and a click to the answers with their pictures."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from bench.report import Bar, Line
from bench.session import Session, connect
from bench.timing import Summary
from tools.cluster import Cluster
from tools.report import SetupError

SECTION = "the page in a browser"
FIRST, CLICK = "first page", "a click to 24 answers with pictures"
ALONE, MORE = "the same SQL alone", "more than the SQL alone"
CHROMIUM = Path("/usr/bin/chromium")
PORT = 8765
COLUMNS = 20
# Milliseconds until each picture of the answers to a click is there.
TIMED_CLICK = """(place) => new Promise((done) => {
    const before = document.querySelector("#answers");
    const start = performance.now();
    const look = () => {
        const answers = document.querySelector("#answers");
        const pictures = [...answers.querySelectorAll("img")];
        if (answers !== before && pictures.length > 24 && pictures.every((each) => each.complete))
            done(performance.now() - start);
        else requestAnimationFrame(look);
    };
    document.querySelectorAll(".card a.picture")[place].click();
    requestAnimationFrame(look);
})"""
LOADED = "() => performance.getEntriesByType('navigation')[0].loadEventEnd"


def fill(cluster: Cluster, files: list[bytes], rows: int) -> None:
    """Make a collection of ``rows`` images, with 20 columns, and build its index."""
    names = [f"c{number}" for number in range(1, COLUMNS)]
    with connect(cluster.dsn()) as session:
        kinds = ["text", "integer", "date", "real"]
        columns = ", ".join(f"{name} {kinds[place % 4]}" for place, name in enumerate(names))
        session.execute(
            f"CREATE TABLE public.shown (id bigint PRIMARY KEY, image bytea, {columns})"
        )
        session.execute("SELECT siamese.create_collection('shown', 'public.shown')")
        values = {
            "text": "'value ' || n %% 12",
            "integer": "(n * 7919) %% 1000",
            "date": "date '2024-01-01' + (n %% 365)::integer",
            "real": "n / 7.0",
        }
        filled = ", ".join(values[kinds[place % 4]] for place in range(len(names)))
        insert = (
            "INSERT INTO shown SELECT n, f.image, {filled} FROM unnest(%s::bytea[])"
            " WITH ORDINALITY AS f (image, place) CROSS JOIN LATERAL (SELECT %s + f.place) AS g (n)"
        )
        for start in range(0, rows, 5_000):
            part = [files[place % len(files)] for place in range(start, min(rows, start + 5_000))]
            session.execute(insert.replace("{filled}", filled), (part, start))
        session.execute("SELECT siamese.build_index('shown')")
        session.execute("VACUUM ANALYZE shown")


def measure(cluster: Cluster, clicks: int) -> list[Line]:
    """Time the first page, clicks from picture to picture, and the same searches without it."""
    with _served(cluster) as (address, page):
        first, shown, keys = [], [], []
        for _ in range(5):
            page.goto(f"{address}/search?c=shown")
            page.wait_for_load_state("networkidle")
            first.append(page.evaluate(LOADED) / 1000)
        for place in range(clicks):
            # htmx attends to new links a moment after it has shown them.
            page.wait_for_timeout(200)
            shown.append(page.evaluate(TIMED_CLICK, 1 + place % 20) / 1000)
            keys.append(page.url.partition("like=key%3A")[2].partition("&")[0])
    alone = []
    with Session(cluster.dsn()) as session:
        call = "siamese.similar_images(image_id => {}, k => 24, collection => 'shown')"
        for key in keys:
            statement = f"SELECT s.*, i.c1 FROM {call.format(key)} AS s JOIN shown AS i"
            alone.append(session.timed(f"{statement} ON i.id = s.image_id ORDER BY s.rank"))
    return [
        Line(SECTION, FIRST, Summary.of(first)),
        Line(SECTION, CLICK, Summary.of(shown)),
        Line(SECTION, ALONE, Summary.of(alone)),
    ]


def bars(lines: list[Line]) -> list[Bar]:
    """Return the promises on these figures."""
    by_name = {line.name: line.figure() for line in lines}
    more = by_name[CLICK] - by_name[ALONE]
    return [
        Bar(f"{FIRST}, ms", by_name[FIRST], 1000, "ms", is_most=True),
        Bar(f"{CLICK}, ms", by_name[CLICK], 300, "ms", is_most=True),
        Bar(f"{MORE}, ms", more, 150, "ms", is_most=True),
    ]


@contextmanager
def _served(cluster: Cluster) -> Iterator[tuple[str, Page]]:
    """Serve the page as its command does, and open it in the browser."""
    if not CHROMIUM.exists():
        raise SetupError("there is no Chromium: run make deps-test as root")
    command = [sys.executable, "-u", "-m", "pg_siamese", "explore", "--port", str(PORT)]
    process = subprocess.Popen(
        [*command, "--dsn", cluster.dsn()], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        link = process.stdout.readline().removeprefix("open ").strip()
        if not link:
            raise SetupError("the page did not start")
        time.sleep(1)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(link)
            page.wait_for_url("**/")
            yield link.partition("/start")[0], page
            browser.close()
    finally:
        process.terminate()
        process.wait()
