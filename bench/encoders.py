"""Measure encoders of several sizes in the server: memory, and images per second of one core."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from bench.data import create_table
from bench.report import Line
from bench.session import Session, bytea_array, connect
from tests.scenarios.process import MEGABYTE, cpu_seconds, private_bytes, watched
from tools.cluster import Cluster
from tools.project import ROOT
from tools.report import SetupError

RATE = "images per second of one core"
MEMORY = "private memory of a session that embeds"
REGISTRATION = "largest memory of a session that registers"
SHIPPED = "medical, 28 x 28"
SIZE = 224
ROWS = 32


def encoders() -> Iterator[tuple[str, bytes]]:
    """Yield names and ONNX files: those that ship, and others of random weights or ImageNet's."""
    try:
        import torch
    except ImportError:
        raise SetupError("PyTorch is missing: run make deps-test, then this again") from None
    from pg_siamese.training.export import to_onnx
    from pg_siamese.training.networks.efficientnet import EfficientNetLite0
    from tests.networks import PixelEncoder, ResNet, VisionTransformer

    yield SHIPPED, (ROOT / "models" / "medical.onnx").read_bytes()
    yield "clinical, 144 x 144", (ROOT / "models" / "clinical.onnx").read_bytes()
    torch.manual_seed(0)
    makers: dict[str, Any] = {
        "EfficientNet-lite0": partial(EfficientNetLite0, 128, (SIZE, SIZE)),
        "ResNet-50": lambda: PixelEncoder(ResNet()),
        "ViT-S/14": lambda: PixelEncoder(VisionTransformer(384, 12, 6, patch_size=14, size=SIZE)),
        "ViT-B/16": lambda: PixelEncoder(VisionTransformer(768, 12, 12, patch_size=16, size=SIZE)),
    }
    for name, make in makers.items():
        model = to_onnx(make(), (SIZE, SIZE))
        yield f"{name}, {SIZE} x {SIZE}", model.SerializeToString()


def pictures(count: int) -> list[bytes]:
    """Return JPEG files of smooth colours, of the size of the large encoders."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(count):
        noise = generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((SIZE, SIZE)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def measure(cluster: Cluster, seconds: float) -> list[Line]:
    """Register each encoder, and insert images through the trigger until a core worked so long."""
    rows = bytea_array(pictures(ROWS))
    lines = []
    for number, (name, onnx) in enumerate(encoders()):
        table = f"encoder_{number}"
        with connect(cluster.dsn()) as admin, watched(admin.info.backend_pid) as registering:
            query = "SELECT siamese.register_model(%s, %b::bytea)"
            admin.execute(query, (table, onnx))
        create_table(cluster, table, "sync", table)
        with Session(cluster.dsn()) as session:
            idle = private_bytes(session.pid)
            insertion = session.prepare_insert(f"bench.{table}")
            insertion(rows)
            count, began = 0, cpu_seconds(session.pid)
            while (spent := cpu_seconds(session.pid) - began) < seconds:
                insertion(rows)
                count += ROWS
            used = private_bytes(session.pid)
        file = f"ONNX file of {len(onnx) / MEGABYTE:.0f} MiB"
        note = f"{idle / MEGABYTE:.1f} MiB right after connecting"
        lines += [
            Line(RATE, name, value=count / spent, unit="images/s", note=file),
            Line(MEMORY, name, value=used / MEGABYTE, unit="MiB", note=note),
            Line(REGISTRATION, name, value=registering.most / MEGABYTE, unit="MiB"),
        ]
    return sorted(lines, key=lambda line: (RATE, MEMORY, REGISTRATION).index(line.section))
