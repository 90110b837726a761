"""Damaged DICOM files: each a proper error or an embedding, by statements and by a worker."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import imagecodecs
import numpy as np
import psycopg
from pydicom import uid

from pg_siamese_server.encoding.specification import InputSpec
from tests import damaged_dicom, dicom_files
from tests.scenarios.bad_images import BOMB_SECONDS, LARGEST_GROWTH, BadImages
from tests.scenarios.process import MEGABYTE, watched
from tests.support import PATIENCE
from tools.project import ROOT

REAL = ROOT.parent / "shared" / "data" / "dicom"
LARGEST_REAL = 300_000


@dataclass(kw_only=True)
class BadDicom(BadImages):
    """So many damaged DICOM files, and bombs. Files are given to ``embed_image``, too.

    Attributes:
        dsn: connection string of the same database, for the worker.
    """

    dsn: str
    whole: Collection[str] = ("deflated frame",)
    largest_peak: float = LARGEST_GROWTH + InputSpec(28, 28).max_bytes
    largest_bomb: float = LARGEST_GROWTH + InputSpec(28, 28).max_bytes
    longest: float = 2 * BOMB_SECONDS  # of two statements

    def samples(self) -> Mapping[str, bytes]:
        """Return good files of many kinds, with real ones if they are beside the project."""
        y, x = np.mgrid[:64, :64]
        values = (2048 + 2000 * np.sin(x / 9) * np.cos(y / 7)).astype(np.uint16)
        eight = (values >> 4).astype(np.uint8)
        rgb = np.stack([eight, eight.T, 255 - eight], axis=-1)
        frames = [imagecodecs.jpegls_encode(np.roll(eight, shift)) for shift in range(5)]
        htj2k = imagecodecs.htj2k_encode(rgb)
        return {name: make(values) for name, make in dicom_files.twins().items()} | {
            "RGB": dicom_files.image(rgb),
            "frames": dicom_files.compressed(frames, eight, uid.JPEGLSLossless),
            "frames without a table": dicom_files.compressed(
                frames, eight, uid.JPEGLSLossless, False
            ),
            "JPEG": dicom_files.compressed(
                [imagecodecs.jpeg8_encode(eight)], eight, uid.JPEGBaseline8Bit
            ),
            "HTJ2K": dicom_files.compressed([htj2k], rgb, uid.HTJ2KLossless),
        }

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yield damaged files, each with a name that makes it again."""
        sources = dict(self.samples())
        for path in sorted(REAL.glob("*.dcm")):
            if path.stat().st_size < LARGEST_REAL:
                sources[path.stem] = path.read_bytes()
        for number in range(self.count):
            seed = f"{self.seed}-{number}"
            generator = random.Random(seed)
            name = generator.choice(list(sources))
            yield f"{name}, seed {seed}", damaged_dicom.mutated(sources[name], generator)

    def bombs(self) -> Mapping[str, bytes]:
        """Return small files that would take much memory or time."""
        return {name: make() for name, make in damaged_dicom.BOMBS.items()}

    def insert(self, file: bytes) -> psycopg.Error | None:
        """Embed a file, then insert it; return the error of the insert, if any."""
        state = None
        try:
            self.session.execute("SELECT siamese.embed_image(%s, 'medical')", (file,))
        except psycopg.Error as error:
            state = error.sqlstate
        found = super().insert(file)
        assert state == (None if found is None else found.sqlstate)
        return found

    def in_bulk(self, outcome: dict[bytes, str | None]) -> None:
        """Insert all in one statement, then into a deferred collection for a worker."""
        super().in_bulk(outcome)
        self.session.execute("CREATE TABLE public.later (id serial PRIMARY KEY, image bytea)")
        self.session.execute(
            "SELECT create_collection('later', 'public.later', model => 'medical',"
            " on_error => 'quarantine', embed => 'deferred')"
        )
        expected = self.work([*self.samples().values()])
        self.session.execute("TRUNCATE public.later")
        most = self.work(list(outcome))
        bad = self.check_failures("later", outcome)
        self.report(
            f"{len(outcome)} by the worker: {bad} put aside, {most / MEGABYTE:.1f} MB at the most,"
            f" {expected / MEGABYTE:.1f} MB with good files"
        )
        assert most - expected < self.largest_peak

    def work(self, files: list[bytes]) -> int:
        """Queue files and let a worker embed them; return its largest memory in bytes."""
        self.session.execute(
            "INSERT INTO public.later (image) SELECT unnest(%b::bytea[])", (files,), binary=True
        )
        command = [sys.executable, "-m", "pg_siamese", "worker", "--once", "--collection", "later"]
        with subprocess.Popen(
            [*command, "--no-rebuild", "--dsn", self.dsn],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as worker:
            with watched(worker.pid) as peak:
                # Not reaped, so that its memory can be read to the end.
                os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
            assert worker.wait(PATIENCE) == 0
        return peak.most
