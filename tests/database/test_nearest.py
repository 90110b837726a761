"""Neighbours of many rows at once, beside a search for each of them."""

from __future__ import annotations


from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from psycopg import sql

from tests.conftest import Connect, Connection, NewRole, Pictures
from tests.database import test_frames
from tests.database.tables import make_collection
from tests.database.test_search import Large
from tests.support import column_of, notices_of, one, rows_of, sql_error

ROWS, PENDING = 300, 20
# (neighbour, distance, frame) of each key, nearest first.
Answers = dict[str, list[tuple[str, float, int | None]]]
KINDS = [
    ("bigint", "one"),
    ("integer", "one"),
    ("text", "one"),
    ("uuid", "one"),
    ("bigint", "all"),
    ("text", "all"),
]
ENGINES = ["auto", "faiss", "pgvector"]
CASES: list[dict[str, Any]] = [
    {},
    {"k": 1},
    {"k": 1000},
    {"filter": '{"side": "left"}'},
    {"filter": '{"patient": ["rare", "rarer"]}', "k": 3},
    {"filter": '{"patient": "nobody"}'},
    {"exclude": '{"side": "left"}'},
    {"max_distance": 0.002},
    {"max_distance": 0.02, "filter": '{"side": "right"}'},
    {"group_by": "patient", "k": 5},
    {"group_by": "patient", "per_group": 3, "own_group": False, "k": 7},
    {"group_by": "side", "k": 10},
    {"group_by": "patient", "filter": '{"side": "left"}', "max_distance": 0.05},
]


def key_of(kind: str, number: int) -> str:
    """Return a key of a type as text, in an order that is not that of the numbers."""
    if kind == "uuid":
        return f"00000000-0000-4000-8000-{number * 7919 % 100_003:012d}"
    return f'k "{number * 7919 % 100_003},\\' if kind == "text" else str(number * 3 + 5)


def patient_of(number: int) -> str | None:
    if number % 40 == 11:
        return None
    return "rare" if number % 97 == 5 else f"five {number // 5}"


@pytest.fixture(params=KINDS, ids=" ".join)
def scans(request: pytest.FixtureRequest, db: Connection, pictures: Pictures) -> Connection:
    """Table ``scans`` with pending, dead, changed, equal and failed rows, and one without image."""
    kind, frames = request.param
    many = ROWS if frames == "one" else 40
    files: list[bytes | None] = list(pictures.files[: many + PENDING])
    if frames == "all":
        files = [
            test_frames.file(number, test_frames.frame_count(number))
            for number in range(many + PENDING)
        ]
    files[30:34] = [files[20]] * 4
    files[many - 2], files[many - 1] = b"no image", None
    make_collection(
        db, "scans", kind, ", patient text, side text", frames=frames, on_error="quarantine"
    )
    insert = f"INSERT INTO scans VALUES (%s::text::{kind}, %s, %s, %s)"
    values = [
        (key_of(kind, number), file, patient_of(number), ("left", "right", None)[number % 3])
        for number, file in enumerate(files)
    ]
    with db.cursor() as cursor:
        cursor.executemany(insert.encode(), values[:many])
    db.execute("SELECT build_index('scans')")
    keys = {number: key_of(kind, number) for number in range(many + PENDING)}
    db.execute(
        "DELETE FROM scans WHERE id::text = ANY(%s)", ([keys[place] for place in range(3, many, 17)],)
    )
    with db.cursor() as cursor:
        cursor.executemany(insert.encode(), values[many:])
    db.execute(
        "UPDATE scans SET image = (SELECT image FROM scans WHERE id::text = %s)"
        " WHERE id::text = %s",
        (keys[20], keys[9]),
    )
    return db


def arguments(options: dict[str, Any]) -> sql.Composed:
    return sql.SQL("").join(
        sql.SQL(", {} => {}").format(sql.Identifier(name), sql.Literal(value))
        for name, value in options.items()
    )


def nearest(session: Connection, **options: Any) -> Answers:
    """Return the answers, after a look at the order and the ranks of their rows."""
    call = sql.SQL("SELECT * FROM siamese.nearest('scans'{})").format(arguments(options))
    return answers_of(session.execute(call).fetchall())


def answers_of(rows: list[Any]) -> Answers:
    answers: Answers = {}
    previous = None
    for key, rank, neighbour, distance, frame in rows:
        assert (key not in answers) == (key != previous), "a key's rows stand together"
        answers.setdefault(key, []).append((neighbour, distance, frame))
        assert rank == len(answers[key])
        previous = key
    return answers


def one_by_one(
    session: Connection, keys: list[str] | None = None, **options: Any
) -> Answers:
    """Search for each row by itself."""
    call = sql.SQL(
        "SELECT b.id::text, (n.item).id::text, n.distance, n.frame FROM public.scans AS b"
        " CROSS JOIN LATERAL siamese.similar_rows("
        "NULL::public.scans, key => b.id::text, collection => 'scans'{}) AS n"
    ).format(arguments(options))
    answers: Answers = {}
    for key, *row in session.execute(call).fetchall():
        if keys is None or key in keys:
            answers.setdefault(key, []).append(tuple(row))
    return answers


def check_same(found: Answers, wanted: Answers) -> None:
    """Check that answers are equal, apart from rows that are equally far."""
    assert found.keys() == wanted.keys()
    for key, rows in found.items():
        distances = [row[1] for row in rows]
        assert distances == pytest.approx([row[1] for row in wanted[key]], abs=2e-6), key
        assert key not in [row[0] for row in rows]
        assert len({(row[0], row[2]) for row in rows}) == len(rows)
        inner = distances[-1] - 1e-5
        assert {(row[0], row[2]) for row in rows if row[1] < inner} == {
            (row[0], row[2]) for row in wanted[key] if row[1] < inner
        }, key


@pytest.mark.parametrize("engine", ENGINES)
def test_as_a_search_for_each(scans: Connection, engine: str) -> None:
    for case in CASES:
        found = nearest(scans, engine=engine, **case)
        check_same(found, one_by_one(scans, engine=engine, **case))


def test_keys(scans: Connection) -> None:
    """Each once, whatever their order. Unknown ones, null and none at all have no neighbours."""
    keys = column_of(scans, "SELECT id::text FROM scans ORDER BY md5(id::text) LIMIT 30")
    unknown = key_of(one(scans, "SELECT key_type FROM siamese.collections WHERE name = 'scans'"), 9999)
    found = nearest(scans, keys=[*keys, None, keys[3], unknown, *keys[:5]])
    check_same(found, one_by_one(scans, keys))
    assert len(found) > 25
    for call in ("'{}'", "NULL", "'{NULL}'", "(SELECT array_agg(id::text) FROM scans WHERE false)"):
        assert rows_of(scans, f"SELECT * FROM nearest('scans', keys => {call})") == []
