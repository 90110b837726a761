"""Searches on the page: answers, filters, examples, a closer look, downloads, checks."""

from __future__ import annotations

import csv
import io
import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.conftest import Pictures
from tests.explore.conftest import DEEP, DICOM, EVIL, ROWS, Open, Ward, hidden
from tests.support import one, rows_of, wait_until


def answers(client: TestClient, **given: Any) -> list[dict[str, str]]:
    """Return the rows of a search, as its CSV has them."""
    answer = client.get("/search.csv", params={"c": "scans", **given})
    assert answer.status_code == 200, answer.text
    return list(csv.DictReader(io.StringIO(answer.text)))


def keys(client: TestClient, **given: Any) -> list[int]:
    return [int(row["id"]) for row in answers(client, **given)]


def pixels(client: TestClient, address: str) -> np.ndarray[Any, Any]:
    answer = client.get(address)
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def test_collections_are_listed(browse: Open) -> None:
    page = browse().get("/").text
    assert 'href="/search?c=scans"' in page and 'href="/search?c=images"' in page
    assert str(ROWS + 2) in page


def test_rows_are_listed_page_by_page(browse: Open) -> None:
    client = browse()
    first = keys(client, k=12)
    assert first == list(range(12))
    assert keys(client, k=12, after=first[-1]) == list(range(12, 24))
    assert "More rows" in client.get("/search?c=scans&k=12").text
    assert "More rows" not in client.get("/search?c=scans&k=96").text


@pytest.mark.parametrize(
    ("given", "call"),
    [
        ({"like": "key:4"}, "image_id => 4, k => 24"),
        ({"like": "key:4", "k": 12, "engine": "pgvector"}, "image_id => 4, k => 12"),
        (
            {"like": ["key:4", "key:6"], "unlike": "key:9"},
            "\"like\" => '{4,6}', unlike => '{9}', k => 24",
        ),
        ({"like": "key:4", "one_each": 1}, "image_id => 4, k => 24, group_by => 'patient'"),
        (
            {"like": "key:4", "other_groups": 1},
            "image_id => 4, k => 24, group_by => 'patient', per_group => 24, own_group => false",
        ),
        (
            {"like": "key:4", "in.label": ["0", "odd"]},
            'image_id => 4, filter => \'{"label": ["0", "odd"]}\', k => 24',
        ),
        (
            {"like": "key:4", "null.label": 1},
            "image_id => 4, filter => '{\"label\": [null]}', k => 24",
        ),
        (
            {"like": "key:4", "min.taken": "2024-01-05", "max.score": "7.5"},
            'image_id => 4, k => 24, filter => \'{"taken": {">=": "2024-01-05"},'
            ' "score": {"<=": 7.5}}\'',
        ),
        (
            {"like": "key:4", "left": 10, "top": 20, "right": 60, "bottom": 90},
            "image_id => 4, region => '(0.1,0.2),(0.6,0.9)', k => 24",
        ),
    ],
)
def test_a_search_is_that_of_sql(
    ward: Ward, browse: Open, given: dict[str, Any], call: str
) -> None:
    client = browse()
    wanted = rows_of(
        ward.db,
        "SELECT image_id, distance, similarity FROM siamese.similar_images("
        f"{call}, collection => 'scans') ORDER BY rank",
    )
    found = answers(client, **given)
    assert wanted and [int(row["id"]) for row in found] == [key for key, _, _ in wanted]
    np.testing.assert_allclose(
        [float(row["distance"]) for row in found], [row[1] for row in wanted], atol=1e-6
    )
    page = client.get("/search", params={"c": "scans", **given}).text
    assert len(re.findall(r'<li class="card">', page)) == len(wanted)
    # The statement that is shown gives the same.
    text = client.get("/search.sql", params={"c": "scans", **given}).text
    ran = rows_of(ward.db, text.replace("%", "%%"))
    assert [row[1] for row in ran] == [int(row["id"]) for row in found]
    assert [str(row[4] or "") for row in ran] == [row["label"] for row in found]


