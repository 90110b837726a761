"""What an experiment can name: networks and objectives, those of the reproductions included."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pg_siamese.training import networks, objectives, reproductions
from pg_siamese.training.experiments import ExperimentError
from pg_siamese.training.networks import Network
from pg_siamese.training.objectives import Objective

NETWORKS = networks.NETWORKS | reproductions.NETWORKS
OBJECTIVES = objectives.OBJECTIVES | reproductions.OBJECTIVES

Made = TypeVar("Made")


def build_network(
    name: str,
    dimension: int,
    size: tuple[int, int],
    options: Mapping[str, Any],
    sets: Sequence[str] = (),
) -> Network:
    """Make a network.

    Args:
        name: a key of ``NETWORKS``.
        dimension: that of the embeddings.
        size: height and width of the images.
        options: what the network's constructor takes besides.
        sets: names of the data sets.

    Raises:
        ExperimentError: the network, or an option, is unknown, or the size does not fit.
    """
    given = {"dimension": dimension, "size": size, "sets": tuple(sets)}
    return _build("network", NETWORKS, name, given, options)


def build_objective(
    name: str,
    dimension: int,
    classes: int,
    metric: str,
    options: Mapping[str, Any],
    sets: Sequence[int] | None = None,
    parts: Sequence[int] = (),
    set_dimension: int = 0,
) -> Objective:
    """Make an objective.

    Args:
        name: a key of ``OBJECTIVES``.
        dimension: that of the embeddings.
        classes: number of classes.
        metric: ``cosine`` or ``l2``.
        options: what the objective's constructor takes besides.
        sets: number of each class's data set. By default all classes are of one.
        parts: dimensions of the network's parts (``Network.parts``).
        set_dimension: those of its part for the data set (``Network.set_dimension``).

    Raises:
        ExperimentError: the objective, or an option, is unknown, or a value does not fit.
    """
    given = {
        "dimension": dimension,
        "classes": classes,
        "metric": metric,
        "sets": [0] * classes if sets is None else list(sets),
        "parts": tuple(parts),
        "set_dimension": set_dimension,
    }
    return _build("objective", OBJECTIVES, name, given, options)


def _build(
    kind: str,
    known: Mapping[str, Callable[..., Made]],
    name: str,
    given: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Made:
    build = known.get(name)
    if build is None:
        raise ExperimentError(f'no {kind} "{name}"; there are: {", ".join(known)}')
    takes = inspect.signature(build).parameters
    free = [key for key in takes if key not in given]
    for key in options:
        if key not in free:
            raise ExperimentError(
                f'{kind} "{name}" has no option "{key}"; there are: {", ".join(free) or "none"}'
            )
    try:
        return build(**{key: given[key] for key in given if key in takes}, **options)
    except (TypeError, ValueError) as error:
        raise ExperimentError(f'{kind} "{name}": {error}') from error
