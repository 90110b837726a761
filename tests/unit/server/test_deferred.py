"""One batch of deferred embedding, without a server: what is read, stored, failed and left."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pg_siamese_server.encoding.encoder import Encoder
from pg_siamese_server.encoding.specification import InputSpec, ModelSpec
from pg_siamese_server.errors import ModelError
from pg_siamese_server.writing.deferred import Outcome, Results, Row, embed_batch
from tests.support import encode, grid_encoder
from tests.unit.server.common import cancel_at

SPEC = ModelSpec(InputSpec(width=8, height=8, channels=3), metric="l2")


def picture(value: int) -> bytes:
    return encode(np.full((8, 8, 3), value, dtype=np.uint8))


def pictures(first: int, end: int) -> dict[str, bytes | None]:
    return {str(n): picture(n) for n in range(first, end)}


class Fake:
    """Rows and tickets in memory."""

    def __init__(self, rows: dict[str, bytes | None], *tickets: list[str]) -> None:
        self.rows = rows
        self.tickets = list(tickets)
        self.portions: list[list[str]] = []
        self.stored: Results | None = None

    def take(self, collection_id: int, max_rows: int) -> list[tuple[int, list[str]]]:
        return list(enumerate(self.tickets, start=1))

    def read(self, collection_id: int, keys: Sequence[str]) -> list[Row]:
        self.portions.append(list(keys))
        return [(key, self.rows[key]) for key in keys if key in self.rows]

    def store(self, collection_id: int, sha256: str, tickets: list[int], results: Results) -> int:
        assert (collection_id, sha256) == (7, "model")
        assert tickets == list(range(1, len(self.tickets) + 1))
        self.stored = results
        return sum(row.embedding is not None for row in results.rows)

    def results(self) -> Results:
        assert self.stored is not None
        return self.stored


class Choosy(Encoder):
    """Fails for batches with a picture of a certain value, with a certain error."""

    bad: int = -1
    error: type[BaseException] = ModelError

    def embed(self, pixels: Any, poll: Any = None) -> Any:
        if (pixels == self.bad).any():
            raise self.error("graph failed")
        return super().embed(pixels, poll)


def encoder() -> Choosy:
    return Choosy(grid_encoder(("n", 3, 8, 8), pool=4), SPEC)


def run(fake: Fake, model: Encoder, max_rows: int = 256, **options: Any) -> Outcome:
    return embed_batch(fake, 7, "model", model, max_rows, lambda: None, **options)


def test_good_bad_and_gone() -> None:
    rows: dict[str, bytes | None] = {"a": picture(10), "b": b"junk", "c": None, "e": picture(20)}
    fake = Fake(rows, ["a", "b", "e"], ["c", "d", "a"])
    assert run(fake, encoder()) == Outcome(stored=2, failed=2, settled=1)
    found = fake.results()
    assert found.seen == ["a", "b", "c", "d", "e"]
    good = [row for row in found.rows if row.embedding is not None]
    assert [row.key for row in good] == ["a", "e"]
    values = [[float(number) for number in str(row.embedding)[1:-1].split(",")] for row in good]
    assert np.allclose(values, [[10 / 255] * 12, [20 / 255] * 12], atol=1e-6)
    digests = {key: image and hashlib.sha256(image).digest() for key, image in rows.items()}
    assert {row.key: row.digest for row in found.rows} == digests
    failed = {row.key: (row.sqlstate, row.may_retry) for row in found.rows if row not in good}
    assert failed == {"b": ("22P03", False), "c": ("22004", False)}


@pytest.mark.parametrize(
    ("error", "sqlstate", "message"),
    [(ModelError, "22023", "graph failed"), (MemoryError, "53200", "out of memory")],
)
def test_one_row_that_fails_is_alone(
    error: type[BaseException], sqlstate: str, message: str
) -> None:
    """The others of its batch get their vectors; it may be tried again."""
    rows = {**pictures(10, 40), "x": b"junk"}
    fake = Fake(rows, list(rows))
    model = encoder()
    model.bad, model.error = 25, error
    assert run(fake, model) == Outcome(stored=29, failed=2)
    found = fake.results().rows
    assert sorted(row.key for row in found) == sorted(rows)
    failed = [row for row in found if row.embedding is None]
    assert sorted((row.key, row.sqlstate, row.message, row.may_retry) for row in failed) == [
        ("25", sqlstate, message, True),
        ("x", "22P03", "image cannot be decoded", False),
    ]


def test_no_more_rows_than_wanted() -> None:
    """What is left stays in its ticket: it is not among those seen."""
    rows = pictures(10, 40)
    fake = Fake(rows, list(rows))
    assert run(fake, encoder(), max_rows=12).stored == 12
    assert fake.results().seen == [str(n) for n in range(10, 22)]


def test_no_longer_than_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 1.0)
    monkeypatch.setattr("pg_siamese_server.writing.deferred.time.monotonic", lambda: next(clock))
    rows = pictures(10, 90)
    fake = Fake(rows, list(rows))
    outcome = run(fake, encoder(), seconds=2.0)
    assert [len(portion) for portion in fake.portions] == [8, 64]
    assert outcome == Outcome(stored=72)


def test_portions_of_large_files_are_small() -> None:
    rows: dict[str, bytes | None] = {f"{n:02}": picture(n) + b"x" * 2**20 for n in range(10, 30)}
    fake = Fake(rows, list(rows))
    assert run(fake, encoder()).stored == 20
    assert [len(portion) for portion in fake.portions] == [8, 3, 3, 3, 3]


def test_nothing_to_do() -> None:
    fake = Fake({})
    assert not run(fake, encoder())
    assert fake.stored is None


class LeftError(BaseException):
    pass


@pytest.mark.law(5)
def test_leaving_in_the_middle_stores_nothing() -> None:
    rows = pictures(10, 40)
    fake = Fake(rows, list(rows))
    with pytest.raises(LeftError):
        embed_batch(fake, 7, "model", encoder(), 256, cancel_at(6, LeftError))
    assert fake.stored is None