def test_filters_of_rows_that_are_listed(ward: Ward, browse: Open) -> None:
    client = browse()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"in.label": ["0"]}, "label = '0'"),
        ({"in.label": ["0"], "null.label": 1}, "label = '0' OR label IS NULL"),
        ({"null.label": 1}, "label IS NULL"),
        (
            {"min.taken": "2024-01-05", "max.taken": "2024-01-09"},
            "taken BETWEEN '2024-01-05' AND '2024-01-09'",
        ),
        ({"min.score": "2.5", "in.ward": "bob"}, "score >= 2.5 AND ward = 'bob'"),
        ({"also.patient": "p3"}, "patient = 'p3'"),
        ({f"in.{EVIL}": "=1+1"}, f"\"{EVIL}\" = '=1+1'"),
        ({"in.data": "{}"}, "data = '{}'"),
    ]
    for given, condition in cases:
        wanted = rows_of(ward.db, f"SELECT id FROM scans WHERE {condition} ORDER BY id")
        found = keys(client, k=96, **given)
        assert wanted and found == [key for (key,) in wanted], given
        text = client.get("/search.sql", params={"c": "scans", "k": 96, **given}).text
        assert [row[0] for row in rows_of(ward.db, text)] == found


def test_values_of_a_column_with_counts(browse: Open) -> None:
    client = browse()
    page = client.get("/facet?c=scans&of=label&in.label=odd").text
    assert re.search(r'name="in.label" value="odd"\s+checked> odd <span class="count">5<', page)
    assert re.search(r'name="null.label" value="1"\s+> \(none\) <span class="count">1<', page)
    page = client.get("/facet?c=scans&of=taken&min.taken=2024-01-03").text
    assert 'name="min.taken" value="2024-01-03" placeholder="2024-01-01"' in page
    assert 'name="max.taken" value="" placeholder="2024-01-28"' in page


def test_other_values_than_the_commonest(ward: Ward, browse: Open) -> None:
    client = browse()
    ward.db.execute("CREATE TABLE many (id bigint PRIMARY KEY, image bytea, code text)")
    ward.db.execute("INSERT INTO many SELECT n, ''::bytea, n FROM generate_series(1, 40) AS n")
    ward.db.execute(
        "SELECT siamese.create_collection('many', 'public.many', on_error => 'quarantine')"
    )
    page = client.get("/facet?c=many&of=code&in.code=39").text
    assert page.count("checkbox") == 31 and 'name="also.code"' in page
    assert re.search(r'value="39"\s+checked|value="39" checked', page)


def test_columns_are_chosen(browse: Open) -> None:
    client = browse()
    row = answers(client, like="key:4", column=["ward", EVIL])[0]
    assert list(row) == ["rank", "distance", "similarity", "id", "ward", EVIL]
    row = answers(client, like="key:4", columns="chosen")[0]
    assert list(row) == ["rank", "distance", "similarity", "id"]
    # The default has label and group.
    assert {"label", "patient"} < set(answers(client, like="key:4")[0])


def test_sizes_are_shown(browse: Open, pictures: Pictures) -> None:
    page = browse().get("/search?c=scans&in.label=odd").text
    height, width = pictures.pixels.shape[1:3]
    assert "32 x 32, 7 kB" in page  # DICOM
    assert f"{width} x {height}, 1 kB" in browse().get("/search?c=scans&k=12").text


def test_a_file_is_searched_for(ward: Ward, browse: Open, pictures: Pictures) -> None:
    client = browse()
    image = pictures.files[ROWS]
    headers = {"X-CSRF-Token": hidden(client.get("/").text, "csrf")}
    sent = client.post("/files?c=scans&k=12&in.ward=bob&like=key:3", content=image, headers=headers)
    address = sent.json()["address"]
    given = parse_qs(urlsplit(address).query)
    assert given["k"] == ["12"] and given["in.ward"] == ["bob"] and len(given["like"]) == 1
    wanted = rows_of(
        ward.db,
        "SELECT image_id FROM siamese.similar_images(image => %s, k => 12, collection => 'scans',"
        ' filter => \'{"ward": "bob"}\')',
        image,
    )
    assert keys(client, **{name: value for name, value in given.items() if name != "c"}) == [
        key for (key,) in wanted
    ]
    text = client.get(address.replace("/search", "/search.sql")).text
    assert [row[1] for row in rows_of(ward.db, text)] == [key for (key,) in wanted]
    shown = pixels(client, f"/picture?c=scans&of={given['like'][0]}")
    assert shown.shape[:2] == pictures.pixels.shape[1:3]
    # A DICOM file, too.
    image = one(ward.db, "SELECT image FROM scans WHERE id = %s", DICOM)
    sent = client.post("/files?c=scans", content=image, headers=headers)
    assert client.get(sent.json()["address"]).status_code == 200


