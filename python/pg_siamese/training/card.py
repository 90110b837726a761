"""The model card: what a model was made from, how, how good it is, and what it is not for.

The text is in ``card.md.j2`` and ``domain.md.j2``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from pg_siamese.datasets import LICENCES, DataSplits, sha256
from pg_siamese.evaluation.domain import ACCEPTED, SPREAD
from pg_siamese.evaluation.figures import PAIRS
from pg_siamese.files import write_whole
from pg_siamese.training.experiments.settings import Augmentation, Experiment

_DOMAIN = "## Domain"
_LIMITS = "## Limits"
_SAMPLING = {
    "classes": "single images",
    "per_class": "a fixed number of images per class",
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
    """Write the card of a model beside it, with the suffix .md.

    Args:
        experiment: what was trained.
        splits: the data sets that it was trained on.
        metadata: what the model's file says.
        model: the model's file.
        cosine: least agreement of ONNX Runtime with PyTorch.
        speed: images per second on one thread at batch 32.

    Returns:
        The card's path.
    """
    # Here, so that ``renew_card`` needs no torch.
    from pg_siamese.training.registry import NETWORKS, OBJECTIVES

    network = NETWORKS[experiment.network.name]
    path = model.with_suffix(".md")
    text = _rendered(
        "card.md.j2",
        metadata,
        experiment=experiment,
        splits=splits,
        model=model,
        cosine=cosine,
        speed=speed,
        file=_file(model),
        network=network,
        unit_vectors=network.unit_vectors,
        objective=OBJECTIVES[experiment.objective.name],
        optimiser=experiment.optimiser,
        sampling=experiment.sampling,
        sampled=_SAMPLING[experiment.sampling.kind],
        augmented=any(each != Augmentation() for each in experiment.augmentation.values()),
        what="class" if metadata["labels"] == "class" else "data set",
        how="cosine" if metadata["metric"] == "cosine" else "Euclidean",
        licences=LICENCES,
        pairs=f"{PAIRS:,}",
    )
    write_whole(path, text.encode())
    return path


def renew_card(card: Path, metadata: dict[str, Any], model: Path) -> None:
    """Bring a card up to date with a model that has another domain than before."""
    text = card.read_text(encoding="utf-8")
    text = re.sub(r"^\| File \|.*$", lambda _: _file(model), text, count=1, flags=re.MULTILINE)
    before, _, rest = text.partition(f"{_LIMITS}\n")
    before = before.partition(f"{_DOMAIN}\n")[0]
    domain = _rendered("domain.md.j2", metadata)
    write_whole(card, f"{before}{domain}{_LIMITS}\n{rest}".encode())


def _rendered(template: str, metadata: dict[str, Any], **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["options"] = _options
    return environment.get_template(template).render(
        metadata=metadata,
        training=metadata["training"],
        spread=SPREAD,
        accepted=ACCEPTED,
        **values,
    )


def _file(model: Path) -> str:
    return f"| File | {model.stat().st_size:,} bytes, SHA-256 `{sha256(model)}` |"


def _options(options: Mapping[str, Any]) -> str:
    named = ", ".join(
        f"{key}{_options(value)}" if isinstance(value, Mapping) else f"{key} {_shown(key, value)}"
        for key, value in options.items()
    )
    return f" ({named})" if named else ""


def _shown(key: str, value: Any) -> Any:
    """Return an option's value. Of a path, only the file's name."""
    return Path(value).name if key == "start" else value
