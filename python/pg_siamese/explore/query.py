"""What a visitor searches for, as the address of the page has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

from psycopg import sql

from pg_siamese.client.queries import Examples, Groups, Search, search_statement
from pg_siamese.explore.failures import PageError, whole_number
from pg_siamese.explore.pictures import MOST_FRAMES
from pg_siamese.explore.sessions import Session
from pg_siamese.explore.tables import Table

ENGINES = ("auto", "faiss", "pgvector")
STRATEGIES = ("mean", "best")
SIZES = (12, 24, 48, 96)
MOST_EXAMPLES = 16
# Of an example that is a stored row, and of one that is a file of the visitor.
STORED, FILE = "key:", "file:"
# Of a filter: values, one that is typed, the ends of a range, and rows without a value.
VALUE, TYPED, LEAST, MOST, NULL = "in.", "also.", "min.", "max.", "null."
_EDGES = ("left", "top", "right", "bottom")

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Condition:
    """What a column's value has to be: one of some values, or within a range."""

    values: tuple[str, ...] = ()
    with_null: bool = False
    least: str = ""
    most: str = ""

    @property
    def filter(self) -> Any:
        """The condition as filters of the extension have it."""
        ends = {">=": self.least, "<=": self.most}
        given: dict[str, Any] = {sign: value for sign, value in ends.items() if value}
        if self.values or self.with_null:
            given["in"] = [*self.values, *([None] if self.with_null else [])]
        return given["in"] if list(given) == ["in"] else given

    def clause(self, column: str, type_name: str) -> sql.Composed:
        """Return the condition as SQL."""
        name, cast = sql.Identifier(column), sql.SQL(type_name)
        clauses: list[sql.Composable] = []
        for sign, value in ((">=", self.least), ("<=", self.most)):
            if value:
                form = sql.SQL("{} {} {}::text::{}")
                clauses.append(form.format(name, sql.SQL(sign), sql.Literal(value), cast))
        among: list[sql.Composable] = []
        if self.values:
            form = sql.SQL("{} = ANY ({}::text[]::{}[])")
            among.append(form.format(name, sql.Literal(list(self.values)), cast))
        if self.with_null:
            among.append(sql.SQL("{} IS NULL").format(name))
        if among:
            clauses.append(sql.SQL("({})").format(sql.SQL(" OR ").join(among)))
        return sql.SQL(" AND ").join(clauses)


@dataclass(frozen=True)
class Query:
    """A search, or with no examples the rows of the table in the order of their keys.

    Attributes:
        like, unlike: examples, each ``key:KEY`` or ``file:NAME``.
        k: number of answers.
        engine, strategy: as in SQL.
        one_each: the best of each group only.
        own_group: whether rows of the query's own group count.
        frame: of the query's image, from 1, or 0 for the representative one.
        region: part of the query's image, in shares of its sides.
        columns: names of the columns that are shown.
        conditions: by name of the column.
        among: name of a set of keys.
        after: key of the last row before the ones to show, if there are no examples.
    """

    like: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()
    k: int = 24
    engine: str = "auto"
    strategy: str = "mean"
    one_each: bool = False
    own_group: bool = True
    frame: int = 0
    region: tuple[float, ...] | None = None
    columns: tuple[str, ...] = ()
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    among: str = ""
    after: str = ""

    @property
    def single(self) -> str | None:
        """The example if there is but one, so that it is searched for by itself."""
        return self.like[0] if len(self.like) == 1 and not self.unlike else None

    def pairs(self) -> list[tuple[str, str]]:
        """Return the search as parameters of an address."""
        found = [("like", each) for each in self.like]
        found += [("unlike", each) for each in self.unlike]
        found += [("k", str(self.k)), ("engine", self.engine)]
        if self.strategy != STRATEGIES[0]:
            found.append(("strategy", self.strategy))
        found += [("one_each", "1")] if self.one_each else []
        found += [] if self.own_group else [("other_groups", "1")]
        found += [("frame", str(self.frame))] if self.frame else []
        if self.region is not None:
            found += [
                (name, f"{100 * edge:.6g}") for name, edge in zip(_EDGES, self.region, strict=True)
            ]
        found += [("column", name) for name in self.columns] or [("columns", "chosen")]
        for name, condition in self.conditions.items():
            found += [(f"{VALUE}{name}", value) for value in condition.values]
            found += [(f"{NULL}{name}", "1")] if condition.with_null else []
            found += [(f"{LEAST}{name}", condition.least)] if condition.least else []
            found += [(f"{MOST}{name}", condition.most)] if condition.most else []
        found += [("among", self.among)] if self.among else []
        return found + ([("after", self.after)] if self.after else [])

    def address(self, path: str, collection: str, **changes: Any) -> str:
        """Return the address of a page that shows this search, with changes."""
        changed = replace(self, **changes) if changes else self
        return f"{path}?{urlencode([('c', collection), *changed.pairs()])}"

    def filter(self) -> dict[str, Any] | None:
        """Return the conditions as one filter."""
        found = {name: condition.filter for name, condition in self.conditions.items()}
        return found or None

    def groups(self, table: Table) -> Groups | None:
        """Return how groups are treated."""
        if table.group_column is None or (self.own_group and not self.one_each):
            return None
        return Groups(table.group_column, 1 if self.one_each else self.k, self.own_group)

    def statement(self, table: Table, session: Session, *, literals: bool = False) -> Search:
        """Return the statement of the search, which has at least one liked example."""
        options: dict[str, Any] = {}
        if self.single is None:
            like, unlike = (_items(each, session) for each in (self.like, self.unlike))
            options["examples"] = Examples(like, unlike, self.strategy)
        else:
            (item,) = _items([self.single], session)
            options["key" if isinstance(item, str) else "image"] = item
            options |= {"frame": self.frame, "region": self.region}
        return search_statement(
            table.showing(self.columns),
            k=self.k,
            filter=self.filter(),
            engine=self.engine,
            groups=self.groups(table),
            candidates=session.sets.get(self.among) if self.among else None,
            literals=literals,
            **options,
        )

    def listing(self, table: Table, session: Session) -> sql.Composed:
        """Return the statement that lists rows, if there are no examples."""
        clauses = [sql.SQL("{} IS NOT NULL").format(table.image)]
        for name, condition in self.conditions.items():
            clauses.append(condition.clause(name, table.column(name).type))
        if self.among:
            keys = sql.Literal(list(session.sets.get(self.among)))
            form = sql.SQL("{} = ANY ({}::text[]::{}[])")
            clauses.append(form.format(table.key, keys, table.key_type))
        if self.after:
            form = sql.SQL("{} > {}::text::{}")
            clauses.append(form.format(table.key, sql.Literal(self.after), table.key_type))
        return sql.SQL("SELECT {}\n  FROM {}\n WHERE {}\n ORDER BY {}\n LIMIT {}").format(
            sql.SQL(", ").join([table.key, *map(sql.Identifier, self.columns)]),
            table.relation,
            sql.SQL("\n   AND ").join(clauses),
            table.key,
            sql.Literal(self.k),
        )


