"""What somebody could try against the page, and that nothing gets through."""

from __future__ import annotations

import io
import re
import secrets
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from pg_siamese.explore import app as explore_app
from pg_siamese.explore import sessions
from pg_siamese.explore.app import Settings, create_app
from pg_siamese.explore.sessions import Sessions
from tests.explore.conftest import (
    DICOM,
    EVIL,
    HTML,
    HTML_ROW,
    HUGE,
    ORIGIN,
    PORT,
    SVG,
    SVG_ROW,
    Open,
    Ward,
    hidden,
    log_in,
)

COOKIE = f"pg_siamese_{PORT}"
PAGES = ("/", "/search?c=scans&like=key:1", "/look?c=scans&key=1", "/health")
# Rows of alice and of bob.
HERS, HIS = 37, 38


def token_of(client: TestClient) -> str:
    return hidden(client.get("/").text, "csrf")


def post(client: TestClient, path: str, headers: dict[str, str] | None = None, **form: str) -> Any:
    return client.post(path, data=form, headers=headers or {})


# --- Other sites ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{PORT + 1}"},
        {"Origin": f"https://127.0.0.1:{PORT}"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
    ],
)
def test_the_form_of_another_site(browse: Open, headers: dict[str, str]) -> None:
    client = browse(write=True)
    token = token_of(client)
    assert post(client, "/build", headers, csrf=token, c="scans").status_code == 403
    # The same from the page itself.
    own = {"Origin": ORIGIN, "Sec-Fetch-Site": "same-origin"}
    assert post(client, "/build", own, csrf=token, c="scans").status_code == 303


def test_another_site_embeds_a_picture(browse: Open) -> None:
    client = browse()
    headers = {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}
    answer = client.get("/picture?c=scans&of=key:1", headers=headers)
    assert answer.status_code == 403 and b"PNG" not in answer.content


def test_a_link_from_elsewhere_leads_here(browse: Open) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert browse().get("/", headers=headers).status_code == 200


@pytest.mark.parametrize("token", [None, "", "guess", "ü"])
@pytest.mark.parametrize("path", ["/build", "/cancel", "/files?c=scans", "/logout"])
def test_a_form_without_its_token(browse: Open, path: str, token: str | None) -> None:
    client = browse(write=True)
    form = {} if token is None else {"csrf": token}
    assert client.post(path, data=form).status_code in (400, 403)
    assert client.get("/").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "127.0.0.1@evil"])
def test_a_name_that_was_bent_to_this_machine(browse: Open, host: str) -> None:
    client = browse()
    answer = client.get("/", headers={"Host": host})
    assert answer.status_code == 400
    assert "scans" not in answer.text


# --- Paths and addresses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static//etc/passwd",
        "/static/%00",
        "/../../etc/passwd",
        "/templates/layout.html",
        "/build",
        "/files",
        "/.git/config",
    ],
)
def test_paths_that_are_no_pages(browse: Open, path: str) -> None:
    answer = browse().get(path)
    assert answer.status_code in (404, 405)
    assert "import" not in answer.text and "root:" not in answer.text


INJECTIONS = (
    "1; DROP TABLE scans",
    "' OR 1=1 --",
    "1) OR (1=1",
    '"; DROP TABLE scans; --',
    "\0",
    "$1",
)


@pytest.mark.parametrize("text", INJECTIONS)
@pytest.mark.parametrize(
    "name",
    [
        *("c", "like", "k", "engine", "strategy", "frame", "left", "column", "among", "after"),
        *("in.label", "min.taken", "max.score", "null.label", "in.nowhere", "of", "key"),
    ],
)
def test_sql_in_each_parameter(ward: Ward, browse: Open, name: str, text: str) -> None:
    client = browse()
    for path in ("/search", "/facet", "/look", "/search.sql"):
        given = {"c": "scans", "of": "label", "key": "1"}
        given[name] = f"key:{text}" if name == "like" else text
        answer = client.get(path, params=given)
        assert answer.status_code in (200, 303, 400, 404, 410), answer.text
        # Whatever it is, it selects no more than it should.
        if name == "in.label" and path == "/search":
            assert "No row qualifies" in answer.text or answer.status_code == 400
    assert ward.db.execute("SELECT count(*) > 0 FROM scans").fetchone() == (True,)


