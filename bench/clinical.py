"""Measure an encoder of larger images: JPEG files through the trigger, speed and memory."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import encoders
from bench.insert import ALONE, TRIGGER, Contest, insert
from bench.report import Bar, Line
from bench.session import BYTEA, Session, bytea_array, connect, first_row
from bench.timing import Summary, one_core, round_robin
from pg_siamese.evaluation.runtime import open_session
from pg_siamese_server.encoding.specification import ModelSpec
from tests.scenarios.process import MEGABYTE, private_bytes, watched
from tools.cluster import Cluster
from tools.project import ROOT

MODEL = ROOT / "models" / "clinical.onnx"
REAL = ROOT.parent / "shared" / "data" / "clinical"
WHAT = "insert of clinical JPEG files"
RUNTIME = "ONNX Runtime, one thread, batches of 8"
OURS, BASELINE = "this encoder", "EfficientNet-lite0 of float32, 224 x 224"
MEMORY = "private memory of a session that has embedded"
QUERIES, INSERTED, MOST = (
    "after images one by one",
    "after inserts",
    "most allocated, within inserts",
)
BATCH = 8
ROWS = 200
INSERT_BAR, SPEED_BAR, MEMORY_BAR = 90, 2, 90


def pictures(count: int) -> list[bytes]:
    """Return JPEG files of some 224 x 224 pixels: train images of the clinical sets, in turns.

    Without these beside the project, drawn pictures take their place.
    """
    archives = [zipfile.ZipFile(path) for path in sorted(REAL.glob("*_224.zip"))]
    if not archives:
        return encoders.pictures(count)
    names = [[n for n in archive.namelist() if n.startswith("train/")] for archive in archives]
    per_set = -(-count // len(archives))
    chosen = [own[:: max(1, len(own) // per_set)][:per_set] for own in names]
    turns = zip(*chosen, strict=True)
    files = [archives[n].read(name) for turn in turns for n, name in enumerate(turn)]
    return files[:count]


def ingest(cluster: Cluster, model: Path, count: int) -> list[Line]:
    """Insert pictures into a collection of this model, and measure speed and memory."""
    onnx = model.read_bytes()
    with connect(cluster.dsn()) as admin:
        admin.execute("SELECT siamese.register_model('clinical', %s)", (onnx,))
        query = "SELECT specification FROM siamese.models WHERE name = 'clinical'"
        (specification,) = first_row(admin, query)
    spec = ModelSpec.from_json(specification)
    files = pictures(count)
    rows = min(ROWS, count // 2)
    contest = Contest(
        {1: min(100, count), rows: max(2, 2 * count // rows)},
        what=WHAT,
        prefix="clinical_",
        model="clinical",
        storage="EXTERNAL",
    )
    lines = insert(cluster, spec, onnx, files, contest)
    return [*lines, *speeds(onnx, count), *memory(cluster, files, rows)]


def speeds(onnx: bytes, count: int) -> list[Line]:
    """Run the graph, and the pretrained EfficientNet-lite0 if PyTorch is there, in turns."""
    graphs = {OURS: onnx} | _baseline()
    random = np.random.default_rng(0)
    calls: dict[str, Callable[[int], object]] = {}
    for name, graph in graphs.items():
        opened = open_session(graph)
        given = opened.get_inputs()[0]
        shape = (BATCH, *given.shape[1:])
        kind = np.uint8 if given.type == "tensor(uint8)" else np.float32
        calls[name] = partial(_run, opened, given.name, random.integers(0, 256, shape).astype(kind))
    with one_core(()):
        seconds, _ = round_robin(calls, max(5, count // BATCH), 5, warm_up=2)
    lines = []
    for name, values in seconds.items():
        times = Summary.of(values)
        note = f"{1000 * BATCH / times.median_ms:,.0f} images/s"
        lines.append(Line(RUNTIME, name, times, note=note))
    return lines


def _run(opened: Any, name: str, pixels: NDArray[Any], _: int) -> None:
    opened.run(None, {name: pixels})


def _baseline() -> dict[str, bytes]:
    try:
        from pg_siamese.training.baseline import export_baseline
    except ImportError:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "baseline.onnx"
        export_baseline(path, ())
        return {BASELINE: path.read_bytes()}


def memory(cluster: Cluster, files: list[bytes], rows: int) -> list[Line]:
    """Measure sessions that have embedded, two at a time, since they share what both map."""
    with Session(cluster.dsn()) as one, Session(cluster.dsn()) as other:
        idle = private_bytes(one.pid)
        for session in (one, other):
            embed = session.prepare("embed", "SELECT siamese.embed_image($1, 'clinical')", BYTEA)
            for file in files[:rows]:
                embed(file)
        queries = private_bytes(one.pid)
        with watched(one.pid) as inserting:
            for session in (one, other):
                insertion = session.prepare_insert("bench.clinical_inserts")
                for start in range(0, len(files), rows):
                    insertion(bytea_array(files[start : start + rows]))
        inserted = private_bytes(one.pid)
    note = f"{idle / MEGABYTE:.1f} MiB right after connecting"
    found = {QUERIES: queries, INSERTED: inserted, MOST: inserting.most}
    return [
        Line(MEMORY, name, value=value / MEGABYTE, unit="MiB", note=note)
        for name, value in found.items()
    ]


def bars(lines: list[Line]) -> list[Bar]:
    """Return the promises on these figures. Without PyTorch, none on the speed of the graph."""
    many = [line for line in lines if line.section.startswith(WHAT)][-3:]
    figures = {line.name: line.figure() for line in many}
    share = 100 * figures[ALONE] / figures[TRIGGER]
    embedded = [line.figure() for line in lines if line.section == MEMORY and line.name != MOST]
    speed = {line.name: line.figure() for line in lines if line.section == RUNTIME}
    found = [
        Bar(f"{many[0].section}, share of {ALONE}", share, INSERT_BAR, "%"),
        Bar(MEMORY, max(embedded), MEMORY_BAR, "MiB", is_most=True),
    ]
    if BASELINE in speed:
        gain = speed[BASELINE] / speed[OURS]
        found.append(Bar("images per second, times EfficientNet-lite0's", gain, SPEED_BAR, "times"))
    return found
