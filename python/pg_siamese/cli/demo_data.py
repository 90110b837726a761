"""What both demos share: pictures at hand, the index, and short paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from rich.markup import escape

from pg_siamese.cli.terminal import notice_bar, output
from pg_siamese.client.connection import CommandError

if TYPE_CHECKING:
    from pg_siamese.datasets import LabelledImages


@dataclass(frozen=True)
class DemoData:
    """The encoder's name, and the splits of each data set."""

    model: str
    origin: str
    sets: dict[str, dict[str, LabelledImages]]


def find_data() -> DemoData:
    """Return MedMNIST, downloaded if it is not on this machine, or else Fashion-MNIST.

    Raises:
        CommandError: none is available. It says what to install.
    """
    from pg_siamese import datasets
    from pg_siamese.datasets import DataNotFoundError

    console = output()
    is_local = any(datasets.find_medmnist(name) for name in datasets.MEDICAL_SETS)
    if not is_local:
        console.print("MedMNIST is not on this machine: downloading it")
    try:
        # What is on this machine is enough: one missing set is no reason to wait for the network.
        sets = datasets.load_medical(datasets.SPLITS, download=not is_local)
    except DataNotFoundError as error:
        reason = str(error).split("; ")[0]  # of the first set: the others were not tried
        console.print(f"MedMNIST is not available: {reason}", markup=False, soft_wrap=True)
    else:
        folders = sorted({str(s["train"].files[0].parent) for s in sets.values()})
        console.print(
            f"[bold]data:[/] MedMNIST from {escape(', '.join(folders))}: {', '.join(sets)}",
            soft_wrap=True,
        )
        missing = [
            name
            for name in datasets.MEDICAL_SETS
            if name not in sets and datasets.STAND_INS.get(name) not in sets
        ]
        if missing:
            console.print(f"left out, because not found: {', '.join(missing)}")
        for name, stand_in in datasets.STAND_INS.items():
            if stand_in in sets:
                console.print(f"{stand_in} stands in for {name}, which was not found")
        return DemoData("medical", "medmnist", sets)
    try:
        fashion = {split: datasets.load_fashion_mnist(split) for split in ("train", "test")}
    except DataNotFoundError as error:
        raise CommandError(f"no data for the demo: MedMNIST is not available; {error}") from error
    console.print("[bold]data:[/] Fashion-MNIST from Debian's package, instead of MedMNIST")
    return DemoData("fashion_mnist", "idx", {"fashion_mnist": fashion})


def build_if_needed(connection: psycopg.Connection[Any], name: str) -> None:
    """Build the index if its file is missing, or if it lacks some vectors."""
    row = connection.execute(
        "SELECT pending, generation, generation_file FROM siamese.collection_status"
        " WHERE collection = %s",
        (name,),
    ).fetchone()
    if row is not None and row[0] == 0 and row[2] == "present":
        output().print(f"the index is up to date (generation {row[1]})")
        return
    with notice_bar(connection, "building the index  "):
        built = connection.execute("SELECT siamese.build_index(%s)", (name,)).fetchone()
    output().print(f"the index is built (generation {built[0] if built else '?'})")


def short_path(path: Path) -> str:
    """Return a path below the current folder as a relative one."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
