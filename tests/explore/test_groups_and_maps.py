"""Groups to decide on, and the map: what is found, written, and shown to whom."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from pg_siamese.explore import maps, review
from tests.explore.conftest import ROWS, Open, Ward, hidden
from tests.support import one, rows_of, wait_until

# Rows 0 and 2 are bob's, 5 is alice's.
COPIES = (2, 5)


@pytest.fixture(scope="module", autouse=True)
def copies(ward: Ward) -> Iterator[None]:
    """Rows with the same picture, in two wards, and a table for decisions."""
    ward.db.execute(
        "UPDATE scans SET image = (SELECT image FROM scans WHERE id = 0) WHERE id = ANY (%s)",
        (list(COPIES),),
    )
    ward.db.execute(review.CREATE)
    yield


def run(client: TestClient, path: str, **form: str) -> str:
    """Begin some work by a form, and return the address of its outcome when it is done."""
    csrf = hidden(client.get("/").text, "csrf")
    started = client.post(path, data={"csrf": csrf, "c": "scans", **form})
    assert started.status_code == 303, started.text
    return outcome(client, started.headers["location"])


def outcome(client: TestClient, job: str) -> str:
    wait_until(lambda: client.get(job).status_code == 303 or "running" not in client.get(job).text)
    answer = client.get(job)
    assert answer.status_code == 303, answer.text
    return str(answer.headers["location"])


def keys_of(page: str) -> list[int]:
    return [int(key) for key in re.findall(r'<img src="/picture\?c=scans&amp;of=key:(\d+)"', page)]


def test_near_duplicates(ward: Ward, browse: Open) -> None:
    client = browse()
    assert "Look for groups" in client.get("/review?c=scans").text
    page = client.get(run(client, "/review", kind="near_duplicates")).text
    wanted = rows_of(ward.db, "SELECT key::int FROM siamese.near_duplicates('scans')")
    assert keys_of(page) == [key for (key,) in wanted]
    assert {0, *COPIES} <= set(keys_of(page))
    # Without --write there is nothing to decide.
    assert "decision" not in page


def test_leaks(ward: Ward, browse: Open) -> None:
    client = browse()
    address = run(client, "/review", kind="leaks", split_column="ward")
    wanted = rows_of(ward.db, "SELECT a::int, b::int FROM siamese.leaks('scans', 'ward')")
    assert wanted
    found: list[int] = []
    for number in range(len(wanted)):
        page = client.get(f"{address}&page={number}").text
        if "There are none" in page:
            break
        found += keys_of(page)
    assert found == [key for pair in wanted for key in pair]
    assert "alice" in client.get(address).text


def test_a_role_finds_groups_of_its_own_rows_only(browse: Open) -> None:
    found = {}
    for role in ("alice", "bob"):
        client = browse(role)
        found[role] = keys_of(client.get(run(client, "/review", kind="near_duplicates")).text)
    assert set(found["bob"]) >= {0, 2} and 5 not in found["bob"]
    assert not {0, *COPIES} & set(found["alice"])


def test_groups_of_rows_that_are_no_longer_for_the_role(ward: Ward, browse: Open) -> None:
    client = browse("bob")
    address = run(client, "/review", kind="near_duplicates")
    assert 2 in keys_of(client.get(address).text)
    ward.db.execute("UPDATE scans SET ward = 'alice' WHERE id = 2")
    assert 2 not in keys_of(client.get(address).text)
    ward.db.execute("UPDATE scans SET ward = 'bob' WHERE id = 2")


def decide(client: TestClient, address: str, **form: str) -> Any:
    given = {"csrf": hidden(client.get("/").text, "csrf"), "into": "decisions", "group": "0"}
    job = re.search(r"job=(\w+)", address)
    assert job is not None
    given |= {"job": job[1], "decision": "same", "note": "it is"}
    return client.post("/decide", data=given | form)


def test_decisions_are_written_and_read(ward: Ward, browse: Open) -> None:
    client = browse(write=True)
    address = run(client, "/review", kind="near_duplicates")
    assert "CREATE TABLE decisions" in client.get(address).text
    assert 'value="different"' not in client.get(address).text
    page = client.get(f"{address}&into=decisions").text
    assert 'value="different"' in page and 'class="good"' not in page
    answer = decide(client, address)
    assert answer.headers["location"].endswith("#group-0")
    row = rows_of(ward.db, "SELECT collection, keys, decision, note, decided_by FROM decisions")
    keys = [str(key) for key in sorted({0, *COPIES})]
    assert [(row[0][0], sorted(row[0][1], key=int), *row[0][2:])] == [
        ("scans", keys, "same", "it is", one(ward.db, "SELECT current_user"))
    ]
    # Another session, which begins again, sees what was decided.
    other = browse(write=True)
    page = other.get(f"{run(other, '/review', kind='near_duplicates')}&into=decisions").text
    assert 'class="good">same</span>' in page
    ward.db.execute("TRUNCATE decisions")


@pytest.mark.parametrize(
    ("form", "status"),
    [
        ({"into": ""}, 400),
        ({"into": "nowhere"}, 400),
        ({"into": "decisions; DROP TABLE scans"}, 400),
        ({"into": "decisions (collection) VALUES ('x') --"}, 400),
        # It has no such columns.
        ({"into": "scans"}, 410),
        ({"decision": "delete"}, 400),
        ({"group": "99"}, 400),
        ({"job": "0123"}, 410),
    ],
)
def test_decisions_that_can_not_be_written(
    ward: Ward, browse: Open, form: dict[str, str], status: int
) -> None:
    client = browse(write=True)
    address = run(client, "/review", kind="near_duplicates")
    assert decide(client, address, **form).status_code == status
    assert one(ward.db, "SELECT count(*) FROM decisions") == 0
    assert one(ward.db, "SELECT count(*) FROM scans WHERE id < 1000") == ROWS


def test_nothing_is_written_without_write_or_a_grant(ward: Ward, browse: Open) -> None:
    for client in (browse(), browse("bob", write=True)):
        address = run(client, "/review", kind="near_duplicates")
        assert decide(client, address).status_code == 403
    assert one(ward.db, "SELECT count(*) FROM decisions") == 0


@pytest.mark.parametrize(
    "form",
    [
        {"kind": "similar_images"},
        {"kind": "near_duplicates", "max_distance": "x"},
        {"kind": "leaks", "split_column": "nowhere"},
    ],
)
def test_reviews_that_mean_nothing(browse: Open, form: dict[str, str]) -> None:
    client = browse()
    given = {"csrf": hidden(client.get("/").text, "csrf"), "c": "scans"}
    assert client.post("/review", data=given | form).status_code == 400


def test_errors_of_the_work_are_shown(browse: Open) -> None:
    client = browse()
    given = {"csrf": hidden(client.get("/").text, "csrf"), "c": "scans"}
    given |= {"kind": "near_duplicates", "max_distance": "nan"}
    job = client.post("/review", data=given).headers["location"]
    wait_until(lambda: "running" not in client.get(job).text)
    assert "failed" in client.get(job).text and "max_distance" in client.get(job).text.lower()


# --- The map --------------------------------------------------------------------------------------


def drawn(client: TestClient, parameters: str = "") -> dict[str, Any]:
    """Return the points of the map."""
    address = f"/map?c=scans{parameters}"
    page = client.get(address)
    if page.status_code == 303:
        assert outcome(client, page.headers["location"]) == address
        page = client.get(address)
    assert page.status_code == 200, page.text
    data = re.search(r'data-points="([^"]*)"', page.text)
    assert data is not None
    found: dict[str, Any] = client.get(data[1].replace("&amp;", "&")).json()
    return found


@pytest.mark.parametrize("method", maps.METHODS)
def test_points_of_the_map(ward: Ward, browse: Open, method: str) -> None:
    client = browse()
    found = drawn(client, f"&method={method}&by=ward")
    assert found["total"] == len(found["keys"]) == ROWS + 2
    places = dict(zip(found["keys"], zip(found["x"], found["y"], strict=True), strict=True))
    assert max(abs(value) for place in places.values() for value in place) == pytest.approx(
        1, abs=1e-3
    )
    # The same picture is at the same place. t-SNE puts neighbours near each other.
    gap = np.subtract(places["0"], places["2"])
    assert np.linalg.norm(gap) < (1e-3 if method == "pca" else 0.5)
    assert found["legend"] == ["alice", "bob"]
    wards = {str(key): name for key, name in rows_of(ward.db, "SELECT id, ward FROM scans")}
    colours = [found["legend"][colour] for colour in found["colours"]]
    assert colours == [wards[key] for key in found["keys"]]


def test_colours_of_the_map(ward: Ward, browse: Open) -> None:
    client = browse()
    found = drawn(client, "&by=score")
    assert len(found["legend"]) == maps.BINS + 1 and found["legend"][-1] == maps.NO_VALUE
    assert found["legend"][0].startswith("0 to ")
    found = drawn(client, "&by=patient")
    assert len(found["legend"]) == maps.MOST_COLOURS + 1 and found["legend"][-1] == maps.OTHERS
    found = drawn(client, "&by=")
    assert found["legend"] == [] and set(found["colours"]) == {0}
    # How many labels there are depends on the data that this machine has.
    rows = ward.db.execute("SELECT DISTINCT coalesce(label, '(none)') FROM scans").fetchall()
    labels = {label for (label,) in rows}
    assert "(none)" in labels
    legend = drawn(client, "&by=label")["legend"]
    if len(labels) <= maps.MOST_COLOURS:
        assert set(legend) == labels
    else:
        assert len(legend) == maps.MOST_COLOURS + 1 and legend[-1] == maps.OTHERS
    assert client.get("/map?c=scans&by=nowhere").status_code == 400


def test_the_map_of_a_role(ward: Ward, browse: Open) -> None:
    client = browse("bob")
    found = drawn(client, "&by=ward")
    assert found["keys"] and all(int(key) % 2 == 0 for key in found["keys"])
    assert found["legend"] == ["bob"] and found["total"] == len(found["keys"])
    # What it may no longer see leaves the map that was drawn before.
    ward.db.execute("UPDATE scans SET ward = 'alice' WHERE id = 4")
    assert "4" in found["keys"] and "4" not in drawn(client, "&by=ward")["keys"]
    ward.db.execute("UPDATE scans SET ward = 'bob' WHERE id = 4")
    assert drawn(browse("alice"), "&by=ward")["legend"] == ["alice"]


def test_large_collections_are_sampled(browse: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(maps.MOST_POINTS, "pca", 10)
    found = drawn(browse(), "&by=")
    assert len(found["keys"]) == 10 and found["total"] == ROWS + 2


def test_a_map_is_drawn_once_per_generation(ward: Ward, browse: Open) -> None:
    client = browse()
    drawn(client)
    assert client.get("/map?c=scans&by=ward").status_code == 200
    ward.db.execute("SELECT siamese.build_index('scans')")
    assert client.get("/map?c=scans").status_code == 303
    assert client.get("/map.json?c=scans&method=tsne").status_code == 410


def test_chosen_points_become_a_filter(ward: Ward, browse: Open) -> None:
    client = browse("bob")
    headers = {"X-CSRF-Token": hidden(client.get("/").text, "csrf")}
    # One of them is not bob's.
    keys = ["4", "6", "8", "7"]
    kept = client.post("/among?c=scans", content=json.dumps(keys), headers=headers)
    address = kept.json()["address"]
    page = client.get(address).text
    assert "chosen on the map" in page and page.count('<li class="card">') == 3
    text = client.get(f"{address}&like=key:2".replace("/search", "/search.sql")).text
    found = client.get(f"{address}&like=key:2".replace("/search", "/search.csv")).text
    assert sorted(int(line.split(",")[3]) for line in found.splitlines()[1:]) == [4, 6, 8]
    assert {4, 6, 8} <= {row[1] for row in rows_of(ward.db, text)}
    for bad in ("[]", "{}", "[1]", "x", '["' + '","'.join(["1"] * 50_001) + '"]'):
        answer = client.post("/among?c=scans", content=bad, headers=headers)
        assert answer.status_code == 400
