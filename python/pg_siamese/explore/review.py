"""Groups of pictures to decide on: near-duplicates, and leaks between splits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from starlette.responses import RedirectResponse, Response

from pg_siamese.explore import jobs
from pg_siamese.explore.failures import PageError, whole_number
from pg_siamese.explore.sessions import Connection
from pg_siamese.explore.tables import Table, values_of
from pg_siamese.explore.visits import Visit

KINDS = ("near_duplicates", "leaks")
DECISIONS = ("same", "different", "unsure")
# Groups that are kept, pictures of each that are shown, and groups on a page.
MOST_GROUPS, MOST_MEMBERS, PER_PAGE = 1_000, 12, 8
# The table of decisions, as a visitor may make it.
CREATE = """\
CREATE TABLE decisions (
    collection text NOT NULL,
    keys text[] NOT NULL,
    decision text NOT NULL,
    note text NOT NULL,
    decided_by text NOT NULL DEFAULT current_user,
    decided_at timestamptz NOT NULL DEFAULT now()
);"""
_TABLE = """
    SELECT n.nspname, c.relname FROM pg_catalog.pg_class AS c
    INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.oid = pg_catalog.to_regclass(%s) AND c.relkind IN ('r', 'p', 'v')
"""
Row = Mapping[str, Any]


@dataclass
class Group:
    """Pictures to decide on.

    Attributes:
        keys: of the rows, as text.
        notes: what is known of each row.
        title: what they have in common.
        decision: the last one, or nothing.
    """

    keys: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    title: str = ""
    decision: str = ""

    @property
    def shown(self) -> list[tuple[str, str]]:
        """Keys and notes of the pictures that are shown."""
        return list(zip(self.keys, self.notes, strict=True))[:MOST_MEMBERS]


@dataclass(frozen=True)
class Found:
    """What a review looks at: the groups, and whether there are more than are kept."""

    collection: str
    groups: list[Group]
    more: bool


def review(visit: Visit) -> Response:
    """Show the form that begins a review, or a page of groups."""
    table = visit.table()
    job = visit.session.jobs.get(visit.parameter("job"))
    found = job.outcome if job is not None else None
    if job is None or not isinstance(found, Found) or found.collection != table.name:
        splits = [column.name for column in table.filtered]
        return visit.render("review.html", collection=table.name, found=None, splits=splits)
    into = visit.parameter("into")
    page = whole_number("page", visit.parameter("page") or "0", 0, MOST_GROUPS)
    first = page * PER_PAGE
    groups = list(enumerate(found.groups))[first : first + PER_PAGE]
    # The role may see less than when they were found.
    keys = {key for _, group in groups for key in group.keys}
    seen = values_of(visit.connection, table, list(keys), None)
    groups = [(number, group) for number, group in groups if seen.keys() >= set(group.keys)]
    if into:
        _read_decisions(visit.connection, _decisions(visit.connection, into), table, groups)
    return visit.render(
        "review.html",
        collection=table.name,
        table=table,
        found=found,
        groups=groups,
        job=job.name,
        into=into,
        page=page,
        pages=-(-len(found.groups) // PER_PAGE),
        address=lambda number: _address(table.name, job.name, into, number),
        create=CREATE,
        decisions=DECISIONS,
    )


def begin(visit: Visit) -> Response:
    """Begin to look for groups."""
    table = visit.table()
    kind = visit.form.get("kind", "")
    if kind not in KINDS:
        raise PageError(400, f"kind is not one of {', '.join(KINDS)}.")
    arguments: dict[str, Any] = {"collection": table.name}
    for name in ("max_distance", "max_difference"):
        if visit.form.get(name):
            arguments[name] = _decimal(name, visit.form[name])
    if kind == "leaks":
        arguments["split_column"] = table.column(visit.form.get("split_column", "")).name
    elif visit.form.get("mirrored"):
        arguments["mirrored"] = True
    statement = sql.SQL("SELECT * FROM siamese.{}({})").format(
        sql.Identifier(kind),
        sql.SQL(", ").join(
            sql.SQL("{} => {}").format(sql.Identifier(name), sql.Literal(value))
            for name, value in arguments.items()
        ),
    )

    def look(connection: Connection) -> Found:
        with connection.transaction(), connection.cursor("rows", row_factory=dict_row) as cursor:
            cursor.execute(statement)
            return _gather(table.name, cursor, kind)

    title = f"Looking for {kind.replace('_', ' ')} in {table.name}"
    started = jobs.start(visit.session, title, "", look)
    started.back = _address(table.name, started.name, "", 0)
    return RedirectResponse(f"/job?id={started.name}", 303)


def decide(visit: Visit) -> Response:
    """Write a decision into the table of the visitor's choice."""
    if not visit.may_write:
        raise PageError(403, "The page was started without --write, so nothing can be changed.")
    form = visit.form
    job = visit.session.jobs.get(form.get("job", ""))
    if job is None or not isinstance(job.outcome, Found):
        raise PageError(410, "The page no longer has these groups.", "Begin the review again.")
    found = job.outcome
    number = whole_number("group", form.get("group", ""), 0, len(found.groups) - 1)
    decision, group = form.get("decision", ""), found.groups[number]
    if decision not in DECISIONS:
        raise PageError(400, f"decision is not one of {', '.join(DECISIONS)}.")
    target = _decisions(visit.connection, form.get("into", ""))
    values = (found.collection, group.keys, decision, form.get("note", ""))
    statement = sql.SQL("INSERT INTO {} (collection, keys, decision, note) VALUES ({})").format(
        target, sql.SQL(", ").join(map(sql.Literal, values))
    )
    with visit.connection.transaction():
        visit.connection.execute("SET TRANSACTION READ WRITE")
        visit.connection.execute(statement)
    group.decision = decision
    page = number // PER_PAGE
    address = _address(found.collection, job.name, form["into"], page)
    return RedirectResponse(f"{address}#group-{number}", 303)


