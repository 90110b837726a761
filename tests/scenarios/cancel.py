"""Time-outs and cancels stop every long entry point at once, and hit that statement only."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from onnx import TensorProto, helper

from pg_siamese.client.sources import png
from tests.scenarios.gallery import DIMENSION, Connection, Gallery, check_files, index_directory
from tests.support import graph, one, sql_error

WITHIN = 1.0


def slow_encoder(layers: int, size: int = 224, channels: int = 48) -> bytes:
    """Return a float32 NCHW encoder as others make them; a layer takes about 10 ms an image."""
    random = np.random.default_rng(0)
    nodes, weights, last = [], {}, "image"
    for layer in range(layers):
        inputs = 3 if layer == 0 else channels
        scale = np.sqrt(2 / (9 * inputs))
        weights[f"w{layer}"] = random.normal(0, scale, (channels, inputs, 3, 3)).astype(np.float32)
        nodes += [
            helper.make_node("Conv", [last, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]),
        ]
        last = f"r{layer}"
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["embedding"]))
    return graph(
        nodes,
        [("image", TensorProto.FLOAT, ["batch", 3, size, size])],
        [("embedding", TensorProto.FLOAT, ["batch", channels])],
        weights,
    )


@dataclass
class Cancel:
    """Long statements, stopped at several moments.

    Args:
        images: needs a few hundred only.
        rows: rows of the long insert and backfill.
        vectors: rows of the index that is built.
        moments: how many moments of an index build are tried.
        layers: of the slow encoder.
    """

    connect: Callable[[], Connection]
    images: Gallery
    rows: int = 100_000
    vectors: int = 100_000
    moments: int = 12
    layers: int = 60
    report: Callable[[str], None] = print
    slowest: float = 0.0

    def run(self) -> None:
        self.session, self.other = self.connect(), self.connect()
        self.stage()
        self.insert()
        self.backfill()
        self.search()
        self.build()
        self.report(f"slowest to stop: {self.slowest:.2f} s")

    # --- how statements are stopped ---------------------------------------------------------------

    def time_out(self, sql: str, milliseconds: int, what: str) -> None:
        """Run a statement that must be stopped by ``statement_timeout``."""
        self.session.execute(f"SET statement_timeout = {milliseconds}")
        started = time.monotonic()
        with sql_error("57014"):
            self.session.execute(sql)
        late = time.monotonic() - started - milliseconds / 1000
        self.session.execute("SET statement_timeout = 0")
        self.conclude(f"{what}, statement_timeout {milliseconds} ms", late)

    def cancel(self, sql: str, moment: Callable[[], None], what: str) -> bool:
        """Run a statement and cancel it when ``moment`` returns; False where it ended before."""
        cancelled_at = 0.0
        finished = threading.Event()

        def strike() -> None:
            nonlocal cancelled_at
            moment()
            if not finished.is_set():
                cancelled_at = time.monotonic()
                self.other.execute("SELECT pg_cancel_backend(%s)", (pid,))

        pid = self.session.info.backend_pid
        thread = threading.Thread(target=strike)
        thread.start()
        try:
            self.session.execute(sql)
        except psycopg.errors.QueryCanceled:
            late = time.monotonic() - cancelled_at
        else:
            finished.set()
            late = -1.0
        finally:
            thread.join()
        if late < 0:
            self.report(f"{what}: had ended before")
            self.session.execute("SELECT 1")
            return False
        self.conclude(f"{what}, pg_cancel_backend", late)
        return True

    def conclude(self, what: str, late: float) -> None:
        """Report, and check that the session's next statements are not struck."""
        self.report(f"{what}: stopped after {late:.2f} s")
        self.slowest = max(self.slowest, late)
        assert late < WITHIN, f"{what}: stopped after {late:.2f} s only"
        for _ in range(3):
            self.session.execute("SELECT 1 FROM pg_sleep(0.02)")

    # --- parts ----------------------------------------------------------------------------------

    def stage(self) -> None:
        """Put images where a statement can take them from."""
        self.session.execute("CREATE UNLOGGED TABLE public.stage (number int, image bytea)")
        with self.session.cursor().copy("COPY public.stage FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["int4", "bytea"])
            for number, file in enumerate(self.images.files[:500]):
                copy.write_row((number, file))
        # Not measured here: the first use of a session loads its packages.
        self.session.execute("SELECT embed_image(image) FROM public.stage LIMIT 1")

    def images_of(self, count: int) -> str:
        """Return a query of many images."""
        return (
            "SELECT image FROM public.stage CROSS JOIN generate_series(1,"
            f" {-(-count // min(500, len(self.images)))})"
        )

    def insert(self) -> None:
        """Stop an insert of many rows: as it stores rows, and as it embeds them."""
        sql = f"INSERT INTO siamese.images (image) {self.images_of(self.rows)}"
        self.time_out(sql, 500, f"insert of {self.rows} rows")
        # Embedding begins when all rows are stored, which the insert without vectors tells.
        plain = self.seconds(
            f"BEGIN; SET LOCAL session_replication_role = replica; {sql}; ROLLBACK"
        )
        self.cancel(sql, lambda: time.sleep(1.5 * plain + 1), f"insert of {self.rows} rows")
        self.session.execute("SET client_min_messages = warning")
        for table in ("siamese.images", "siamese.embedding_1", "siamese.pending_1"):
            assert one(self.session, f"SELECT count(*) FROM {table}") == 0, table

    def backfill(self) -> None:
        """Stop the backfill of a table that has many rows already."""
        self.session.execute("CREATE TABLE public.old (id bigserial PRIMARY KEY, image bytea)")
        self.session.execute(f"INSERT INTO public.old (image) {self.images_of(self.rows)}")
        create = "create_collection('old', 'public.old', model => 'medical'"
        self.time_out(f"SELECT {create})", 500, "create_collection with backfill")
        assert one(self.session, "SELECT count(*) FROM siamese.collections") == 1
        self.session.execute(f"SELECT {create}, backfill => false)")
        number = one(self.session, "SELECT max(collection_id) FROM siamese.collections")
        sql = "SELECT backfill('old')"
        self.time_out(sql, 500, f"backfill of {self.rows} rows")
        self.cancel(sql, lambda: time.sleep(2), f"backfill of {self.rows} rows")
        assert one(self.session, f"SELECT count(*) FROM siamese.embedding_{number}") == 0
        assert one(self.session, "SELECT backfill('old', max_rows => 50)") == 50
        self.session.execute("SELECT drop_collection('old')")

    def search(self) -> None:
        """Stop searches and inserts that a slow encoder of others makes long."""
        self.session.execute(
            "SELECT register_model('slow', %s, mean => '{0.485,0.456,0.406}',"
            " std => '{0.229,0.224,0.225}')",
            (slow_encoder(self.layers),),
        )
        self.session.execute("CREATE TABLE public.slow (id serial PRIMARY KEY, image bytea)")
        self.session.execute("SELECT create_collection('slow', 'public.slow', model => 'slow')")
        self.session.execute("INSERT INTO public.slow (image) SELECT image FROM stage LIMIT 2")
        many = (
            "SELECT count(*) FROM (SELECT image FROM stage LIMIT 40) AS q,"
            " similar_images(q.image, 1, 'slow')"
        )
        single = many.replace("LIMIT 40", "LIMIT 1")
        alone = self.seconds(single)
        self.report(f"one search with the slow encoder takes {alone:.2f} s")
        self.time_out(many, 500, "searches with a slow encoder")
        self.cancel(many, lambda: time.sleep(0.7), "searches with a slow encoder")
        self.time_out(single, max(20, int(alone * 300)), "one search with a slow encoder")
        self.cancel(single, lambda: time.sleep(alone * 0.5), "one search with a slow encoder")
        insert = "INSERT INTO public.slow (image) SELECT image FROM stage LIMIT 100"
        self.time_out(insert, 500, "insert with a slow encoder")
        large = png(np.zeros((5000, 5000, 3), dtype=np.uint8))
        self.session.execute("UPDATE public.stage SET image = %s WHERE number = 0", (large,))
        huge = "SELECT s.* FROM stage, similar_images(image, 1) AS s WHERE number = 0"
        self.cancel(huge, lambda: time.sleep(0.1), "search for a large image")

    def seconds(self, sql: str) -> float:
        started = time.monotonic()
        self.session.execute(sql)
        return time.monotonic() - started

    def build(self) -> None:
        """Stop index builds at many moments, from reading to writing."""
        self.fill()
        whole = self.seconds("SELECT build_index()")
        before = self.state()
        self.report(f"index build of {self.vectors} vectors takes {whole:.1f} s")
        sql = "SELECT build_index()"
        self.time_out(sql, 500, f"index build of {self.vectors} vectors")
        for part in np.linspace(0.02, 0.98, self.moments):
            seconds = float(part * whole)
            if self.cancel(sql, partial(time.sleep, seconds), f"build, after {seconds:.1f} s"):
                assert self.state() == before
            else:
                before = self.state()
        folder = index_directory(self.session)
        for name in ("faiss.tmp", "meta.tmp", "meta"):
            moment = partial(self.until, folder, name, before)
            if self.cancel(sql, moment, f"build, as it writes {name}"):
                assert self.state() == before
            else:
                before = self.state()
        self.session.execute(sql)
        check_files(self.session)
        query = "SELECT count(*) FROM siamese.generations WHERE collection_id = 1"
        assert one(self.session, query) <= 2

    def until(self, folder: Path, suffix: str, before: Any) -> None:
        """Wait until a build writes a file of its own."""
        known = {f"{generation}.{suffix}" for generation in before[1]}
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if any(name.endswith(suffix) and name not in known for name in os.listdir(folder)):
                return
            time.sleep(0.001)

    def state(self) -> Any:
        """Return the current generation, and all in the manifest."""
        return self.session.execute(
            "SELECT c.generation, array_agg(g.generation ORDER BY g.generation)"
            " FROM siamese.collections AS c INNER JOIN siamese.generations AS g"
            " USING (collection_id) WHERE c.name = 'images' GROUP BY 1"
        ).fetchone()

    def fill(self) -> None:
        """Make many rows with random vectors, quickly: an index build does not look at images."""
        self.session.execute(
            "BEGIN; SET LOCAL session_replication_role = replica;"
            "INSERT INTO siamese.images (image) SELECT '\\x00'"
            f" FROM generate_series(1, {self.vectors}); COMMIT"
        )
        random = np.random.default_rng(0)
        centres = random.normal(size=(200, DIMENSION))
        ids = self.session.execute("SELECT image_id FROM siamese.images").fetchall()
        sql = "COPY siamese.embedding_1 (key, embedding) FROM STDIN"
        with self.session.cursor().copy(sql) as copy:
            for (image_id,) in ids:
                vector = centres[image_id % 200] + random.normal(0, 0.5, DIMENSION)
                copy.write_row((image_id, "[" + ",".join(map("%.3g".__mod__, vector)) + "]"))
        self.session.execute(
            "INSERT INTO siamese.pending_1 (embedding_id)"
            " SELECT embedding_id FROM siamese.embedding_1"
        )
