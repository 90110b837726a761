"""Check the language of the documentation and of the SQL comments.

`python -m tools.prose` reads Markdown files, prints a table of counts and each violation with its
file and line, and ends with status 1 if there is one. `--comments` also checks SQL COMMENTs.

Sentences are counted in paragraphs and list items. Headings, captions and table cells are mostly
fragments, so they count for the phrases, the semicolons and the longest sentence, but not for the
mean. Code, targets of links and generated parts are skipped.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.project import ROOT

LONGEST_SENTENCE = 25
MEAN_SENTENCE = 14.0
LONGEST_COMMENT = 12
MEAN_COMMENT = 7.0
AIM = 20  # words of a sentence; longer ones are counted in the table

# Whole words, in any case. The reason is what to write instead.
FORBIDDEN = {
    r"any more": "no longer",
    r"as it were": "leave it out",
    r"(?:can't|cannot|could not|couldn't|can|may|to|might) be had": "is (not) available",
    r"where (?:none|no|nothing|nobody|several|there (?:is|are)|it (?:can|does|is not|was))": "if",
    r"where (?:they|inserts|writes|two|that is not|this is not)": "if",
    r"of (?:its|their|your|one's) own(?! \w)": "its own ..., separate, temporary",
    r"once an? (?:second|minute|hour|day|session|build|query)": "per",
    r"\d+(?: [\w%/]+)? an? (?:million|second|minute|hour|day|session|class|seed|image|row)": "per",
    r"(?:\d+|two|four|eight|sixteen) numbers": "dimensions",
    r"mend(?:s|ed|ing)?": "fix, repair",
    r"for who(?:ever)? (?:runs|reads|wants)": "for administrators, for readers",
    r"beside (?:writers|searches|the database|it|them|two)": "concurrently with, next to",
    r"in the place of": "instead of",
    r"by heart": "memorise, overfit",
    r"for ever": "permanently",
    r"the slower": "name the cause, then the effect",
    r"go(?:es)? on meanwhile": "continue",
    r"(?:make|made|makes) anew": "again",
    r"said once in": "once per",
    r"it is there whole": "complete",
    r"tells? of": "describe",
    r"none waits?": "the queue is empty",
    r"has come to mean|have come to mean": "now means",
}
PHRASES = {
    re.compile(rf"\b{p}\b".replace(" ", r"\s+"), re.IGNORECASE): w for p, w in FORBIDDEN.items()
}

CODE_SPAN = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
TARGET = re.compile(r"(?<=\])\([^()\s]*(?:\([^()]*\)[^()\s]*)*\)")
URL = re.compile(r"<?https?://[^\s>]+>?")
HTML = re.compile(r"<!--.*?-->", re.DOTALL)
GENERATED = re.compile(r"<!-- figures: begin -->.*?<!-- figures: end -->", re.DOTALL)
FENCE = re.compile(r"^[ ]*(```+|~~~+).*?^[ ]*\1[ ]*$", re.DOTALL | re.MULTILINE)
ITEM = re.compile(r"[ ]*(?:[-*+]|\d+\.)[ ]+")
END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bet al)(?<!\bcf)[.!?][\"”’)*_]*(?=\s)")
WORD = re.compile(r"\S*\w\S*")
LITERAL = re.compile(r"'((?:[^']|'')*)'")


@dataclass(frozen=True)
class Violation:
    """What is wrong, and where."""

    place: str
    line: int
    text: str

    def __str__(self) -> str:
        """Return the line that is printed."""
        return f"{self.place}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Block:
    """A run of prose: where it begins in the file, and whether it has whole sentences."""

    start: int
    text: str
    running: bool

    def sentences(self) -> Iterator[tuple[int, int]]:
        """Yield the place in the file and the number of words of each sentence."""
        begin = 0
        ends = [match.end() for match in END.finditer(self.text)]
        for end in [*ends, len(self.text)]:
            words = list(WORD.finditer(self.text, begin, end))
            if words:
                yield self.start + words[0].start(), len(words)
            begin = end


@dataclass
class Counts:
    """Counts of one file, or of several."""

    sentences: int = 0
    words: int = 0
    longest: int = 0
    over_aim: int = 0
    semicolons: int = 0

    def __add__(self, other: Counts) -> Counts:
        """Return the counts of both."""
        return Counts(
            self.sentences + other.sentences,
            self.words + other.words,
            max(self.longest, other.longest),
            self.over_aim + other.over_aim,
            self.semicolons + other.semicolons,
        )

    @property
    def mean(self) -> float:
        """Words per sentence."""
        return self.words / self.sentences if self.sentences else 0.0


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def _cross(match: re.Match[str]) -> str:
    return "x" * len(match[0])


def prose(markdown: str) -> str:
    """Return a text of the same length and lines, without what is not prose.

    A code span counts as one word, and keeps its length as a row of "x".
    """
    text = GENERATED.sub(_blank, markdown)
    text = FENCE.sub(_blank, text)
    text = CODE_SPAN.sub(_cross, text)
    text = HTML.sub(_blank, text)
    text = TARGET.sub(_blank, text)
    return URL.sub(_cross, text)


def blocks(markdown: str) -> Iterator[Block]:
    """Yield the paragraphs, list items, headings and table cells of a Markdown text."""
    start: int | None = None
    place = 0
    text = prose(markdown)
    for line in [*text.splitlines(keepends=True), "\n"]:
        stripped = line.strip()
        item = ITEM.match(line)
        alone = stripped.startswith(("#", "|", "!["))
        if start is not None and (not stripped or alone or item):
            yield Block(start, text[start:place], running=True)
            start = None
        if stripped.startswith("|"):
            yield from _cells(line, place)
        elif alone:
            yield Block(place, line, running=False)
        elif stripped and start is None:
            start = place + (item.end() if item else 0)
        place += len(line)


def _cells(line: str, place: int) -> Iterator[Block]:
    for cell in re.finditer(r"[^|\n]+", line):
        if re.search(r"\w", cell[0]):
            yield Block(place + cell.start(), cell[0], running=False)


def check_markdown(markdown: str, place: str) -> tuple[Counts, list[Violation]]:
    """Return the counts of a Markdown text, and its violations in the order of lines."""
    counts = Counts()
    found = []

    def report(offset: int, what: str) -> None:
        found.append(Violation(place, markdown.count("\n", 0, offset) + 1, what))

    for block in blocks(markdown):
        for match in re.finditer(";", block.text):
            counts.semicolons += 1
            report(block.start + match.start(), "semicolon: make two sentences")
        for pattern, instead in PHRASES.items():
            for match in pattern.finditer(block.text):
                said = " ".join(match[0].split())
                report(block.start + match.start(), f'"{said}": {instead}')
        for offset, words in block.sentences():
            if words > LONGEST_SENTENCE:
                report(offset, f"sentence of {words} words: at most {LONGEST_SENTENCE}")
            if block.running:
                counts.sentences += 1
                counts.words += words
                counts.longest = max(counts.longest, words)
                counts.over_aim += words > AIM
    return counts, sorted(found, key=lambda violation: violation.line)


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each COMMENT in an SQL file.

    Texts that format() puts together have an "X" for each part that is not written there.
    """
    for match in re.finditer(r"COMMENT ON\b[^;']*?\bIS\s+(?:'((?:[^']|'')*)'|%L'\s*,)", source):
        line = source.count("\n", 0, match.start()) + 1
        if match[1] is not None:
            yield line, match[1].replace("''", "'")
        else:
            yield line, _composed(_last_argument(source, match.end()))


