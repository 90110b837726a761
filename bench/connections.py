"""Measure the first answer of a new connection, and the private memory of a session."""

from __future__ import annotations

import os
import subprocess
import time

from bench.data import MODEL
from bench.report import Line
from bench.search import ours
from bench.server import index_file
from bench.session import Session, bigint, private_bytes
from bench.timing import Summary
from tools.cluster import Cluster
from tools.project import ROOT

FIRST = "first search of a new connection"
MEMORY = "private memory of a session"
BY_ID, BY_IMAGE = "by stored id", "by new image"
BARE = {
    BY_ID: "numpy, FAISS and the index file in a Python process",
    BY_IMAGE: "the same with ONNX Runtime and the model",
}
# What a first search can't do without, from the start of a process until it is ready.
_BARE_BY_ID = """
import sys
import numpy, faiss
index = faiss.read_index(sys.argv[1], faiss.IO_FLAG_MMAP_IFC)
"""
_BARE_BY_IMAGE = (
    _BARE_BY_ID
    + """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
"""
)


def first_searches(
    cluster: Cluster, collection: str, ids: list[int], files: list[bytes], count: int
) -> list[Line]:
    """Open connections and search once, by id and by image in turns. Connecting counts.

    For comparison, a bare Python process of the server's environment does what can't be saved.
    """
    seconds: dict[str, list[float]] = {}
    for name in (BY_ID, BY_IMAGE):
        seconds |= {name: [], BARE[name]: []}
    path = str(index_file(cluster, collection))
    for number in range(count):
        for name, value in ((BY_ID, bigint(ids[number])), (BY_IMAGE, files[number])):
            program = _BARE_BY_ID if name == BY_ID else _BARE_BY_IMAGE
            seconds[BARE[name]].append(ready(program, path, str(MODEL)))
            began = time.perf_counter()
            with Session(cluster.dsn()) as session:
                answer = ours(session, collection, name == BY_IMAGE)(value)
                seconds[name].append(time.perf_counter() - began)
                assert answer.ntuples == 10 and not session.notices, session.notices
    notes = dict.fromkeys(BARE, f"{count} connections, from connect on")
    notes |= dict.fromkeys(BARE.values(), f"{count} times, from the start on")
    return [Line(FIRST, name, Summary.of(seconds[name]), note=notes[name]) for name in seconds]


def ready(program: str, *arguments: str) -> float:
    """Return the seconds until a Python process has run a program."""
    python = str(ROOT / "build" / "server" / "bin" / "python")
    command = [python, "-c", f"{program}\nprint()"]
    began = time.perf_counter()
    with subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        return time.perf_counter() - began


def memory(cluster: Cluster, collection: str, ids: list[int], files: list[bytes]) -> list[Line]:
    """Measure sessions that have searched, two at a time, since they share what both map."""
    lines = []
    for name in (BY_ID, BY_IMAGE):
        values = [bigint(key) for key in ids] if name == BY_ID else files
        with Session(cluster.dsn()) as one, Session(cluster.dsn()) as other:
            idle = private_bytes(one.pid)
            for session in (one, other):
                search = ours(session, collection, name == BY_IMAGE)
                for value in values:
                    search(value)
            used = private_bytes(one.pid)
        what = f"after {len(values)} searches {name}"
        note = f"{idle / 1024**2:.1f} MiB right after connecting"
        lines.append(Line(MEMORY, what, value=used / 1024**2, unit="MiB", note=note))
    return lines
