"""The extension as the catalog shows it: comments, volatility, safe settings, dump."""

from __future__ import annotations

import pytest

from tests.conftest import Connection, Pictures, insert_images

PUBLIC_FUNCTIONS = {
    "alter_collection",
    "any_two_match",
    "backfill",
    "build_index",
    "classify_image",
    "create_collection",
    "drop_collection",
    "drop_model",
    "embed_image",
    "embed_pending",
    "grant_admin",
    "grant_usage",
    "grant_worker",
    "image_distance",
    "rebuild_file",
    "register_model",
    "register_shipped_models",
    "renew_collections",
    "renew_grants",
    "dicom_tag",
    "dicom_tags",
    "same_class",
    "self_check",
    "similar_images",
    "similar_rows",
    "warm_up",
}


def test_public_surface(shared: Connection) -> None:
    rows = shared.execute(
        "SELECT DISTINCT p.proname FROM pg_proc AS p JOIN pg_depend AS d ON d.objid = p.oid"
        " JOIN pg_extension AS x ON x.oid = d.refobjid AND d.deptype = 'e'"
        " WHERE x.extname = 'pg_siamese' AND p.proname NOT LIKE '\\_%%'"
    )
    assert {row[0] for row in rows} == PUBLIC_FUNCTIONS


@pytest.mark.parametrize(
    "query",
    [
        "SELECT oid::regprocedure FROM pg_proc WHERE pronamespace = 'siamese'::regnamespace"
        " AND oid::regprocedure::text !~ 'vector' AND obj_description(oid, 'pg_proc') IS NULL"
        " AND NOT EXISTS (SELECT FROM pg_depend AS d JOIN pg_extension AS x"
        " ON x.oid = d.refobjid WHERE d.objid = pg_proc.oid AND x.extname = 'vector')",
        "SELECT oid::regclass FROM pg_class WHERE relnamespace = 'siamese'::regnamespace"
        " AND relkind IN ('r', 'v') AND obj_description(oid, 'pg_class') IS NULL",
        "SELECT polname FROM pg_policy AS p JOIN pg_class AS c ON c.oid = p.polrelid"
        " WHERE relnamespace = 'siamese'::regnamespace"
        " AND obj_description(p.oid, 'pg_policy') IS NULL",
        "SELECT 'schema' WHERE obj_description('siamese'::regnamespace, 'pg_namespace') IS NULL",
    ],
    ids=["functions", "tables", "policies", "schema"],
)
def test_every_object_has_a_comment(shared: Connection, query: str) -> None:
    assert shared.execute(query).fetchall() == []


def test_comments_are_in_one_style(shared: Connection) -> None:
    """A noun phrase or an imperative: ``\\d+`` shows it beside the name."""
    rows = shared.execute(
        "SELECT d.description FROM pg_description AS d"
        " CROSS JOIN LATERAL pg_identify_object(d.classoid, d.objoid, d.objsubid) AS o"
        " LEFT JOIN pg_depend AS x ON x.classid = d.classoid AND x.objid = d.objoid"
        " AND x.deptype = 'e' LEFT JOIN pg_extension AS e ON e.oid = x.refobjid"
        " WHERE o.identity ~ '\\msiamese\\M' AND e.extname IS DISTINCT FROM 'vector'"
    )
    comments = [row[0] for row in rows]
    assert len(comments) > 150
    assert [text for text in comments if text.endswith(".") or len(text.split()) > 12] == []
    assert sum(len(text.split()) for text in comments) / len(comments) <= 7


def test_search_functions_are_stable(shared: Connection) -> None:
    """So that all their statements see one snapshot."""
    rows = shared.execute(
        "SELECT proname, provolatile::text, prosecdef FROM pg_proc"
        " WHERE pronamespace = 'siamese'::regnamespace AND proname IN ('similar_images',"
        " '_similar_images', '_match_line', '_similar_keys', 'similar_rows', 'classify_image',"
        " '_classify_image',"
        " 'embed_image', '_compare_images', 'warm_up', '_warm_up')"
    ).fetchall()
    assert len(rows) == 11
    assert {row[1:] for row in rows} == {("s", False)}  # and with the invoker's rights


def test_nothing_runs_in_parallel_workers(shared: Connection) -> None:
    rows = shared.execute(
        "SELECT p.proname FROM pg_proc AS p JOIN pg_language AS l ON l.oid = p.prolang"
        " WHERE p.pronamespace = 'siamese'::regnamespace AND l.lanname = 'plpython3u'"
        " AND p.proparallel <> 'u'"
    )
    assert rows.fetchall() == []


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


def test_user_tables_do_not_belong_to_the_extension(shared: Connection) -> None:
    for name in ("images", "embedding_1", "pending_1"):
        rows = shared.execute(
            "SELECT FROM pg_depend WHERE objid = format('siamese.%%s', %s::text)::regclass"
            " AND deptype = 'e'",
            (name,),
        )
        assert rows.fetchall() == []


def test_vectors_are_logged(db: Connection, pictures: Pictures) -> None:
    """Law 1: tables are the truth, so they must survive a crash."""
    insert_images(db, pictures.files[:2])
    rows = db.execute(
        "SELECT relname, relpersistence::text FROM pg_class WHERE relnamespace ="
        " 'siamese'::regnamespace AND relkind = 'r' AND relpersistence <> 'p'"
    )
    assert rows.fetchall() == []


def test_version(shared: Connection) -> None:
    row = shared.execute(
        "SELECT extversion, n.nspname, extrelocatable FROM pg_extension AS x"
        " JOIN pg_namespace AS n ON n.oid = x.extnamespace WHERE extname = 'pg_siamese'"
    ).fetchone()
    assert row == ("0.3.0", "siamese", False)


def test_extension_can_be_dropped(db: Connection) -> None:
    db.execute("SELECT drop_collection('images')")
    db.execute("DROP EXTENSION pg_siamese CASCADE")
    assert db.execute("SELECT to_regclass('siamese.images')").fetchone() == ("images",)
