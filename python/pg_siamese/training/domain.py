"""The body of ``pg_siamese calibrate-domain``: a domain for an encoder that is already trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx

from pg_siamese.client.connection import CommandError
from pg_siamese.datasets import DataSplits
from pg_siamese.evaluation.domain import domain_errors, fit_domain, other_images
from pg_siamese.evaluation.figures import require_sklearn
from pg_siamese.evaluation.model import (
    EvaluatedModel,
    data_specs,
    embed_images,
    open_data,
    open_model,
)
from pg_siamese.evaluation.retrieval import Vectors
from pg_siamese.training.card import renew_card
from pg_siamese.training.files import write_model


def calibrate_domain(
    path: Path,
    *,
    data: Sequence[str] = (),
    outside: Sequence[str] = (),
    threads: int = 1,
    say: Callable[[str], object] = print,
) -> None:
    """Write a domain into the metadata of an ONNX file, and into its card if there is one.

    The graph stays as it is.

    Args:
        path: the ONNX file.
        data: the data sets that it was trained on, by default those that it names.
        outside: data sets by which errors are counted.
        threads: threads of ONNX Runtime.
        say: called with lines of progress.

    Raises:
        CommandError: the file has no calibration, or a data set does not fit.
    """
    require_sklearn()
    model = open_model(path, threads)
    if model.spec.weight is None and model.spec.threshold is None:
        raise CommandError(f"{path}: has neither calibration nor threshold, which a domain is for")
    splits = open_data(model, data or data_specs(model), "test")
    train = np.concatenate([embed_images(model, each.train) for each in splits])
    known = {"validation": _embed(model, splits, "val"), "test": _embed(model, splits, "test")}
    held_out = np.concatenate(list(known["validation"].values()))
    domain = fit_domain(train, held_out, model.metric, model.seed)
    others = {
        name: model.encoder.embed(pixels)
        for name, pixels in other_images(outside, model.spec.input, say)
    }
    errors = domain_errors(domain, model.metric, known, others)
    command = " ".join(
        [
            f"pg_siamese calibrate-domain {path}",
            *(f"--data {spec}" for spec in data),
            *(f"--outside {spec}" for spec in outside),
        ]
    )
    training = model.metadata.get("training", {}) | {"domain": {"command": command, **errors}}
    metadata = model.metadata | {"domain": domain.to_json(), "training": training}
    write_model(onnx.load_model(str(path), load_external_data=False), path, metadata)
    say(f"{path}: {len(domain.limits)} balls, {path.stat().st_size:,} bytes")
    for name, share in errors["accepted"].items():
        say(f"{name}: {share:.1f} % inside")
    card = path.with_suffix(".md")
    if card.is_file():
        renew_card(card, metadata, path)
        say(f"{card}: model card")


def _embed(model: EvaluatedModel, splits: Sequence[DataSplits], part: str) -> dict[str, Vectors]:
    return {each.name: embed_images(model, getattr(each, part)) for each in splits}
