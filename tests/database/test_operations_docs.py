"""docs/operations.md: statements run, shell commands exist, messages are those of the sources."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg import sql

from tests.conftest import Connect, Connection, Pictures, insert_images
from tests.messages import Message, all_messages
from tests.server import pg_environment
from tests.support import grid_encoder, rows_of
from tools.project import ROOT

TEXT = (ROOT / "docs" / "operations.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.M | re.S)
ROLES = ("analyst", "curator", "embedder")
# Self-explaining, and too many to list: the message names the argument.
GENERAL = {"22023", "22004"}


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def test_no_block_is_left_out() -> None:
    # Those in bash are for other servers: tests/operations does the same with its own.
    assert {name for name, _ in BLOCKS} == {"sql", "sh", "ini", "bash"}
    assert len(blocks("ini")) == 1  # PgBouncer's


@pytest.fixture
def filled(db: Connection, pictures: Pictures) -> Iterator[Connection]:
    db.execute(
        "INSERT INTO siamese.images (image) SELECT unnest(%s::bytea[])", (pictures.files[:50],)
    )
    db.execute("CREATE TABLE public.archive (archive_id bigint PRIMARY KEY, image bytea)")
    db.execute("SELECT create_collection('archive', 'public.archive', embed => 'deferred')")
    db.execute("INSERT INTO public.archive VALUES (1, %s)", (pictures.files[60],))
    model = grid_encoder(("n", 3, 28, 28), pool=7)
    db.execute("SELECT register_model('medical_2', %s)", (model,))
    yield db
    for role in map(sql.Identifier, ROLES):
        db.execute(sql.SQL("DROP OWNED BY {}").format(role))
        db.execute(sql.SQL("DROP ROLE {}").format(role))


def test_sql(filled: Connection, pictures: Pictures) -> None:
    for block in blocks("sql"):
        for statement in re.split(r";[ ]*(?:--[^\n]*)?\n", block):
            if not statement.strip():
                continue
            values = (pictures.files[0],) * statement.count("$1")
            cursor = filled.execute(statement.replace("%", "%%").replace("$1", "%b"), values)
            if cursor.description:
                rows = cursor.fetchall()
                assert bool(rows) != ("-- none expected" in statement), f"{statement}: {rows}"
    assert rows_of(filled, "SELECT embed_pending()") == [(1,)]  # the collection that was made again


@pytest.mark.parametrize(
    ("damage", "query"),
    [
        ("INSERT INTO siamese.pending_1 (embedding_id, deleted) SELECT n, true"
         " FROM generate_series(1, 20001) AS n", "pending, dead, rows_indexed"),
        ("UPDATE siamese.generations SET generation = 99; UPDATE siamese.collections"
         " SET generation = 99 WHERE name = 'images'", "collection, generation_file"),
        ("INSERT INTO siamese.failures VALUES (1, '7', '22P03', 'image is empty')", "sqlstate"),
        ("UPDATE siamese.queue_2 SET queued_at = now() - interval '1 hour'", "retrying"),
        ("DELETE FROM siamese.embedding_1 WHERE key = 7", "self_check"),
    ],
)  # fmt: skip
def test_alerts_come(filled: Connection, damage: str, query: str) -> None:
    """The queries that expect no row give one where something is wrong."""
    for role in ROLES:
        filled.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    filled.execute("SELECT build_index()")
    alerts = [
        statement
        for block in blocks("sql")
        for statement in block.split(";")
        if "-- none expected" in statement and query in statement
    ]
    assert len(alerts) == 1
    for statement in damage.split("; "):
        filled.execute(statement)
    assert filled.execute(alerts[0]).fetchall()


def test_shell(filled: Connection, dsn: str) -> None:
    for role in ROLES:
        filled.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    environment = os.environ | pg_environment(dsn)
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for block in blocks("sh"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[0] == "make":  # these change the machine: only that they are there
                words = ["make", "-n", *words[1:]]
            done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def test_a_session_of_a_pool(db: Connection, connect: Connect, pictures: Pictures) -> None:
    """Clients share a session, as PgBouncer lets them, with DISCARD ALL between or without."""
    insert_images(db, pictures.files[:30])
    db.execute("SELECT build_index()")
    other = connect()
    for number, between in enumerate(("SELECT 1", "DISCARD ALL", "DISCARD ALL")):
        insert_images(other, pictures.files[30 + number : 31 + number])
        other.execute("DELETE FROM images WHERE image_id = %s", (number + 1,))
        query = "SELECT image_id FROM similar_images(%s, k => 100, engine => 'faiss') ORDER BY 1"
        found = db.execute(query, (pictures.files[0],)).fetchall()
        assert found == db.execute("SELECT image_id FROM images ORDER BY 1").fetchall()
        db.execute(between)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        path, _, anchor = target.partition("#")
        if path:
            assert (ROOT / "docs" / path).exists(), target
        else:
            titles = re.findall(r"^#+ (.*)$", TEXT, re.M)
            assert anchor in {title.lower().replace(" ", "-") for title in titles}, target


def table(title: str) -> list[list[str]]:
    """Return the cells of the first table after a line."""
    _, _, rest = TEXT.partition(title)
    found = re.search(r"(?:^\|.*\|$\n)+", rest, re.M)
    assert found is not None
    rows = [line.strip("|").split("|") for line in found[0].splitlines()]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def listed() -> set[Message]:
    """Return the messages that the tables name."""
    found = set()
    for states, messages, _ in table("## Errors"):
        for state in re.findall(r"\w{5}", states):
            found |= {Message(state, text) for text in re.findall("`([^`]+)`", messages)}
    for messages, _ in table("Notices and warnings:"):
        found |= {Message("", text) for text in re.findall("`([^`]+)`", messages)}
    return found


def test_every_message_is_listed() -> None:
    known = {
        Message("", message.text) if message.sqlstate in ("notice", "warning") else message
        for message in all_messages()
    }
    assert len(known) > 90
    named = listed()
    assert named <= known, f"not in the sources: {sorted(named - known)}"
    missing = {message for message in known - named if message.sqlstate not in GENERAL}
    assert not missing, f"not in docs/operations.md: {sorted(missing)}"
    assert set(re.findall(r"\w{5}", table("## Errors")[0][0])) == GENERAL
