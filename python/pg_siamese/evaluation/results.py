"""Results as JSON, one file per experiment, and the table in the docs that is made from them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pg_siamese.client.connection import CommandError
from pg_siamese.datasets import sha256
from pg_siamese.evaluation.database import ENGINES
from pg_siamese.evaluation.figures import Evaluation
from pg_siamese.files import write_whole
from pg_siamese_server.encoding.specification import METRICS

FORMAT = 1
DIGITS = 5
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
HEADING = """\
# Results

Mean over the seeds, with the standard deviation if there are several. The text between the two
marks is written by `pg_siamese evaluate --table`, from the files in `results/`.

"""


def result(evaluations: Sequence[Evaluation], command: str) -> dict[str, Any]:
    """Return the content of a results file: one experiment, a model file for each seed.

    Raises:
        CommandError: they were evaluated on different data.
    """
    first = evaluations[0]
    for other in evaluations[1:]:
        if (other.split, _counts(other)) != (first.split, _counts(first)):
            raise CommandError(
                f"{other.model.path} and {first.model.path} were evaluated on different data"
            )
    return {
        "format": FORMAT,
        "experiment": first.model.experiment,
        "split": first.split,
        "labels": first.model.labels,
        "metric": first.model.metric,
        "dimension": int(first.gallery.vectors.shape[1]),
        "data": _counts(first),
        "command": command,
        "models": [
            {
                "file": e.model.path.name,
                "sha256": sha256(e.model.path),
                "seed": e.model.seed,
                "figures": rounded(e.figures),
            }
            for e in evaluations
        ],
        "summary": rounded(summary([e.figures for e in evaluations])),
    }


def _counts(evaluation: Evaluation) -> dict[str, dict[str, int]]:
    found = {}
    for part in evaluation.data:
        queries = getattr(part, evaluation.split)
        found[part.name] = {
            "gallery": len(part.train),
            "validation": len(part.val),
            "queries": len(queries),
        }
        if part.has_groups:
            found[part.name]["query_groups"] = len(set(queries.groups))
    return found


def summary(figures: Sequence[Any]) -> Any:
    """Return mean, sd, min and max of each number in dictionaries of the same form.

    ``sd`` is the sample standard deviation, None for one file.
    """
    if isinstance(figures[0], dict):
        shared = [key for key in figures[0] if all(key in item for item in figures)]
        return {key: summary([item[key] for item in figures]) for key in shared}
    return {
        "mean": statistics.fmean(figures),
        "sd": statistics.stdev(figures) if len(figures) > 1 else None,
        "min": min(figures),
        "max": max(figures),
    }


def rounded(value: Any) -> Any:
    """Return the same with five decimals at most.

    Raises:
        ValueError: a number is not finite, which JSON can't hold.
    """
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a figure is not a finite number")
        return round(value, DIGITS)
    return value


def write_result(content: dict[str, Any], path: Path) -> None:
    """Write a results file."""
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read all results files of a folder, by name.

    Raises:
        CommandError: a file is none.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CommandError(f"{path}: not JSON: {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CommandError(f"{path}: not a results file of pg_siamese evaluate")
        found.append(content)
    return found


def write_table(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the tables into a Markdown file, between its two marks. The text around them stays.

    Raises:
        CommandError: the file lacks the marks.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else f"{HEADING}{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise CommandError(f"{path}: lacks the marks {BEGIN} and {END}")
    write_whole(path, f"{before}{BEGIN}\n{tables(results)}{END}{after}".encode())


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Return the tables as Markdown: experiments, retrieval by data set, and the commands."""
    lines = [
        "## Do images match?",
        "",
        "Pairs and triples half and half. A pair matches when both images are of one class of one "
        "data set, or of one data set (column *match*). Losses are of P(different). The "
        "contrastive one is mean((1 − y) p² + y (1 − p)²). Of a triple, do at least two match? By "
        "distance alone, with thresholds from validation images.",
        "",
        "| experiment | seeds | match | pair accuracy, % | area under ROC | contrastive loss | "
        "log loss | triple accuracy, % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for item in results:
        for key, match in (("pairs", item["labels"]), ("set_pairs", "set")):
            figures = item["summary"].get(key)
            if figures is None or (key == "set_pairs" and item["labels"] == "set"):
                continue
            triples = item["summary"].get("triples") if key == "pairs" else None
            cells = [_name(item), str(len(item["models"])), match]
            cells += [spread(figures["accuracy"], 100, 2)]
            cells += [spread(figures[k], 1, 4) for k in ("auc", "contrastive_loss", "log_loss")]
            cells += [spread(triples["accuracy"], 100, 2) if triples else ""]
            lines.append(_row(cells))
    lines += [
        "",
        "## Nearest neighbours",
        "",
        "Gallery: the train split of the data set. Queries: another split, by default the test "
        "split. Relevant: the same class. Per cent. mAP@5, mMV@5 and ACC@k are as in Mahbod et al. "
        "(2025). P@10 is the precision among the ten nearest, kNN the accuracy of the vote of "
        "the nearest. The last columns are the greatest differences to the same figures computed "
        "in the database, through `similar_images`. One is by its exact scan. The other is as it "
        "searches by default, approximately in a large index.",
        "",
        "| experiment | data set | queries | mAP@5 | mMV@5 | ACC@1 | ACC@3 | ACC@5 | P@10 | 5-NN | "
        "10-NN | in the database, exact | by default |",
        "| --- " * 13 + "|",
    ]
    for item in results:
        for name, figures in item["summary"]["sets"].items():
            for note, values in variants(figures).items():
                protocol, knn = values["retrieval"], values["knn_accuracy"]
                in_database = values.get("in_database")
                cells = [_name(item), f"{name}{note}", f"{item['data'][name]['queries']:,}"]
                cells += [spread(protocol[k], 1, 2) for k in _PROTOCOL]
                cells += [spread(values["precision_at_10"], 100, 2)]
                cells += [spread(knn[k], 100, 2) for k in ("5", "10")]
                for engine in ENGINES:
                    most = in_database and in_database[engine]["greatest_difference"]["max"]
                    cells += [f"{most:.3f}" if in_database else ""]
                lines.append(_row(cells))
    joined = [item for item in results if "right_set" in item["summary"]]
    if joined:
        lines += [
            "",
            "Data sets joined: is the nearest image of all of the right set, and do pairs match by "
            "the sets of their nearest images?",
            "",
            "| experiment | nearest of the right set, % | pairs by their neighbours, % |",
            "| --- | --- | --- |",
        ]
        for item in joined:
            right = spread(item["summary"]["right_set"], 1, 3)
            by_neighbour = item["summary"]["set_pairs"]["accuracy_by_neighbour"]
            lines.append(_row([_name(item), right, spread(by_neighbour, 100, 2)]))
    lines += ["", "## Commands", ""]
    lines += [f"- {_name(item)}: `{item['command']}`" for item in results]
    return "\n".join(lines) + "\n"


_PROTOCOL = ("map5", "mmv5", "acc1", "acc3", "acc5")


def variants(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a data set's figures by its metric, and those by the other one, if there are any."""
    others = {f", by {m}": figures[f"by_{m}"] for m in METRICS if f"by_{m}" in figures}
    return {"": figures, **others}


def _name(item: dict[str, Any]) -> str:
    return str(item["experiment"]) + ("" if item["split"] == "test" else f" ({item['split']})")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(figure: Mapping[str, float | None], scale: float, decimals: int) -> str:
    """Return '98.58 ± 0.12', or the mean alone if there is one file."""
    mean, sd = figure["mean"], figure["sd"]
    assert mean is not None  # only ``sd`` may be
    text = f"{mean * scale:.{decimals}f}"
    return text if sd is None else f"{text} ± {sd * scale:.{decimals}f}"