def test_a_long_statement_is_a_file(browse: Open, ward: Ward) -> None:
    client = browse()
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    headers = {"X-CSRF-Token": hidden(client.get("/").text, "csrf")}
    sent = client.post("/files?c=scans", content=file.getvalue(), headers=headers)
    address = sent.json()["address"]
    assert 'id="sql"' not in client.get(address).text
    text = client.get(address.replace("/search", "/search.sql")).text
    assert len(rows_of(ward.db, text)) == 24


def test_links_of_an_answer(browse: Open) -> None:
    client = browse()
    page = client.get("/search?c=scans&like=key:4&k=12&in.ward=bob").text
    links = [link.replace("&amp;", "&") for link in re.findall(r'href="([^"]*)"', page)]
    for link in dict.fromkeys(links):
        if link.startswith(("/search", "/look", "/picture")):
            assert client.get(link).status_code == 200, link
    other = next(link for link in links if "like=key%3A4&like=" in link)
    assert "k=12" in other and "in.ward=bob" in other


def test_keys_that_are_no_numbers(ward: Ward, browse: Open, pictures: Pictures) -> None:
    # Names that a driver could take for placeholders, too.
    ward.db.execute('CREATE TABLE "50%s" ("the %(key)s" text PRIMARY KEY, image bytea, label text)')
    ward.db.execute("SELECT siamese.create_collection('by name', 'public.\"50%s\"')")
    names = ["a/b", "c:d&e=f", "'g\"", "ü 1"]
    for number, name in enumerate(names):
        insert = """INSERT INTO "50%%s" VALUES (%s, %s, 'x')"""
        ward.db.execute(insert, (name, pictures.files[number]))
    client = browse()
    for name in names:
        given = {"c": "by name", "like": f"key:{name}"}
        page = client.get("/search", params=given)
        assert page.status_code == 200, page.text
        found = client.get("/search.csv", params=given).text
        assert len(found.splitlines()) == len(names)
        assert len(rows_of(ward.db, client.get("/search.sql", params=given).text)) == 3
        assert client.get("/look", params={"c": "by name", "key": name}).status_code == 200
        assert pixels(
            client,
            str(
                client.build_request(
                    "GET", "/picture", params={"c": "by name", "of": f"key:{name}"}
                ).url
            ),
        ).size


def test_all_frames_of_a_collection(ward: Ward, browse: Open) -> None:
    ward.db.execute("CREATE TABLE films (id bigint PRIMARY KEY, image bytea)")
    ward.db.execute("SELECT siamese.create_collection('films', 'public.films', frames => 'all')")
    ward.db.execute("INSERT INTO films SELECT id, image FROM scans WHERE id IN (1, %s)", (DICOM,))
    client = browse()
    page = client.get("/search?c=films&like=key:1").text
    assert page.count('<li class="card">') == 3 and "frame 3" in page
    assert f"of=key%3A{DICOM}&amp;side=160&amp;frame=3" in page
    assert "frame" in client.get("/search.csv?c=films&like=key:1").text.splitlines()[0]
    assert client.get("/search.png?c=films&like=key:1").content[:4] == b"\x89PNG"


def test_a_closer_look(ward: Ward, browse: Open) -> None:
    client = browse()
    page = client.get("/look", params={"c": "scans", "key": DICOM, "beside": "key:4"}).text
    assert "DICOM, 32 x 32" in page and "3 frames" in page
    assert "<dt>Modality</dt><dd>CT</dd>" in page
    assert "Doe" not in page  # not on the list of tags
    assert "Query: 4" in page and "<dt>ward</dt><dd>alice</dd>" in page
    first, second, third = (
        pixels(client, f"/picture?c=scans&of=key:{DICOM}&frame={frame}&window=1500/3000")
        for frame in (1, 2, 3)
    )
    assert first.mean() < second.mean() < third.mean()
    assert client.get(f"/picture?c=scans&of=key:{DICOM}&frame=4").status_code == 415


