"""The page in a real browser: what is clicked, dropped and typed, and what it asks for."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from pg_siamese.explore import review
from tests.conftest import Pictures
from tests.explore.browser import Watch, chromium, served, settled
from tests.explore.conftest import DICOM, ROWS, Ward
from tests.support import one
from tools.project import ROOT

AXE = (ROOT / "tests" / "data" / "axe" / "axe-4.14.1.min.js").read_text()
WIDE, NARROW = 1280, 390
DROP = """([name, text]) => {
    const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
    const bubbling = { bubbles: true, cancelable: true };
    const data = new DataTransfer();
    data.items.add(new File([bytes], name));
    for (const kind of ["dragover", "drop"])
        document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: data, ...bubbling }));
}"""
PASTE = """(text) => {
    const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
    const bubbling = { bubbles: true, cancelable: true };
    const data = new DataTransfer();
    data.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
    document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, ...bubbling }));
}"""

# The place of the map's first point, in shares of its sides.
FIRST_POINT = """async () => {
    const map = await (await fetch(document.getElementById("map").dataset.points)).json();
    return [(map.x[0] * 0.94 + 1) / 2, (1 - map.y[0] * 0.94) / 2];
}"""

Start = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def visit(ward: Ward, browser: Browser) -> Iterator[Start]:
    """Open the page in a window of some width. At the end, it has asked for nothing elsewhere."""
    contexts: list[BrowserContext] = []
    watches: list[Watch] = []
    with served(ward.dsn, write=True) as (address, tokens):

        def start(width: int = WIDE) -> Page:
            context = browser.new_context(viewport={"width": width, "height": 900})
            contexts.append(context)
            page = context.new_page()
            watches.append(Watch(page))
            page.goto(f"{address}/start?token={tokens[-1]}")
            page.wait_for_url(f"{address}/")
            return page

        yield start
        for watch in watches:
            assert watch.problems == []
            assert {urlsplit(url)[:2] for url in watch.requests} == {urlsplit(address)[:2]}
        for context in contexts:
            context.close()


def to_search(page: Page, parameters: str = "") -> None:
    page.goto(f"{origin(page)}/search?c=scans{parameters}")
    settled(page)


def origin(page: Page) -> str:
    parts = urlsplit(page.url)
    return f"{parts.scheme}://{parts.netloc}"


def shown(page: Page) -> list[str]:
    """Return the keys of the answers."""
    return page.locator(".card dl dd:first-of-type").all_inner_texts()


def broken(page: Page) -> list[str]:
    found = page.evaluate(
        "() => [...document.images].filter((i) => !i.naturalWidth && !i.hidden).map((i) => i.src)"
    )
    return [str(each) for each in found]


def test_three_searches_by_clicks(visit: Start) -> None:
    page = visit()
    page.get_by_role("link", name="scans", exact=True).click()
    page.wait_for_url("**/search?c=scans")
    settled(page)
    assert len(shown(page)) == 24 and broken(page) == []
    before, places = shown(page), []
    for place in (3, 5, 7):
        key = shown(page)[place]
        places.append(page.url)
        page.locator(".card a.picture").nth(place).click()
        page.wait_for_url(f"**like=key%3A{key}&**")
        page.locator(f'.example img[alt="Liked: key:{key}"]').wait_for()
        settled(page)
        assert key not in shown(page) and len(shown(page)) == 24 and broken(page) == []
    for address in reversed(places):
        # htmx loads the page again, which page.go_back() takes for a failure.
        with page.expect_event("load"):
            page.evaluate("() => void setTimeout(() => history.back())")
        page.wait_for_url(address)
        settled(page)
    assert shown(page) == before


def test_a_file_is_dropped_pasted_and_chosen(
    visit: Start, pictures: Pictures, tmp_path: Path
) -> None:
    page = visit()
    file = tmp_path / "query.png"
    file.write_bytes(pictures.files[ROWS])
    text = base64.b64encode(file.read_bytes()).decode()
    found = []
    for put in (
        lambda: page.evaluate(DROP, ["query.png", text]),
        lambda: page.evaluate(PASTE, text),
        lambda: page.get_by_label("Search with a file").set_input_files(file),
    ):
        to_search(page)
        put()
        page.wait_for_url("**like=file%3A**")
        settled(page)
        assert broken(page) == []
        found.append(shown(page))
    assert len(found[0]) == 24 and found[0] == found[1] == found[2]


def test_what_is_no_picture_is_refused_in_words(visit: Start) -> None:
    page = visit()
    to_search(page)
    text = base64.b64encode(b"<html></html>").decode()
    with page.expect_response("**/files?**") as refused:
        page.evaluate(DROP, ["page.html", text])
    assert refused.value.status == 400
    page.get_by_role("alert").get_by_text("HTML page").wait_for()


def test_filters(visit: Start) -> None:
    page = visit()
    to_search(page, "&like=key:4")
    everything = shown(page)
    page.locator("summary", has_text="ward").click()
    page.get_by_label(re.compile("bob")).check()
    page.wait_for_url("**in.ward=bob**")
    settled(page)
    assert shown(page) != everything and all(int(key) % 2 == 0 for key in shown(page))
    page.locator("summary", has_text="taken").click()
    page.get_by_label("from").fill("2024-01-05")
    page.get_by_label("from").press("Tab")
    page.wait_for_url("**min.taken=2024-01-05**")
    settled(page)
    assert shown(page) and all(int(key) % 28 >= 4 for key in shown(page))
    # Clicks keep them, and a page that is loaded shows them.
    page.locator(".card a.picture").first.click()
    settled(page)
    assert all(int(key) % 2 == 0 and int(key) % 28 >= 4 for key in shown(page))
    page.reload()
    settled(page)
    assert page.get_by_label(re.compile("bob")).is_checked()
    page.get_by_label(re.compile("bob")).uncheck()
    page.wait_for_url(lambda url: "in.ward" not in url)
    settled(page)
    assert any(int(key) % 2 for key in shown(page))


def test_a_wrong_filter_is_explained(visit: Start) -> None:
    page = visit()
    to_search(page, "&like=key:4")
    page.locator("summary", has_text="taken").click()
    page.get_by_label("from").fill("no date")
    page.get_by_label("from").press("Enter")
    page.get_by_role("alert").get_by_text("taken").wait_for()
    assert len(shown(page)) == 24


def test_a_box_is_drawn(visit: Start) -> None:
    page = visit()
    to_search(page, "&like=key:4")
    whole = shown(page)
    place = page.locator(".box-area").bounding_box()
    assert place is not None
    page.mouse.move(place["x"] + place["width"] * 0.1, place["y"] + place["height"] * 0.2)
    page.mouse.down()
    page.mouse.move(place["x"] + place["width"] * 0.5, place["y"] + place["height"] * 0.9)
    page.mouse.up()
    page.wait_for_url("**left=10**")
    settled(page)
    assert shown(page) != whole and page.locator(".box").is_visible()
    edges = [page.get_by_label(name).input_value() for name in ("left", "top", "right", "bottom")]
    assert [round(float(edge)) for edge in edges] == [10, 20, 50, 90]
    page.get_by_role("button", name="Whole picture").click()
    page.wait_for_url(lambda url: "left=10" not in url)
    settled(page)
    assert shown(page) == whole
    # By the keyboard.
    page.locator("summary", has_text="Part of the picture").click()
    for name, edge in zip(("left", "top", "right", "bottom"), (10, 20, 50, 90), strict=True):
        page.get_by_label(name).fill(str(edge))
    page.get_by_label("bottom").press("Enter")
    page.wait_for_url("**left=10**")


def test_liked_and_disliked(visit: Start) -> None:
    page = visit()
    to_search(page, "&like=key:4")
    first, second = shown(page)[:2]
    page.get_by_role("link", name=f"More like {first}", exact=True).click()
    page.locator(".example").nth(1).wait_for()
    settled(page)
    page.get_by_role("link", name=f"Less like {second}", exact=True).click()
    page.locator(".example.unlike").wait_for()
    settled(page)
    assert page.locator(".example").count() == 3
    assert not {"4", first, second} & set(shown(page))
    page.get_by_role("link", name="Remove this example").last.click()
    page.locator(".example.unlike").wait_for(state="detached")


def test_sql_is_copied(visit: Start, ward: Ward) -> None:
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    to_search(page, "&like=key:4")
    page.locator("summary", has_text="SQL of this answer").click()
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert [str(row[1]) for row in ward.db.execute(copied)] == shown(page)


def test_downloads(visit: Start) -> None:
    page = visit()
    to_search(page, "&like=key:4")
    for name, start in (("CSV", b"rank,"), ("Contact sheet", b"\x89PNG"), ("SQL file", b"SELECT")):
        with page.expect_download() as download:
            page.get_by_role("link", name=name).click()
        assert Path(download.value.path()).read_bytes().startswith(start)


def test_a_closer_look(visit: Start) -> None:
    page = visit()
    to_search(page, "&like=key:4&in.label=odd")
    page.get_by_role("link", name=f"Look closer at {DICOM}").click()
    page.locator("h2", has_text="Neighbours").wait_for()
    page.locator(".grid .card").first.wait_for()
    settled(page)
    assert page.locator(".large img").count() == 2 and broken(page) == []
    page.get_by_label("Frame").fill("2")
    page.get_by_label("Window center").fill("1500")
    page.get_by_label("Window width").fill("800")
    page.get_by_role("button", name="Show").click()
    page.wait_for_url("**width=800**")
    settled(page)
    assert broken(page) == [] and page.get_by_label("Frame").input_value() == "2"


def test_an_index_is_built(visit: Start, ward: Ward) -> None:
    page = visit()
    query = "SELECT generation FROM siamese.collections WHERE name = 'scans'"
    before = one(ward.db, query)
    page.goto(f"{origin(page)}/health")
    card = page.locator("section", has=page.get_by_role("heading", name="scans"))
    card.get_by_role("button", name="Build the index").click()
    page.get_by_text("Building the index of scans: done").wait_for()
    assert one(ward.db, query) > before


def test_the_keyboard_alone(visit: Start) -> None:
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "Skip to content"
    page.keyboard.press("Enter")
    tab_to(page, "() => document.activeElement.textContent.trim() === 'scans'")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search?c=scans")
    settled(page)
    for press in (1, 2):
        tab_to(page, "() => document.activeElement.className === 'picture'")
        page.keyboard.press("Enter")
        page.wait_for_url("**like=key**")
        page.locator(".example").wait_for()
        settled(page)
        assert page.locator(".example").count() == 1, press
    tab_to(page, "() => document.activeElement.textContent.startsWith('look')")
    page.keyboard.press("Enter")
    page.wait_for_url("**/look?**")
    settled(page)


def tab_to(page: Page, condition: str) -> None:
    """Press Tab until the condition holds. What has the focus must be visible."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate(condition):
            outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none"
            return
    raise AssertionError("the keyboard does not get there")


