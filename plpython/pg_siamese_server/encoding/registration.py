"""Check an ONNX file before it becomes a model of the database."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx

from pg_siamese_server.encoding.encoder import Encoder, is_channels_first, metadata_of
from pg_siamese_server.encoding.specification import ModelSpec
from pg_siamese_server.errors import PROGRAM_LIMIT_EXCEEDED, ModelError

MAX_ONNX_BYTES = 512 * 1024 * 1024
MAX_DIMENSION = 16000  # of pgvector's type vector
MAX_BATCH_EFFECT = 0.02  # relative to the length of the embedding
# Operator sets that ONNX Runtime includes. Any other needs code from elsewhere.
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})


def inspect_model(data: bytes, given: dict[str, Any]) -> tuple[ModelSpec, int, dict[str, Any]]:
    """Check an ONNX file and work out how to feed it.

    Args:
        data: the serialised model.
        given: the administrator's settings, which override the file's own metadata. Keys as in
            ``ModelSpec.to_json``, the input's as in ``InputSpec.to_json``.

    Returns:
        The specification, the dimension of its embeddings, and the file's metadata.

    Raises:
        ModelError: not an encoder, or not a safe one.
    """
    if len(data) > MAX_ONNX_BYTES:
        raise ModelError(
            f"model of {len(data)} bytes is too large",
            sqlstate=PROGRAM_LIMIT_EXCEEDED,
            detail=f"The limit is {MAX_ONNX_BYTES} bytes.",
            hint="Store its weights as float16, or take a smaller model.",
        )
    model = _parse(data)
    _check_graph(model)
    metadata = metadata_of({entry.key: entry.value for entry in model.metadata_props})
    shape, dtype = _image_input(model)
    del model  # as large as the file, and the trial run needs as much again
    spec = _specification(shape, dtype, metadata, given)
    dimension = _trial_run(data, spec)
    if spec.domain is not None and spec.domain.dimension != dimension:
        raise ModelError(
            "model's domain is not understood",
            detail=f"Its centres have {spec.domain.dimension} dimensions, the embeddings"
            f" {dimension}.",
        )
    return spec, dimension, metadata


def _parse(data: bytes) -> onnx.ModelProto:
    try:
        model = onnx.load_from_string(data)
    except Exception:  # protobuf's decode errors have no common base
        raise ModelError("model is not an ONNX file") from None
    if not model.graph.node:
        raise ModelError("model is not an ONNX file", detail="It has no graph.")
    return model


def graphs(model: onnx.ModelProto) -> Iterator[Any]:
    """Yield the graph, the model's own functions, and all graphs within their nodes."""
    stack: list[Any] = [model.graph, *model.functions]
    while stack:
        graph = stack.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    stack.append(attribute.g)
                stack.extend(attribute.graphs)


def tensors(graph: Any) -> Iterator[onnx.TensorProto]:
    """Yield the tensors of one of these."""
    yield from getattr(graph, "initializer", ())
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def is_outside(tensor: onnx.TensorProto) -> bool:
    """Return whether a tensor's data are in another file."""
    return bool(tensor.external_data) or tensor.data_location == tensor.EXTERNAL


def _check_graph(model: onnx.ModelProto) -> None:
    own = {function.domain for function in model.functions}
    for graph in graphs(model):
        for node in graph.node:
            if node.domain not in DOMAINS | own:
                raise ModelError(
                    f'model uses operator "{node.op_type}" of unknown domain "{node.domain}"',
                    detail="Custom operators would need code that is not part of the server.",
                )
        for tensor in tensors(graph):
            if is_outside(tensor):
                raise ModelError(
                    "model keeps weights in another file",
                    detail=f'Tensor "{tensor.name}" has external data.',
                    hint="Export it with external_data=False (torch.onnx.export), or use"
                    " pg_siamese register-model, which puts the weights inside.",
                )


