"""Damaged images and bombs: each a proper error or a valid embedding, and no memory is lost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import psycopg

from pg_siamese_server.encoding.images import decode_image
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import ImageError
from tests.scenarios.gallery import Connection, embed_outside, image_sets
from tests.scenarios.mutations import bombs, mutated, samples
from tests.scenarios.process import MEGABYTE, private_bytes, watched
from tests.support import one

LARGEST_GROWTH = 64 * MEGABYTE
BOMB_SECONDS = 2.0
# Their picture is whole: what would unpack to much lies beside it, and is left out.
WHOLE = ("png too much data", "png iCCP", "png zTXt", "png iTXt", "png 63 x zTXt")


@dataclass
class BadImages:
    """So many damaged files, one by one and in bulk, and bombs."""

    connect: Callable[[], Connection]
    count: int = 2000
    seed: int = 0
    report: Callable[[str], None] = print

    def run(self) -> None:
        self.session = self.connect()
        self.pid = self.session.info.backend_pid
        images = [group for group in image_sets(3) if len(group)]
        self.pictures = np.concatenate([group.rgb()[:1] for group in images[:4]])
        # The first use of each format loads code, once and for all.
        for name, file in samples(self.pictures[0]).items():
            assert self.insert(file) is None, name
        self.session.execute("TRUNCATE siamese.images")
        outcome = self.one_by_one()
        self.in_bulk(outcome)
        self.bombs()

    def insert(self, file: bytes) -> psycopg.Error | None:
        """Insert a file; return the error, if any, after looking at it."""
        try:
            self.session.execute("INSERT INTO siamese.images (image) VALUES (%s)", (file,))
        except psycopg.Error as error:
            return error
        return None

    def one_by_one(self) -> dict[bytes, str | None]:
        """Insert each into a collection that rejects bad images; returns SQLSTATEs by file."""
        states: Counter[str] = Counter()
        outcome: dict[bytes, str | None] = {}
        before = private_bytes(self.pid)
        with watched(self.pid) as peak:
            for name, file in mutated(self.pictures, self.count, self.seed):
                error = self.insert(file)
                state = None if error is None else error.sqlstate
                assert state is None or state[:2] in ("22", "54"), f"{name}: {error!r}"
                assert error is None or "image_id = " in str(error), f"{name}: {error}"
                outcome[file] = state
                states[state or "embedded"] += 1
        growth = private_bytes(self.pid) - before
        self.report(f"{self.count} damaged files one by one: {dict(states)}")
        self.report(
            f"private memory grew by {growth / MEGABYTE:.1f} MB,"
            f" at the most {peak.growth / MEGABYTE:.1f} MB meanwhile"
        )
        assert self.session.info.backend_pid == self.pid
        assert growth < LARGEST_GROWTH
        self.compare(outcome)
        return outcome

    def compare(self, outcome: dict[bytes, str | None]) -> None:
        """Compare with the decoder and the encoder in this process."""
        rows = self.session.execute(
            "SELECT b.image, e.embedding::real[] FROM siamese.images AS b"
            " INNER JOIN siamese.embedding_1 AS e ON e.key = b.image_id",
            binary=True,
        ).fetchall()
        spec = InputSpec(28, 28)
        assert {row[0] for row in rows} == {file for file, state in outcome.items() if not state}
        pixels = np.stack([decode_image(row[0], spec) for row in rows])
        cosines = np.einsum("nd,nd->n", embed_outside(pixels), np.array([row[1] for row in rows]))
        self.report(f"{len(rows)} embedded, as outside to a cosine of {cosines.min():.6f}")
        assert cosines.min() >= 0.9999
        for file, state in outcome.items():
            try:
                decode_image(file, spec)
            except ImageError as error:
                assert state == error.sqlstate
            else:
                assert state is None

    def in_bulk(self, outcome: dict[bytes, str | None]) -> None:
        """Insert all in one statement into a collection that puts bad images aside."""
        self.session.execute("CREATE TABLE public.bulk (id serial PRIMARY KEY, image bytea)")
        self.session.execute(
            "SELECT create_collection('bulk', 'public.bulk', model => 'medical',"
            " on_error => 'quarantine')"
        )
        before = private_bytes(self.pid)
        self.session.execute(
            "INSERT INTO public.bulk (image) SELECT unnest(%s::bytea[])",
            (list(outcome),),
            binary=True,
        )
        growth = private_bytes(self.pid) - before
        rows = self.session.execute(
            "SELECT b.image, f.sqlstate FROM public.bulk AS b LEFT JOIN siamese.embedding_failures"
            " AS f ON f.collection = 'bulk' AND f.key = b.id::text",
            binary=True,
        ).fetchall()
        assert dict(rows) == outcome
        query = "SELECT rows_embedded, failures FROM collection_status WHERE collection = 'bulk'"
        bad = sum(state is not None for state in outcome.values())
        assert self.session.execute(query).fetchone() == (len(outcome) - bad, bad)
        self.report(
            f"{len(outcome)} in bulk: {bad} put aside,"
            f" private memory grew by {growth / MEGABYTE:.1f} MB"
        )
        assert growth < LARGEST_GROWTH
        assert one(self.session, "SELECT pg_backend_pid()") == self.pid

    def bombs(self) -> None:
        """Insert each bomb: nothing large is allocated, and it is over soon."""
        for name, file in bombs(self.pictures[0]).items():
            started = time.monotonic()
            with watched(self.pid) as peak:
                error = self.insert(file)
            seconds = time.monotonic() - started
            state = "embedded" if error is None else error.sqlstate
            self.report(
                f"{name} ({len(file)} bytes): {state} in {seconds:.2f} s,"
                f" {peak.growth / MEGABYTE:.0f} MB at the most"
            )
            assert error is None or (error.sqlstate or "")[:2] in ("22", "54"), f"{name}: {error!r}"
            assert error is not None or name in WHOLE, f"{name}: embedded"
            assert peak.growth < LARGEST_GROWTH, name
            assert seconds < BOMB_SECONDS, name
        assert one(self.session, "SELECT pg_backend_pid()") == self.pid