def _last_argument(source: str, place: int) -> str:
    """Return the last argument of the call that the place is in."""
    depth = 0
    begin = place
    for token in re.finditer(r"'(?:[^']|'')*'|[(),]", source[place:]):
        if token[0] == "(":
            depth += 1
        elif token[0] == ")":
            if not depth:
                return source[begin : place + token.start()].strip()
            depth -= 1
        elif token[0] == "," and not depth:
            begin = place + token.end()
    raise ValueError("a call that does not end")


def _composed(argument: str) -> str:
    if argument.startswith("format("):
        literal = LITERAL.search(argument)
        return re.sub(r"%\w", "X", literal[1]).replace("''", "'") if literal else "X"
    parts = re.split(r"\s*\|\|\s*", argument)
    texts = [LITERAL.fullmatch(part) for part in parts]
    return "".join(text[1].replace("''", "'") if text else "X" for text in texts)


def check_comments(source: str, place: str) -> tuple[list[int], list[Violation]]:
    """Return the number of words of each COMMENT of an SQL file, and the violations."""
    lengths = []
    found = []
    for line, text in comments(source):
        words = len(WORD.findall(text))
        lengths.append(words)
        if words > LONGEST_COMMENT:
            what = f'COMMENT of {words} words: at most {LONGEST_COMMENT}: "{text}"'
            found.append(Violation(place, line, what))
    return lengths, found