def _image_input(model: onnx.ModelProto) -> tuple[list[Any], str]:
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = [item for item in model.graph.input if item.name not in initializers]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise ModelError(
            f"model has {len(inputs)} inputs and {len(model.graph.output)} outputs",
            detail="An encoder takes one image tensor and gives one embedding tensor.",
            hint="Export a module whose forward takes the image and returns the embedding alone.",
        )
    tensor = inputs[0].type.tensor_type
    shape: list[Any] = [
        int(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or None
        for dim in tensor.shape.dim
    ]
    kinds = {onnx.TensorProto.UINT8: "tensor(uint8)", onnx.TensorProto.FLOAT: "tensor(float)"}
    dtype = kinds.get(tensor.elem_type)
    if dtype is None or len(shape) != 4 or not ({1, 3} & {shape[1], shape[3]}):
        raise ModelError(
            "model's input is not a batch of images",
            detail=f"Its type is {onnx.TensorProto.DataType.Name(tensor.elem_type)}, "
            f"its shape {shape}.",
            hint="Use uint8 NHWC or float32 NCHW, with 1 or 3 channels. A model of float16 can cast"
            " its input.",
        )
    return shape, dtype


def _specification(
    shape: list[Any], dtype: str, metadata: dict[str, Any], given: dict[str, Any]
) -> ModelSpec:
    first = is_channels_first(shape)
    channels = shape[1] if first else shape[3]
    height, width = (shape[2], shape[3]) if first else (shape[1], shape[2])
    described = metadata.get("input") or {}
    if not isinstance(described, dict):
        raise ModelError("model's metadata is not understood", detail="Its input is not an object.")
    merged = {**described, **given.get("input", {})}
    for name, fixed in (("width", width), ("height", height), ("channels", channels)):
        if isinstance(fixed, int):
            if merged.setdefault(name, fixed) != fixed:
                raise ModelError(f"model's input has a {name} of {fixed}, not {merged[name]}")
        elif name not in merged:
            raise ModelError(
                f"model does not fix the {name} of its input",
                hint="Give image_width and image_height.",
            )
    if dtype == "tensor(uint8)" and (given.get("mean") or given.get("std")):
        raise ModelError(
            "mean and std apply to models with float input only",
            detail="This model takes uint8 pixels and normalises them itself.",
        )
    try:
        return ModelSpec.from_json({**metadata, **given, "input": merged})
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ModelError("model's metadata is not understood", detail=f"{error}.") from None


def _trial_run(data: bytes, spec: ModelSpec) -> int:
    """Embed two very different images, alone and together, and return the dimension."""
    encoder = Encoder(data, spec)
    shape = (2, spec.input.height, spec.input.width, spec.input.channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels[1] //= 8
    alone = np.concatenate([encoder.run(image[None]) for image in pixels])
    together = encoder.run(pixels) if encoder.max_batch > 1 else alone
    if len(alone) != 2 or len(together) != 2:
        raise ModelError(
            "model's output is not a batch of embeddings",
            detail=f"It has shape {list(together.shape)} for two images.",
        )
    dimension = int(together.shape[1])
    if not 1 <= dimension <= MAX_DIMENSION:
        raise ModelError(
            f"model's embeddings have {dimension} dimensions",
            sqlstate=PROGRAM_LIMIT_EXCEEDED,
            detail=f"The type vector has at most {MAX_DIMENSION}.",
        )
    if not (np.isfinite(together).all() and np.isfinite(alone).all()):
        raise ModelError("model's output is not finite")
    # Rounding and the scales of dynamic quantisation may differ with the batch. Nothing else may.
    difference = np.linalg.norm(together - alone, axis=1)
    if (difference > MAX_BATCH_EFFECT * np.linalg.norm(together, axis=1)).any():
        raise ModelError(
            "model's embedding of an image depends on the other images of its batch",
            hint="Export the model in evaluation mode.",
        )
    return dimension