@pytest.mark.parametrize("key", [DICOM, DEEP])
def test_windows(browse: Open, key: int) -> None:
    client = browse()
    address = f"/picture?c=scans&of=key:{key}&frame={int(key == DICOM)}"
    plain = pixels(client, address)
    narrow = pixels(client, f"{address}&centre=500&width=10")
    assert {0, 255} <= set(np.unique(narrow).tolist())
    assert (narrow != plain).mean() > 0.5
    assert np.array_equal(pixels(client, f"{address}&window=500/10"), narrow)
    for bad in ("x", "1/0", "1/-5", "a/b"):
        answer = client.get("/look", params={"c": "scans", "key": key, "window": bad})
        assert "this image can" in answer.text.lower() or answer.status_code == 400
    page = client.get("/look", params={"c": "scans", "key": key, "centre": 500, "width": 10}).text
    assert 'name="centre" value="500"' in page and 'name="width" value="10"' in page
    # Eight bits have none.
    assert "Window" not in client.get("/look?c=scans&key=1").text


def test_parts_of_a_picture(browse: Open) -> None:
    client = browse()
    page = client.get("/search?c=scans&like=key:4&left=0&top=50&right=50&bottom=100").text
    assert re.search(r'name="top"[^>]*\s+value="50"', page)
    whole = keys(client, like="key:4")
    assert keys(client, like="key:4", left=0, top=0, right=100, bottom=100) == whole


def test_contact_sheets(browse: Open) -> None:
    client = browse()
    for given in ({"like": "key:4"}, {"k": 12}, {"like": ["key:4", "key:5"]}):
        answer = client.get("/search.png", params={"c": "scans", **given})
        assert answer.headers["content-type"] == "image/png"
        assert min(Image.open(io.BytesIO(answer.content)).size) > 300
    assert client.get("/search.png?c=scans&in.label=nothing").status_code == 404


def test_health(ward: Ward, browse: Open) -> None:
    client = browse()
    page = client.get("/health").text
    assert "checks are fine" in page and "3 rows could not be embedded" in page
    assert "SVG" in page
    assert "Build the index" not in page
    ward.db.execute("SELECT siamese.create_collection('later', embed => 'deferred')")
    assert "later" in client.get("/health").text
    # A reader sees less.
    page = browse("alice").get("/health").text
    assert "scans" in page and "Checks" not in page and "SVG" not in page


def test_an_index_is_built(ward: Ward, browse: Open) -> None:
    client = browse(write=True)
    before = one(ward.db, "SELECT generation FROM siamese.collections WHERE name = 'scans'")
    page = client.get("/health").text
    form = {"csrf": hidden(page, "csrf"), "c": "scans"}
    started = client.post("/build", data=form)
    assert started.status_code == 303
    job = started.headers["location"]
    part = {"HX-Request": "true"}
    assert "running" in client.get(job).text or client.get(job).status_code == 303
    wait_until(lambda: "hx-redirect" in client.get(job, headers=part).headers)
    assert "Building the index of scans</strong>: done" in client.get("/health").text
    assert one(ward.db, "SELECT generation FROM siamese.collections WHERE name = 'scans'") > before
    assert client.get(job).headers["location"] == "/health"


def test_a_build_is_cancelled(ward: Ward, browse: Open) -> None:
    client = browse(write=True)
    form = {"csrf": hidden(client.get("/health").text, "csrf"), "c": "scans"}
    with ward.db.transaction():
        # The build waits for this lock.
        ward.db.execute("SELECT FROM siamese.collections WHERE name = 'scans' FOR UPDATE")
        job = client.post("/build", data=form).headers["location"]
        assert "running" in client.get(job).text
        # Others see it, too.
        other = browse("alice")
        wait_until(lambda: "Work under way" in other.get("/health").text)
        sent = client.post("/cancel", data={"csrf": form["csrf"], "id": job.partition("=")[2]})
        assert sent.headers["location"] == job
        wait_until(lambda: "running" not in client.get(job).text)
        assert "cancelled" in client.get(job).text


def test_lost_connections_are_replaced(ward: Ward, browse: Open) -> None:
    for role in (None, "alice"):
        client = browse(role)
        assert client.get("/search?c=scans").status_code == 200
        name = role or "postgres"
        ended = rows_of(
            ward.db,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE usename = %s AND pid <> pg_backend_pid() AND application_name = 'pg_siamese'",
            name,
        )
        assert ended
        answer = client.get("/search?c=scans")
        # The password went with the connection.
        assert answer.status_code == (200 if role is None else 303)
