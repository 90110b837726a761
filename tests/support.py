"""What many test files share: of databases, of threads, image files, small ONNX graphs.

What belongs to one kind of test lies with it, in ``tests/database/tables.py`` for example.
"""

from __future__ import annotations

import io
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import psycopg
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tests.conftest import Connection

Array = np.ndarray[Any, Any]
PATIENCE = 60  # seconds


@contextmanager
def sql_error(sqlstate: str, *texts: str) -> Iterator[None]:
    """Expect an error with this SQLSTATE and all of these texts in message, DETAIL or HINT."""
    with pytest.raises(psycopg.Error) as caught:
        yield
    error = caught.value
    report = f"{error.diag.message_primary}\n{error.diag.message_detail}\n{error.diag.message_hint}"
    assert error.sqlstate == sqlstate, report
    for text in texts:
        assert text in report, report
    assert_plain(error)


def assert_plain(error: psycopg.Error) -> None:
    """No name of an exception in the message, and no traceback in CONTEXT."""
    message, context = error.diag.message_primary or "", error.diag.context or ""
    # A cancel is PostgreSQL's own, which PL/Python passes on in its way.
    if error.sqlstate != "57014":
        assert message and not re.match(r"\w+\.\w+: ", message), message
        assert "Traceback" not in context and "File" not in context, context


def one(db: Connection, query: str, *values: Any) -> Any:
    """Return the first column of the first row of a query."""
    row = db.execute(query, values or None).fetchone()
    assert row is not None, query
    return row[0]


def rows_of(db: Connection, query: str, *values: Any) -> list[Any]:
    """Return a query's rows."""
    return db.execute(query, values or None).fetchall()


def column_of(db: Connection, query: str, *values: Any) -> list[Any]:
    """Return the first column of a query's rows."""
    return [row[0] for row in rows_of(db, query, *values)]


def notices_of(db: Connection) -> list[str]:
    """Return the list that takes the notices of a session from now on, each with its HINT."""
    found: list[str] = []
    db.add_notice_handler(
        lambda notice: found.append(f"{notice.message_primary} {notice.message_hint or ''}".strip())
    )
    return found


def wait_until(condition: Callable[[], object], what: str = "nothing happens") -> None:
    """Wait until a condition holds, for a minute at most."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def in_threads(*bodies: Callable[[], object]) -> list[BaseException]:
    """Run functions at the same time; return their errors."""
    errors: list[BaseException] = []

    def run(body: Callable[[], object]) -> None:
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def exact_distances(
    db: Connection, image: bytes, where: str = "true", operator: str = "<=>"
) -> dict[int, float]:
    """Distances of a query to all rows of ``siamese.images`` that qualify, by plain SQL."""
    rows = db.execute(
        f"SELECT b.image_id, e.embedding {operator} (SELECT siamese.embed_image(%s))"
        " FROM siamese.images AS b JOIN siamese.embedding_1 AS e ON e.key = b.image_id"
        f" WHERE {where}",
        (image,),
    )
    return dict(rows.fetchall())


def assert_exact(answer: Sequence[Any], truth: dict[int, float], k: int) -> None:
    """Check rows (rank, key, distance, …): the k nearest of ``truth``, each with its distance."""
    keys = [row[1] for row in answer]
    distances = [row[2] for row in answer]
    assert [row[0] for row in answer] == list(range(1, len(answer) + 1))
    assert len(set(keys)) == len(keys) == min(k, len(truth))
    np.testing.assert_allclose(distances, [truth[key] for key in keys], atol=1e-5)
    np.testing.assert_allclose(distances, sorted(truth.values())[: len(keys)], atol=1e-5)


def encode(pixels: Array, kind: str = "PNG", **options: Any) -> bytes:
    """Encode pixels (height, width[, channels]) as an image file."""
    return saved(Image.fromarray(pixels), kind, **options)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return an image as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grid_encoder(
    shape: Sequence[int | str],
    dtype: int = TensorProto.FLOAT,
    *,
    pool: int,
    offset: float = 0.0,
    metadata: str | None = None,
) -> bytes:
    """An encoder whose embedding is the means of squares of ``pool`` x ``pool`` pixels.

    ``shape`` is NCHW for float32, NHWC for uint8 or where the last item is 1 or 3. The
    embedding is ordered channels, rows, columns, with ``offset`` added to each number.
    """
    nodes, last = [], "image"
    if dtype != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [last], ["floats"], to=TensorProto.FLOAT))
        last = "floats"
    if shape[3] in (1, 3):
        nodes.append(helper.make_node("Transpose", [last], ["first"], perm=[0, 3, 1, 2]))
        last = "first"
    nodes += [
        helper.make_node(
            "AveragePool", [last], ["means"], kernel_shape=[pool, pool], strides=[pool, pool]
        ),
        helper.make_node("Flatten", ["means"], ["flat"]),
        helper.make_node("Add", ["flat", "offset"], ["embedding"]),
    ]
    return graph(
        nodes,
        inputs=[("image", dtype, shape)],
        outputs=[("embedding", TensorProto.FLOAT, [shape[0], "dimension"])],
        constants={"offset": np.array([offset], dtype=np.float32)},
        metadata=metadata,
    )


Tensor = tuple[str, int, Sequence[int | str]]


def graph(
    nodes: list[Any],
    inputs: Sequence[Tensor] = (("image", TensorProto.FLOAT, ("batch", 3, 8, 8)),),
    outputs: Sequence[Tensor] = (("embedding", TensorProto.FLOAT, ("batch", 3)),),
    constants: dict[str, Array] | None = None,
    metadata: str | None = None,
    domains: Sequence[str] = (),
) -> bytes:
    """Serialise an ONNX model."""
    body = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(*item) for item in inputs],
        [helper.make_tensor_value_info(*item) for item in outputs],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(name, 1) for name in domains)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=9)
    if metadata is not None:
        helper.set_model_props(model, {"pg_siamese": metadata})
    serialized: bytes = model.SerializeToString()
    return serialized


def grid(pixels: Array, pool: int, mean: Sequence[float], std: Sequence[float]) -> Array:
    """What :func:`grid_encoder` gives for one image, computed with NumPy.

    Args:
        pixels: uint8 (height, width, channels).
        pool: as there.
        mean, std: per channel, of pixels scaled to 0..1.
    """
    values = (pixels / 255 - np.asarray(mean)) / np.asarray(std)
    height, width, channels = values.shape
    squares = values.reshape(height // pool, pool, width // pool, pool, channels).mean(axis=(1, 3))
    embedding: Array = squares.transpose(2, 0, 1).ravel()
    return embedding


def heeding_interrupts() -> None:
    """Be the ``preexec_fn`` of a process that is to end by SIGINT.

    A shell's background job may have SIGINT ignored, and a child would inherit that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
