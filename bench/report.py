"""Write one table and one JSON file of a run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.timing import Summary


@dataclass(frozen=True)
class Line:
    """One contestant's figures.

    Attributes:
        section: what was measured.
        name: of the contestant.
        time: distribution of the times, or None.
        value, unit: the figure, if it is not the median time.
        recall: recall at 10 of the answers that were timed.
        note: settings and the like.
    """

    section: str
    name: str
    time: Summary | None = None
    value: float | None = None
    unit: str = "ms"
    recall: float | None = None
    note: str = ""

    def figure(self) -> float:
        """Return the value, or the median in milliseconds."""
        if self.value is not None:
            return self.value
        assert self.time is not None
        return self.time.median_ms


@dataclass(frozen=True)
class Bar:
    """A figure that the project has promised.

    Attributes:
        name: what is compared.
        value: as measured.
        limit: the minimum, or the maximum if ``is_most``.
        unit: of both.
    """

    name: str
    value: float
    limit: float
    unit: str = ""
    is_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure keeps the promise."""
        return self.value <= self.limit if self.is_most else self.value >= self.limit


@dataclass
class Report:
    """All figures of a run."""

    kind: str
    machine: dict[str, object]
    settings: dict[str, str]
    parameters: dict[str, object]
    lines: list[Line] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)

    def line(self, section: str, name: str) -> Line:
        """Return one of the lines."""
        return next(line for line in self.lines if (line.section, line.name) == (section, name))

    def figures(self, section: str) -> dict[str, float]:
        """Return the figures of a section by name."""
        return {line.name: line.figure() for line in self.lines if line.section == section}

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object with everything."""
        return {
            "format": 1,
            "kind": self.kind,
            "machine": self.machine,
            "settings": self.settings,
            "parameters": self.parameters,
            "results": [_without_none(asdict(line)) for line in self.lines],
            "bars": [asdict(bar) | {"met": bar.met} for bar in self.bars],
        }

    def write(self, folder: Path) -> Path:
        """Write the JSON file, named by the time, the commit and the kind of run."""
        folder.mkdir(parents=True, exist_ok=True)
        stamp = str(self.machine["date"]).replace(":", "").replace("-", "")[:13]
        commit = str(self.machine["commit"]).replace("+", "-changed")
        path = folder / f"{stamp}-{commit}-{self.kind}.json"
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        return path

    def print(self, console: Console) -> None:
        """Print the table."""
        machine = self.machine
        table = Table(
            title=f"pg_siamese {machine['pg_siamese']} ({machine['commit']}),"
            f" PostgreSQL {machine['postgresql']}, pgvector {machine['pgvector']},"
            f" {machine['cores']} cores of {machine['cpu']}",
            title_justify="left",
        )
        table.add_column("", overflow="fold")
        for name in ("median", "5 – 95 %", "recall@10"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("note", overflow="fold")
        section = None
        for line in self.lines:
            if line.section != section:
                section = line.section
                table.add_section()
                table.add_row(f"[bold]{section}[/]")
            spread = f"{line.time.p5_ms:.3f} – {line.time.p95_ms:.3f}" if line.time else ""
            recall = "" if line.recall is None else f"{line.recall:.4f}"
            table.add_row(
                f"  {line.name}", f"{_number(line.figure())} {line.unit}", spread, recall, line.note
            )
        table.add_section()
        table.add_row("[bold]bars[/]")
        for bar in self.bars:
            verdict = "[green]met[/]" if bar.met else "[red]missed[/]"
            limit = f"{'≤' if bar.is_most else '≥'} {bar.limit:g} {bar.unit}: {verdict}"
            table.add_row(f"  {bar.name}", f"{_number(bar.value)} {bar.unit}", "", "", limit)
        console.print(table)


def _without_none(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item not in (None, "")}


def _number(value: float) -> str:
    limits = ((1000, ",.0f"), (100, ".1f"), (1, ".3g"), (0, ".3f"))
    return f"{value:{next(form for limit, form in limits if abs(value) >= limit)}}"
