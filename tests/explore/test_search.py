"""Searches on the page: answers, filters, examples, downloads."""

from __future__ import annotations

from tests.explore.conftest import Open, Ward


def test_first_page(ward: Ward, browse: Open) -> None:
    client = browse()
    page = client.get("/")
    assert page.status_code == 200, page.text
    assert "scans" in page.text
    page = client.get("/search", params={"c": "scans"})
    assert page.status_code == 200, page.text
    page = client.get("/search", params={"c": "scans", "like": "key:4"})
    assert page.status_code == 200, page.text
    print(page.text[-6000:])
    page = client.get("/facet", params={"c": "scans", "of": "label"})
    assert page.status_code == 200, page.text
    page = client.get("/look", params={"c": "scans", "key": "1001"})
    assert page.status_code == 200, page.text
    page = client.get("/health", params={"c": "scans", "key": "1001"})
    assert page.status_code == 200, page.text
    page = client.get("/search.png", params={"c": "scans", "like": "key:4"})
    assert page.status_code == 200, page.text
