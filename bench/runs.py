"""Run the benchmarks: 70,000 images with everything, and a million vectors."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from bench import (
    build,
    clinical,
    connections,
    data,
    deferred,
    dicom,
    duplicates,
    encoders,
    explore,
    filtered,
    grouped,
    groups,
    heat,
    insert,
    machine,
    nearest,
    pairs,
    search,
)
from bench.exact import Truth, Vectors
from bench.report import Bar, Report
from bench.server import LARGE_SETTINGS, SETTINGS, server
from bench.session import Session
from pg_siamese.client.sources import png
from pg_siamese_server.encoding.encoder import Encoder
from pg_siamese_server.encoding.images import decode_image
from tools.cluster import Cluster
from tools.installation import Installation

PENDING_ROWS = 5_000
# Queries per filtered search. Their true neighbours are found one by one.
FILTERED = 240
GROUPED = 200


@dataclass(frozen=True)
class Size:
    """The amounts of everything."""

    rows: int
    queries: int
    builds: int
    insert_files: int = 0
    connections: int = 0
    worker_rows: int = 0
    slices: int = 0
    seconds: float = 0
    pictures: int = 0
    maps: int = 0


STANDARD = Size(
    rows=70_000,
    queries=3_000,
    builds=3,
    insert_files=12_000,
    connections=15,
    slices=1_000,
    seconds=4,
    pictures=1_000,
    maps=200,
)
STANDARD_QUICK = Size(
    rows=12_000,
    queries=400,
    builds=1,
    insert_files=1_000,
    connections=3,
    slices=20,
    seconds=0.1,
    pictures=20,
    maps=4,
)
LARGE = Size(rows=1_000_000, queries=2_000, builds=1)
LARGE_QUICK = Size(rows=50_000, queries=400, builds=1)
# Rows per insert, timed statements of these, and runs of workers.
DEFERRED = Size(rows=deferred.ROWS, queries=25, builds=3, worker_rows=20_000)
DEFERRED_QUICK = Size(rows=1_000, queries=3, builds=1, worker_rows=1_000)
# Pictures, and copies of them.
DUPLICATES = Size(rows=60_000, queries=2_000, builds=1)
DUPLICATES_QUICK = Size(rows=3_000, queries=500, builds=1)
EXPLORE = Size(rows=100_000, queries=40, builds=1)
EXPLORE_QUICK = Size(rows=3_000, queries=10, builds=1)
# For two revisions, with inserts in place of builds.
COMPARE = Size(rows=70_000, queries=3_000, builds=7, connections=75)
COMPARE_QUICK = Size(rows=2_000, queries=400, builds=1, connections=2)
DIMENSION, CLUSTERS = 64, 500


def _sample(ids: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    chosen: NDArray[np.int64] = np.random.default_rng(seed).choice(ids, count, replace=False)
    return chosen


def standard(size: Size, console: Console) -> Report:
    """Measure everything on Fashion-MNIST, inserted through the triggers."""
    with server(SETTINGS) as cluster:
        facts = machine.facts(cluster)
        console.print(f"Embedding {size.rows:,} images …")
        pictures = data.fashion_mnist(size.rows)
        spec = data.register(cluster)
        stored = [png(picture) for picture in pictures]
        new = data.new_pictures(pictures, size.queries, seed=1)
        with Session(cluster.dsn()) as session:
            session.run("SELECT siamese.create_collection()")
            data.insert(session, "siamese.images", stored)
        data.copy_vectors(cluster, "siamese.embedding_1")
        build.vacuum(cluster)
        report = Report("standard", facts, SETTINGS, vars(size))

        console.print("Building indexes …")
        report.lines += build.build(cluster, "images", size.builds)
        build.vacuum(cluster)

        console.print("Searching …")
        vectors = data.read_vectors(cluster)
        own = _sample(vectors.ids, size.queries, seed=2)
        truth = Truth.of(vectors, vectors.of(own), own)
        report.lines += search.by_id(cluster, "images", truth)
        encoder = Encoder(data.MODEL.read_bytes(), spec)
        embedded = encoder.embed(np.stack([decode_image(file, spec.input) for file in new]))
        report.lines += search.by_image(cluster, "images", Truth.of(vectors, embedded), new)
        with Session(cluster.dsn()) as session:  # as before, since by_image may have built another
            session.run("SELECT siamese.build_index()")

        console.print("Opening connections …")
        keys = own.tolist()
        report.lines += connections.first_searches(cluster, "images", keys, new, size.connections)
        report.lines += connections.memory(cluster, "images", keys[:200], new[:200])

        console.print("Inserting …")
        report.lines += insert.insert(
            cluster, spec, data.MODEL.read_bytes(), stored[: size.insert_files]
        )

        console.print("Searching with pending rows …")
        more = data.new_pictures(pictures, PENDING_ROWS, seed=3)
        with Session(cluster.dsn()) as session:
            report.lines += search.pending(
                cluster, "images", own, lambda: data.insert(session, "siamese.images", more)
            )
        report.bars += _standard_bars(report)
        _ingest_dicom(cluster, size, console, report)
    return report


def dicom_alone(size: Size, console: Console) -> Report:
    """Measure inserts of DICOM files, and nothing else."""
    with server(SETTINGS) as cluster:
        report = Report("dicom", machine.facts(cluster), SETTINGS, vars(size))
        _ingest_dicom(cluster, size, console, report)
    return report


def encoders_alone(size: Size, console: Console) -> Report:
    """Measure the memory and the speed of encoders of several sizes, and nothing else."""
    with server(SETTINGS) as cluster:
        report = Report("encoders", machine.facts(cluster), SETTINGS, vars(size))
        console.print("Embedding …")
        report.lines += encoders.measure(cluster, size.seconds)
    return report


def clinical_alone(size: Size, console: Console, model: Path) -> Report:
    """Measure an encoder of larger images: inserts of JPEG files, speed and memory."""
    with server(SETTINGS) as cluster:
        report = Report("clinical", machine.facts(cluster), SETTINGS, vars(size))
        console.print("Inserting JPEG files …")
        report.lines += clinical.ingest(cluster, model, size.pictures)
        report.bars += clinical.bars(report.lines)
    return report


def _ingest_dicom(cluster: Cluster, size: Size, console: Console, report: Report) -> None:
    console.print("Inserting DICOM files …")
    lines = dicom.ingest(cluster, size.slices, size.connections)
    report.lines += lines
    report.bars += dicom.bars(lines)


def _standard_bars(report: Report) -> list[Bar]:
    def most(what: str, value: float, limit: float, unit: str = "times") -> Bar:
        return Bar(what, value, limit, unit, is_most=True)

    bars = _search_bars(report, 1.4)
    bars.append(_gain(report, "search by new image", search.BY_IMAGE, search.OURS, 1.4))
    pending = report.figures(search.PENDING_SECTION)
    none = float(np.mean([pending[name] for name in search.NONE_PENDING]))
    what = "search with 5,000 pending rows, times the search with none"
    bars.append(most(what, pending[search.PENDING] / none, 3.0))
    if many := report.figures(insert.section(10_000)):
        what = "10,000-row insert, share of decode + ONNX Runtime alone"
        bars.append(Bar(what, 100 * many[insert.ALONE] / many[insert.TRIGGER], 80, "%"))
    one = report.figures(insert.section(1))
    what = "insert of 1 row, times decode + ONNX Runtime alone and a plain insert"
    bars.append(most(what, one[insert.TRIGGER] / (one[insert.ALONE] + one[insert.PLAIN]), 1.6))
    first = report.figures(connections.FIRST)
    for name, bare in connections.BARE.items():
        what = f"first search of a connection {name}, times the bare process"
        bars.append(most(what, first[name] / first[bare], 1.6))
    memory = max(report.figures(connections.MEMORY).values())
    return [*bars, most("private memory of a session that searches", memory, 60, "MiB")]


def _search_bars(report: Report, times: float) -> list[Bar]:
    bars = []
    for name in (search.OURS, search.PGVECTOR):
        recall = report.line(search.BY_ID, name).recall
        assert recall is not None
        bars.append(Bar(f"recall@10 by stored id, {name}", recall, search.TARGET))
    return [*bars, _gain(report, "search by stored id", search.BY_ID, search.OURS, times)]


def _gain(report: Report, what: str, section: str, ours: str, times: float) -> Bar:
    figures = report.figures(section)
    gain = figures[search.PGVECTOR] / figures[ours]
    return Bar(f"{what}, times as fast as pgvector", gain, times, "times")


def heat_alone(size: Size, console: Console) -> Report:
    """Check which parts of a query similarity maps show, and nothing else."""
    with server(SETTINGS) as cluster:
        report = Report("heat", machine.facts(cluster), SETTINGS, vars(size))
    console.print("Drawing maps …")
    report.lines += heat.measure(size.maps)
    report.bars += heat.bars(report.lines)
    return report


def nearest_alone(size: Size, console: Console, earlier: Installation | None = None) -> Report:
    """Measure searches for many rows at once on a mixture of clusters, and nothing else.

    Args:
        size: vectors.
        console: for messages about progress.
        earlier: PostgreSQL with another revision, to search for each row by that as well.
    """
    with ExitStack() as stack:
        cluster = stack.enter_context(server(LARGE_SETTINGS))
        report = Report("nearest", machine.facts(cluster), LARGE_SETTINGS, vars(size))
        clusters = [cluster]
        if earlier:
            clusters.append(stack.enter_context(server(LARGE_SETTINGS, earlier)))
        for each in clusters:
            vectors = _load_mixture(each, size, console)
            with Session(each.dsn()) as session:
                session.run("SELECT siamese.build_index('large')")
        with Session(cluster.dsn()) as session:
            session.run(build.CREATE)
        build.vacuum(cluster)
        console.print("Searching …")
        own = _sample(vectors.ids, min(nearest.KEYS, size.rows), seed=2)
        truth = Truth.of(vectors, vectors.of(own), own)
        report.lines += nearest.nearest(cluster, truth, *clusters[1:])
        report.bars += nearest.bars(report.lines)
    return report


def pairs_alone(size: Size, console: Console) -> Report:
    """Measure the search for all near pairs on a mixture of clusters, and nothing else."""
    with server(LARGE_SETTINGS) as cluster:
        report = Report("pairs", machine.facts(cluster), LARGE_SETTINGS, vars(size))
        vectors = _load_mixture(cluster, size, console)
        console.print("Searching …")
        report.lines += pairs.pairs(cluster, vectors)
        report.bars += pairs.bars(report.lines)
    return report


def explore_alone(size: Size, console: Console) -> Report:
    """Measure the page in a browser, and nothing else."""
    with server(SETTINGS) as cluster:
        report = Report("explore", machine.facts(cluster), SETTINGS, vars(size))
        console.print(f"Inserting {size.rows:,} images …")
        data.register(cluster)
        files = [png(picture) for picture in data.fashion_mnist(size.rows)]
        explore.fill(cluster, files, size.rows)
        console.print("Opening the page …")
        report.lines += explore.measure(cluster, size.queries)
        report.bars += explore.bars(report.lines)
    return report


def _load_mixture(cluster: Cluster, size: Size, console: Console) -> Vectors:
    console.print(f"Loading {size.rows:,} x {DIMENSION} vectors …")
    data.register(cluster)
    vectors = data.mixture(size.rows, DIMENSION, CLUSTERS)
    data.load_mixture(cluster, vectors, {})
    build.vacuum(cluster)
    return vectors


def duplicates_alone(size: Size, console: Console) -> Report:
    """Measure how many planted copies are found, and nothing else."""
    with server(SETTINGS) as cluster:
        report = Report("duplicates", machine.facts(cluster), SETTINGS, vars(size))
        console.print("Storing pictures and copies of some …")
        report.lines += duplicates.duplicates(cluster, size.rows, size.queries)
        report.bars += duplicates.bars(report.lines)
    return report


def deferred_embedding(size: Size, console: Console) -> Report:
    """Measure what queueing costs an insert, and how workers share."""
    with server(SETTINGS) as cluster:
        facts = machine.facts(cluster)
        pictures = data.fashion_mnist(max(size.rows, size.worker_rows))
        data.register(cluster)
        files = [png(picture) for picture in pictures]
        deferred.create(cluster)
        report = Report("deferred", facts, SETTINGS, vars(size))
        console.print("Inserting …")
        report.lines += deferred.insert(cluster, files[: size.rows], size.queries)
        console.print("Embedding by workers …")
        report.lines += deferred.workers(cluster, files[: size.worker_rows], size.builds)
        report.bars += deferred.bars(report.lines)
    return report


def large(size: Size, console: Console, only_groups: bool = False) -> Report:
    """Measure search and build on a mixture of clusters.

    Args:
        size: vectors, queries and builds.
        console: for messages about progress.
        only_groups: measure nothing but searches by group.
    """
    with server(LARGE_SETTINGS) as cluster:
        facts = machine.facts(cluster)
        console.print(f"Loading {size.rows:,} x {DIMENSION} vectors …")
        data.register(cluster)
        vectors = data.mixture(size.rows, DIMENSION, CLUSTERS)
        columns = groups.draw(vectors)
        data.load_mixture(cluster, vectors, columns)
        build.vacuum(cluster)
        parameters = vars(size) | {
            "dimension": DIMENSION,
            "clusters": CLUSTERS,
            "inner_dimensions": data.INNER,
            "spread": data.SPREAD,
            "noise": data.NOISE,
        }
        report = Report("large", facts, LARGE_SETTINGS, parameters)
        own = _sample(vectors.ids, size.queries, seed=2)
        if only_groups:
            with Session(cluster.dsn()) as session:
                session.run("SELECT siamese.build_index('large')")
        else:
            _large_without_groups(cluster, vectors, columns, own, size, console, report)
        console.print("Searching by group …")
        best = grouped.grouped(cluster, vectors, columns, own[:GROUPED])
        report.lines += best
        report.bars += grouped.bars(best, grouped.cases(vectors, columns))
    return report


def _large_without_groups(
    cluster: Cluster,
    vectors: Vectors,
    columns: dict[str, NDArray[np.int32]],
    own: NDArray[np.int64],
    size: Size,
    console: Console,
    report: Report,
) -> None:
    console.print("Building indexes …")
    report.lines += build.build(cluster, "large", size.builds)
    build.vacuum(cluster)
    console.print("Searching …")
    truth = Truth.of(vectors, vectors.of(own), own)
    report.lines += search.by_id(cluster, "large", truth)
    report.bars += _search_bars(report, 3.0)
    console.print("Searching with filters …")
    filters = filtered.filtered(cluster, "large", vectors, columns, own[:FILTERED])
    report.lines += filters
    report.bars += filtered.bars(filters)
    report.bars.append(_gain(report, "index build", build.SECTION, build.OURS, 3.0))
