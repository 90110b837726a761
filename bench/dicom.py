"""Measure inserts of DICOM files: through the trigger, and pydicom with ONNX Runtime alone."""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from pydicom.uid import UID

from bench.connections import ready
from bench.insert import PLAIN, TRIGGER, Contest, insert
from bench.report import Bar, Line
from bench.session import BYTEA, Session, connect
from bench.timing import Summary
from pg_siamese_server.encoding.dicom import rendering
from pg_siamese_server.encoding.dicom.file import File
from pg_siamese_server.encoding.dicom.frames import Pixels
from pg_siamese_server.encoding.images import RESAMPLING, decode_image
from pg_siamese_server.encoding.specification import InputSpec, ModelSpec
from tests import dicom_files
from tools.cluster import Cluster
from tools.project import ROOT

MODEL = ROOT / "models" / "clinical.onnx"
REAL = ROOT.parent / "shared" / "data" / "dicom_series" / "covid19_ny_sbu"
WHAT = "insert of CT slices, 512 x 512"
SIDE = 512
# A statement holds about 50 MB.
ROWS = 100
ALONE = "pydicom, rendering + ONNX Runtime alone"
FIRST = "first DICOM file of a new connection"
EMBED = "embed_image"
BARE = "numpy, pydicom and imagecodecs in a Python process"
NOISE = 20
BAR, FIRST_BAR = 80, 400


def slices(count: int) -> list[bytes]:
    """Return CT slices of 512 x 512 and 16 bits: real ones moved and turned, with some noise.

    Without the real ones beside the project, a phantom takes their place.
    """
    generator = np.random.default_rng(4)
    sources = [dcmread(path) for path in sorted(REAL.glob("**/*.dcm"))] or [_phantom()]
    values = [source.pixel_array for source in sources]
    files = []
    for number in range(count):
        chosen = number % len(sources)
        source = sources[chosen]
        moved = np.roll(values[chosen], generator.integers(-40, 41, 2), (0, 1))
        turned = np.rot90(moved, int(generator.integers(4)))
        noise = generator.integers(-NOISE, NOISE + 1, turned.shape, dtype=np.int16)
        source.PixelData = (turned + noise).astype(turned.dtype).tobytes()
        source.SOPInstanceUID = UID(f"1.2.3.{number}")
        target = io.BytesIO()
        source.save_as(target)
        files.append(target.getvalue())
    return files


def _phantom() -> Any:
    """Return a body with two lungs, in Hounsfield units."""
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    values = np.full((SIDE, SIDE), -1000, np.int16)
    values[(x / 0.8) ** 2 + (y / 0.6) ** 2 < 1] = 40
    for side in (-0.35, 0.35):
        values[((x - side) / 0.25) ** 2 + (y / 0.4) ** 2 < 1] = -800
    window = {"WindowCenter": "-600", "WindowWidth": "1500", "Modality": "CT"}
    return dcmread(io.BytesIO(dicom_files.image(values, **window)))


def by_pydicom(data: bytes, spec: InputSpec) -> NDArray[np.uint8]:
    """Decode an uncompressed grey file as a program without guards does; uint8 (H, W, 3)."""
    elements = dcmread(io.BytesIO(data))
    stored = elements.pixel_array
    syntax = elements.file_meta.TransferSyntaxUID
    file = File(b"", elements, syntax, 0, 0, "PixelData")
    values = stored.view(f"u{stored.dtype.itemsize}")
    pixels = Pixels(values, elements.BitsStored, elements.PhotometricInterpretation)
    picture = Image.fromarray(rendering.render(file, 0, pixels, spec)).convert("RGB")
    size = (spec.width, spec.height)
    return np.asarray(picture.resize(size, RESAMPLING[spec.interpolation]))


def ingest(cluster: Cluster, count: int, connections: int) -> list[Line]:
    """Insert CT slices into a collection of the clinical model, and embed first ones."""
    onnx = MODEL.read_bytes()
    with connect(cluster.dsn()) as admin:
        admin.execute("SELECT siamese.register_model('clinical', %s)", (onnx,))
        query = "SELECT specification FROM siamese.models WHERE name = 'clinical'"
        row = admin.execute(query).fetchone()
    assert row is not None
    spec = ModelSpec.from_json(row[0])
    files = slices(count)
    for file in files[:20]:
        assert np.array_equal(by_pydicom(file, spec.input), decode_image(file, spec.input))
    rows = min(ROWS, count // 2)
    contest = Contest(
        {rows: count // rows},
        what=WHAT,
        prefix="ct_",
        model="clinical",
        storage="EXTERNAL",
        decode=by_pydicom,
        alone=ALONE,
    )
    lines = insert(cluster, spec, onnx, files, contest)
    return [*lines, *_first_files(cluster, files[:connections])]


def _first_files(cluster: Cluster, files: list[bytes]) -> list[Line]:
    """Embed a file per connection, and import what that needs in a Python process, in turns."""
    seconds: dict[str, list[float]] = {EMBED: [], BARE: []}
    for file in files:
        seconds[BARE].append(ready("import numpy, pydicom, imagecodecs"))
        began = time.perf_counter()
        with Session(cluster.dsn()) as session:
            statement = "SELECT siamese.embed_image($1, 'clinical')"
            session.prepare("", statement, BYTEA)(file)
            seconds[EMBED].append(time.perf_counter() - began)
    return [Line(FIRST, name, Summary.of(values)) for name, values in seconds.items()]


def bars(lines: list[Line]) -> list[Bar]:
    """Return the promises on these figures.

    To store half a megabyte per row takes PostgreSQL as long as to embed it. So what counts is the
    time that the trigger adds.
    """
    figures = {line.name: line.figure() for line in lines}
    added = figures[TRIGGER] - figures[PLAIN]
    what = "CT slices, what the trigger adds to an insert, share of pydicom + ONNX Runtime alone"
    beyond = figures[EMBED] - figures[BARE]
    return [
        Bar(what, 100 * figures[ALONE] / added, BAR, "%"),
        Bar("first DICOM file, beyond a bare process", beyond, FIRST_BAR, "ms", is_most=True),
    ]
