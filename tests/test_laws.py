"""Each law of docs/architecture.md has tests that fail when it is broken.

They are marked with its number: ``@pytest.mark.law(9)``.
"""

from __future__ import annotations

import ast
import functools
import re

import pytest

from tools.project import ROOT

LAWS = {
    int(number): title
    for number, title in re.findall(
        r"^(\d+)\. \*\*(.+?)\*\*", (ROOT / "docs" / "architecture.md").read_text(), re.M
    )
}


@functools.cache
def marks() -> list[tuple[str, int]]:
    """Return the name of each marked test with the number of each of its laws."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.law":
                    test = f"{path.name}::{node.name}"
                    found += [(test, ast.literal_eval(number)) for number in mark.args]
    return found


def test_laws_are_numbered() -> None:
    assert list(LAWS) == list(range(1, len(LAWS) + 1)) and len(LAWS) >= 14


@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law} {LAWS[law]}")
def test_every_law_has_a_test(law: int) -> None:
    assert law in {number for _, number in marks()}, f"no test is marked with law {law}"


def test_marks_name_laws_and_stand_on_tests() -> None:
    for test, number in marks():
        assert number in LAWS, f"{test}: there is no law {number}"
        assert "::test_" in test, f"{test} is not a test"
