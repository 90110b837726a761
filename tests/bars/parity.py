"""The same file gives the same vector: in PostgreSQL, in ONNX Runtime outside, and in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import numpy_helper

from pg_siamese.datasets import LabelledImages
from pg_siamese.sources import png
from tests.bars.gallery import MODELS, Connection, image_sets

LEAST_COSINE = 0.9999


def torch_encoder(path: Path) -> Any:
    """Rebuild the training code's network and give it the weights of an ONNX file.

    The network's shape is read from the weights and from the strides of the graph's convolutions,
    whose names are those of the network's own parts; every weight must find its place.
    """
    import torch

    from pg_siamese.training.export import fold_batch_norms
    from pg_siamese.training.networks.residual import ResidualEncoder

    graph = onnx.load_model(str(path), load_external_data=False).graph
    weights = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    strides = {
        node.input[1]: next(a.ints[0] for a in node.attribute if a.name == "strides")
        for node in graph.node
        if node.op_type == "Conv"
    }
    stages: list[tuple[int, int]] = []
    while (name := f"blocks.{len(stages)}.first.0.weight") in weights:
        stages.append((weights[name].shape[0], strides[name]))
    network = fold_batch_norms(
        ResidualEncoder(
            dimension=weights["head.weight"].shape[0],
            stem=(weights["stem.0.weight"].shape[0], strides["stem.0.weight"]),
            stages=tuple(stages),
        )
    )
    expected = set(network.state_dict())
    # What else the graph holds are constants of operators, not weights.
    state = {name: torch.tensor(weights[name]) for name in expected}
    assert {name for name in weights if "." in name} == expected
    network.load_state_dict(state, strict=True)
    return network.eval()


def embed_torch(path: Path, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Embed uint8 pixels (N, 28, 28, 3) by PyTorch; float32 (N, d)."""
    import torch

    network = torch_encoder(path)
    with torch.inference_mode():
        result: npt.NDArray[np.float32] = network(torch.from_numpy(pixels)).numpy()
    return result


def embed_onnxruntime(path: Path, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Embed uint8 pixels (N, 28, 28, 3) by ONNX Runtime with its default settings."""
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
    """Compare on images of each data set that this machine has.

    Args:
        connect: opens an autocommit connection.
        count: images of each data set.
        model: ``medical`` or ``fashion_mnist``.
        with_torch: whether PyTorch takes part.
        report: takes lines.
    """

    connect: Callable[[], Connection]
    count: int = 500
    model: str = "medical"
    with_torch: bool = True
    report: Callable[[str], None] = print

    def run(self) -> int:
        """Compare; returns how many data sets there were."""
        session = self.connect()
        path = MODELS / f"{self.model}.onnx"
        session.execute("SELECT register_model(%s, %s)", (self.model, path.read_bytes()))
        session.execute("CREATE TABLE public.parity (id bigserial PRIMARY KEY, image bytea)")
        session.execute(
            "SELECT create_collection('parity', 'public.parity', model => %s)", (self.model,)
        )
        names: dict[str, list[LabelledImages]] = {}
        for images in image_sets(self.count):
            names.setdefault(images.name, []).append(images)
        for name, parts in names.items():
            pixels = np.concatenate([part.rgb() for part in parts])[: self.count]
            grey = parts[0].images.ndim == 3
            files = [png(image[..., 0] if grey else image) for image in pixels]
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
        table = session.execute(
            "SELECT 'siamese.embedding_' || collection_id FROM siamese.collections"
            " WHERE name = 'parity'"
        ).fetchone()
        assert table is not None
        stored = session.execute(
            f"SELECT e.embedding::real[] FROM public.parity AS b INNER JOIN {table[0]} AS e"
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
