"""The linter of the documentation's language: each rule has a text that breaks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import prose
from tools.project import ROOT
from tools.prose import LONGEST_COMMENT, LONGEST_SENTENCE, check_markdown, check_means, main

LONG = " ".join(["word"] * (LONGEST_SENTENCE + 1)) + "."


def violations(markdown: str) -> list[tuple[int, str]]:
    return [(v.line, v.text) for v in check_markdown(markdown, "x.md")[1]]


@pytest.mark.parametrize(
    "text",
    [
        "It is not there any more.",
        "It is, as it were, quick.",
        "MedMNIST can't be had here.",
        "Memory is to be had.",
        "It searches all, where none is given.",
        "Where it can't read, it stops.",
        "Rows, where they are, stay.",
        "They start servers of their own.",
        "Run it once an hour.",
        "It takes 0.36 GB a million.",
        "It inserts 4,157 a second.",
        "Vectors of 64 numbers are small.",
        "The next build mends it.",
        "For who runs a database.",
        "It works beside writers.",
        "A set in the place of another.",
        "It learns them by heart.",
        "It fails for ever.",
        "The more there are, the slower it is.",
        "Searches go on meanwhile.",
        "The file is made anew.",
        "It is said once in a session.",
        "The file, unless it is there whole.",
        "The page tells of experiments.",
        "Until none waits, it runs.",
        "It gives what it has come to mean.",
    ],
)
def test_phrases(text: str) -> None:
    assert [line for line, _ in violations(f"Good.\n\n{text}\n")] == [3], text


def test_every_phrase_has_a_text() -> None:
    """Each pattern is hit by the texts of the test above."""
    (mark,) = test_phrases.pytestmark  # type: ignore[attr-defined]
    texts = mark.args[1]
    assert all(any(p.search(text) for text in texts) for p in prose.PHRASES)


def test_a_phrase_over_two_lines() -> None:
    assert violations("It is no there any\nmore. Good.") == [(1, '"any more": no longer')]


@pytest.mark.parametrize(
    "text",
    [
        "It is no longer there. Many more are, in any case.",
        "The packages of its own Python.",
        "See where the file is.",
        "A version number: 64. Numbers follow.",
    ],
)
def test_what_is_allowed(text: str) -> None:
    assert violations(text) == []


@pytest.mark.parametrize(
    ("markdown", "lines"),
    [
        ("One; two.", [1]),
        ("# A title; with more", [1]),
        ("- one\n- two; three", [2]),
        ("| a | b |\n| --- | --- |\n| c; d | e; f |", [3, 3]),
        ("**One; two**", [1]),
        ("See [a; b](c.md).", [1]),
        ("Run `a; b`.", []),
        ("Run ``a; `b``.", []),
        ("See [a](c;d.md) or <https://a.org/b;c>.", []),
        ("```sh\na; b\n```", []),
        ("- one\n\n  ```sh\n  a; b\n  ```", []),
        ("<!-- a; b -->", []),
        ("<!-- figures: begin -->\na; b\n<!-- figures: end -->\n\nc; d", [5]),
    ],
)
def test_semicolons(markdown: str, lines: list[int]) -> None:
    found = violations(markdown)
    assert [line for line, _ in found] == lines
    assert all(text.startswith("semicolon") for _, text in found)
    assert check_markdown(markdown, "x.md")[0].semicolons == len(lines)


@pytest.mark.parametrize("markdown", [LONG, f"- {LONG}", f"| a | {LONG} |", f"Good. {LONG} Good."])
def test_long_sentences(markdown: str) -> None:
    words = LONGEST_SENTENCE + 1
    assert violations(markdown) == [(1, f"sentence of {words} words: at most {LONGEST_SENTENCE}")]


def test_a_sentence_of_the_greatest_length() -> None:
    assert violations(LONG.removeprefix("word ")) == []


@pytest.mark.parametrize(
    ("markdown", "lengths"),
    [
        ("One two. Three!  Four five six? Seven", [2, 1, 3, 1]),
        ("One two\nthree. Four.", [3, 1]),
        ("**One.** Two three.", [1, 2]),
        ("Yang et al. wrote e.g. 0.5 of it.", [8]),
        ("`a b c` is one. `d`.", [3, 1]),
        ("[two words](there) of 28 x 28 – pixels.", [7]),
        ("- one two\n- three\n  four", [2, 2]),
        ("1. one\n2. two three", [1, 2]),
        ("one\n\ntwo three", [1, 2]),
    ],
)
def test_sentences(markdown: str, lengths: list[int]) -> None:
    assert [n for block in prose.blocks(markdown) for _, n in block.sentences()] == lengths
    counts, _ = check_markdown(markdown, "x.md")
    assert (counts.sentences, counts.words) == (len(lengths), sum(lengths))


def test_fragments_are_not_in_the_mean() -> None:
    counts, _ = check_markdown("# Title\n\n| a | b |\n\n![caption](a.png)\n\nOne two.", "x.md")
    assert (counts.sentences, counts.words, counts.mean) == (1, 2, 2.0)


def test_the_mean() -> None:
    counts, _ = check_markdown(" ".join(["word"] * 15) + ".", "x.md")
    assert [v.text for v in check_means("x", counts)] == ["15.0 words per sentence: at most 14"]
    other, _ = check_markdown("One. Two.", "x.md")
    assert check_means("x", counts + other) == []


SQL = """
COMMENT ON TABLE a IS 'what''s in it';
COMMENT ON FUNCTION b(text, integer)
IS 'do it';
EXECUTE format(
    'COMMENT ON TABLE %s IS %L', name,
    'vectors of collection ' || collection.name || ' without index');
EXECUTE format(
    'COMMENT ON FUNCTION _%s_%s IS %L', item[1], number,
    format('%s of collection %s, with rights of the table''s owner', item[5], collection.name));
"""


def test_comments() -> None:
    assert list(prose.comments(SQL)) == [
        (2, "what's in it"),
        (3, "do it"),
        (6, "vectors of collection X without index"),
        (9, "X of collection X, with rights of the table's owner"),
    ]


def test_long_comments() -> None:
    text = " ".join(["word"] * (LONGEST_COMMENT + 1))
    source = f"{SQL}COMMENT ON TABLE c\nIS '{text}';"
    lengths, found = prose.check_comments(source, "x.sql")
    assert lengths == [3, 2, 6, 10, LONGEST_COMMENT + 1]
    assert [str(v) for v in found] == [f'x.sql:11: COMMENT of 13 words: at most 12: "{text}"']


def test_status_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text("One two. Three.\n")
    bad.write_text("One.\n\nTwo; three.\n")
    assert main([str(good)]) == 0
    assert main([str(good), str(bad)]) == 1
    assert "bad.md:3: semicolon" in capsys.readouterr().out
    (tmp_path / "sql").mkdir()
    comment = "COMMENT ON TABLE a IS 'one two three four five six seven%s';"
    (tmp_path / "sql/a.sql").write_text(comment % "")
    assert main([str(good), "--comments"]) == 0
    (tmp_path / "sql/b.sql").write_text(comment % " eight")
    assert main([str(good), "--comments"]) == 1
    assert "7.5 words per COMMENT" in capsys.readouterr().out


def test_what_is_checked() -> None:
    names = {str(path.relative_to(ROOT)) for path in prose.documents()}
    assert {"README.md", "docs/operations.md", "docs/decisions/README.md"} <= names
    assert "docs/cli.md" not in names  # generated
    assert all(path.is_file() for path in prose.documents())