def _gather(collection: str, rows: Iterable[Row], kind: str) -> Found:
    """Put rows of one group together, which follow each other."""
    groups: list[Group] = []
    last: object = None
    for row in rows:
        number = row["group_number"] if kind == KINDS[0] else (row["a"], row["b"], row["kind"])
        if number != last:
            if len(groups) == MOST_GROUPS:
                return Found(collection, groups, more=True)
            groups.append(Group())
            last = number
        if kind == KINDS[0]:
            groups[-1].keys.append(row["key"])
            groups[-1].notes.append(_difference(row))
        else:
            groups[-1].keys += [row["a"], row["b"]]
            groups[-1].notes += [str(row["split_a"]), str(row["split_b"])]
            title = [row["kind"], row["group_label"] or "", _difference(row)]
            groups[-1].title = ", ".join(filter(None, title))
    return Found(collection, groups, more=False)


def _difference(row: Row) -> str:
    if row["difference"] is None:
        return ""
    mirrored = ", mirrored" if row.get("is_mirrored") else ""
    return f"difference {row['difference']:.1f}{mirrored}"


def _decisions(connection: Connection, name: str) -> sql.Identifier:
    """Return the table that a visitor names. Raises ``PageError``."""
    if not name:
        raise PageError(400, "Name a table for the decisions.")
    row = None
    with suppress(psycopg.errors.SyntaxError, psycopg.errors.InvalidName):
        row = connection.execute(_TABLE, (name,)).fetchone()
    if row is None:
        raise PageError(400, f'There is no table "{name}".', "Make it with the SQL on this page.")
    return sql.Identifier(*row)


def _read_decisions(
    connection: Connection,
    decisions: sql.Identifier,
    table: Table,
    groups: Sequence[tuple[int, Group]],
) -> None:
    """Note the last decision on each group."""
    form = sql.SQL(
        "SELECT decision FROM {} WHERE collection = {} AND keys = {}::text[]"
        " ORDER BY decided_at DESC LIMIT 1"
    )
    for _, group in groups:
        values = sql.Literal(table.name), sql.Literal(group.keys)
        row = connection.execute(form.format(decisions, *values)).fetchone()
        group.decision = "" if row is None else str(row[0])


def _address(collection: str, job: str, into: str, page: int) -> str:
    given = {"c": collection, "job": job, "into": into, "page": page}
    return f"/review?{urlencode({name: value for name, value in given.items() if value != ''})}"


def _decimal(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PageError(400, f"{name} is not a number.") from None