PLACES = (
    "/",
    "/search?c=scans",
    "/search?c=scans&like=key:4",
    f"/look?c=scans&key={DICOM}",
    "/health",
    "/map?c=scans",
    "/review?c=scans",
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_everybody_can_use_it(visit: Start, width: int, scheme: str) -> None:
    """No page has what axe-core calls serious, and none is wider than the window."""
    page = visit(width)
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    for place in PLACES:
        page.goto(f"{origin(page)}{place}")
        if place.startswith("/map"):  # by way of the page of the job that draws it
            page.locator("#map[data-ready]").wait_for()
        for summary in page.locator("summary").all():
            summary.click()
        settled(page)
        page.evaluate(AXE)
        found = page.evaluate("async () => (await axe.run()).violations")
        serious = [
            (each["id"], [node["target"] for node in each["nodes"]][:3])
            for each in found
            if each["impact"] in ("serious", "critical")
        ]
        assert serious == [], place
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width, place


def test_a_role_logs_in_and_sees_its_own_rows(ward: Ward, browser: Browser) -> None:
    with served(ward.dsn, form=True) as (address, _):
        page = browser.new_page()
        watch = Watch(page)
        page.goto(address)
        page.get_by_label("Database role").fill("alice")
        page.get_by_label("Password").fill("wrong")
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("alert").get_by_text("did not accept").wait_for()
        watch.problems.clear()
        page.get_by_label("Password").fill(ward.password)
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("link", name="scans", exact=True).click()
        page.wait_for_url("**/search?c=scans")
        settled(page)
        assert shown(page) and all(int(key) % 2 or int(key) > 1000 for key in shown(page))
        page.locator(".card a.picture").first.click()
        page.wait_for_url("**like=key**")
        settled(page)
        assert shown(page) and all(int(key) % 2 or int(key) > 1000 for key in shown(page))
        assert page.evaluate("() => document.cookie") == ""
        # htmx keeps the address of the page, as the browser's history does.
        kept = "() => [...Object.keys(localStorage), ...Object.keys(sessionStorage)]"
        assert set(page.evaluate(kept)) <= {"htmx-current-path-for-history"}
        page.get_by_role("button", name="Log out").click()
        page.get_by_label("Password").wait_for()
        assert "key" not in page.evaluate("() => JSON.stringify(sessionStorage)")
        page.go_back()
        assert page.locator(".card").count() == 0
        assert watch.problems == []
        page.close()


def test_a_lasso_on_the_map_becomes_a_filter(visit: Start) -> None:
    page = visit()
    page.goto(f"{origin(page)}/map?c=scans&by=ward")
    page.locator("#map[data-ready]").wait_for()
    place = page.locator("#map").bounding_box()
    assert place is not None
    corners = ((0.02, 0.02), (0.98, 0.02), (0.98, 0.6), (0.02, 0.6))
    points = [
        (place["x"] + a * place["width"], place["y"] + b * place["height"]) for a, b in corners
    ]
    # A picture appears under the pointer.
    left, top = page.evaluate(FIRST_POINT)
    page.mouse.move(place["x"] + left * place["width"], place["y"] + top * place["height"])
    page.locator("#near").wait_for()
    settled(page)
    assert broken(page) == []
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=4)
    page.mouse.up()
    chosen = int(page.locator("#near-text").inner_text().split()[0])
    assert 0 < chosen < ROWS + 2  # all of the map
    page.get_by_role("button", name="Search the chosen rows").click()
    page.wait_for_url("**among=**")
    settled(page)
    assert len(shown(page)) == min(24, chosen)
    page.locator(".card a.picture").first.click()
    page.wait_for_url("**like=key**among=**")
    page.locator(".example").wait_for()
    settled(page)
    assert len(shown(page)) == min(24, chosen - 1)


