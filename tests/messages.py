"""The error messages of the sources, with the SQLSTATE of each, for comparison with the docs."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

import psycopg.errors

from pg_siamese_server import errors
from tools.project import ROOT

SERVER = ROOT / "plpython" / "pg_siamese_server"
CLASSES = {
    name: kind.sqlstate
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.SiameseError)
}
EMPTY = (ast.Constant(None), ast.Constant(None))


@dataclass(frozen=True, order=True)
class Message:
    """A message, with … for each part that varies.

    Of what is no error, ``sqlstate`` is ``notice`` or ``warning``.
    """

    sqlstate: str
    text: str


def _template(node: ast.expr) -> str | None:
    """Return the text of a string or f-string; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    return None


def _sqlstate(node: ast.expr, default: str) -> str | None:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.Name):
        return str(getattr(errors, node.id, None) or default)
    return None


def of_python(text: str) -> set[Message]:
    """Return the messages of a Python source of the server package."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.List):
            # An error that PL/Python returns: SQLSTATE, message, DETAIL and HINT.
            state, template = map(_template, [*node.value.elts, *EMPTY][:2])
            if state and template:
                found.add(Message(state, template.replace("@VERSION@", "…")))
        if not (isinstance(node, ast.Call) and node.args):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name in ("notice", "warning"):
            found.add(Message(name, _template(node.args[0]) or ""))
            continue
        if name not in CLASSES and name != "error":
            continue
        states = [word.value for word in node.keywords if word.arg == "sqlstate"]
        first = node.args[0]
        texts = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
        for template in map(_template, texts):
            state = CLASSES.get(name, "") if not states else _sqlstate(states[0], "")
            if template is not None and state:
                template = template.replace("@VERSION@", "…")
                found.add(Message(state, template))
    return found


def of_sql(text: str) -> set[Message]:
    """Return the messages of SQL: RAISE EXCEPTION, and the errors of PL/Python bodies."""
    found = set()
    for message, condition in re.findall(
        r"RAISE EXCEPTION '((?:[^']|'')+)'[^;]*?ERRCODE = '(\w+)'", text
    ):
        name = "".join(word.capitalize() for word in condition.split("_"))
        state = str(getattr(psycopg.errors, name).sqlstate)
        found.add(Message(state, re.sub(r"%\d+\$s|%", "…", message.replace("''", "'"))))
    for body in re.findall(r"AS \$python\$\n(.*?)\$python\$", text, re.S):
        found |= of_python(body)
    return found


def all_messages() -> set[Message]:
    """Return the messages of all sources."""
    states = {sqlstate for sqlstate, _ in errors.FILE_ERRORS.values()} | {errors.IO_ERROR}
    found = {Message(state, 'could not write index file "…": …') for state in states}
    for path in SERVER.rglob("*.py"):
        found |= of_python(path.read_text())
    for path in (ROOT / "sql").glob("*.sql"):
        found |= of_sql(path.read_text())
    return found
