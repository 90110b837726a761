"""Static quantisation of an exported encoder: convolutions of 8-bit integers.

ONNX Runtime then computes about twice as many images per second on processors with VNNI. Others
gain less, and add in 16 bits, where sums of two products can saturate. So vectors of one file
can differ between the two kinds of processors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from pg_siamese.datasets import DataSplits
from pg_siamese.evaluation.retrieval import Embedded, distances, each_set, neighbours, retrieval
from pg_siamese.training.experiments import ExperimentError

# Operators with integer forms. Activations are merged into the convolutions before them.
OPERATORS = ["Conv", "Add", "Clip", "Relu"]
# The first convolutions have few channels, of very different ranges. In 8 bits they make most of
# EfficientNet-lite0's error (stem and two blocks). As floats they cost a sixth of the speed.
FLOAT_FIRST = 6
CALIBRATION_IMAGES = 32  # of each data set. 16 and 64 gave the same agreement
CALIBRATION_BATCH = 8
NEIGHBOURS = 10


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches of pixels, in their order."""

    def __init__(self, pixels: npt.NDArray[np.uint8]) -> None:
        starts = range(0, len(pixels), CALIBRATION_BATCH)
        self.batches = iter([pixels[start : start + CALIBRATION_BATCH] for start in starts])

    def get_next(self) -> dict[str, npt.NDArray[np.uint8]] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"image": batch}


def calibration_pixels(splits: Sequence[DataSplits], seed: int) -> npt.NDArray[np.uint8]:
    """Draw validation images of each data set; uint8 (N, H, W, 3)."""
    random = np.random.default_rng(seed)
    parts = []
    for each in splits:
        count = min(CALIBRATION_IMAGES, len(each.val))
        chosen = np.sort(random.choice(len(each.val), count, replace=False))
        parts.append(each.val.rgb()[chosen])
    return np.concatenate(parts)


def quantised(model: onnx.ModelProto, pixels: npt.NDArray[np.uint8]) -> onnx.ModelProto:
    """Return an encoder with convolutions of 8-bit integers.

    Weights have a scale per output channel. Activations have the range that they reach on the
    images. The first convolutions, and what follows the last, stay float32.

    Args:
        model: as ``to_onnx`` makes it, with float32 weights.
        pixels: images for calibration, uint8 (N, H, W, 3).

    Raises:
        ExperimentError: the graph has too few convolutions.
    """
    kinds = [node.op_type for node in model.graph.node]
    places = [place for place, kind in enumerate(kinds) if kind == "Conv"]
    if len(places) <= FLOAT_FIRST:
        raise ExperimentError(
            f'weights = "int8" needs a network of more than {FLOAT_FIRST} convolutions:'
            f" this one has {len(places)}"
        )
    first = places[FLOAT_FIRST]
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    # The exporter has folded constants and batch norms. This says so, which spares a warning.
    prepared.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantised.onnx"
        quantize_static(
            prepared,
            path,
            _Reader(pixels),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=OPERATORS,
            nodes_to_exclude=[node.name for node in model.graph.node[:first]],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        return onnx.load(path)


def agreement(
    before: tuple[Embedded, Embedded],
    after: tuple[Embedded, Embedded],
    names: Sequence[str],
    metric: str,
    labels: str,
) -> dict[str, dict[str, float]]:
    """Compare the embeddings of an encoder with those of its quantised form.

    Args:
        before: gallery and queries by the encoder.
        after: the same images by its quantised form.
        names: names of the data sets.
        metric: ``cosine`` or ``l2``.
        labels: ``class`` or ``set``, as in ``retrieval_by_set``.

    Returns:
        For each data set, of the queries: ``cosine``, the mean of one image's two vectors.
        ``overlap``, the mean share of the ten nearest that stay. ``map5``, the change of mAP@5 in
        points. A query's own group is no neighbour.

    Raises:
        ValueError: a gallery has fewer than ten images outside a query's group.
    """
    figures: dict[str, dict[str, float]] = {}
    sets = zip(each_set(*before, names, labels), each_set(*after, names, labels), strict=True)
    for (name, gallery, queries), (_, known, asked) in sets:
        found = neighbours(gallery, queries, NEIGHBOURS, metric)
        again = neighbours(known, asked, NEIGHBOURS, metric)
        cosine = 1 - distances(queries.vectors, asked.vectors)
        stay = [np.isin(*pair).mean() for pair in zip(found, again, strict=True)]
        scores = [
            retrieval(gallery.labels[each[:, :5]], queries.labels).map5 for each in (found, again)
        ]
        figures[name] = {
            "cosine": round(float(cosine.mean()), 4),
            "overlap": round(float(np.mean(stay)), 4),
            "map5": round(scores[1] - scores[0], 2),
        }
    return figures
