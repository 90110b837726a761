"""The model card: what a model was made from, how, how good it is, and what it is not for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pg_siamese.datasets import LICENCES, sha256
from pg_siamese.training.data import DataSplits
from pg_siamese.training.experiments import Experiment

_PROTOCOL = """\
Retrieval within each data set: the gallery is the images trained on, the queries are another split,
compared by cosine; a neighbour is relevant when its class equals the query's (Mahbod et al.,
Engineering Applications of Artificial Intelligence 150 (2025) 110571). Per cent.
"""


def write_card(
    experiment: Experiment,
    splits: list[DataSplits],
    metadata: dict[str, Any],
    model: Path,
    cosine: float,
    speed: float,
) -> Path:
    """Write the card of `model` beside it, with the suffix .md, and return its path.

    `cosine` is the least agreement of ONNX Runtime with PyTorch, `speed` the images a second on
    one thread at batch 32.
    """
    training = metadata["training"]
    metrics = training["metrics"]
    calibration = metadata["calibration"]
    size = metadata["input"]
    lines = [
        f"# {experiment.title}",
        "",
        f"`{model.name}` turns an image into a unit vector of {metadata['dimension']} numbers; "
        "images of one class lie close together by cosine distance.",
        "",
        "| | |",
        "| --- | --- |",
        f"| File | {model.stat().st_size:,} bytes, SHA-256 `{sha256(model)}` |",
        f"| Input `image` | uint8, batch x {size['height']} x {size['width']} x 3 (RGB; grey "
        "images replicated), any batch size; normalisation is in the graph |",
        f"| Output `embedding` | float32, batch x {metadata['dimension']}, L2-normalised |",
        "| Network | residual CNN: convolution of "
        f"{experiment.stem[0]} channels, residual blocks of "
        f"{', '.join(str(c) for c, _ in experiment.stages)} channels, mean, linear layer |",
        f"| Speed | {speed:,.0f} images a second on one thread of ONNX Runtime at batch 32, where "
        "it was trained (CPU time) |",
        f"| Agreement with PyTorch | cosine of at least {cosine:.6f} |",
        "",
        "## Intended use",
        "",
        experiment.intended_use,
        "",
        "## Training",
        "",
        f"Command: `{training['command']}` (seed {experiment.seed}).",
        "",
        f"Cosine-margin softmax (CosFace, margin {experiment.margin:g}, scale {experiment.scale:g})"
        f" over 'which class of which data set' ({len(metadata['classes'])} classes), "
        f"{experiment.epochs} epochs of AdamW, batches of {experiment.batch_size}, random flips, "
        "rotation, shift, zoom, brightness and contrast; the exponential moving average of the "
        f"weights is what was exported. {_draws(experiment.balance)} Settings were chosen on the "
        "validation splits, none on the test splits.",
        "",
        "| data set | train | validation | test | licence |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {s.name} | {len(s.train):,} | {len(s.val):,} | {len(s.test):,} | "
            f"{LICENCES.get(s.name, 'see its source')} |"
            for s in splits
        ),
        "",
        "| file | SHA-256 |",
        "| --- | --- |",
        *(f"| {item['file']} | `{item['sha256']}` |" for item in training["data"]),
        "",
        "## Figures",
        "",
        _PROTOCOL,
        "| data set | split | mAP@5 | mMV@5 | ACC@1 | ACC@3 | ACC@5 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {part} | {s['map5']:.2f} | {s['mmv5']:.2f} | {s['acc1']:.2f} | "
            f"{s['acc3']:.2f} | {s['acc5']:.2f} |"
            for part, values in metrics.items()
            for name, s in values["retrieval"].items()
        ),
        "",
    ]
    if len(splits) > 1:
        shares = ", ".join(f"{v['right_set']:.2f} % ({part})" for part, v in metrics.items())
        lines += [f"Nearest neighbour in all data sets together is of the right one: {shares}.", ""]
    lines += [
        "## Calibration",
        "",
        f"P(match) = sigmoid({calibration['weight']:.4f} x distance + {calibration['bias']:.4f}), "
        f"decision threshold {metadata['threshold']:.4f}; distance = 1 - cosine; match = same data "
        "set and same class. Fitted on 20,000 validation pairs, half of which match; of those that "
        "don't, "
        + (
            "half are of one data set and half of two. "
            if len(splits) > 1
            else "all are of different classes. "
        ),
        "",
        "| pairs of | accuracy at the threshold | area under the ROC curve | log loss |",
        "| --- | --- | --- | --- |",
        *(
            f"| {part} | {v['pairs']['accuracy']:.4f} | {v['pairs']['auc']:.4f} | "
            f"{v['pairs']['log_loss']:.4f} |"
            for part, v in metrics.items()
        ),
        "",
        "## Limits",
        "",
        experiment.limits,
        "",
    ]
    path = model.with_suffix(".md")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _draws(balance: float) -> str:
    if balance == 0:
        return "Every image is equally likely to be drawn."
    if balance == 1:
        return "Every class is equally likely to be drawn."
    return f"A class of n images is drawn in proportion to n ** {1 - balance:g}."
