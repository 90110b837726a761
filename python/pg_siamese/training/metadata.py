"""What an exported model says of itself: input, calibration, classes, training and figures."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from pg_siamese.datasets import DataFormatError, DataSplits, sha256
from pg_siamese.evaluation.domain import domain_errors, fit_domain, other_images
from pg_siamese.evaluation.figures import CHOOSING_SEED, draw_pairs, stated_figures
from pg_siamese.evaluation.pairs import calibrate
from pg_siamese.evaluation.retrieval import Embedded
from pg_siamese.training.data import JoinedImages
from pg_siamese.training.experiments.settings import Experiment
from pg_siamese.training.export import embed_onnx
from pg_siamese.training.quantise import agreement
from pg_siamese_server.encoding.specification import InputSpec

# Figures are of at most so many images of train: retrieval compares all with all.
GALLERY = 60_000


def embed_joined(model: bytes, images: JoinedImages) -> Embedded:
    """Embed joined data sets by a model's ONNX file."""
    vectors = embed_onnx(model, images.pixels.numpy(), threads=torch.get_num_threads())
    groups = None if images.groups is None else images.groups.numpy()
    return Embedded(vectors, images.labels.numpy(), images.sets.numpy(), groups)


def describe(
    experiment: Experiment,
    model: bytes,
    splits: list[DataSplits],
    *,
    command: str,
    head: tuple[float, float] | None,
    unquantised: bytes | None = None,
    test: bool = True,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Return the metadata of a trained encoder, a JSON object.

    Its figures are those of the ONNX file, as anyone who has it finds them. The threshold is chosen
    on validation pairs. The domain is fitted to train and validation images.

    Args:
        experiment: what was trained.
        model: the bytes of the ONNX file.
        splits: the data sets.
        command: the command line that made it.
        head: weight and bias of the Siamese head, which then are the calibration. Otherwise a
            logistic regression is fitted on validation pairs.
        unquantised: the bytes of the file before it was quantised, to compare it with.
        test: state figures of the test split, too.
        say: called with lines of progress.

    Raises:
        DataFormatError: there are no such pairs.
    """
    joined = {
        part: JoinedImages([getattr(s, part) for s in splits], experiment.labels)
        for part in ("train", "val", "test")
    }
    train, metric = joined["train"], experiment.metric
    compared = (train.some(GALLERY, experiment.seed), joined["val"])
    gallery, queries = (embed_joined(model, images) for images in compared)
    quantisation = {}
    try:
        if unquantised is not None:
            first, second = (embed_joined(unquantised, images) for images in compared)
            quantisation["quantisation"] = agreement(
                (first, second), (gallery, queries), train.names, metric, experiment.labels
            )
        pairs = draw_pairs(queries, experiment.labels, metric, experiment.seed + CHOOSING_SEED)
        calibration = calibrate(*pairs)
        if head is not None:
            calibration = dataclasses.replace(calibration, weight=head[0], bias=head[1])
        parts = {"validation": queries}
        if test:
            parts["test"] = embed_joined(model, joined["test"])
        metrics = {
            part: stated_figures(
                gallery,
                embedded,
                calibration,
                names=train.names,
                labels=experiment.labels,
                metric=metric,
                seed=experiment.seed,
            )
            for part, embedded in parts.items()
        }
    except ValueError as error:
        raise DataFormatError(
            f"{experiment.name}: {error}: the validation and test splits need two classes and two "
            "images of a class at least"
        ) from error
    domain = fit_domain(gallery.vectors, queries.vectors, metric, experiment.seed)
    size = InputSpec(**msgspec.structs.asdict(experiment.input))
    others = {
        name: embed_onnx(model, pixels, threads=torch.get_num_threads())
        for name, pixels in other_images(experiment.outside, size, say)
    }
    known = {
        part: {name: embedded.of_set(place).vectors for place, name in enumerate(train.names)}
        for part, embedded in parts.items()
    }
    return {
        "format": 1,
        "name": experiment.name,
        "dimension": experiment.network.dimension,
        "metric": metric,
        "labels": experiment.labels,
        "input": {
            "width": experiment.input.width,
            "height": experiment.input.height,
            "channels": 3,
            "resize": experiment.input.resize,
            "interpolation": experiment.input.interpolation,
        },
        "calibration": {"weight": calibration.weight, "bias": calibration.bias},
        "threshold": calibration.threshold,
        "domain": domain.to_json(),
        "classes": list(train.classes),
        "training": {
            "experiment": experiment.name,
            "objective": experiment.objective.name,
            "seed": experiment.seed,
            "data": [item for s in splits for item in _sources(s)],
            "left_out": left_out(splits),
            "command": command,
            "metrics": metrics,
            **quantisation,
            "domain": {"command": command, **domain_errors(domain, metric, known, others)},
        },
    }


def left_out(splits: Sequence[DataSplits]) -> dict[str, int]:
    """Return how many train images of each data set share a group with what is held out."""
    counts = {s.name: len(s.train) - len(s.for_training()) for s in splits}
    return {name: count for name, count in counts.items() if count}


def _sources(splits: DataSplits) -> list[dict[str, str]]:
    """Name the files of a data set.

    Of a folder of images, say only how it was named. Of a table, the sum is that of the pixels.
    """
    same = {"name": splits.name, "spec": splits.spec}
    files = splits.files
    if not files:
        parts = (splits.train, splits.val, splits.test)
        pixels = hashlib.sha256(b"".join(part.images.tobytes() for part in parts)).hexdigest()
        return [same | {"file": f"{sum(map(len, parts))} rows of a table", "sha256": pixels}]
    if len(files) > 16:
        # One sum for all: that of the sorted list of theirs.
        every = "\n".join(sorted(map(sha256, files)))
        total = hashlib.sha256(every.encode()).hexdigest()
        return [same | {"file": f"{len(files)} image files", "sha256": total}]
    return [same | {"file": file.name, "sha256": sha256(file)} for file in files]
