"""The model card: what a model was made from, how, how good it is, and what it is not for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pg_siamese.datasets import LICENCES, DataSplits, sha256
from pg_siamese.evaluation.domain import ACCEPTED, SPREAD
from pg_siamese.training.experiments import Augmentation, Experiment

_DOMAIN = "## Domain"
_LIMITS = "## Limits"
_NETWORKS = {
    "residual": "small residual CNN with batch norm, mean over the image, linear layer",
    "ensemble": "first blocks of EfficientNet-lite0, which began with weights learned on ImageNet,"
    " beside small residual CNNs, and a part of the vector for the data set",
    "siamese_cnn": "batch norm, two 5 x 5 convolutions with tanh and average pooling, linear layer",
    "conv5": "five convolutions, each followed by max pooling",
    "conv3_gap": "three convolutions of stride 2 with ReLU, global average pooling, linear layer",
    "efficientnet_b0": "EfficientNet-b0 with random initial weights, linear layer",
    "efficientnet_lite0": "EfficientNet-lite0 with weights learned on ImageNet, linear layer",
}
_OBJECTIVES = {
    "cosface": "Cosine-margin softmax (CosFace)",
    "cosface_parts": "Cosine-margin softmax (CosFace) on each member's part of the vector,"
    " cross-entropy on that of the data sets",
    "contrastive_sigmoid": "Contrastive loss on the sigmoid of a linear layer on the distance",
    "contrastive_hadsell": "Contrastive loss of Hadsell, Chopra and LeCun",
    "pair_cross_entropy": "Binary cross entropy of a linear layer on the distance",
    "triplet": "Triplet loss",
    "triplet_cross_entropy": "Triplet loss and categorical cross entropy",
}
_SAMPLING = {
    "classes": "single images",
    "per_class": "a fixed number of images a class",
    "pairs": "pairs, half of which match",
    "triplets": "triplets of anchor, positive and negative",
}


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
    cosine_metric = metadata["metric"] == "cosine"
    unit = "unit vector" if _normalised(experiment) else "vector"
    what = "class" if metadata["labels"] == "class" else "data set"
    how = "cosine" if cosine_metric else "Euclidean"
    lines = [
        f"# {experiment.title}",
        "",
        f"`{model.name}` turns an image into a {unit} of {metadata['dimension']} numbers; images "
        f"of one {what} lie close together by {how} distance.",
        "",
        "| | |",
        "| --- | --- |",
        _file(model),
        f"| Input `image` | uint8, batch x {size['height']} x {size['width']} x 3 (RGB; grey "
        "images replicated), any batch size; normalisation is in the graph |",
        f"| Output `embedding` | float32, batch x {metadata['dimension']}"
        f"{', L2-normalised' if _normalised(experiment) else ''} |",
        f"| Network | {_NETWORKS.get(experiment.network.name, experiment.network.name)}"
        f"{_options(experiment.network.options)} |",
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
        *_training(experiment, metadata),
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
        *_protocol(what, how),
        "",
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
        *_calibration(metadata, calibration, len(splits)),
        "",
        "| pairs of | accuracy at the threshold | area under the ROC curve | log loss |",
        "| --- | --- | --- | --- |",
        *(
            f"| {part} | {v['pairs']['accuracy']:.4f} | {v['pairs']['auc']:.4f} | "
            f"{v['pairs']['log_loss']:.4f} |"
            for part, v in metrics.items()
        ),
        "",
        *_domain(metadata),
        _LIMITS,
        "",
        experiment.limits,
        "",
    ]
    path = model.with_suffix(".md")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def renew_card(card: Path, metadata: dict[str, Any], model: Path) -> None:
    """Bring a card up to date with a model that has another domain than before."""
    text = card.read_text(encoding="utf-8")
    text = re.sub(r"^\| File \|.*$", lambda _: _file(model), text, count=1, flags=re.MULTILINE)
    before, _, rest = text.partition(f"{_LIMITS}\n")
    before = before.partition(f"{_DOMAIN}\n")[0]
    lines = "\n".join([*_domain(metadata), _LIMITS, rest])
    card.write_text(before + lines, encoding="utf-8")


def _file(model: Path) -> str:
    return f"| File | {model.stat().st_size:,} bytes, SHA-256 `{sha256(model)}` |"


def _domain(metadata: dict[str, Any]) -> list[str]:
    balls = len(metadata["domain"]["limits"])
    errors = metadata["training"]["domain"]
    parts, others = errors["refused"], errors["accepted"]
    return [
        _DOMAIN,
        "",
        "The calibration is for images inside the domain: for all others `same_class` and "
        "`similarity` are NULL, and `any_two_match` leaves them out. Distances stay. The domain "
        f"is {balls} balls around the centres of k-means of the train images' vectors, in a space "
        "that is shrunk along the directions in which images differ most from their centres. Each "
        f"is so large that it holds {100 * SPREAD:.0f} % of its own images, and then all are "
        f"widened by one factor so that {100 * ACCEPTED:.0f} % of the validation images are "
        f"inside. Fitted by `{errors['command']}`.",
        "",
        f"| wrongly outside, % of | {' | '.join(parts)} |",
        f"| --- |{' --- |' * len(parts)}",
        *(
            f"| {name} | {' | '.join(f'{sets[name]:.1f}' for sets in parts.values())} |"
            for name in next(iter(parts.values()))
        ),
        "",
        "| other images (test splits of data sets) | wrongly inside, % |",
        "| --- | --- |",
        *(f"| {name} | {share:.1f} |" for name, share in others.items()),
        "",
    ]


def _normalised(experiment: Experiment) -> bool:
    return experiment.network.name not in ("siamese_cnn", "conv5")


def _options(options: Mapping[str, Any]) -> str:
    named = ", ".join(
        f"{key}{_options(value)}" if isinstance(value, Mapping) else f"{key} {value}"
        for key, value in options.items()
    )
    return f" ({named})" if named else ""


def _training(experiment: Experiment, metadata: dict[str, Any]) -> list[str]:
    objective, sampling, optimiser = (
        experiment.objective,
        experiment.sampling,
        experiment.optimiser,
    )
    text = (
        f"{_OBJECTIVES.get(objective.name, objective.name)}{_options(objective.options)} over "
        f"{_labels(metadata)} ({len(metadata['classes'])} classes); at most {experiment.epochs} "
        f"epochs of {optimiser.name} (rate {optimiser.learning_rate:g}, schedule "
        f"{optimiser.schedule.replace('_', ' ')}), batches of {experiment.batch_size}: "
        f"{_SAMPLING[sampling.kind]}."
    )
    if sampling.kind == "classes":
        text += f" {_draws(sampling.balance)}"
    if any(change != Augmentation() for change in experiment.augmentation.values()):
        text += (
            " Images are changed at random (flips, rotation, shift, zoom, brightness, contrast)."
        )
    if experiment.average_decay:
        text += " The exponential moving average of the weights is what was exported."
    if experiment.validation.keep == "best":
        text += f" The epoch with the best {experiment.validation.monitor} was exported."
    return [f"{text} Settings were chosen on the validation splits, none on the test splits."]


def _labels(metadata: dict[str, Any]) -> str:
    return (
        "'which class of which data set'" if metadata["labels"] == "class" else "'which data set'"
    )


def _protocol(what: str, how: str) -> list[str]:
    if what == "class":
        where = "Retrieval within each data set: the gallery is the images trained on"
    else:
        where = "Retrieval in all data sets together: the gallery is the images trained on"
    return [
        f"{where}, the queries are another split,",
        f"compared by {how} distance; a neighbour is relevant when its {what} equals the query's "
        "(Mahbod et al.,",
        "Engineering Applications of Artificial Intelligence 150 (2025) 110571). Per cent.",
    ]


def _calibration(metadata: dict[str, Any], calibration: dict[str, float], sets: int) -> list[str]:
    distance = "1 - cosine" if metadata["metric"] == "cosine" else "the Euclidean distance"
    match = "same data set and same class" if metadata["labels"] == "class" else "same data set"
    head = metadata["training"]["objective"] in ("contrastive_sigmoid", "pair_cross_entropy")
    fitted = "These are the Siamese head's own" if head else "These were fitted"
    drawn = (
        "half are of one data set and half of two"
        if sets > 1 and metadata["labels"] == "class"
        else "all are of different data sets"
        if metadata["labels"] == "set"
        else "all are of different classes"
    )
    return [
        f"P(match) = sigmoid({calibration['weight']:.4f} x distance + {calibration['bias']:.4f}), "
        f"decision threshold {metadata['threshold']:.4f}; distance = {distance}; match = {match}. "
        f"{fitted}{';' if head else ' on 20,000 validation pairs,'} "
        f"{'the threshold was chosen on 20,000 validation pairs, ' if head else ''}half of which "
        f"match; of those that don't, {drawn}.",
    ]


def _draws(balance: float) -> str:
    if balance == 0:
        return "Every image is equally likely to be drawn."
    if balance == 1:
        return "Every class is equally likely to be drawn."
    return f"A class of n images is drawn in proportion to n ** {1 - balance:g}."
