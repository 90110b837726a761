"""Run an ONNX encoder on one core and with little memory: pixels in, embeddings out."""

from __future__ import annotations

import ctypes
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pg_siamese_server.encoding.specification import ModelSpec
from pg_siamese_server.errors import ImageError, ModelError
from pg_siamese_server.interrupts import PIECE_SECONDS, pending, signals_blocked

if TYPE_CHECKING:  # searches by a stored image open no encoder
    import onnxruntime

METADATA_KEY = "pg_siamese"
MAX_BATCH = 64
# ONNX Runtime maps memory for each large tensor anew. So large batches of large images are slower,
# not quicker, and take hundreds of megabytes.
MAX_BATCH_PIXELS = 2**16
# Pre-packed weights are a private copy in every session, so only small encoders have them.
PREPACK_BELOW_BYTES = 16 * 1024 * 1024
WATCH_SECONDS = 0.05
# pgvector counts in single precision, so it can't divide by the square of a smaller length.
MIN_SQUARED_LENGTH = float(np.finfo(np.float32).tiny)
# What ONNX Runtime puts before its reason: a code, and often a place in its source.
_NO_REASON = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |Exception during initialization: "
    r"|/\S+\.(?:cc|h):\d+ \S.*?\) "
)
MAX_REASON = 500
TOO_NEW = re.compile(r"opset|IR version")
BAD_EMBEDDING = (
    "The encoder fails on this image, perhaps because it is blank. Remove the image, or let the"
    " collection put such rows aside with on_error => 'quarantine'."
)


def pixels_to_input(
    pixels: NDArray[np.uint8], shape: list[Any], dtype: str, spec: ModelSpec
) -> NDArray[Any]:
    """Bring uint8 NHWC pixels to the layout and type of a graph's input.

    Args:
        pixels: uint8 (batch, height, width, channels).
        shape: the graph's input shape, for its layout.
        dtype: ONNX Runtime's type name, ``tensor(uint8)`` or ``tensor(float)``.
        spec: mean and std for float inputs.
    """
    if dtype == "tensor(uint8)":
        values: NDArray[Any] = pixels
    else:
        mean = np.asarray(spec.mean, dtype=np.float32) * np.float32(255)
        scale = 1.0 / (np.asarray(spec.std, dtype=np.float32) * np.float32(255))
        values = (pixels.astype(np.float32) - mean) * scale
    if is_channels_first(shape):
        values = np.ascontiguousarray(values.transpose(0, 3, 1, 2))
    return values


def is_channels_first(shape: list[Any]) -> bool:
    """Tell NCHW from NHWC by the place of the 1 or 3 channels in a graph's input shape."""
    return shape[1] in (1, 3) and shape[3] not in (1, 3)


@dataclass
class Encoder:
    """An ONNX graph opened for inference.

    Args:
        onnx: the serialised model.
        spec: how to feed it.
        threads: intra-op threads of ONNX Runtime.
    """

    onnx: bytes
    spec: ModelSpec
    threads: int = 1
    _seconds_per_image: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        """Open the session. Raises ``ModelError``."""
        with signals_blocked():  # its threads inherit the mask
            import onnxruntime

        self._run_options = onnxruntime.RunOptions
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        # Both would take memory for the rest of the session, and make no run quicker.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.log_severity_level = 4
        if len(self.onnx) > PREPACK_BELOW_BYTES:
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            with signals_blocked():
                self._session = onnxruntime.InferenceSession(
                    self.onnx, options, providers=["CPUExecutionProvider"]
                )
        except Exception as error:  # ONNX Runtime has no common base for its errors
            reason = _reason(error)
            raise ModelError(
                "ONNX Runtime cannot open the model",
                detail=reason,
                hint="Export the model with an older opset_version, such as 20."
                if TOO_NEW.search(reason)
                else None,
            ) from None
        # ONNX Runtime has copied the weights. Its Python class would keep the file, too.
        self.onnx = self._session._model_bytes = b""
        self._input = self._session.get_inputs()[0]
        self._output = self._session.get_outputs()[0].name
        return_freed_memory()
        batch = self._input.shape[0]
        self._fixed_batch = isinstance(batch, int)
        fitting = MAX_BATCH_PIXELS // (self.spec.input.width * self.spec.input.height)
        self.max_batch = max(1, batch if self._fixed_batch else min(MAX_BATCH, fitting))

    def batch_size(self) -> int:
        """Return how many images to run at once so that a run takes at most PIECE_SECONDS."""
        if self._fixed_batch or not self._seconds_per_image:
            return self.max_batch if self._fixed_batch else 1
        return max(1, min(self.max_batch, int(PIECE_SECONDS / self._seconds_per_image)))

    def run(
        self, pixels: NDArray[np.uint8], poll: Callable[[], None] | None = None
    ) -> NDArray[np.float32]:
        """Embed one batch in one call of ONNX Runtime.

        Args:
            pixels: uint8 (batch, height, width, channels) as ``decode_image`` makes them.
            poll: called if an interrupt waits during the run of a slow graph, may raise to stop.

        Returns:
            float32 (batch, dimension).

        Raises:
            ModelError: the graph failed.
        """
        count = len(pixels)
        if self._fixed_batch and count < self.max_batch:
            filler = np.zeros((self.max_batch - count, *pixels.shape[1:]), dtype=np.uint8)
            pixels = np.concatenate([pixels, filler])
        values = pixels_to_input(pixels, self._input.shape, self._input.type, self.spec)
        started = time.perf_counter()
        result = self._run({self._input.name: values}, poll)
        if not isinstance(result, np.ndarray) or result.ndim != 2 or result.dtype.kind not in "fiu":
            raise ModelError(
                "model's output is not a batch of embeddings",
                detail="An encoder gives one row of numbers for each image, "
                f"not {_describe_output(result)}.",
                hint=_reduction(result),
            )
        per_image = (time.perf_counter() - started) / len(pixels)
        # The first run of a shape plans memory, so later runs, which are quicker, correct it.
        previous = self._seconds_per_image
        self._seconds_per_image = per_image if not previous else (previous + per_image) / 2
        return np.ascontiguousarray(result[:count], dtype=np.float32)

    def _run(self, feed: dict[str, NDArray[Any]], poll: Callable[[], None] | None) -> Any:
        """Run the graph. If it is slow, or of unknown speed, stop when an interrupt waits."""
        options = self._run_options()
        watched = poll is not None and not 0 < self._seconds_per_image <= PIECE_SECONDS
        try:
            if not watched:
                return self._session.run([self._output], feed)[0]
            with _stopped_on_interrupt(options):
                return self._session.run([self._output], feed, options)[0]
        except Exception as error:  # as above
            if not options.terminate:
                raise ModelError(
                    "ONNX Runtime cannot run the model", detail=_reason(error)
                ) from None
        assert poll is not None
        poll()
        # The interrupt did not cancel.
        return self._run(feed, None)

    def embed(
        self, pixels: NDArray[np.uint8], poll: Callable[[], None] | None = None
    ) -> NDArray[np.float32]:
        """Embed any number of images, in batches of bounded time.

        Args:
            pixels: uint8 (count, height, width, channels).
            poll: called between batches, may raise to stop.

        Returns:
            float32 (count, dimension).
        """
        parts = []
        start = 0
        while start < len(pixels):
            batch = self.batch_size()
            parts.append(self.run(pixels[start : start + batch], poll))
            start += batch
            if poll:
                poll()
        return np.concatenate(parts) if len(parts) != 1 else parts[0]


