"""Results as JSON, one file per experiment, and the table in the docs that is made from them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pg_siamese.client.connection import CommandError
from pg_siamese.datasets import sha256
from pg_siamese.evaluation.bootstrap import drawn_means, interval
from pg_siamese.evaluation.database import ENGINES
from pg_siamese.evaluation.figures import Evaluation, joined_parts
from pg_siamese.evaluation.retrieval import Floats
from pg_siamese.files import write_whole
from pg_siamese_server.encoding.specification import METRICS

FORMAT = 1
DIGITS = 5
WORST_KINDS = 3
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
HEADING = """\
# Results

Mean over the seeds, with the standard deviation if there are several. In brackets: the 95 %
confidence interval of the mean, by bootstrap over the queries. Each of 2,000 draws takes as many
queries as there are, or as many whole groups such as patients. All seeds get the same draws.

The text between the two marks is written by `pg_siamese evaluate --table`, from the files in
`results/`.

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
    figures = summary([e.figures for e in evaluations])
    for number, part in enumerate(first.data):
        _add_intervals(figures["sets"][part.name], evaluations, number)
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
        "summary": rounded(figures),
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
        if part.train.groups is not None:
            found[part.name]["query_groups"] = len(set(queries.groups))
            shared = int(np.isin(queries.groups, part.train.groups).sum())
            if shared:
                found[part.name]["queries_with_their_group_in_gallery"] = shared
    return found


def _add_intervals(figures: dict[str, Any], evaluations: Sequence[Evaluation], number: int) -> None:
    """Add the interval of the mean over models to those figures of a set that are means."""
    drawn, paths = [], []
    for evaluation in evaluations:
        part = evaluation.data[number]
        leaves = dict(_leaves(evaluation.scores[part.name]))
        paths, values = list(leaves), np.stack(list(leaves.values()))
        groups = evaluation.queries.of_set(number).groups
        # One draw for all models, unless each has queries of its own.
        drawn.append(drawn_means(values, groups, evaluation.model.seed if part.drawn else 0))
    for path, bounds in zip(paths, interval(drawn), strict=True):
        figure = figures
        for key in path:
            figure = figure[key]
        figure["interval"] = bounds.tolist()


