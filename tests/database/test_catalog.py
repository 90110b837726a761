"""The extension as the catalog shows it: comments, volatility, safe settings, dump."""

from __future__ import annotations

import pytest

from tests.conftest import Connection
from tests.support import column_of, one

OF_PGVECTOR = """EXISTS (SELECT FROM pg_depend AS d JOIN pg_extension AS x ON x.oid = d.refobjid
WHERE d.objid = pg_proc.oid AND x.extname = 'vector')"""
# Each gives what breaks the rule.
RULES = {
    "functions have a comment": "SELECT oid::regprocedure FROM pg_proc"
    " WHERE pronamespace = 'siamese'::regnamespace AND oid::regprocedure::text !~ 'vector'"
    f" AND obj_description(oid, 'pg_proc') IS NULL AND NOT {OF_PGVECTOR}",
    "tables have a comment": "SELECT oid::regclass FROM pg_class"
    " WHERE relnamespace = 'siamese'::regnamespace AND relkind IN ('r', 'v')"
    " AND obj_description(oid, 'pg_class') IS NULL",
    "policies have a comment": "SELECT polname FROM pg_policy AS p JOIN pg_class AS c"
    " ON c.oid = p.polrelid WHERE relnamespace = 'siamese'::regnamespace"
    " AND obj_description(p.oid, 'pg_policy') IS NULL",
    "the schema has a comment": "SELECT 'schema'"
    " WHERE obj_description('siamese'::regnamespace, 'pg_namespace') IS NULL",
    "nothing runs in parallel workers": "SELECT p.proname FROM pg_proc AS p"
    " JOIN pg_language AS l ON l.oid = p.prolang WHERE l.lanname = 'plpython3u'"
    " AND p.pronamespace = 'siamese'::regnamespace AND p.proparallel <> 'u'",
    # Law 1: tables are the truth, so they must survive a crash.
    "tables are logged": "SELECT relname FROM pg_class"
    " WHERE relnamespace = 'siamese'::regnamespace AND relkind = 'r' AND relpersistence <> 'p'",
    "users' tables are not the extension's": "SELECT objid FROM pg_depend WHERE deptype = 'e'"
    " AND objid IN ('siamese.images'::regclass, 'siamese.embedding_1'::regclass,"
    " 'siamese.pending_1'::regclass)",
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(shared: Connection, rule: str) -> None:
    assert shared.execute(RULES[rule]).fetchall() == []


def test_comments_are_in_one_style(shared: Connection) -> None:
    """A noun phrase or an imperative: ``\\d+`` shows it beside the name."""
    comments = column_of(
        shared,
        "SELECT d.description FROM pg_description AS d"
        " CROSS JOIN LATERAL pg_identify_object(d.classoid, d.objoid, d.objsubid) AS o"
        " LEFT JOIN pg_depend AS x ON x.classid = d.classoid AND x.objid = d.objoid"
        " AND x.deptype = 'e' LEFT JOIN pg_extension AS e ON e.oid = x.refobjid"
        " WHERE o.identity ~ '\\msiamese\\M' AND e.extname IS DISTINCT FROM 'vector'",
    )
    assert len(comments) > 150
    assert [text for text in comments if text.endswith(".") or len(text.split()) > 12] == []
    assert sum(len(text.split()) for text in comments) / len(comments) <= 7


def test_search_functions_are_stable(shared: Connection) -> None:
    """So that all their statements see one snapshot."""
    rows = shared.execute(
        "SELECT proname, provolatile::text, prosecdef FROM pg_proc"
        " WHERE pronamespace = 'siamese'::regnamespace AND proname IN ('similar_images',"
        " '_similar_images', '_match_line', '_similar_keys', 'similar_rows', 'classify_image',"
        " '_classify_image', 'explain_search', '_explain_search', 'measure_recall',"
        " '_measure_recall', 'retrieval_quality', '_retrieval_quality', 'similarity_map',"
        " '_similarity_map', 'thumbnail', '_thumbnail', 'contact_sheet', '_contact_sheet',"
        " 'embed_image', '_embed_image', '_compare_images', 'warm_up', '_warm_up')"
    ).fetchall()
    assert len(rows) == 24
    assert {row[1:] for row in rows} == {("s", False)}  # and with the invoker's rights


def test_tables_of_configuration_are_dumped(shared: Connection) -> None:
    """Their rows are the user's, though the tables are the extension's."""
    rows = shared.execute(
        "SELECT c.oid::regclass::text FROM pg_extension AS x CROSS JOIN unnest(x.extconfig) AS u"
        " JOIN pg_class AS c ON c.oid = u WHERE x.extname = 'pg_siamese'"
    )
    dumped = {row[0].removeprefix("siamese.") for row in rows}
    tables = shared.execute(
        "SELECT c.relname FROM pg_class AS c JOIN pg_depend AS d ON d.objid = c.oid"
        " AND d.deptype = 'e' JOIN pg_extension AS x ON x.oid = d.refobjid"
        " WHERE x.extname = 'pg_siamese' AND c.relkind IN ('r', 'S')"
    )
    # What is left out is about the last minutes only.
    assert {row[0] for row in tables} - dumped == {
        "embedding_batches",
        "embedding_batches_batch_id_seq",
        "embedding_attempts",
    }


def test_version(shared: Connection) -> None:
    assert shared.execute(
        "SELECT extversion, n.nspname, extrelocatable FROM pg_extension AS x"
        " JOIN pg_namespace AS n ON n.oid = x.extnamespace WHERE extname = 'pg_siamese'"
    ).fetchone() == ("0.3.0", "siamese", False)


def test_extension_can_be_dropped(db: Connection) -> None:
    db.execute("SELECT drop_collection('images')")
    db.execute("DROP EXTENSION pg_siamese CASCADE")
    assert one(db, "SELECT to_regclass('siamese.images')") == "images"
