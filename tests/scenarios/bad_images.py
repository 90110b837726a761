"""Damaged images and bombs: each a proper error or a valid embedding, and no memory is lost."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import psycopg

from pg_siamese_server.encoding.images import decode_image
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import ImageError
from tests.scenarios.gallery import Connection, embed_outside, image_sets
from tests.scenarios.mutations import bombs, mutated, samples
from tests.scenarios.process import MEGABYTE, anonymous_bytes, cpu_seconds, watched
from tests.server import pid_of
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
    whole: Collection[str] = WHOLE
    largest_peak: float = math.inf  # pictures of 25,000,000 pixels are allowed
    largest_bomb: float = LARGEST_GROWTH
    longest: float = BOMB_SECONDS

    def run(self) -> None:
        self.session = self.connect()
        self.pid = self.session.info.backend_pid
        # The first use of each format loads code, once and for all.
        for name, file in self.samples().items():
            assert self.insert(file) is None, name
        self.session.execute("TRUNCATE siamese.images")
        outcome = self.one_by_one()
        self.in_bulk(outcome)
        self.insert_bombs()

    @functools.cached_property
    def pictures(self) -> npt.NDArray[np.uint8]:
        """A picture of each of some image sets."""
        images = [group for group in image_sets(3) if len(group)]
        return np.concatenate([group.rgb()[:1] for group in images[:4]])

    def samples(self) -> Mapping[str, bytes]:
        """Return a good file of each format."""
        return samples(self.pictures[0])

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yield damaged files, each with a name that makes it again."""
        return mutated(self.pictures, self.count, self.seed)

    def bombs(self) -> Mapping[str, bytes]:
        """Return small files that would take much memory or time."""
        return bombs(self.pictures[0])

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
        longest, here = 0.0, pid_of(self.pid)
        before = anonymous_bytes(here)
        with watched(here) as peak:
            for name, file in self.files():
                started = cpu_seconds(here)
                error = self.insert(file)
                seconds = cpu_seconds(here) - started
                longest = max(longest, seconds)
                assert seconds < self.longest, f"{name}: {seconds:.1f} s"
                state = None if error is None else error.sqlstate
                assert state is None or state[:2] in ("22", "54"), f"{name}: {error!r}"
                assert error is None or "image_id = " in str(error), f"{name}: {error}"
                outcome[file] = state
                states[state or "embedded"] += 1
        growth = anonymous_bytes(pid_of(self.pid)) - before
        self.report(f"{self.count} damaged files one by one: {dict(states)}")
        self.report(
            f"allocated memory grew by {growth / MEGABYTE:.1f} MB,"
            f" at the most {peak.growth / MEGABYTE:.1f} MB meanwhile;"
            f" the longest took {longest:.2f} s of processor time"
        )
        assert self.session.info.backend_pid == self.pid
        assert growth < LARGEST_GROWTH
        assert peak.growth < self.largest_peak
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
        before = anonymous_bytes(pid_of(self.pid))
        self.session.execute(
            "INSERT INTO public.bulk (image) SELECT unnest(%b::bytea[])",
            (list(outcome),),
            binary=True,
        )
        growth = anonymous_bytes(pid_of(self.pid)) - before
        bad = self.check_failures("bulk", outcome)
        self.report(
            f"{len(outcome)} in bulk: {bad} put aside,"
            f" allocated memory grew by {growth / MEGABYTE:.1f} MB"
        )
        assert growth < LARGEST_GROWTH
        assert one(self.session, "SELECT pg_backend_pid()") == self.pid

    def check_failures(self, table: str, outcome: dict[bytes, str | None]) -> int:
        """Compare the failures of a collection with SQLSTATEs by file; return how many failed."""
        rows = self.session.execute(
            f"SELECT b.image, f.sqlstate FROM public.{table} AS b"
            " LEFT JOIN siamese.embedding_failures AS f"
            " ON f.collection = %s AND f.key = b.id::text",
            (table,),
            binary=True,
        ).fetchall()
        found = dict(rows)
        different = [(outcome[file], found.get(file)) for file in outcome]
        assert all(expected == state for expected, state in different), Counter(different)
        assert len(found) == len(outcome)
        query = "SELECT rows_embedded, failures FROM collection_status WHERE collection = %s"
        bad = sum(state is not None for state in outcome.values())
        assert self.session.execute(query, (table,)).fetchone() == (len(outcome) - bad, bad)
        return bad

    def insert_bombs(self) -> None:
        """Insert each bomb: nothing large is allocated, and it is over soon."""
        here = pid_of(self.pid)
        for name, file in self.bombs().items():
            started = cpu_seconds(here)
            with watched(here) as peak:
                error = self.insert(file)
            seconds = cpu_seconds(here) - started
            state = "embedded" if error is None else error.sqlstate
            self.report(
                f"{name} ({len(file)} bytes): {state} in {seconds:.2f} s,"
                f" {peak.growth / MEGABYTE:.0f} MB at the most"
            )
            assert error is None or (error.sqlstate or "")[:2] in ("22", "54"), f"{name}: {error!r}"
            assert error is not None or name in self.whole, f"{name}: embedded"
            assert peak.growth < self.largest_bomb, name
            assert seconds < self.longest, name
        assert one(self.session, "SELECT pg_backend_pid()") == self.pid
