"""Measure inserts: through the trigger, decode and ONNX Runtime alone, and a plain insert."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.data import create_table
from bench.report import Line
from bench.session import Prepared, Session, bytea_array
from bench.timing import Summary, round_robin
from pg_siamese_server.encoding.batches import MAX_ROWS_AT_ONCE
from pg_siamese_server.encoding.encoder import Encoder
from pg_siamese_server.encoding.images import decode_image
from pg_siamese_server.encoding.specification import InputSpec, ModelSpec
from tools.cluster import Cluster

TRIGGER = "INSERT through the trigger"
PLAIN = "plain INSERT"
ALONE = "decode + ONNX Runtime alone"
# Rows per statement, and how often.
STATEMENTS = {1: 200, 100: 40, 10_000: 5}

Decode = Callable[[bytes, InputSpec], NDArray[np.uint8]]


@dataclass(frozen=True)
class Contest:
    """What is inserted, and what the process without a server does.

    Attributes:
        statements: rows per statement, and how often.
        what: first words of the sections.
        prefix: of the names of both tables.
        model: of the collection. Empty is the only one.
        storage: of the image columns.
        decode: of the process, which embeds what it returns.
        alone: name of the process.
    """

    statements: dict[int, int]
    what: str = "insert"
    prefix: str = ""
    model: str = ""
    storage: str = "EXTENDED"
    decode: Decode = decode_image
    alone: str = ALONE


IMAGES = Contest(STATEMENTS)


def section(rows: int, what: str = IMAGES.what) -> str:
    """Return the name of a section of the table."""
    return f"{what}, {rows:,} row{'s' if rows > 1 else ''} per statement"


def insert(
    cluster: Cluster, spec: ModelSpec, onnx: bytes, files: list[bytes], contest: Contest = IMAGES
) -> list[Line]:
    """Insert images into two tables that differ only in the trigger. Each statement commits."""
    tables = {TRIGGER: f"{contest.prefix}inserts", PLAIN: f"{contest.prefix}plain"}
    create_table(cluster, tables[PLAIN], storage=contest.storage)
    create_table(cluster, tables[TRIGGER], "sync", contest.model, contest.storage)
    lines = []
    names = (TRIGGER, contest.alone, PLAIN)
    with (
        reference(spec, onnx, files, contest.decode) as alone,
        Session(cluster.dsn()) as session,
    ):
        insertions = {
            name: session.prepare_insert(f"bench.{table}") for name, table in tables.items()
        }
        for rows, count in contest.statements.items():
            if rows > len(files):
                continue
            starts = np.linspace(0, len(files) - rows, count).astype(int).tolist()
            arrays = [bytea_array(files[start : start + rows]) for start in starts]
            calls: dict[str, Callable[[int], Any]] = {
                name: partial(_insert, insertion, arrays) for name, insertion in insertions.items()
            }
            calls[contest.alone] = partial(_embed, alone, starts, rows)
            seconds, answers = round_robin(calls, count, 1, warm_up=1 + count // 20)
            # The process's own clock, without the time of messages.
            seconds[contest.alone] = np.asarray(answers[contest.alone])
            lines += [
                _line(section(rows, contest.what), rows, name, seconds[name]) for name in names
            ]
        assert not session.notices, session.notices
    return lines


def _insert(insertion: Prepared, arrays: list[bytes], number: int) -> None:
    insertion(arrays[number])


def _embed(alone: Callable[[int, int], float], starts: list[int], rows: int, number: int) -> float:
    return alone(starts[number], rows)


def _line(heading: str, rows: int, name: str, seconds: NDArray[np.float64]) -> Line:
    times = Summary.of(seconds)
    rate = f"{1000 * rows / times.median_ms:,.0f} rows/s"
    if name not in (TRIGGER, PLAIN):
        rate += ", in a Python process, one core"
    return Line(heading, name, times, note=rate)


@contextmanager
def reference(
    spec: ModelSpec, onnx: bytes, files: list[bytes], decode: Decode = decode_image
) -> Iterator[Callable[[int, int], float]]:
    """Start a process on one core that decodes and embeds. Yield a function of start and count.

    It has the server's own encoder, and takes images in a trigger's batches. It reads no table and
    writes none.
    """
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    process = context.Process(target=_work, args=(child, spec, onnx, files, decode), daemon=True)
    process.start()
    child.close()
    try:

        def embed(start: int, count: int) -> float:
            parent.send((start, count))
            return float(parent.recv())

        embed(0, 1)
        yield embed
    finally:
        parent.close()
        process.join()


def _work(
    pipe: Connection, spec: ModelSpec, onnx: bytes, files: list[bytes], decode: Decode
) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    encoder = Encoder(onnx, spec)
    while True:
        try:
            start, count = pipe.recv()
        except EOFError:
            return
        began = time.perf_counter()
        for first in range(start, start + count, MAX_ROWS_AT_ONCE):
            part = files[first : min(first + MAX_ROWS_AT_ONCE, start + count)]
            encoder.embed(np.stack([decode(file, spec.input) for file in part]))
        pipe.send(time.perf_counter() - began)
