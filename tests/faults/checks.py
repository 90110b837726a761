"""What must hold after a fault: right answers, a clear message, and repair by one command."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.scenarios.gallery import (
    Connection,
    Content,
    Found,
    Gallery,
    check_files,
    check_tables,
)
from tests.support import notices_of, sql_error

Connect = Callable[[], Connection]


def put(path: Path, data: bytes) -> None:
    """Replace a file as a restore would: by another one, since somebody may have it mapped."""
    new = path.with_name("new")
    new.write_bytes(data)
    os.replace(new, path)


def check_answers(session: Connection, images: Gallery, engine: str, what: str) -> None:
    """Search for the nearest few, and for all rows: each committed one once, and no other."""
    content = Content.read(session, images)
    count = len(content.ids)
    everything = {"k": count + 10}
    searches: list[dict[str, Any]] = [{"image": len(images) - 1}, {"image": 0} | everything]
    searches += [{"row": count // 2} | everything] * bool(count)
    found = Found()
    for search in searches:
        found.add(content.check(session, images, **search, engine=engine, what=what))
    assert found.recall == 1.0, f"{what}: recall {found.recall}"


def check_fallback(connect: Connect, images: Gallery, message: str) -> None:
    """A new session answers rightly, says once why FAISS doesn't, and self_check names the cure."""
    session = connect()
    notices = notices_of(session)
    check_answers(session, images, "auto", message)
    assert len(notices) == 1, notices
    for text in ('searching collection "images" without its FAISS index', message, "build_index"):
        assert text in notices[0], notices
    with sql_error("55000", "FAISS cannot answer", message):
        session.execute("SELECT similar_images(%s, engine => 'faiss')", (images.files[0],))
    row = session.execute("SELECT ok, detail FROM self_check() WHERE subject ~ ': index$'")
    ok, detail = row.fetchone() or (True, "")
    assert not ok and message in detail and "call build_index" in detail, detail


def check_repair(connect: Connect, images: Gallery) -> None:
    """One command, and everything is as it should be."""
    connect().execute("SELECT build_index()")
    session = connect()
    check_answers(session, images, "faiss", "after repair")
    check_tables(session)
    check_files(session)