def _leaves(scores: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Floats]]:
    """Yield the arrays in dictionaries of dictionaries, each with its keys."""
    if isinstance(scores, dict):
        for key, item in scores.items():
            yield from _leaves(item, *path, key)
    else:
        yield path, scores


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
    if isinstance(value, list):
        return [rounded(item) for item in value]
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
    joined = [
        (item, f"{_name(item)}{note}", part)
        for item in results
        for note, part in joined_parts(item["summary"]).items()
    ]
    for item, name, part in joined:
        for key, match in (("pairs", item["labels"]), ("set_pairs", "set")):
            figures = part.get(key)
            if figures is None or (key == "set_pairs" and item["labels"] == "set"):
                continue
            triples = part.get("triples") if key == "pairs" else None
            cells = [name, str(len(item["models"])), match]
            cells += [spread(figures["accuracy"], 100, 2)]
            cells += [spread(figures[k], 1, 4) for k in ("auc", "contrastive_loss", "log_loss")]
            cells += [spread(triples["accuracy"], 100, 2) if triples else ""]
            lines.append(_row(cells))
    lines += [
        "",
        "## Nearest neighbours",
        "",
        "Gallery: the train split of the data set. Queries: another split, by default the test "
        "split. A query's own group, such as its patient, is left out. *As published*: it may be a "
        "neighbour. Relevant: the same class. Per cent. mAP@5, mMV@5 and ACC@k are as in Mahbod et "
        "al. (2025). P@10 is the precision among the ten nearest, kNN the accuracy of the vote of "
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
                cells += [spread(protocol[k], 1, 2, k in _WITH_INTERVAL) for k in _PROTOCOL]
                cells += [spread(values["precision_at_10"], 100, 2)]
                cells += [spread(knn[k], 100, 2) for k in ("5", "10")]
                for engine in ENGINES:
                    most = in_database and in_database[engine]["greatest_difference"]["max"]
                    cells += [f"{most:.3f}" if in_database else ""]
                lines.append(_row(cells))
    with_sets = [(name, part) for _, name, part in joined if "right_set" in part]
    if with_sets:
        lines += [
            "",
            "Data sets joined: is the nearest image of all of the right set, and do pairs match by "
            "the sets of their nearest images?",
            "",
            "| experiment | nearest of the right set, % | pairs by their neighbours, % |",
            "| --- | --- | --- |",
        ]
        for name, part in with_sets:
            right = spread(part["right_set"], 1, 3)
            by_neighbour = part["set_pairs"]["accuracy_by_neighbour"]
            lines.append(_row([name, right, spread(by_neighbour, 100, 2)]))
    lines += _reliability_table(joined) + _robustness_table(results) + _outside_table(results)
    lines += ["", "## Commands", ""]
    lines += [f"- {_name(item)}: `{item['command']}`" for item in results]
    return "\n".join(lines) + "\n"


def _reliability_table(joined: Sequence[tuple[dict[str, Any], str, dict[str, Any]]]) -> list[str]:
    having = [(name, part["reliability"]) for _, name, part in joined if "reliability" in part]
    if not having:
        return []
    lines = [
        "",
        "## Calibration",
        "",
        "Expected calibration error of the match probability: the mean difference between "
        "predicted and observed shares of matches, in ten bins of pairs. Pairs are half and half. "
        "Per cent.",
        "",
        "| experiment | expected calibration error |",
        "| --- | --- |",
    ]
    for name, figures in having:
        lines.append(_row([name, spread(figures["expected_calibration_error"], 100, 2)]))
    return lines


def _robustness_table(results: Sequence[dict[str, Any]]) -> list[str]:
    having = [item for item in results if "robustness" in item["summary"]]
    if not having:
        return []
    lines = [
        "",
        "## Robustness",
        "",
        "Queries are changed in ten ways, with five severities each: see "
        "[training.md](training.md#robustness). Figures without *unchanged* are means of all "
        "changes, in per cent except the cosine. The worst kinds have the least mAP@5, as the mean "
        "of their severities.",
        "",
        "| experiment | data set | queries | mAP@5, unchanged | mAP@5 | cosine to the unchanged | "
        "nearest stays | its class stays | worst kinds, mAP@5 |",
        "| --- " * 9 + "|",
    ]
    for item in having:
        for name, figures in item["summary"]["robustness"].items():
            mean = figures["mean"]
            cells = [_name(item), name, f"{figures['queries']['mean']:,.0f}"]
            cells += [spread(figures["unchanged"]["map5"], 1, 2), spread(mean["map5"], 1, 2)]
            cells += [spread(mean["cosine"], 1, 3)]
            cells += [spread(mean[key], 100, 1) for key in ("same_neighbour", "same_class")]
            worst = ", ".join(f"{kind} {map5:.1f}" for map5, kind in _worst(figures["changes"]))
            lines.append(_row([*cells, worst]))
    return lines


def _worst(changes: Mapping[str, Mapping[str, Any]]) -> list[tuple[float, str]]:
    """Return mAP@5, as the mean of the severities, and name of the worst kinds of changes."""
    kinds = [
        (statistics.fmean(each["map5"]["mean"] for each in by_severity.values()), kind)
        for kind, by_severity in changes.items()
    ]
    return sorted(kinds)[:WORST_KINDS]


def _outside_table(results: Sequence[dict[str, Any]]) -> list[str]:
    having = [item for item in results if "outside" in item["summary"]]
    if not having:
        return []
    lines = [
        "",
        "## Images of other kinds",
        "",
        "Accepted: inside the domain. Near: within the threshold of the nearest gallery image. "
        "A false match is both. Per cent.",
        "",
        "| experiment | images | number | accepted | near | false matches |",
        "| --- " * 6 + "|",
    ]
    for item in having:
        for name, figures in item["summary"]["outside"].items():
            cells = [_name(item), name, f"{figures['images']['mean']:,.0f}"]
            cells += [spread(figures[key], 1, 2) for key in ("accepted", "near", "false_match")]
            lines.append(_row(cells))
    return lines


_PROTOCOL = ("map5", "mmv5", "acc1", "acc3", "acc5")
_WITH_INTERVAL = ("map5", "mmv5", "acc1")
_VARIANTS = {"as_published": ", as published"} | {f"by_{m}": f", by {m}" for m in METRICS}


def variants(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a data set's main figures, and those with own groups or by the other metric, if any.

    Each by a note that says so.
    """
    others = {note: figures[key] for key, note in _VARIANTS.items() if key in figures}
    return {"": figures, **others}


def _name(item: dict[str, Any]) -> str:
    return str(item["experiment"]) + ("" if item["split"] == "test" else f" ({item['split']})")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(
    figure: Mapping[str, Any], scale: float, decimals: int, with_interval: bool = False
) -> str:
    """Return '98.58 ± 0.12', or the mean alone if there is one file.

    ``with_interval`` adds the interval, as in '98.58 ± 0.12 [97.90, 99.17]', if there is one.
    """

    def shown(value: float) -> str:
        return f"{value * scale:.{decimals}f}"

    text = shown(figure["mean"])
    if figure["sd"] is not None:
        text += f" ± {shown(figure['sd'])}"
    if with_interval and "interval" in figure:
        text += f" [{', '.join(map(shown, figure['interval']))}]"
    return text
