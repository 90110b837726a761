"""Tell the facts of a search that was traced, but none of rows that the caller may not see."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pg_siamese_server.search import filters
from pg_siamese_server.search.request import Answer
from pg_siamese_server.search.trace import Trace

PHASES = {
    "embed": "embedding of the image",
    "open": "state of the collection, index file, list of changes",
    "index": "distances from the index",
    "pending": "distances of pending vectors",
    "check": "questions to the table: visibility, filters, groups",
    "scan": "pgvector's scan",
}
# Known to a caller under row-level security. All else depends on rows that it hides.
TOLD = ("engine", "returned", "embed_ms", "total_ms")
HIDDEN = "hidden by row-level security"

# Name, value and detail.
Fact = tuple[str, str | None, str | None]


def facts(plpy: Any, trace: Trace, answer: Answer, seconds: float) -> list[Fact]:
    """Return what to tell of a search that took some seconds in all."""
    found: list[Fact] = [
        ("engine", trace.engine, trace.reason),
        ("method", trace.method, None),
        ("exact", _text(trace.exact), None),
        ("ef", _text(trace.ef), "breadth of the last walk through the graph"),
        ("rounds", str(trace.rounds), "each asks the index for more rows"),
        *_counts(plpy, trace, answer),
        ("returned", str(len(answer.keys)), None),
        ("pending", _text(trace.pending), "vectors that the index lacks"),
        ("dead", _text(trace.dead), "vectors of the index that are deleted or replaced"),
    ]
    for name, detail in PHASES.items():
        found.append((f"{name}_ms", _milliseconds(trace.seconds[name]), detail))
    rest = seconds - sum(trace.seconds.values())
    found.append(("other_ms", _milliseconds(rest), "everything else"))
    found.append(("total_ms", _milliseconds(seconds), None))
    hides = plpy.execute(
        "SELECT pg_catalog.row_security_active("
        f"{answer.collection.relation_oid}::pg_catalog.oid) AS yes"
    )[0]["yes"]
    return [_hidden(fact) for fact in found] if hides else found


def _hidden(fact: Fact) -> Fact:
    name, value, detail = fact
    if name not in TOLD:
        return name, None, HIDDEN
    # The reason for the engine may be the number of changes.
    return name, value, HIDDEN if name == "engine" else detail


def _counts(plpy: Any, trace: Trace, answer: Answer) -> list[Fact]:
    """Return how many candidates there were, and why some were not returned."""
    details = {
        "candidates": "rows that were considered, in the last round",
        "rejected_by_visibility": "not in the table as this snapshot sees it",
        "rejected_by_filter": "by filter, exclude or candidates",
        "rejected_by_group": "no room in their group",
        "rejected_by_distance": "farther than the last row returned, or than max_distance",
    }
    if trace.candidates is None:
        return [(name, None, detail) for name, detail in details.items()]
    present = _count_present(plpy, trace, answer)
    unseen, filtered = len(trace.rejected) - present, present + trace.outside
    farther = trace.candidates - unseen - filtered - trace.grouped - len(answer.keys)
    values = trace.candidates, unseen, filtered, trace.grouped, farther
    return [
        (name, str(value), detail)
        for value, (name, detail) in zip(values, details.items(), strict=True)
    ]


def _count_present(plpy: Any, trace: Trace, answer: Answer) -> int:
    """Return how many of the rejected candidates the table has, filters aside."""
    if not trace.rejected:
        return 0
    collection = answer.collection
    items = Counter(item[0] if collection.has_frames else item for item in trace.rejected)
    found = filters.qualifying(plpy, collection, filters.Conditions(), list(items)) or ()
    return sum(items[key] for key in found)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3f}"


def _text(value: int | bool | None) -> str | None:
    return None if value is None else str(value).lower()