@pytest.mark.parametrize(
    "address",
    [
        *("/search?c=scans&k=1000000", "/search?c=scans&k=-1", "/search?c=scans&k=9e9"),
        *("/search?c=scans&like=1", "/search?c=scans&unlike=key:1", "/search?c=scans&engine=x"),
        "/search?c=scans&like=key:1&left=10&top=10&right=5&bottom=50",
        "/search?c=scans&like=key:1&left=nan&top=nan&right=nan&bottom=nan",
        "/search?c=scans" + "".join(f"&like=key:{number}" for number in range(17)),
        *("/search?c=nowhere", "/search", "/look?c=scans", "/facet?c=scans&of=image"),
        "/search?c=scans&min.data=%7B",
    ],
)
def test_addresses_that_mean_nothing(browse: Open, address: str) -> None:
    answer = browse().get(address)
    assert 400 <= answer.status_code < 500, answer.text
    assert 'role="alert"><p>' in answer.text


# --- What is stored -------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "content"), [(SVG_ROW, SVG), (HTML_ROW, HTML), (HUGE, b"IHDR")])
def test_what_is_no_picture_is_never_served(
    browse: Open, key: int, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = browse()
    for side in ("", "&side=2048"):
        answer = client.get(f"/picture?c=scans&of=key:{key}{side}")
        assert answer.status_code == 415
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-content-type-options"] == "nosniff"
        with Image.open(io.BytesIO(answer.content)) as image:
            assert image.getextrema() == ((200, 200),) * 3
    page = client.get("/look", params={"c": "scans", "key": key})
    assert page.status_code == 200
    assert "This image can&#39;t be shown" in page.text or "can't be shown" in page.text
    assert "<script>alert" not in page.text
    # The sheet has them, too.
    sheet = client.get("/search.png", params={"c": "scans", "in.label": "odd"})
    assert sheet.content[:4] == b"\x89PNG"


def test_pictures_are_encoded_again(ward: Ward, browse: Open) -> None:
    """What somebody puts behind the pixels of a file stays behind."""
    client = browse()
    before = client.get("/picture?c=scans&of=key:39").content
    ward.db.execute("UPDATE scans SET image = image || %s WHERE id = 39", (HTML,))
    answer = client.get("/picture?c=scans&of=key:39")
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    assert answer.content == before and b"<script>" not in answer.content


def test_names_and_values_that_are_markup(browse: Open) -> None:
    client = browse()
    pages = [
        client.get("/search", params={"c": "scans", "like": "key:1", "column": EVIL}),
        client.get("/search", params={"c": "scans", "column": EVIL, f"in.{EVIL}": "=1+1"}),
        client.get("/facet", params={"c": "scans", "of": EVIL}),
        client.get("/look", params={"c": "scans", "key": "1", "beside": f"key:{EVIL}"}),
        client.get("/look", params={"c": "scans", "key": EVIL}),
        client.get("/search", params={"c": EVIL}),
        client.get("/search", params={"c": "scans", "in.label": EVIL}),
        client.get("/search", params={"c": "scans", "engine": EVIL}),
    ]
    for page in pages:
        assert "<script>alert" not in page.text and "<img src=x" not in page.text
    assert "&lt;script&gt;" in pages[0].text


def test_a_file_name_can_not_be_chosen(browse: Open) -> None:
    answer = browse().get("/search.csv?c=scans&like=key:1&name=../../evil")
    assert answer.headers["content-disposition"] == 'attachment; filename="answers.csv"'


def test_formulas_in_csv(browse: Open) -> None:
    text = browse().get("/search.csv", params={"c": "scans", "column": [EVIL, "score"]}).text
    assert "'=1+1" in text and not re.search(r"(^|,)=", text, re.MULTILINE)
    assert f"id,{EVIL},score" in text


# --- Roles ----------------------------------------------------------------------------------------


def test_a_role_sees_its_own_rows_only(browse: Open) -> None:
    for role, own, other in (("alice", HERS, HIS), ("bob", HIS, HERS)):
        client = browse(role)
        found = client.get("/search.csv", params={"c": "scans", "k": 96, "column": "ward"}).text
        assert {line.split(",")[1] for line in found.splitlines()[1:]} == {role}
        found = client.get("/search.csv", params={"c": "scans", "k": 96, "like": f"key:{own}"}).text
        keys = {int(line.split(",")[3]) for line in found.splitlines()[1:]}
        assert keys and all(key % 2 == own % 2 for key in keys if key < 1000)
        counts = client.get("/facet", params={"c": "scans", "of": "ward"}).text
        assert role in counts and {"alice": "bob", "bob": "alice"}[role] not in counts
        assert client.get(f"/picture?c=scans&of=key:{own}").status_code == 200
        assert client.get(f"/picture?c=scans&of=key:{other}").status_code == 404
        assert client.get(f"/look?c=scans&key={other}").status_code == 404
        hers = client.get(f"/search?c=scans&like=key:{other}")
        nobody = client.get("/search?c=scans&like=key:999")
        assert hers.status_code == nobody.status_code == 400
        # Not a word tells that the one is there.
        assert hers.text.replace(f"{other}", "N") == nobody.text.replace("999", "N")


def test_columns_without_a_grant(browse: Open) -> None:
    client = browse("alice")
    page = client.get("/look", params={"c": "scans", "key": "1"})
    assert page.status_code == 200 and "secret" not in page.text and "hidden</dt>" not in page.text
    for given in ({"column": "hidden"}, {"in.hidden": "secret"}, {"min.hidden": "a"}):
        answer = client.get("/search", params={"c": "scans", **given})
        assert answer.status_code == 400
    assert client.get("/facet?c=scans&of=hidden").status_code == 400


def test_two_roles_in_one_browser(ward: Ward, browse: Open) -> None:
    client = browse("alice")
    old, token = client.cookies[COOKIE], token_of(client)
    assert log_in(client, "bob", ward.password).status_code == 303
    assert client.cookies[COOKIE] != old
    # The page of the other tab, which was alice's.
    assert post(client, "/logout", csrf=token).status_code == 403
    assert client.get(f"/picture?c=scans&of=key:{HERS}").status_code == 404
    assert "bob" in client.get("/").text
    client.cookies.set(COOKIE, old, domain="127.0.0.1")
    client.cookies.clear()
    client.cookies.set(COOKIE, old)
    assert client.get("/").headers["location"] == "/login"


def test_a_grant_that_is_revoked_in_mid_session(ward: Ward, browse: Open) -> None:
    ward.role("carol", "GRANT SELECT ON scans TO {}", "GRANT alice TO {}")
    ward.db.execute("SELECT siamese.grant_usage('carol')")
    ward.db.execute("CREATE POLICY carol ON scans FOR SELECT TO carol USING (true)")
    client = browse("carol")
    pages = ("/search?c=scans", "/search?c=scans&like=key:1", "/look?c=scans&key=1")
    picture = "/picture?c=scans&of=key:1"
    assert [client.get(page).status_code for page in (*pages, picture)] == [200] * 4
    ward.db.execute("REVOKE SELECT ON scans FROM carol")
    ward.db.execute("REVOKE alice FROM carol")
    for page in pages:
        answer = client.get(page)
        assert answer.status_code == 403
        assert "/picture" not in answer.text
    answer = client.get(picture)
    assert answer.status_code == 403


def test_a_role_that_may_no_longer_log_in(ward: Ward, browse: Open) -> None:
    ward.role("dave")
    ward.db.execute("SELECT siamese.grant_usage('dave')")
    client = browse("dave")
    assert client.get("/").status_code == 200
    ward.db.execute("ALTER ROLE dave NOLOGIN")
    assert client.get("/").headers["location"] == "/login"
    ward.db.execute("ALTER ROLE dave LOGIN VALID UNTIL '2020-01-01'")
    assert client.get("/").headers["location"] == "/login"
    assert log_in(client, "dave", ward.password).status_code == 403


def test_a_role_without_any_grant(ward: Ward, browse: Open) -> None:
    client = browse(ward.role("erin"))
    for path in PAGES:
        answer = client.get(path)
        assert answer.status_code in (403, 410), answer.text
        assert "siamese." not in answer.text


@pytest.mark.parametrize(
    ("role", "password"),
    [
        ("alice", "wrong"),
        ("nobody at all", "wrong"),
        # The server lets this one in without a password, over this socket.
        ("postgres", "anything"),
        ("alice", ""),
        ("", "x"),
        ("alice user=postgres", "x"),
        ("alice", "x\0"),
    ],
)
def test_logins_that_fail(ward: Ward, browse: Open, role: str, password: str) -> None:
    client = browse("alice")
    client.cookies.clear()
    answer = log_in(client, role, password)
    assert answer.status_code in (400, 403)
    assert "did not accept" in answer.text or answer.status_code == 400
    assert COOKIE not in client.cookies
    assert client.get("/").headers["location"] == "/login"


def test_the_password_file_of_the_command_is_not_used(
    ward: Ward, browse: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "pgpass"
    file.write_text(f"*:*:*:alice:{ward.password}\n")
    file.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(file))
    monkeypatch.setenv("PGPASSWORD", ward.password)
    client = browse("bob")
    client.cookies.clear()
    assert log_in(client, "alice", "").status_code == 403
    assert log_in(client, "alice", "wrong").status_code == 403


def test_the_login_form_of_another_visitor(ward: Ward, browse: Open) -> None:
    client = browse("alice")
    client.cookies.clear()
    token = hidden(client.get("/login").text, "csrf")
    client.cookies.clear()
    client.get("/login")
    form = {"csrf": token, "role": "alice", "password": ward.password}
    assert client.post("/login", data=form).status_code == 403


# --- Sessions -------------------------------------------------------------------------------------


def test_no_session_no_page(browse: Open) -> None:
    client = browse()
    for cookie in ("", "guess", secrets.token_urlsafe(32)):
        client.cookies.clear()
        headers = {"Cookie": f"{COOKIE}={cookie}"} if cookie else {}
        for path in (*PAGES, "/picture?c=scans&of=key:1", "/search.csv?c=scans"):
            answer = client.get(path, headers=headers)
            assert (answer.status_code, answer.headers["location"]) == (303, "/login")
        answer = client.get("/", headers={**headers, "HX-Request": "true"})
        assert (answer.status_code, answer.headers["hx-redirect"]) == (401, "/login")


def test_a_link_opens_one_session(ward: Ward) -> None:
    tokens: list[str] = []
    app = create_app(Settings(dsn=ward.dsn, announce=tokens.append))
    with TestClient(app, base_url=ORIGIN) as client:
        for guess in ("", "guess", tokens[0][:-1], "ü"):
            assert client.get("/start", params={"token": guess}).status_code == 403
        assert client.get("/start", params={"token": tokens[0]}).status_code == 200
        assert client.get("/start", params={"token": tokens[0]}).status_code == 403
        assert len(tokens) == 2 and tokens[0] != tokens[1]
        # Nobody logs in by a form then.
        assert log_in_fails(client, ward)


def log_in_fails(client: TestClient, ward: Ward) -> bool:
    form = {"csrf": "x", "role": "alice", "password": ward.password}
    return client.post("/login", data=form).status_code == 403


def test_the_link_is_no_way_around_the_form(ward: Ward, browse: Open) -> None:
    client = browse("alice")
    token = client.app.state.invitation.token  # type: ignore[attr-defined]
    client.cookies.clear()
    assert client.get("/start", params={"token": token}).status_code == 403


@pytest.mark.parametrize(
    ("steps", "ends"),
    [
        ([sessions.IDLE_SECONDS - 1] * 3, False),
        ([sessions.IDLE_SECONDS + 1], True),
        (
            [sessions.IDLE_SECONDS - 1] * (sessions.ABSOLUTE_SECONDS // sessions.IDLE_SECONDS + 1),
            True,
        ),
    ],
)
def test_sessions_end(ward: Ward, browse: Open, steps: list[int], ends: bool) -> None:
    now = 0.0
    kept = Sessions(clock=lambda: now)
    client = browse(sessions=kept)
    session = kept.find(client.cookies[COOKIE])
    assert session is not None
    for step in steps:
        now += step
        answer = client.get("/")
    assert (answer.status_code == 303) is ends
    assert session.ended is ends


def test_ended_sessions_close_their_connections(ward: Ward, browse: Open) -> None:
    ward.role("frank")
    ward.db.execute("SELECT siamese.grant_usage('frank')")
    count = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'frank'"
    client = browse("frank")
    client.get("/")
    assert ward.db.execute(count).fetchone() == (1,)
    assert post(client, "/logout", csrf=token_of(client)).status_code == 303
    from tests.support import one, wait_until

    wait_until(lambda: one(ward.db, count) == 0, "the connection stays")
    assert client.get("/").headers["location"] == "/login"


def test_there_are_not_too_many_sessions(ward: Ward, browse: Open) -> None:
    kept = Sessions()
    client = browse("alice", sessions=kept)
    first = kept.find(client.cookies[COOKIE])
    for _ in range(sessions.MOST_SESSIONS):
        client.cookies.clear()
        assert log_in(client, "alice", ward.password).status_code == 303
    assert first is not None and first.ended


def test_cookies_are_not_for_scripts(browse: Open, ward: Ward) -> None:
    client = browse("alice")
    answers = [client.get("/login"), log_in(client, "alice", ward.password)]
    for answer in answers:
        for cookie in answer.headers.get_list("set-cookie"):
            assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower(), cookie
    app = create_app(Settings(dsn=ward.dsn))
    with TestClient(app, base_url=ORIGIN.replace("http", "https")) as secure:
        assert "Secure" in secure.get("/login").headers["set-cookie"]


def test_what_a_visitor_brought_is_nobody_elses(browse: Open, ward: Ward) -> None:
    alice, bob = browse("alice"), browse("bob")
    headers = {"X-CSRF-Token": token_of(alice)}
    image = ward.db.execute("SELECT image FROM scans WHERE id = 1", binary=True).fetchone()
    assert image is not None
    kept = alice.post("/files?c=scans", content=image[0], headers=headers)
    address = kept.json()["address"]
    assert alice.get(address).status_code == 200
    bob.cookies.set("x", "y")
    answer = bob.get(address)
    assert answer.status_code == 410


# --- Writing --------------------------------------------------------------------------------------


def test_a_page_without_write_changes_nothing(ward: Ward, browse: Open) -> None:
    client = browse()
    before = ward.db.execute("SELECT max(generation) FROM siamese.generations").fetchone()
    assert post(client, "/build", csrf=token_of(client), c="scans").status_code == 403
    assert ward.db.execute("SELECT max(generation) FROM siamese.generations").fetchone() == before
    session = client.app.state.sessions.find(client.cookies[COOKIE])  # type: ignore[attr-defined]
    with session.connection() as connection, pytest.raises(Exception, match="read-only"):
        connection.execute("CREATE TABLE t ()")


def test_write_does_not_give_more_than_the_role_has(ward: Ward, browse: Open) -> None:
    client = browse("alice", write=True)
    assert "Build the index" not in client.get("/health").text
    started = post(client, "/build", csrf=token_of(client), c="scans")
    assert started.status_code == 303
    from tests.support import wait_until

    wait_until(lambda: "running" not in client.get(started.headers["location"]).text)
    assert "no permission" in client.get(started.headers["location"]).text


# --- Sizes ----------------------------------------------------------------------------------------


def test_forms_that_are_too_large(browse: Open) -> None:
    client = browse()
    token = token_of(client)
    for content in (b"csrf=" + b"x" * explore_app.MOST_FORM_BYTES, b"a=1&" * 600):
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = client.post("/logout", content=content, headers=headers)
        assert answer.status_code in (400, 413)
    assert token_of(client) == token


def test_files_that_are_too_large_or_no_pictures(browse: Open) -> None:
    client = browse()
    headers = {"X-CSRF-Token": token_of(client)}
    for content, status in (
        (HTML, 400),
        (SVG, 400),
        (b"", 400),
        (b"\x89PNG" + b"\0" * 34_000_000, 413),
    ):
        answer = client.post("/files?c=scans", content=content, headers=headers)
        assert answer.status_code == status, answer.text
        assert "Traceback" not in answer.text


def test_pictures_have_a_largest_size(browse: Open) -> None:
    client = browse()
    for side in ("0", "100000", "-5", "x"):
        assert client.get(f"/picture?c=scans&of=key:1&side={side}").status_code == 400


# --- Headers and markup ---------------------------------------------------------------------------


def test_every_answer_has_the_headers(browse: Open) -> None:
    client = browse()
    paths = [*PAGES, "/nowhere", "/login", "/static/explore.js", "/picture?c=scans&of=key:1"]
    for path in [*paths, "/search?c=nowhere", "/picture?c=scans&of=key:77777", "/start?token=x"]:
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "data:" not in policy and "*" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert ("no-store" in headers.get("cache-control", "")) is not path.startswith("/static")
        assert "server" not in headers or "uvicorn" not in headers["server"]


class Tags(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_pages_have_no_inline_code_and_nothing_from_outside(browse: Open) -> None:
    client = browse(write=True)
    for path in [*PAGES, "/login", "/nowhere", f"/look?c=scans&key={DICOM}"]:
        tags = Tags(client.get(path).text).found
        assert any(tag == "main" for tag, _ in tags)
        for tag, attributes in tags:
            assert tag not in ("style", "iframe", "object", "embed", "base")
            assert tag != "script" or str(attributes["src"]).startswith("/static/")
            assert not any(name == "style" or name.startswith("on") for name in attributes)
            assert not any(name.startswith("hx-on") for name in attributes)
            for name in ("src", "href", "action", "hx-get", "hx-post"):
                # One slash: two would be another host.
                assert re.match(r"/(?!/)|#", attributes.get(name) or "/"), attributes


def test_errors_say_nothing_of_the_sql(ward: Ward, browse: Open) -> None:
    client = browse()
    ward.db.execute("CREATE TABLE public.gone (id bigint PRIMARY KEY, image bytea)")
    ward.db.execute("SELECT siamese.create_collection('gone', 'public.gone')")
    assert client.get("/search?c=gone").status_code == 200
    ward.db.execute("DROP TABLE gone CASCADE")
    for path in ("/search?c=gone", "/search?c=gone&like=key:1", "/look?c=gone&key=1"):
        answer = client.get(path)
        assert 400 <= answer.status_code < 500, answer.text
        for word in ("SELECT", "LINE 1", "psycopg", "Traceback", "pg_catalog"):
            assert word not in answer.text
