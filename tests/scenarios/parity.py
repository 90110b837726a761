"""The same file gives the same vector: in PostgreSQL, in ONNX Runtime outside, and in PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import numpy_helper

from pg_siamese.client.sources import png
from pg_siamese.datasets import LabelledImages
from pg_siamese_server.encoding.images import decode_image
from pg_siamese_server.encoding.registration import inspect_model
from tests.scenarios.gallery import MODELS, Connection, image_sets
from tests.support import one

LEAST_COSINE = 0.9999


def torch_encoder(path: Path) -> Any:
    """Build the network of an ONNX file's experiment and give it the file's weights.

    Those of the graph have the names of the network's own parts; every weight must find its place.
    """
    import torch
    from torch import nn

    from pg_siamese.training.experiments import load_experiment
    from pg_siamese.training.export import fold_batch_norms
    from pg_siamese.training.registry import build_network
    from pg_siamese_server.encoding.encoder import METADATA_KEY

    model = onnx.load_model(str(path), load_external_data=False)
    metadata = json.loads(next(p.value for p in model.metadata_props if p.key == METADATA_KEY))
    experiment = load_experiment(metadata["name"])
    settings, size = experiment.network, (experiment.input.height, experiment.input.width)
    sets = [each["name"] for each in metadata["training"]["data"]]
    network = fold_batch_norms(
        build_network(settings.name, settings.dimension, size, settings.options, sets)
    )
    weights = {
        item.name: torch.tensor(numpy_helper.to_array(item)) for item in model.graph.initializer
    }
    # Weights that are kept as float16 are cast by the graph, to their own names.
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in weights:
            weights[node.output[0]] = weights.pop(node.input[0]).float()
    biases = {
        node.input[1]: weights[node.input[2]] for node in model.graph.node if node.op_type == "Conv"
    }
    state = network.state_dict()
    # What else the graph holds are constants of operators, and biases under names of its own.
    assert {name for name in weights if name.endswith(".weight")} <= set(state)
    modules = network.named_modules()
    kinds = nn.BatchNorm1d | nn.BatchNorm2d
    norms = {name: part for name, part in modules if isinstance(part, kinds) and part.affine}
    state |= {name: weights[name] for name in state if name in weights}
    for name, norm in norms.items():
        # The exporter folded it into the layer before it. If that has no bias of its own, the bias
        # is what is left of it.
        before = layer_before(name)
        if f"{before}.bias" in state:
            bias = torch.zeros_like(state[f"{before}.bias"])
        else:
            bias = biases[f"{before}.weight"]
        state |= {
            f"{name}.running_mean": torch.zeros_like(bias),
            f"{name}.running_var": torch.full_like(bias, 1 - norm.eps),
            f"{name}.weight": torch.ones_like(bias),
            f"{name}.bias": bias,
        }
    left = [
        name
        for name in state
        if name not in weights
        and name.rpartition(".")[0] not in norms
        and not name.endswith(".num_batches_tracked")
    ]
    assert left == []
    network.load_state_dict(state, strict=True)
    return network.eval()


def layer_before(norm: str) -> str:
    """Return the name of the convolution or linear layer that a batch norm follows."""
    parent, _, own = norm.rpartition(".")
    names = {
        "1": "0",
        "3": "2",
        "_bn0": "_expand_conv",
        "_bn1": "_depthwise_conv",
        "_bn2": "_project_conv",
    }
    return f"{parent}.{names[own]}"


def embed_torch(path: Path, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Embed uint8 pixels (N, H, W, 3) by PyTorch; float32 (N, d)."""
    import torch

    network = torch_encoder(path)
    with torch.inference_mode():
        result: npt.NDArray[np.float32] = network(torch.from_numpy(pixels)).numpy()
    return result


def embed_onnxruntime(path: Path, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Embed uint8 pixels (N, H, W, 3) by ONNX Runtime with its default settings."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    result: npt.NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: pixels})[0]
    return result


def least_cosine(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Return the least cosine between vectors of the same rows."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float((np.einsum("nd,nd->n", a, b) / norms).min())


@dataclass
class Parity:
    """Compare on so many images of each data set that this machine has."""

    connect: Callable[[], Connection]
    count: int = 500
    model: str = "medical"
    with_torch: bool = True
    report: Callable[[str], None] = print

    def run(self) -> int:
        """Compare; returns how many data sets there were."""
        session = self.connect()
        path = MODELS / f"{self.model}.onnx"
        onnx_bytes = path.read_bytes()
        spec, _, _ = inspect_model(onnx_bytes, {})
        session.execute("SELECT register_model(%s, %s)", (self.model, onnx_bytes))
        session.execute("CREATE TABLE public.parity (id bigserial PRIMARY KEY, image bytea)")
        session.execute(
            "SELECT create_collection('parity', 'public.parity', model => %s)", (self.model,)
        )
        names: dict[str, list[LabelledImages]] = {}
        for part in image_sets(self.count):
            names.setdefault(part.name, []).append(part)
        for name, parts in names.items():
            images = np.concatenate([part.images for part in parts])[: self.count]
            files = [png(image) for image in images]
            pixels = np.stack([decode_image(file, spec.input) for file in files])
            inside = self.inside(session, files)
            outside = {"ONNX Runtime outside": embed_onnxruntime(path, pixels)}
            if self.with_torch:
                outside["PyTorch"] = embed_torch(path, pixels)
            for where, vectors in inside.items():
                for other, expected in outside.items():
                    cosine = least_cosine(vectors, expected)
                    self.report(
                        f"{self.model}, {len(pixels)} of {name}: {where} and {other}:"
                        f" least cosine {cosine:.7f}"
                    )
                    assert cosine >= LEAST_COSINE, (name, where, other, cosine)
        return len(names)

    def inside(self, session: Connection, files: list[bytes]) -> dict[str, npt.NDArray[Any]]:
        """Embed files inside PostgreSQL, by the trigger and by the function."""
        session.execute("TRUNCATE public.parity")
        session.execute(
            "INSERT INTO public.parity (image) SELECT * FROM unnest(%s::bytea[])",
            (files,),
            binary=True,
        )
        query = "SELECT collection_id FROM siamese.collections WHERE name = 'parity'"
        stored = session.execute(
            "SELECT e.embedding::real[] FROM public.parity AS b"
            f" INNER JOIN siamese.embedding_{one(session, query)} AS e"
            " ON e.key = b.id ORDER BY b.id",
            binary=True,
        ).fetchall()
        computed = session.execute(
            "SELECT embed_image(image, %s)::real[] FROM public.parity ORDER BY id",
            (self.model,),
            binary=True,
        ).fetchall()
        assert len(stored) == len(computed) == len(files)
        return {
            "stored": np.array([row[0] for row in stored]),
            "embed_image": np.array([row[0] for row in computed]),
        }
