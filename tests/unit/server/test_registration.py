"""Which ONNX files become models, and how they are understood."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pg_siamese_server.encoding.registration import inspect_model
from pg_siamese_server.encoding.specification import ModelSpec
from pg_siamese_server.errors import ModelError
from tests.support import graph, grid_encoder
from tools.project import ROOT

FLOAT = TensorProto.FLOAT


def means(source: str = "image", result: str = "embedding", axes: Sequence[int] = (2, 3)) -> Any:
    return helper.make_node("ReduceMean", [source], [result], axes=axes, keepdims=0)


MEANS = means()
GOOD = graph([MEANS])


def refuse(data: bytes, message: str, **given: object) -> ModelError:
    with pytest.raises(ModelError) as caught:
        inspect_model(data, given)
    text = f"{caught.value.message} {caught.value.detail} {caught.value.hint}"
    assert message in text
    return caught.value


def test_model_of_this_project(onnx: bytes) -> None:
    spec, dimension, metadata = inspect_model(onnx, {})
    assert metadata["format"] == 1
    assert dimension == metadata["dimension"]
    assert (spec.input.width, spec.input.height, spec.input.channels) == (28, 28, 3)
    assert spec.metric == metadata["metric"]
    assert spec.weight == metadata["calibration"]["weight"]
    assert spec.threshold == metadata["threshold"]


def test_given_values_go_before_metadata() -> None:
    described = json.dumps({"metric": "l2", "threshold": 1.5, "input": {"resize": "pad"}})
    model = graph([MEANS], metadata=described)
    spec, _, _ = inspect_model(model, {})
    assert (spec.metric, spec.threshold, spec.input.resize) == ("l2", 1.5, "pad")
    spec, _, _ = inspect_model(model, {"metric": "cosine", "input": {"resize": "crop"}})
    assert (spec.metric, spec.threshold, spec.input.resize) == ("cosine", 1.5, "crop")


def test_specification_survives_json() -> None:
    given = {"mean": [0.1, 0.2, 0.3], "calibration": {"weight": -3.0, "bias": 1.0}}
    spec, _, _ = inspect_model(GOOD, given)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        (("n", 3, 8, 16), FLOAT, (16, 8, 3)),
        (("n", 1, 8, 16), FLOAT, (16, 8, 1)),
        (("n", 8, 16, 3), FLOAT, (16, 8, 3)),
        (("n", 8, 16, 1), TensorProto.UINT8, (16, 8, 1)),
        ((1, 3, 8, 16), FLOAT, (16, 8, 3)),
        ((4, 8, 16, 3), TensorProto.UINT8, (16, 8, 3)),
    ],
)
def test_layouts(shape: tuple[int | str, ...], dtype: int, expected: tuple[int, int, int]) -> None:
    spec, dimension, _ = inspect_model(grid_encoder(shape, dtype, pool=4), {})
    assert (spec.input.width, spec.input.height, spec.input.channels) == expected
    assert dimension == 2 * 4 * expected[2]


def test_dynamic_size_must_be_given() -> None:
    model = grid_encoder(("n", 3, "h", "w"), pool=4)
    refuse(model, "image_width and image_height")
    refuse(model, "height", input={"width": 8})
    spec, dimension, _ = inspect_model(model, {"input": {"width": 12, "height": 8}})
    assert (spec.input.width, spec.input.height, dimension) == (12, 8, 18)


@pytest.mark.parametrize("data", [b"", b"\0", b"not a model", b"\x89PNG\r\n\x1a\n", GOOD[:-40]])
def test_not_onnx(data: bytes) -> None:
    refuse(data, "model")


@pytest.mark.law(7)
def test_external_data() -> None:
    model = onnx.load_from_string(grid_encoder(("n", 3, 8, 8), pool=4))
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    refuse(model.SerializeToString(), "another file")


@pytest.mark.law(7)
def test_external_data_inside_a_branch() -> None:
    tensor = helper.make_tensor("hidden", FLOAT, [1], [0.0])
    tensor.external_data.add(key="location", value="weights.bin")
    constant = helper.make_node("Constant", [], ["value"], value=tensor)
    output = helper.make_tensor_value_info("value", FLOAT, [1])
    branch = helper.make_graph([constant], "branch", [], [output])
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    nodes = [
        helper.make_node("Constant", [], ["condition"], value=yes),
        helper.make_node("If", ["condition"], ["chosen"], then_branch=branch, else_branch=branch),
        means(result="means"),
        helper.make_node("Add", ["means", "chosen"], ["embedding"]),
    ]
    refuse(graph(nodes), "another file")


@pytest.mark.law(7)
def test_custom_operator() -> None:
    node = helper.make_node("Evil", ["image"], ["embedding"], domain="custom.example")
    error = refuse(graph([node], domains=["custom.example"]), 'unknown domain "custom.example"')
    assert error.sqlstate == "22023"


def test_two_inputs_or_outputs() -> None:
    two = [("image", FLOAT, ("n", 3, 8, 8)), ("other", FLOAT, ("n", 3, 8, 8))]
    added = helper.make_node("Add", ["image", "other"], ["sum"])
    error = refuse(graph([added, means("sum")], inputs=two), "2 inputs and 1 outputs")
    assert "returns the embedding alone" in str(error.hint)
    outputs = [("embedding", FLOAT, ("n", 3)), ("more", FLOAT, ("n", 3))]
    copy = helper.make_node("Identity", ["embedding"], ["more"])
    refuse(graph([MEANS, copy], outputs=outputs), "1 inputs and 2 outputs")


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (TensorProto.INT32, ("n", 3, 8, 8)),
        (TensorProto.DOUBLE, ("n", 3, 8, 8)),
        (TensorProto.FLOAT16, ("n", 3, 8, 8)),
        (FLOAT, ("n", 3, 8)),
        (FLOAT, ("n", 4, 8, 8)),
        (FLOAT, ("n", "c", "h", "w")),
    ],
)
def test_input_that_is_no_image(dtype: int, shape: tuple[int | str, ...]) -> None:
    node = helper.make_node("Identity", ["image"], ["embedding"])
    model = graph([node], inputs=[("image", dtype, shape)], outputs=[("embedding", dtype, shape)])
    refuse(model, "input is not a batch of images")


@pytest.mark.parametrize("axes", [[0, 1, 2, 3], [1, 2, 3], [3], [0, 2, 3]])
def test_output_of_wrong_rank(axes: list[int]) -> None:
    shape: list[int | str] = ["batch", 3, 8, 8]
    kept: list[int | str] = [size for axis, size in enumerate(shape) if axis not in axes]
    model = graph([means(axes=axes)], outputs=[("embedding", FLOAT, kept)])
    refuse(model, "not a batch of embeddings")


@pytest.mark.parametrize(
    ("shape", "hint"),
    [((16, 12), "class token"), ((3, 8, 8), "height and width"), ((192, 1, 1), "flatten it")],
)
def test_output_that_is_not_pooled(shape: tuple[int, ...], hint: str) -> None:
    """Tokens of a transformer, feature maps of a convolution, and means that kept their axes."""
    reshape = helper.make_node("Reshape", ["image", "shape"], ["embedding"])
    sizes: list[int | str] = ["batch", *shape]
    constants = {"shape": np.array([-1, *shape])}
    model = graph([reshape], outputs=[("embedding", FLOAT, sizes)], constants=constants)
    assert hint in str(refuse(model, "one row of numbers for each image").hint)


@pytest.mark.parametrize("newer", ["opset", "ir"])
def test_format_of_a_later_version(newer: str) -> None:
    """What ONNX Runtime says, without the place in its source."""
    model = onnx.load_from_string(GOOD)
    if newer == "opset":
        model.opset_import[0].version = 99
    else:
        model.ir_version = 99
    error = refuse(model.SerializeToString(), "99")
    assert error.message == "ONNX Runtime cannot open the model"
    assert "opset_version" in str(error.hint)
    assert not any(part in str(error.detail) for part in ("[ONNXRuntimeError]", "/", "::"))


def test_newest_format_is_that_of_the_docs() -> None:
    text = (ROOT / "docs" / "encoders.md").read_text()
    found = re.search(r"up to operator set (\d+) and IR version (\d+)", text)
    assert found
    opset, ir = map(int, found.groups())
    for more in (0, 1):
        for new in ((opset + more, 9), (17, ir + more)):
            model = onnx.load_from_string(grid_encoder(("n", 3, 8, 8), pool=4))
            model.opset_import[0].version, model.ir_version = new
            if more:
                refuse(model.SerializeToString(), "cannot open the model")
            else:
                inspect_model(model.SerializeToString(), {})


def test_unknown_operator() -> None:
    unknown = graph([helper.make_node("Unknown", ["image"], ["embedding"])])
    assert refuse(unknown, "No Op registered for Unknown").hint is None


def test_graph_that_does_not_run() -> None:
    reshape = helper.make_node("Reshape", ["image", "shape"], ["embedding"])
    model = graph([reshape], constants={"shape": np.array([7, 5])})
    error = refuse(model, "Input shape:{1,3,8,8}, requested shape:{7,5}")
    assert error.message == "ONNX Runtime cannot run the model"


def test_output_of_wrong_type() -> None:
    cast = helper.make_node("Cast", ["means"], ["embedding"], to=TensorProto.STRING)
    nodes = [means(result="means"), cast]
    text = graph(nodes, outputs=[("embedding", TensorProto.STRING, ("batch", 3))])
    refuse(text, "not a batch of embeddings")


def test_embedding_that_depends_on_its_batch() -> None:
    """Such a model would give an image another vector in each statement."""
    nodes = [
        means(result="means"),
        helper.make_node("ReduceMean", ["means"], ["centre"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["means", "centre"], ["around"]),
        helper.make_node("Add", ["around", "one"], ["embedding"]),
    ]
    refuse(graph(nodes, constants={"one": np.ones(1, np.float32)}), "depends on the other images")
    one_row = [helper.make_node("ReduceMean", ["image"], ["x"], axes=[0], keepdims=1), means("x")]
    refuse(graph(one_row, outputs=[("embedding", FLOAT, (1, 3))]), "[1, 3] for two images")


def test_output_that_is_not_finite() -> None:
    nodes = [means(result="means"), helper.make_node("Div", ["means", "zero"], ["embedding"])]
    refuse(graph(nodes, constants={"zero": np.zeros(1, np.float32)}), "not finite")


def test_too_many_dimensions() -> None:
    node = helper.make_node("Flatten", ["image"], ["embedding"])
    inputs = [("image", FLOAT, ("n", 3, 80, 80))]
    model = graph([node], inputs=inputs, outputs=[("embedding", FLOAT, ("n", 19200))])
    assert refuse(model, "19200 dimensions").sqlstate == "54000"


@pytest.mark.parametrize(
    "given",
    [
        {"mean": [0.0, 0.0]},
        {"mean": [0.0, None, 0.0]},
        {"std": [1.0, 0.0, 1.0]},
        {"std": [1.0, float("nan"), 1.0]},
        {"metric": "dot"},
        {"threshold": float("nan")},
        {"calibration": {"weight": 1.0}},
        {"calibration": {"weight": "1", "bias": 0.0}},
        {"calibration": 5},
        {"input": {"width": 9}},
        {"input": {"resize": "zoom"}},
        {"input": {"interpolation": "cubic"}},
        {"input": {"max_bytes": 0}},
    ],
)
def test_wrong_specification(given: dict[str, object]) -> None:
    refuse(GOOD, "", **given)


@pytest.mark.parametrize(
    "metadata",
    ["{", "[]", '{"input": 5}', '{"input": {"width": 8.0}}', '{"threshold": NaN}', '{"mean": "x"}'],
)
def test_wrong_metadata(metadata: str) -> None:
    refuse(graph([MEANS], metadata=metadata), "")


def test_mean_and_std_are_for_float_input(onnx: bytes) -> None:
    refuse(onnx, "float input only", mean=[0.5, 0.5, 0.5])