def return_freed_memory() -> None:
    """Give the system back what ONNX Runtime freed. It takes some milliseconds.

    After a graph was opened, that is more than its weights.
    """
    with suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def _stopped_on_interrupt(options: onnxruntime.RunOptions) -> Iterator[None]:
    """Let a thread end a run, with an error, when PostgreSQL has an interrupt waiting."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_SECONDS):
            if pending():
                options.terminate = True
                return

    thread = threading.Thread(target=watch)
    with signals_blocked():
        thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _describe_output(output: Any) -> str:
    if not isinstance(output, np.ndarray):
        return f"a {type(output).__name__}"
    return f"shape {list(output.shape)} of type {output.dtype}"


def _reduction(output: Any) -> str | None:
    """Return how to make one row for each image of an output, if that is what it lacks."""
    dimensions = getattr(output, "ndim", 2)
    if dimensions == 3:
        return "Take the class token, or the mean of all tokens, before the export."
    if dimensions == 4:
        return "Take the mean over height and width, and flatten it, before the export."
    return None


def _reason(error: Exception) -> str:
    """Return what an error of ONNX Runtime says, in one line."""
    return " ".join(_NO_REASON.sub("", str(error)).split())[:MAX_REASON]


def have_distances(embeddings: NDArray[np.float32], metric: str) -> bool:
    """Return whether all embeddings (count, dimension) have a distance to others in pgvector.

    One without, in an index, can take most of the recall of all others.
    """
    least = MIN_SQUARED_LENGTH if metric == "cosine" else 0.0
    # A list is the quickest way to check a few rows. NaN fails every comparison.
    squared = np.einsum("ij,ij->i", embeddings, embeddings).tolist()
    return all(least <= square < math.inf for square in squared)


def check_embedding(embedding: NDArray[np.float32], metric: str) -> None:
    """Refuse an embedding without a distance to others. Raises ``ImageError``."""
    if have_distances(embedding[None], metric):
        return
    if not np.isfinite(embedding).all():
        raise ImageError("encoder gave an embedding that is not finite", hint=BAD_EMBEDDING)
    if not embedding.any():
        raise ImageError(
            "encoder gave an embedding of length zero, which has no cosine distance",
            hint=BAD_EMBEDDING,
        )
    raise ImageError("encoder gave an embedding whose length is out of range", hint=BAD_EMBEDDING)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def metadata_of(session_metadata: dict[str, str]) -> dict[str, Any]:
    """Return the project's own metadata of an ONNX file, or an empty object."""
    text = session_metadata.get(METADATA_KEY)
    if not text:
        return {}
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except ValueError:
        raise ModelError(f'metadata "{METADATA_KEY}" of the model is not JSON') from None
    if not isinstance(value, dict):
        raise ModelError(f'metadata "{METADATA_KEY}" of the model is not a JSON object')
    return value
