"""Run the benchmarks: ``python -m bench``, with ``--large`` at a million vectors."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psycopg
from rich.console import Console

from bench import clinical, runs
from bench.compare import compare, unpacked
from bench.report import Report
from bench.session import QueryError
from tools.report import SetupError

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    """Run, print the table, write the JSON file, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--large", action="store_true", help="search and build at 1,000,000 x 64")
    for name, text in (
        ("--deferred", "inserts into deferred collections, and workers"),
        ("--quick", "small, to try the script: figures mean nothing"),
        ("--check", "exit with status 1 if a bar is missed"),
    ):
        parser.add_argument(name, action="store_true", help=text)
    text = (
        "only DICOM files, the clinical encoder, encoders of several sizes, searches by group or"
        " for many rows at once, similarity maps, pairs of rows, duplicates, or the page"
    )
    parts = ["dicom", "clinical", "encoders", "groups", "nearest", "heat", "pairs", "duplicates"]
    parts.append("explore")
    parser.add_argument("--only", choices=parts, help=text)
    text = "ONNX file for --only clinical (models/clinical.onnx)"
    parser.add_argument("--model", type=Path, default=clinical.MODEL, metavar="FILE", help=text)
    text = "compare this tree with another revision, also searches for each row in --only nearest"
    parser.add_argument("--compare", metavar="REVISION", help=text)
    text = "folder of the JSON file (bench/results)"
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=text)
    chosen = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    began = time.monotonic()
    if chosen.only == "clinical" and not chosen.model.is_file():
        print(f"skipped: there is no {chosen.model.name}. Name an ONNX file with --model")
        return 0
    try:
        if chosen.only in ("nearest", "pairs"):
            standard, large = runs.STANDARD, runs.LARGE
            if chosen.quick:
                standard, large = runs.STANDARD_QUICK, runs.LARGE_QUICK
            size = large if chosen.large else standard
            if chosen.only == "nearest":
                earlier = unpacked(chosen.compare, console) if chosen.compare else None
                report = runs.nearest_alone(size, console, earlier)
            else:
                report = runs.pairs_alone(size, console)
        elif chosen.only == "explore":
            size = runs.EXPLORE_QUICK if chosen.quick else runs.EXPLORE
            report = runs.explore_alone(size, console)
        elif chosen.only == "duplicates":
            size = runs.DUPLICATES_QUICK if chosen.quick else runs.DUPLICATES
            report = runs.duplicates_alone(size, console)
        elif chosen.large or chosen.only == "groups":
            size = runs.LARGE_QUICK if chosen.quick else runs.LARGE
            report = runs.large(size, console, only_groups=chosen.only == "groups")
        elif chosen.only:
            size = runs.STANDARD_QUICK if chosen.quick else runs.STANDARD
            alone: dict[str, Callable[[runs.Size, Console], Report]] = {
                "dicom": runs.dicom_alone,
                "clinical": partial(runs.clinical_alone, model=chosen.model),
                "encoders": runs.encoders_alone,
                "heat": runs.heat_alone,
            }
            report = alone[chosen.only](size, console)
        elif chosen.compare:
            size = runs.COMPARE_QUICK if chosen.quick else runs.COMPARE
            report = compare(chosen.compare, size, console)
        elif chosen.deferred:
            size = runs.DEFERRED_QUICK if chosen.quick else runs.DEFERRED
            report = runs.deferred_embedding(size, console)
        else:
            report = runs.standard(runs.STANDARD_QUICK if chosen.quick else runs.STANDARD, console)
    except subprocess.CalledProcessError as error:
        print(f"error: {error}\n{error.stderr or ''}", file=sys.stderr)
        return 1
    except (SetupError, QueryError, psycopg.Error, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    report.print(console)
    folder = chosen.output or (None if chosen.quick else RESULTS)
    where = "" if folder is None else f"; written to {report.write(folder).name}"
    console.print(f"{time.monotonic() - began:.0f} s{where}")
    return int(chosen.check and not all(bar.met for bar in report.bars))


if __name__ == "__main__":
    sys.exit(main())
