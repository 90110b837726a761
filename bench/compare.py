"""Compare the working tree with an earlier revision, in turns in one run.

The other revision is unpacked below ``build/compare``, and makes its own environment there. Each
has a server of its own with the same images. Only what both have in SQL is called.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console

from bench import build, data, machine
from bench.report import Bar, Line, Report
from bench.runs import Size
from bench.search import BLOCK, WARM_UP, check_engine, ours
from bench.server import SETTINGS, server
from bench.session import Session, bigint, bytea_array, private_bytes
from bench.timing import Summary, one_core, round_robin
from pg_siamese.client.sources import png
from tools import overlay
from tools.cluster import Cluster
from tools.installation import Installation
from tools.project import ROOT, build_folder

SECTIONS = (
    "search by stored id",
    "search by new image",
    "first search of a new connection",
    "private memory of a session after 50 searches by new image",
    "insert, 10,000 rows per statement",
)
MEMORY_SEARCHES, MEMORY_SESSIONS = 50, 5
INSERT_ROWS = 10_000
# Medians of a change that costs nothing stay within this share.
TOLERANCE = 0.03


def compare(revision: str, size: Size, console: Console) -> Report:
    """Time the working tree and another revision.

    Args:
        revision: any name that git knows.
        size: images, searches, connections, and inserts of 10,000 rows (or all), per side.
        console: for messages about progress.

    Raises:
        OSError, subprocess.CalledProcessError: git or make failed.
    """
    before = unpacked(revision, console)
    rows, queries = size.rows, size.queries
    short = machine.git("rev-parse", "--short", revision)
    head = machine.git("rev-parse", "--short", "HEAD")
    names = (f"{head} and what is not committed", f"{short} ({revision})")
    pictures = data.fashion_mnist(rows)
    stored = [png(picture) for picture in pictures]
    new = data.new_pictures(pictures, queries, seed=1)
    keys = np.random.default_rng(2).choice(rows, queries, replace=False) + 1
    with ExitStack() as stack:
        sides = {}
        for name, installation in zip(names, (None, before), strict=True):
            console.print(f"Embedding {rows:,} images: {name} …")
            cluster = stack.enter_context(server(SETTINGS, installation))
            _fill(cluster, stored)
            sides[name] = cluster
        facts = machine.facts(sides[names[0]])
        report = Report("compare", facts | {"compared_with": short}, SETTINGS, vars(size))
        by_id = [bigint(int(key)) for key in keys]
        console.print("Searching, by turns …")
        _searches(report, SECTIONS[0], sides, by_id, by_image=False)
        _searches(report, SECTIONS[1], sides, new, by_image=True)
        console.print("Opening connections, by turns …")
        firsts = {name: partial(_first, cluster, by_id) for name, cluster in sides.items()}
        _add(report, SECTIONS[2], firsts, size.connections, 1, 1)
        console.print("Measuring memory, by turns …")
        _memory(report, SECTIONS[3], sides, new[:MEMORY_SEARCHES])
        console.print("Inserting, by turns …")
        part = bytea_array(stored[: min(rows, INSERT_ROWS)])
        insertions = {}
        for name, cluster in sides.items():
            session = stack.enter_context(Session(cluster.dsn()))
            insertions[name] = partial(_insert, session.prepare_insert("bench.inserts"), part)
        _add(report, SECTIONS[4], insertions, size.builds, 1, 1)
    for section in SECTIONS:
        mine, theirs = report.figures(section).values()
        report.bars.append(
            Bar(f"{section}: times of {revision}", mine / theirs, 1 + TOLERANCE, is_most=True)
        )
    return report


def unpacked(revision: str, console: Console) -> Installation:
    """Unpack a revision, let it make what it needs, and return its private PostgreSQL."""
    commit = machine.git("rev-parse", f"{revision}^{{commit}}")
    folder = build_folder() / "compare" / commit[:12]
    if not (folder / "Makefile").exists():
        archive = subprocess.run(
            ["git", "-C", ROOT, "archive", revision], check=True, capture_output=True
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder)
    console.print(f"Making the environment of {revision} …")
    subprocess.run(["make", "-C", folder, "deps"], check=True, stdout=subprocess.DEVNULL)
    return overlay.find(folder / "build" / "pg")


def _fill(cluster: Cluster, stored: list[bytes]) -> None:
    data.register(cluster)
    with Session(cluster.dsn()) as session:
        session.run("SELECT siamese.create_collection()")
        data.insert(session, "siamese.images", stored)
        # With one thread both build the same graph, and measure the same breadths for it.
        session.run("SET max_parallel_maintenance_workers = 0")
        session.run("SELECT siamese.build_index()")
    data.create_table(cluster, "inserts", embed="sync")
    build.vacuum(cluster)


def _searches(
    report: Report,
    section: str,
    sides: dict[str, Cluster],
    values: list[bytes],
    *,
    by_image: bool,
) -> None:
    with ExitStack() as stack:
        calls: dict[str, Callable[[int], None]] = {}
        sessions = []
        for name, cluster in sides.items():
            session = stack.enter_context(Session(cluster.dsn()))
            check_engine(session, "images")
            calls[name] = partial(_search, ours(session, "images", by_image), values)
            sessions.append(session)
        with one_core(session.pid for session in sessions):
            _add(report, section, calls, len(values), BLOCK, WARM_UP)


def _add(
    report: Report,
    section: str,
    calls: Mapping[str, Callable[[int], Any]],
    count: int,
    block: int,
    warm_up: int,
) -> None:
    seconds, _ = round_robin(calls, count, block, warm_up)
    report.lines += [Line(section, name, Summary.of(seconds[name])) for name in calls]


def _search(search: Callable[[bytes], Any], values: list[bytes], number: int) -> None:
    assert search(values[number]).ntuples == 10


def _first(cluster: Cluster, values: list[bytes], number: int) -> None:
    with Session(cluster.dsn()) as session:
        _search(ours(session, "images", False), values, number)


def _memory(report: Report, section: str, sides: dict[str, Cluster], files: list[bytes]) -> None:
    used = {name: partial(_used, cluster, files) for name, cluster in sides.items()}
    _, answers = round_robin(used, MEMORY_SESSIONS, 1)
    for name in sides:
        median = float(np.median(answers[name])) / 1024**2
        report.lines.append(Line(section, name, value=median, unit="MiB"))


def _used(cluster: Cluster, files: list[bytes], number: int) -> int:
    """Return the private memory of one of two sessions, since they share what both map."""
    with Session(cluster.dsn()) as one, Session(cluster.dsn()) as other:
        for session in (one, other):
            search = ours(session, "images", True)
            for file in files:
                search(file)
        return private_bytes(one.pid)


def _insert(insertion: Callable[[bytes], Any], part: bytes, number: int) -> None:
    insertion(part)