def test_the_map_by_the_keyboard(visit: Start) -> None:
    page = visit()
    page.goto(f"{origin(page)}/map?c=scans")
    page.locator("#map[data-ready]").wait_for()
    page.locator("#map").focus()
    for presses, key in (
        (13, "ArrowLeft"),
        (13, "ArrowUp"),
        (1, " "),
        (26, "ArrowRight"),
        (1, " "),
    ):
        for _ in range(presses):
            page.keyboard.press(key)
    for presses, key in ((26, "ArrowDown"), (1, " "), (26, "ArrowLeft"), (1, " ")):
        for _ in range(presses):
            page.keyboard.press(key)
    assert "chosen" in page.locator("#near-text").inner_text()
    page.keyboard.press("Escape")
    assert page.get_by_role("button", name="Search the chosen rows").is_disabled()


def test_a_group_is_reviewed(visit: Start, ward: Ward) -> None:
    ward.db.execute(review.CREATE)
    copy = "UPDATE scans SET image = (SELECT image FROM scans WHERE id = 10) WHERE id = 11"
    ward.db.execute(copy)
    page = visit()
    page.goto(f"{origin(page)}/review?c=scans")
    page.get_by_role("button", name="Look for groups").click()
    page.locator("h2", has_text="Group 1").wait_for()
    page.get_by_label("Your table for decisions").fill("decisions")
    page.get_by_role("button", name="Use").click()
    section = page.locator("section", has=page.get_by_role("img", name="id 11"))
    section.get_by_label("Note").fill("a copy")
    section.get_by_role("button", name="same").click()
    page.wait_for_url("**#group-**")
    section.get_by_text("same", exact=True).first.wait_for()
    settled(page)
    assert broken(page) == []
    row = ward.db.execute("SELECT keys, decision, note FROM decisions").fetchone()
    assert row is not None and {"10", "11"} <= set(row[0]) and row[1:] == ("same", "a copy")
