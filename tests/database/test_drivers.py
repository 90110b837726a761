"""Calls as drivers send them: each with the types that it gives to parameters, or none at all.

Each driver asks the same questions of the same few images, by the calls that its users would write.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.json import Json, Jsonb

from tests.conftest import Connection, Pictures
from tests.server import ExternalServer
from tests.support import column_of, one
from tools.cluster import Cluster

KEYS = [uuid.UUID(int=number + 1) for number in range(6)]


@pytest.fixture(scope="module")
def filled(shared: Connection, pictures: Pictures) -> Connection:
    """Six images, three of either label, in ``images`` and in ``scans``, whose keys are uuids."""
    files = pictures.files[:6]
    labels = ["a", "b"] * 3
    shared.execute(
        "INSERT INTO images (image, label) SELECT * FROM unnest(%s::bytea[], %s::text[])",
        (files, labels),
    )
    shared.execute("CREATE TABLE public.scans (scan_id uuid PRIMARY KEY, image bytea, label text)")
    shared.execute(
        "INSERT INTO public.scans SELECT * FROM unnest(%s::uuid[], %s::bytea[], %s::text[])",
        (KEYS, files, labels),
    )
    shared.execute("SELECT create_collection('scans', 'public.scans')")
    return shared


@pytest.fixture(scope="module")
def dsn_of_shared(cluster: Cluster | ExternalServer, filled: Connection) -> str:
    return cluster.dsn(filled.info.dbname)


# psycopg 3: parameters of the narrowest type, numbers with a fraction as double precision.


@pytest.mark.parametrize("placeholder", ["%s", "%b", "%t"])
def test_psycopg(filled: Connection, pictures: Pictures, placeholder: str) -> None:
    def ids(call: str, *values: Any) -> list[int]:
        text = f"SELECT image_id FROM siamese.similar_images({call})".replace("%s", placeholder)
        return column_of(filled, text, *values)

    image = pictures.files[0]
    assert ids("%s", image)[0] == 1
    assert len(ids("%s, %s", image, 3)) == 3
    assert set(ids("image_id => %s, k => %s", 1, 5)) == {2, 3, 4, 5, 6}
    for k in (2, np.int16(2), np.int64(2)):
        assert len(ids("image => %s, k => %s", image, k)) == 2
    for limit in (0.2, np.float64(0.2), np.float32(0.2), 1, float("inf")):
        assert 1 in ids("%s, max_distance => %s", image, limit)
    assert set(ids("image_id => %s", np.int64(1))) == {2, 3, 4, 5, 6}
    for chosen in ([1, 3], [1, 2**40, 3], [np.int64(1), np.int64(3)]):
        assert set(ids("%s, candidates => %s", image, chosen)) == {1, 3}
    for condition in (Json({"label": "b"}), Jsonb({"label": "b"})):
        assert set(ids("%s, filter => %s", image, condition)) == {2, 4, 6}
    if placeholder != "%b":  # unknown as text
        assert set(ids("%s, filter => %s", image, '{"label": "b"}')) == {2, 4, 6}


def test_psycopg_similar_rows(filled: Connection, pictures: Pictures) -> None:
    def found(call: str, *values: Any) -> set[uuid.UUID]:
        text = f"SELECT (item).scan_id FROM siamese.similar_rows(NULL::scans, {call})"
        return set(column_of(filled, text, *values))

    image = pictures.files[0]
    assert found("%s, %s", image, 1) == {KEYS[0]}
    assert found("%s, candidates => %s", image, KEYS[:2]) == set(KEYS[:2])
    assert found("%s, candidates => %s", image, [str(key) for key in KEYS[:2]]) == set(KEYS[:2])
    assert found("key => %s", KEYS[0]) == set(KEYS[1:])
    assert found("key => %s", str(KEYS[0]).upper()) == set(KEYS[1:])
    assert found("key => %s, filter => %s", KEYS[0], Json({"label": "b"})) == set(KEYS[1::2])
    computed = "candidates => ARRAY(SELECT scan_id FROM scans WHERE label = 'b')"
    assert found(f"%s, {computed}, max_distance => %s", image, 2.0) == set(KEYS[1::2])


def test_other_functions_take_wide_numbers(filled: Connection, onnx: bytes) -> None:
    call = "siamese.build_index(%s, %s, ef_construction => %s, target_recall => %s, threads => %s)"
    wide = ("images", np.int64(8), np.int64(40), np.float64(0.9), np.int64(1))
    assert filled.execute(f"SELECT {call}", wide).fetchone()
    assert one(filled, "SELECT siamese.embed_pending('', %s)", 2**40) == 0
    assert one(filled, "SELECT siamese.backfill('scans', %s)", 2**40) == 0


# psycopg 2 puts values into the text.


def test_psycopg2(filled: Connection, dsn_of_shared: str, pictures: Pictures) -> None:
    psycopg2 = pytest.importorskip("psycopg2")
    extras = pytest.importorskip("psycopg2.extras")
    with closing(psycopg2.connect(dsn_of_shared)) as connection:
        extras.register_uuid(conn_or_curs=connection)
        cursor = connection.cursor()

        def ids(call: str, *values: Any) -> set[int]:
            cursor.execute(f"SELECT image_id FROM siamese.similar_images({call})", values)
            return {row[0] for row in cursor.fetchall()}

        image = pictures.files[0]
        assert len(ids("%s, %s", image, 3)) == 3
        assert ids("image_id => %s, max_distance => %s", 1, 2.0) == {2, 3, 4, 5, 6}
        for condition in (extras.Json({"label": "b"}), '{"label": "b"}'):
            assert ids("%s, filter => %s", image, condition) == {2, 4, 6}
        assert ids("%s, candidates => %s", image, [1, 3]) == {1, 3}
        cursor.execute(
            "SELECT (item).scan_id FROM siamese.similar_rows(NULL::scans, key => %s,"
            " candidates => %s)",
            (KEYS[0], KEYS[:3]),
        )
        assert {row[0] for row in cursor.fetchall()} == set(KEYS[1:3])


# asyncpg and node-postgres give no types, and ask the server which ones it wants.


def test_asyncpg(filled: Connection, dsn_of_shared: str, pictures: Pictures) -> None:
    asyncpg = pytest.importorskip("asyncpg")
    image = pictures.files[0]

    async def run() -> None:
        given = conninfo_to_dict(dsn_of_shared)
        connection = await asyncpg.connect(
            host=str(given["host"]),
            port=int(str(given["port"])),
            user=str(given["user"]),
            database=str(given["dbname"]),
            password=str(given.get("password", "")) or None,
        )
        try:

            async def ids(call: str, *values: Any) -> list[int]:
                rows = await connection.fetch(
                    f"SELECT image_id FROM siamese.similar_images({call})", *values
                )
                return [row[0] for row in rows]

            assert (await ids("$1", image))[0] == 1
            assert len(await ids("$1, 5", image)) == 5
            assert len(await ids("$1, $2", image, 3)) == 3
            assert len(await ids("$1, $2, $3", image, 3, "images")) == 3
            far = await ids("image_id => $1, max_distance => $2", 1, 2.0)
            assert set(far) == {2, 3, 4, 5, 6}
            assert set(await ids("$1, filter => $2", image, '{"label": "b"}')) == {2, 4, 6}
            assert set(await ids("$1, filter => $2::jsonb", image, '{"label": "b"}')) == {2, 4, 6}
            assert set(await ids("$1, candidates => $2", image, [1, 3])) == {1, 3}

            async def keys(call: str, *values: Any) -> set[uuid.UUID]:
                rows = await connection.fetch(
                    f"SELECT (item).scan_id FROM siamese.similar_rows(NULL::public.scans, {call})",
                    *values,
                )
                return {uuid.UUID(str(row[0])) for row in rows}

            assert await keys("$1, $2", image, 1) == {KEYS[0]}
            assert await keys("key => $1", str(KEYS[0])) == set(KEYS[1:])
            assert await keys("key => $1::uuid", KEYS[0]) == set(KEYS[1:])
            assert await keys("$1, candidates => $2::uuid[]", image, KEYS[:2]) == set(KEYS[:2])
            assert await keys("$1, candidates => $2", image, [str(KEYS[0])]) == {KEYS[0]}
        finally:
            await connection.close()

    asyncio.run(run())


NODE = """
const { Client } = require('pg');
const input = JSON.parse(process.argv[1]);
(async () => {
  const client = new Client(input.connection);
  await client.connect();
  const answers = [];
  for (const [text, values] of input.queries) {
    const given = values.map(v => (v && v.hex) ? Buffer.from(v.hex, 'hex') : v);
    answers.push((await client.query(text, given)).rows.map(row => Object.values(row)[0]));
  }
  await client.end();
  console.log(JSON.stringify(answers));
})().catch(error => { console.error(error.message); process.exit(1); });
"""


def test_node_postgres(filled: Connection, dsn_of_shared: str, pictures: Pictures) -> None:
    """Where Node.js and its package pg are at hand, as NODE_PATH says."""
    node = shutil.which("node")
    if (
        node is None
        or subprocess.run([node, "-e", "require('pg')"], capture_output=True).returncode
    ):
        pytest.skip("Node.js with the package pg is not here (npm install pg, NODE_PATH)")
    given = conninfo_to_dict(dsn_of_shared)
    image = {"hex": pictures.files[0].hex()}
    search = "SELECT image_id FROM siamese.similar_images({})"
    rows = "SELECT (item).scan_id FROM siamese.similar_rows(NULL::public.scans, {})"
    queries: list[tuple[str, list[Any]]] = [
        (search.format("$1"), [image]),
        (search.format("$1, $2"), [image, 3]),
        (search.format("image_id => $1, k => $2, max_distance => $3"), [1, 5, 2.0]),
        (search.format("$1, filter => $2"), [image, {"label": "b"}]),
        (search.format("$1, candidates => $2"), [image, [1, 3]]),
        (
            rows.format("key => $1, candidates => $2"),
            [str(KEYS[0]), [str(key) for key in KEYS[:3]]],
        ),
    ]
    connection = {
        "host": given["host"],
        "port": int(str(given["port"])),
        "user": given["user"],
        "database": given["dbname"],
        "password": given.get("password"),
    }
    text = json.dumps({"connection": connection, "queries": queries})
    done = subprocess.run([node, "-e", NODE, text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found[0][0] == "1" and len(found[1]) == 3
    assert [set(rows) for rows in found[2:]] == [
        {"2", "3", "4", "5", "6"},
        {"2", "4", "6"},
        {"1", "3"},
        {str(key) for key in KEYS[1:3]},
    ]


# pg8000 and SQLAlchemy.


def test_pg8000(filled: Connection, dsn_of_shared: str, pictures: Pictures) -> None:
    native = pytest.importorskip("pg8000.native")
    given = conninfo_to_dict(dsn_of_shared)
    if not str(given["host"]).startswith("/"):
        where: dict[str, Any] = {"host": given["host"], "port": int(str(given["port"]))}
    else:
        where = {"unix_sock": f"{given['host']}/.s.PGSQL.{given['port']}"}
    where |= {"database": given["dbname"], "password": given.get("password")}
    with closing(native.Connection(str(given["user"]), **where)) as connection:

        def ids(call: str, **values: Any) -> set[int]:
            rows = connection.run(f"SELECT image_id FROM siamese.similar_images({call})", **values)
            return {row[0] for row in rows}

        image = pictures.files[0]
        assert len(ids(":image, :k", image=image, k=3)) == 3
        assert ids("image_id => :id, max_distance => :far", id=1, far=2.0) == {2, 3, 4, 5, 6}
        assert ids(":image, filter => :f", image=image, f={"label": "b"}) == {2, 4, 6}
        assert ids(":image, filter => :f", image=image, f='{"label": "b"}') == {2, 4, 6}
        assert ids(":image, candidates => :c", image=image, c=[1, 3]) == {1, 3}
        rows = connection.run(
            "SELECT (item).scan_id FROM siamese.similar_rows(NULL::public.scans, key => :key,"
            " candidates => :chosen)",
            key=KEYS[0],
            chosen=KEYS[:3],
        )
        assert {row[0] for row in rows} == set(KEYS[1:3])


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "asyncpg", "pg8000"])
def test_sqlalchemy(
    filled: Connection, dsn_of_shared: str, pictures: Pictures, driver: str
) -> None:
    alchemy = pytest.importorskip("sqlalchemy")
    pytest.importorskip(driver)
    if driver == "asyncpg":
        pytest.importorskip("greenlet")
    from sqlalchemy.dialects.postgresql import JSON, JSONB

    given = conninfo_to_dict(dsn_of_shared)
    host, port = str(given["host"]), str(given["port"])
    query: dict[str, str] = {"host": host, "port": port}
    if driver == "pg8000":
        query = {"unix_sock": f"{host}/.s.PGSQL.{port}"}
    if driver == "pg8000" and not host.startswith("/"):
        pytest.skip("over a socket only")
    address = alchemy.URL.create(
        f"postgresql+{driver}",
        username=str(given["user"]),
        password=given.get("password"),
        database=str(given["dbname"]),
        query=query,
    )
    select = alchemy.text("SELECT image_id FROM siamese.similar_images(image => :image, k => :k,"
        " max_distance => :far, filter => :filter)")  # fmt: skip
    by_id = alchemy.text(
        "SELECT image_id FROM siamese.similar_images(image_id => :id, candidates => :chosen)"
    )
    values = {"image": pictures.files[0], "k": 3, "far": 1.9}
    statements = [
        (select.bindparams(alchemy.bindparam("filter", type_=kind)),
            values | {"filter": {"label": "b"}}, {2, 4, 6})
        for kind in (JSON, JSONB)
    ]  # fmt: skip
    statements.append((by_id, {"id": 1, "chosen": [1, 3]}, {3}))
    if driver == "asyncpg":
        from sqlalchemy.ext.asyncio import create_async_engine

        async def run() -> list[set[int]]:
            engine = create_async_engine(address)
            async with engine.connect() as connection:
                found = [
                    {row[0] for row in await connection.execute(statement, values)}
                    for statement, values, _ in statements
                ]
            await engine.dispose()
            return found

        found = asyncio.run(run())
    else:
        engine = alchemy.create_engine(address)
        with engine.connect() as connection:
            found = [
                {row[0] for row in connection.execute(statement, values)}
                for statement, values, _ in statements
            ]
        engine.dispose()
    assert found == [expected for _, _, expected in statements]


# What JDBC sends: setBytes, setLong, setInt, setDouble, setFloat, setBigDecimal, setString,
# setArray, setObject. A statement that is prepared with these types resolves its calls as the
# driver's does.

JDBC = {
    "similar_images($1, $2)": ["bytea", "int8"],
    "similar_images($1, $2 )": ["bytea", "int2"],
    "similar_images(image => $1, max_distance => $2)": ["bytea", "float8"],
    "similar_images(image => $1, max_distance => $2 )": ["bytea", "float4"],
    "similar_images(image => $1, max_distance => $2  )": ["bytea", "numeric"],
    "similar_images(image_id => $1, collection => $2)": ["int8", "varchar"],
    "similar_images(image_id => $1, filter => $2)": ["int4", "varchar"],
    "similar_images(image_id => $1, filter => $2 )": ["int8", "json"],
    "similar_images(image_id => $1, filter => $2  )": ["int8", "jsonb"],
    "similar_images(image_id => $1, candidates => $2)": ["int8", "int8[]"],
    "similar_images(image_id => $1, candidates => $2 )": ["int8", "int4[]"],
    "similar_images($1, engine => $2)": ["bytea", "varchar"],
    "similar_rows(NULL::scans, key => $1)": ["uuid"],
    "similar_rows(NULL::scans, key => $1 )": ["varchar"],
    "similar_rows(NULL::scans, key => $1, candidates => $2)": ["uuid", "uuid[]"],
    "similar_rows(NULL::scans, $1, candidates => $2)": ["bytea", "varchar[]"],
    "classify_image($1, $2, $3, $4)": ["bytea", "int8", "varchar", "varchar"],
    "classify_image(image_id => $1)": ["int8"],
    "embed_image($1, $2)": ["bytea", "varchar"],
    "build_index($1, threads => $2)": ["varchar", "int8"],
    "backfill($1, $2)": ["varchar", "int4"],
    "embed_pending($1, $2)": ["varchar", "int8"],
}
UNTYPED = [
    "similar_images($1)",
    "similar_images($1, $2)",
    "similar_images($1, 5)",
    "similar_images($1, $2, $3, $4, $5, $6, $7)",
    "similar_images(image => $1, k => $2)",
    "similar_images(image_id => $1, k => $2)",
    "similar_images(image_id => $1, filter => $2, candidates => $3, max_distance => $4)",
    "similar_rows(NULL::scans, $1)",
    "similar_rows(NULL::scans, $1, $2, $3, $4, $5, $6, $7)",
    "similar_rows(NULL::scans, key => $1, candidates => $2, filter => $3)",
    "classify_image($1)",
    "classify_image($1, $2, $3, $4)",
    "classify_image(image_id => $1)",
    "embed_image($1)",
    "embed_image($1, $2)",
    "image_distance($1, $2)",
    "image_distance($1, $2, $3)",
    "same_class($1, $2)",
    "any_two_match($1, $2, $3)",
    "build_index($1, $2, $3, $4, $5)",
    "backfill($1, $2)",
    "embed_pending($1, $2)",
    "warm_up($1)",
    "register_model($1, $2)",
    "create_collection($1)",
    "drop_collection($1)",
]


@pytest.mark.parametrize("call", JDBC)
def test_typed_calls_resolve(filled: Connection, call: str) -> None:
    types = sql.SQL(", ".join(JDBC[call]))
    filled.execute(sql.SQL("PREPARE typed ({}) AS SELECT siamese.{}").format(types, sql.SQL(call)))
    filled.execute("DEALLOCATE typed")


@pytest.mark.parametrize("call", UNTYPED)
def test_untyped_calls_resolve(filled: Connection, call: str) -> None:
    """Nothing is ambiguous for parameters without types, and each gets the type that is meant."""
    filled.execute(sql.SQL("PREPARE untyped AS SELECT siamese.{}").format(sql.SQL(call)))
    query = "SELECT parameter_types::text[] FROM pg_prepared_statements WHERE name = 'untyped'"
    types = one(filled, query)
    filled.execute("DEALLOCATE untyped")
    if call.startswith("similar_images($1") or call.startswith("classify_image($1"):
        assert types[0] == "bytea"


def test_public_functions_have_one_form(filled: Connection) -> None:
    rows = filled.execute(
        "SELECT proname FROM pg_proc WHERE pronamespace = 'siamese'::regnamespace"
        " GROUP BY proname HAVING count(*) > 1"
    ).fetchall()
    assert rows == []


def test_duckdb(filled: Connection, dsn_of_shared: str) -> None:
    """DuckDB's postgres extension sends the text of a query; where it is at hand."""
    duckdb = pytest.importorskip("duckdb")
    scanner = pytest.importorskip("duckdb_extension_postgres_scanner")
    file = next(Path(scanner.__path__[0]).rglob("*.duckdb_extension"))
    connection = duckdb.connect()
    connection.execute(f"LOAD '{file}'")
    given = {k: v for k, v in conninfo_to_dict(dsn_of_shared).items() if v}
    address = " ".join(f"{name}={value}" for name, value in given.items())
    connection.execute(f"ATTACH '{address}' AS pg (TYPE postgres, READ_ONLY)")
    rows = connection.execute(
        "SELECT image_id FROM postgres_query('pg', 'SELECT image_id, distance"
        " FROM siamese.similar_images(image_id => 1, k => 5, max_distance => 1.9)')"
    ).fetchall()
    assert {row[0] for row in rows} == {2, 3, 4, 5, 6}
