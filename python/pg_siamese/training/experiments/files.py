"""Finding and reading experiments: TOML files by name or by path."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

    With ``extends`` a file names another experiment, and states only what differs from it.

    Raises:
        ExperimentError: there is none, or its file is not right. The message names file and key.
    """
    path = _find(name)
    try:
        from pg_siamese.training.experiments.settings import parse_experiment
    except ImportError as error:
        raise ExperimentError(
            f"training needs the extra packages of pg_siamese[train]: {error}"
        ) from error
    table = _read(path)
    if (base := table.pop("extends", None)) is not None:
        table = _changed(_read(_find(str(base))), table)
    try:
        return parse_experiment({"name": path.stem} | table)
    except ExperimentError as error:
        raise ExperimentError(f"{path.name}: {error}") from error


def _find(name: str) -> Path:
    path = Path(name) if name.endswith(".toml") else _own_files().get(name)
    if path is None or not path.is_file():
        raise ExperimentError(
            f'no experiment "{name}"; there are: {", ".join(experiment_names())}, '
            "or the path of a .toml file"
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path.name}: no valid TOML: {error}") from error


def _changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return nested tables with other values, table by table."""
    found = base | changes
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            found[key] = _changed(base[key], value)
    return found
