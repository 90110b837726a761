"""Install and upgrade scripts: how they are put together, and that pgspot finds nothing in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import extension
from tools.project import version

PLACE = "/somewhere/site-packages"
PGSPOT = [
    "--ignore-lang=plpython3u",
    # Operators outside functions run in the script alone, in which pg_catalog comes first.
    "--ignore=PS001",
    # Fully qualified inside; the first two must be cheap, and policies on the tables that are
    # searched, and what they call, expect the path of the caller.
    "--proc-without-search-path=siamese._caller()",
    "--proc-without-search-path=siamese._xact_id()",
    "--proc-without-search-path=siamese.similar_images(image bytea,k bigint,collection text,"
    "filter siamese.filter,candidates bigint[],max_distance double precision,engine text,"
    "image_id bigint,exclude siamese.filter,group_by text,per_group bigint,own_group boolean,"
    'query_frame bigint,region box,"like" bigint[],unlike bigint[],like_images bytea[],'
    "unlike_images bytea[],strategy text,penalty double precision)",
    "--proc-without-search-path=siamese.similar_rows(of_table anyelement,image bytea,k bigint,"
    "collection text,filter siamese.filter,candidates siamese.key[],max_distance double precision,"
    "engine text,key siamese.key,exclude siamese.filter,group_by text,per_group bigint,"
    'own_group boolean,query_frame bigint,region box,"like" siamese.key[],unlike siamese.key[],'
    "like_images bytea[],unlike_images bytea[],strategy text,penalty double precision,"
    "item anyelement,distance real,frame integer)",
    "--proc-without-search-path=siamese.nearest(collection text,keys siamese.key[],k bigint,"
    "filter siamese.filter,max_distance double precision,engine text,exclude siamese.filter,"
    "group_by text,per_group bigint,own_group boolean,threads bigint,key text,rank integer,"
    "neighbour text,distance real,frame integer)",
    "--proc-without-search-path=siamese.similar_pairs(collection text,"
    "max_distance double precision,filter siamese.filter,engine text,exclude siamese.filter,"
    "group_by text,own_group boolean,threads bigint,a text,b text,distance real)",
    "--proc-without-search-path=siamese.near_duplicates(collection text,"
    "max_distance double precision,max_difference double precision,mirrored boolean,"
    "filter siamese.filter,exclude siamese.filter,engine text,threads bigint,"
    "group_number integer,key text,representative text,difference real,distance real,"
    "is_mirrored boolean)",
    "--proc-without-search-path=siamese.leaks(collection text,split_column text,group_column text,"
    "max_distance double precision,max_difference double precision,filter siamese.filter,"
    "exclude siamese.filter,engine text,threads bigint,kind text,a text,split_a text,b text,"
    "split_b text,group_label text,difference real)",
    "--proc-without-search-path=siamese.classify_image(image bytea,k bigint,collection text,"
    "label_column text,image_id siamese.key,filter siamese.filter,exclude siamese.filter,"
    "group_by text,own_group boolean,label text,votes integer,share real)",
    "--proc-without-search-path=siamese.explain_search(image bytea,k bigint,collection text,"
    "filter siamese.filter,candidates siamese.key[],max_distance double precision,engine text,"
    "image_id siamese.key,exclude siamese.filter,group_by text,per_group bigint,own_group boolean,"
    "query_frame bigint,region box,fact text,value text,detail text)",
    "--proc-without-search-path=siamese.measure_recall(collection text,queries bigint,k bigint,"
    "filter siamese.filter,seed bigint,sampled integer,recall real,minimum real,milliseconds real,"
    "exact_milliseconds real)",
    "--proc-without-search-path=siamese.retrieval_quality(collection text,label_column text,"
    "queries siamese.filter,gallery siamese.filter,sample bigint,seed bigint,own_group boolean,"
    "sampled integer,map5 real,mmv5 real,acc1 real,acc3 real,acc5 real)",
    "--proc-without-search-path=siamese.similarity_map(image bytea,neighbour bytea,collection text,"
    "image_id siamese.key,neighbour_id siamese.key,model text,query_frame bigint,"
    "neighbour_frame bigint,masks bigint,side bigint,legend boolean)",
    "--proc-without-search-path=siamese.contact_sheet(collection text,keys siamese.key[],"
    "captions text[],columns bigint,size bigint,frames bigint[])",
    "--proc-without-search-path=siamese.warm_up(collection text,engine text,detail text)",
]
# PostgreSQL lets an extension's script replace its own functions and views only.
UPGRADE = ["--ignore=PS002", "--ignore=PS015"]
SCRIPTS = sorted(
    name
    for name in extension.files(PLACE)
    if name.endswith(f"--{version()}.sql")  # scripts of earlier versions are history
)


def run_pgspot(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.sql"
    script.write_text(text)
    command = [sys.executable, "-m", "pgspot", *PGSPOT, *options, str(script)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.law(7)
@pytest.mark.parametrize("name", SCRIPTS)
def test_pgspot(name: str, tmp_path: Path) -> None:
    text = extension.files(PLACE)[name]
    done = run_pgspot(tmp_path, text, *(UPGRADE if name.count("--") == 2 else ()))
    # What it can't parse, it says and leaves out.
    assert "Errors: 0 Warnings: 0 Unknown: 0" in done.stdout, done.stdout
    assert "error" not in done.stdout.lower().replace("errors: 0", ""), done.stdout
    assert done.returncode == 0, done.stderr


def test_pgspot_would_find_something(tmp_path: Path) -> None:
    text = extension.files(PLACE)[f"pg_siamese--{version()}.sql"]
    locked = "SECURITY DEFINER\nSET search_path = pg_catalog, pg_temp"
    assert "PS003" in run_pgspot(tmp_path, text.replace(locked, "SECURITY DEFINER")).stdout


def test_upgrades_replace_every_function_and_view() -> None:
    """Each script those of the version that it leads to."""
    files = extension.files(PLACE)
    for name in SCRIPTS:
        if name.count("--") == 2:
            install = files[f"pg_siamese--{name.removesuffix('.sql').split('--')[2]}.sql"]
            wanted = [
                line.replace("CREATE ", "CREATE OR REPLACE ", 1)
                for line in install.splitlines()
                if line.startswith(("CREATE FUNCTION ", "CREATE VIEW "))
            ]
            assert len(wanted) > 50
            text = files[name]
            lines = text.splitlines()
            assert [line for line in lines if line.startswith("CREATE OR REPLACE")] == wanted
            assert text.count("\nCOMMENT ON ") == install.count("\nCOMMENT ON ")
            assert "@REPLACEABLE@" not in text and "@VERSION@" not in text


def test_earlier_versions_keep_their_own_number() -> None:
    for name, text in extension.files(PLACE).items():
        if name.endswith(".sql") and name.count("--") == 1:
            number = name.removesuffix(".sql").split("--")[1]
            assert f"GD['pg_siamese {number}']" in text
            assert "@VERSION@" not in text and "@SITE_PACKAGES@" not in text


@pytest.mark.parametrize(
    "text",
    [
        "CREATE FUNCTION f() RETURNS text LANGUAGE sql AS $$ SELECT ';' $$;",
        "CREATE FUNCTION f() RETURNS text LANGUAGE sql AS $x$ SELECT $$;$$; -- it's one\n $x$;",
        "CREATE FUNCTION f() RETURNS text LANGUAGE sql AS $$\n-- one;\nSELECT ';'\n$$;",
        "COMMENT ON TABLE t IS 'one; it''s one';",
    ],
)
def test_statements_are_not_cut(text: str) -> None:
    expected = text.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION")
    assert extension.replaceable(f"SELECT 1;\n{text}\nSELECT 2;\n") == expected + "\n"