def parse(pairs: Pairs, table: Table) -> Query:
    """Read the parameters of an address. Raises ``PageError``."""
    values: dict[str, list[str]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)

    def last(name: str, default: str = "") -> str:
        return values.get(name, [default])[-1]

    like, unlike = (tuple(dict.fromkeys(values.get(name, ()))) for name in ("like", "unlike"))
    if any(not each.startswith((STORED, FILE)) for each in (*like, *unlike)):
        raise PageError(400, "An example is neither a key nor a file.")
    if len(like) + len(unlike) > MOST_EXAMPLES:
        raise PageError(400, f"Take at most {MOST_EXAMPLES} examples.")
    if unlike and not like:
        raise PageError(400, "Like at least one picture, too.")
    columns = tuple(table.column(name).name for name in dict.fromkeys(values.get("column", ())))
    return Query(
        like=like,
        unlike=unlike,
        k=whole_number("k", last("k", "24"), 1, max(SIZES)),
        engine=_one_of("engine", last("engine", ENGINES[0]), ENGINES),
        strategy=_one_of("strategy", last("strategy", STRATEGIES[0]), STRATEGIES),
        one_each=bool(last("one_each")),
        own_group=not last("other_groups"),
        frame=whole_number("frame", last("frame", "0") or "0", 0, MOST_FRAMES),
        region=_region([last(name) for name in _EDGES]),
        columns=columns if {"column", "columns"} & values.keys() else table.shown_first(),
        conditions=_conditions(values, table),
        among=last("among"),
        after="" if like else last("after"),
    )


def _conditions(values: Mapping[str, Sequence[str]], table: Table) -> dict[str, Condition]:
    found: dict[str, Condition] = {}
    for each, given in values.items():
        prefix, dot, name = each.partition(".")
        prefix += dot
        if prefix not in (VALUE, TYPED, LEAST, MOST, NULL) or (prefix != VALUE and not given[-1]):
            continue
        if table.column(name).kind == "none":
            raise PageError(400, f'Column "{name}" can\'t be filtered.')
        known = found.get(name, Condition())
        if prefix in (VALUE, TYPED):
            known = replace(known, values=tuple(dict.fromkeys((*known.values, *given))))
        elif prefix == NULL:
            known = replace(known, with_null=True)
        elif prefix == LEAST:
            known = replace(known, least=given[-1])
        else:
            known = replace(known, most=given[-1])
        found[name] = known
    return found


def _items(examples: Sequence[str], session: Session) -> list[bytes | str]:
    return [
        each.removeprefix(STORED)
        if each.startswith(STORED)
        else session.files.get(each.removeprefix(FILE))
        for each in examples
    ]


def _one_of(name: str, text: str, known: Sequence[str]) -> str:
    if text not in known:
        raise PageError(400, f"{name} is not one of {', '.join(known)}.")
    return text


def _region(texts: Sequence[str]) -> tuple[float, ...] | None:
    if not any(texts):
        return None
    try:
        edges = [float(text) / 100 for text in texts]
    except ValueError:
        edges = []
    if len(edges) != 4 or not all(0 <= edge <= 1 for edge in edges):
        raise PageError(400, "The part of the picture is not four numbers from 0 to 100.")
    left, top, right, bottom = edges
    if left >= right or top >= bottom:
        raise PageError(400, "The part of the picture is empty.")
    return None if edges == [0, 0, 1, 1] else (left, top, right, bottom)
