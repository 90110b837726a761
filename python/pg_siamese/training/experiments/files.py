"""Finding and reading experiments: TOML files by name or by path."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from pg_siamese.training.experiments.errors import ExperimentError

if TYPE_CHECKING:
    from pg_siamese.training.experiments.settings import Experiment

FOLDER = Path(__file__).parent
REPRODUCTIONS = FOLDER.parent / "reproductions"


def experiment_names() -> list[str]:
    """Return the names of the experiments that come with the project."""
    return sorted(_own_files())


def _own_files() -> dict[str, Path]:
    found = (*FOLDER.glob("*.toml"), *REPRODUCTIONS.glob("*/*.toml"))
    return {path.stem: path for path in found}


def load_experiment(name: str) -> Experiment:
    """Read an experiment by its name, or by the path of a TOML file.

    Raises:
        ExperimentError: there is none, or its file is not right. The message names file and key.
    """
    path = Path(name) if name.endswith(".toml") else _own_files().get(name)
    if path is None or not path.is_file():
        raise ExperimentError(
            f'no experiment "{name}"; there are: {", ".join(experiment_names())}, '
            "or the path of a .toml file"
        )
    try:
        from pg_siamese.training.experiments.settings import parse_experiment
    except ImportError as error:
        raise ExperimentError(
            f"training needs the extra packages of pg_siamese[train]: {error}"
        ) from error
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path.name}: no valid TOML: {error}") from error
    try:
        return parse_experiment({"name": path.stem} | table)
    except ExperimentError as error:
        raise ExperimentError(f"{path.name}: {error}") from error
