"""Reading experiments from TOML: every key must be known, every value of its type."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pg_siamese.training.experiments.settings import Augmentation, Experiment, ExperimentError

FOLDER = Path(__file__).parent
REPRODUCTIONS = FOLDER.parent / "reproductions"
# These pass what they don't know themselves to the network or the objective, as its options.
_OPEN = ("network", "objective")


def experiment_names() -> list[str]:
    """Return the names of the experiments that come with the project."""
    return sorted(_own_files())


def _own_files() -> dict[str, Path]:
    found = (*FOLDER.glob("*.toml"), *REPRODUCTIONS.glob("*/*.toml"))
    return {path.stem: path for path in found}


def load_experiment(name: str) -> Experiment:
    """Read an experiment by its name, or by the path of a TOML file.

    Raises `ExperimentError` where there is none, or its file isn't right (naming file and key).
    """
    path = Path(name) if name.endswith(".toml") else _own_files().get(name)
    if path is None or not path.is_file():
        raise ExperimentError(
            f'no experiment "{name}"; there are: {", ".join(experiment_names())}, '
            "or the path of a .toml file"
        )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path.name}: no valid TOML: {error}") from error
    try:
        return parse_experiment({"name": path.stem} | table)
    except ExperimentError as error:
        raise ExperimentError(f"{path.name}: {error}") from error


def parse_experiment(table: Mapping[str, Any]) -> Experiment:
    """Make an experiment of nested tables, as TOML or a checkpoint has them.

    Raises `ExperimentError` for a key that is unknown or missing, or has a value of a wrong type.
    """
    parsed: Experiment = _parse(Experiment, table, "")
    return parsed


def _parse(cls: type[Any], table: Any, where: str) -> Any:
    if not isinstance(table, Mapping):
        raise ExperimentError(f"{where.rstrip('.')} must be a table")
    table = dict(table)
    name = where.rstrip(".")
    if name in _OPEN:
        options = dict(table.pop("options", {}))
        known = {field.name for field in dataclasses.fields(cls)}
        options |= {key: table.pop(key) for key in list(table) if key not in known}
        table["options"] = options
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in hints:
            raise ExperimentError(f'unknown key "{where}{key}"; there are: {", ".join(hints)}')
        values[key] = _value(hints[key], value, f"{where}{key}")
    for field in dataclasses.fields(cls):
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and field.name not in values:
            raise ExperimentError(f'key "{where}{field.name}" is missing')
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _parse(typing.cast(type[Any], hint), value, f"{where}.")
    if hint == Mapping[str, Augmentation]:
        if not isinstance(value, Mapping):
            raise ExperimentError(f"{where} must be a table of tables")
        return {
            name: _parse(Augmentation, item, f"{where}.{name}.") for name, item in value.items()
        }
    if hint == tuple[str, ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise ExperimentError(f"{where} must be a list of texts")
        return tuple(value)
    if hint == Mapping[str, Any]:
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ExperimentError(f"{where} is {value!r}: it must be of type {hint.__name__}")
    return value.strip() if isinstance(value, str) else value
