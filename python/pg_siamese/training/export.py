"""Export to ONNX, with the metadata that the database reads, and the checks of the result."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pg_siamese.evaluation.runtime import open_session

OPSET = 18
LEAST_HALVED = 1024  # weights: smaller ones save nothing that counts


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode, each Sequential's convolution + batch norm as one."""
    module = copy.deepcopy(module).eval()
    for part in module.modules():
        if (
            isinstance(part, nn.Sequential)
            and len(part) == 2
            and isinstance(part[0], nn.Conv2d)
            and isinstance(part[1], nn.BatchNorm2d)
        ):
            part[0], part[1] = fuse_conv_bn_eval(part[0], part[1]), nn.Identity()
    return module


def to_onnx(
    encoder: nn.Module, size: tuple[int, int] = (28, 28), half: bool = False
) -> onnx.ModelProto:
    """Return an encoder as ONNX: uint8 ``image`` (batch, H, W, 3) to float32 ``embedding`` (batch,
    d).

    With ``half``, weights are kept as float16 and made float32 when the file is opened. A weight
    that float16 can't hold stays as it is.
    """
    example = torch.zeros((2, *size, 3), dtype=torch.uint8)
    # The exporter warns that torchvision, of which nothing is used here, is not installed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            fold_batch_norms(encoder),
            (example,),
            input_names=["image"],
            output_names=["embedding"],
            opset_version=OPSET,
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _strip(model)
    if half:
        _halve_weights(model.graph)
    return model


def _strip(model: onnx.ModelProto) -> None:
    # The exporter writes Python stack traces, with the paths of this machine, into every node.
    del model.metadata_props[:]
    graph = model.graph
    del graph.metadata_props[:]
    graph.doc_string = ""
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]


def _halve_weights(graph: onnx.GraphProto) -> None:
    # ONNX Runtime folds casts of constants into them as it opens a file: the graph runs as before.
    casts = []
    for weight in graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if weight.data_type != onnx.TensorProto.FLOAT or values.size < LEAST_HALVED:
            continue
        if np.abs(values).max() > np.finfo(np.float16).max:
            continue
        stored = f"{weight.name}_float16"
        casts.append(
            onnx.helper.make_node("Cast", [stored], [weight.name], to=onnx.TensorProto.FLOAT)
        )
        weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), stored))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def embed_onnx(
    model: Path | bytes, pixels: npt.NDArray[np.uint8], batch_size: int = 64, threads: int = 1
) -> npt.NDArray[np.float32]:
    """Embed uint8 pixels (N, H, W, 3) in ONNX Runtime: float32 (N, d)."""
    session = open_session(model, threads)
    return np.concatenate(
        [
            session.run(["embedding"], {"image": pixels[start : start + batch_size]})[0]
            for start in range(0, len(pixels), batch_size)
        ]
    )


def cosines(
    encoder: nn.Module, model: Path | bytes, pixels: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float64]:
    """Return the cosines (N,) between PyTorch's and ONNX Runtime's embeddings of images."""
    from pg_siamese.evaluation.retrieval import distances
    from pg_siamese.training.learner import embed

    expected = embed(encoder, torch.from_numpy(pixels))
    return 1 - distances(expected, embed_onnx(model, pixels))


def images_per_second(path: Path, batch_size: int = 32, seconds: float = 2.0) -> float:
    """Measure one thread of ONNX Runtime: images per second of CPU time, best of ten stretches.

    CPU time, so that other work on the machine counts little.
    """
    session = open_session(path)
    shape = session.get_inputs()[0].shape[1:]
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, *shape), np.uint8)
    session.run(None, {"image": pixels})
    best = 0.0
    for _ in range(10):
        start, runs = time.process_time(), 0
        while (elapsed := time.process_time() - start) < seconds / 10:
            session.run(None, {"image": pixels})
            runs += 1
        best = max(best, runs * batch_size / elapsed)
    return best