def check_means(names: str, counts: Counts) -> list[Violation]:
    """Return a violation if the sentences of a set of files are too long on average."""
    if counts.mean <= MEAN_SENTENCE:
        return []
    what = f"{counts.mean:.1f} words per sentence: at most {MEAN_SENTENCE:.0f}"
    return [Violation(names, 0, what)]


def documents() -> list[Path]:
    """Return the Markdown files whose language is checked."""
    own = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
    folders = [ROOT / name / "README.md" for name in ("bench", "docker", "migrations")]
    generated = {ROOT / "docs" / "cli.md"}
    return [*own, *sorted(set((ROOT / "docs").rglob("*.md")) - generated), *folders]


def table(rows: Iterable[tuple[str, Counts]]) -> str:
    """Return the counts as lines of text."""
    head = ("file", "sentences", "words each", "longest", f"over {AIM}", "semicolons")
    rows = list(rows)
    width = max(len(name) for name in [head[0], *(name for name, _ in rows)])
    lines = [f"{head[0]:<{width}}" + "".join(f"{name:>12}" for name in head[1:])]
    for name, c in rows:
        cells = (c.sentences, f"{c.mean:.1f}", c.longest, c.over_aim, c.semicolons)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _check_documents(paths: Sequence[Path]) -> list[Violation]:
    rows = []
    found = []
    for path in paths:
        counts, violations = check_markdown(path.read_text(), _name(path))
        rows.append((_name(path), counts))
        found += violations
    manual = [c for name, c in rows if name == "README.md" or name.startswith("docs/")]
    totals = {"README and docs": manual, "all": [c for _, c in rows]}
    for name, members in totals.items():
        total = sum(members, Counts())
        rows.append((name, total))
        found += check_means(name, total)
    print(table(rows))
    return found


def _check_comments(paths: Sequence[Path]) -> list[Violation]:
    lengths: list[int] = []
    found = []
    for path in paths:
        words, violations = check_comments(path.read_text(), _name(path))
        lengths += words
        found += violations
    mean = sum(lengths) / len(lengths) if lengths else 0.0
    if mean > MEAN_COMMENT:
        found.append(
            Violation("sql", 0, f"{mean:.1f} words per COMMENT: at most {MEAN_COMMENT:.0f}")
        )
    over = sum(words > LONGEST_COMMENT for words in lengths)
    print(
        f"SQL COMMENTs: {len(lengths)}, {mean:.1f} words each, longest {max(lengths, default=0)}, "
        f"over {LONGEST_COMMENT}: {over}"
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the files given, or all; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.prose", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="Markdown files instead of all")
    parser.add_argument("--comments", action="store_true", help="check SQL COMMENTs too")
    options = parser.parse_args(arguments)
    found = _check_documents([path.resolve() for path in options.files] or documents())
    if options.comments:
        found += _check_comments(sorted((ROOT / "sql").glob("*.sql")))
    for violation in found:
        print(violation)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
