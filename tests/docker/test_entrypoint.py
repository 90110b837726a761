"""The entry point's conventions: those of the official image, which people know."""

from __future__ import annotations

import gzip
from pathlib import Path

import psycopg
import pytest

from tests.docker.conftest import (
    PASSWORD,
    QUICK,
    Container,
    Containers,
    docker,
    variable,
    volume_at,
)

SCRIPTS = "/docker-entrypoint-initdb.d"


def test_no_password_is_refused(containers: Containers) -> None:
    container = containers.start(environment={"POSTGRES_PASSWORD": ""})
    assert container.ended() == 1
    logs = container.logs()
    assert "the superuser has no password" in logs
    assert "POSTGRES_PASSWORD=" in logs
    assert "POSTGRES_HOST_AUTH_METHOD=trust" in logs
    # Nothing was made, so that a second start with a password works.
    assert "initdb" not in logs
    assert "ready to accept" not in logs


def test_trust_when_told(containers: Containers) -> None:
    container = containers.start(
        environment={"POSTGRES_PASSWORD": "", "POSTGRES_HOST_AUTH_METHOD": "trust"}
    ).healthy()
    assert container.one("SELECT current_user", password="wrong") == "postgres"
    assert "warning: POSTGRES_HOST_AUTH_METHOD=trust" in container.logs()


def test_the_password_is_asked_for(usual: Container) -> None:
    assert usual.one("SELECT current_user") == "postgres"
    for password in ("wrong", ""):
        with pytest.raises(psycopg.OperationalError, match="password"):
            usual.connect(password=password)
    # Also within the container, unless one has got in already.
    inside = "psql --host 127.0.0.1 --no-password -d siamese -c 'SELECT 1' 2>&1 || true"
    assert "no password supplied" in usual.exec("bash", "-c", inside)
    assert usual.exec("psql", "-XAt", "--dbname", "siamese", "--command", "SELECT 7") == "7"
    assert usual.one("SHOW password_encryption") == "scram-sha-256"
    assert PASSWORD not in usual.exec("bash", "-c", "tr '\\0' '\\n' < /proc/1/environ")


def test_password_from_a_file(containers: Containers, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("from a file\n")
    secret.chmod(0o444)
    name = {"POSTGRES_PASSWORD": "", "POSTGRES_PASSWORD_FILE": "/run/password"}
    container = containers.start(environment=name, files={"/run/password": secret}).healthy()
    assert container.one("SELECT current_user", password="from a file") == "postgres"


def test_files_that_make_no_sense(containers: Containers) -> None:
    both = containers.start(environment={"POSTGRES_PASSWORD_FILE": "/etc/hostname"})
    assert both.ended() == 1
    assert "both POSTGRES_PASSWORD and POSTGRES_PASSWORD_FILE are set" in both.logs()
    missing = containers.start(
        environment={"POSTGRES_PASSWORD": "", "POSTGRES_PASSWORD_FILE": "/nowhere"}
    )
    assert missing.ended() == 1
    assert "names /nowhere, which can't be read" in missing.logs()


def test_names_of_user_and_database(containers: Containers) -> None:
    # PostgreSQL itself refuses quotes in the name of who makes extensions.
    user, database = "Ann & Söhne", 'Röntgen\'s & "Co"'
    container = containers.start(
        environment={"POSTGRES_USER": user, "POSTGRES_DB": database}
    ).healthy()
    with container.connect(user=user, dbname=database) as db:
        row = db.execute("SELECT usesuper, current_database() FROM pg_user").fetchall()
        assert row == [(True, database)]
        models = db.execute("SELECT name FROM siamese.models ORDER BY 1").fetchall()
        assert models == [("clinical",), ("fashion_mnist",), ("medical",)]
    with pytest.raises(psycopg.OperationalError):
        container.connect(dbname=database)


def test_the_database_is_named_as_the_user(containers: Containers) -> None:
    container = containers.start(environment={"POSTGRES_USER": "anna", "POSTGRES_DB": ""})
    container.healthy()
    assert container.one("SELECT current_database()", user="anna", dbname="anna") == "anna"
    path = '"$user", public, siamese'
    assert container.one("SHOW search_path", user="anna", dbname="anna") == path


def test_the_default_database(containers: Containers) -> None:
    container = containers.start(environment={"POSTGRES_DB": ""}).healthy()
    assert container.one("SELECT count(*) FROM siamese.models", dbname="postgres") == 3


def script_folder(folder: Path, **scripts: str) -> Path:
    """Write scripts, `_` in a name for a dot; those in sh are executable unless called sourced."""
    folder.mkdir()
    folder.chmod(0o755)
    for name, text in scripts.items():
        file = folder / name.replace("_", ".").lstrip("n")
        file.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        executable = name.endswith("_sh") and "sourced" not in name
        file.chmod(0o755 if executable else 0o644)
    return folder


def test_scripts_run_once_and_in_order(containers: Containers, tmp_path: Path) -> None:
    folder = script_folder(
        tmp_path / "scripts",
        n10_sql="CREATE TABLE steps (id int GENERATED ALWAYS AS IDENTITY, step text);"
        "INSERT INTO steps (step) SELECT 'sql in ' || current_database();",
        n20_sh="#!/bin/bash\nset -e\n"
        'psql --username "$POSTGRES_USER" --dbname "$POSTGRES_DB"'
        " --command \"INSERT INTO steps (step) VALUES ('executed')\"\n",
        n30sourced_sh="psql --command \"INSERT INTO steps (step) VALUES ('sourced')\"\n"
        '[ -z "$NOT_SET" ] && export FROM_SOURCED=kept\n',
        n40_sh="#!/bin/bash\n"
        "psql --command \"INSERT INTO steps (step) VALUES ('$FROM_SOURCED')\"\n",
        n50_sql_gz="INSERT INTO steps (step) SELECT 'model ' || name FROM siamese.models"
        " WHERE name = 'medical';",
        n60_txt="not a script",
    )
    container = containers.start(files={SCRIPTS: folder}).healthy()
    expected = ["sql in siamese", "executed", "sourced", "kept", "model medical"]
    query = "SELECT array_agg(step ORDER BY id) FROM steps"
    assert container.one(query) == expected
    assert f"ignoring {SCRIPTS}/60.txt" in container.logs()
    docker("restart", container.name)
    container.healthy()
    assert container.one(query) == expected


@pytest.mark.parametrize(
    "script", [{"n10_sql": "SELECT 1 / 0;"}, {"n10_sh": "#!/bin/bash\nexit 3\n"}], ids=["sql", "sh"]
)
def test_a_failing_script_stops_everything(
    containers: Containers, tmp_path: Path, script: dict[str, str]
) -> None:
    container = containers.start(files={SCRIPTS: script_folder(tmp_path / "scripts", **script)})
    assert container.ended() != 0
    assert "the database could not be made" in container.logs()
    assert "starting the server" not in container.logs()
    # A half-made database is never taken for a whole one.
    docker("start", container.name)
    assert container.ended() == 1
    assert "is half made" in container.logs()


def test_not_healthy_and_not_reached_before_it_is_made(
    containers: Containers, tmp_path: Path
) -> None:
    wait = "#!/bin/bash\ntouch /tmp/waiting\nwhile [ -e /tmp/waiting ]; do sleep 0.1; done\n"
    folder = script_folder(tmp_path / "scripts", n10_sh=wait)
    container = containers.start(files={SCRIPTS: folder})
    container.exec("bash", "-c", "until [ -e /tmp/waiting ]; do sleep 0.1; done")
    # A server is there, for the scripts.
    assert container.exec("psql", "-XAt", "--dbname", "siamese", "--command", "SELECT 7") == "7"
    check = "docker-healthcheck.sh && echo healthy || echo not yet"
    assert container.exec("bash", "-c", check) == "not yet"
    assert container.state()["Health"]["Status"] == "starting"
    with pytest.raises(psycopg.OperationalError):
        container.connect()
    container.exec("rm", "/tmp/waiting")
    container.healthy()
    assert container.one("SELECT 1") == 1


def test_stopped_while_it_is_made(containers: Containers, tmp_path: Path) -> None:
    folder = script_folder(tmp_path / "scripts", n10_sh="#!/bin/bash\ntouch /tmp/here\nsleep 3\n")
    container = containers.start(files={SCRIPTS: folder})
    container.exec("bash", "-c", "until [ -e /tmp/here ]; do sleep 0.1; done")
    docker("stop", "--time", "60", container.name)
    assert container.state()["ExitCode"] == 130  # of its own, not killed
    docker("start", container.name)
    assert container.ended() == 1
    assert "is half made" in container.logs()


def test_arguments_of_initdb(containers: Containers) -> None:
    arguments = "--no-sync --wal-segsize=4 --set 'application_name=two words'"
    container = containers.start(environment={"POSTGRES_INITDB_ARGS": arguments}).healthy()
    assert container.one("SHOW wal_segment_size") == "4MB"
    find = "grep '^application_name' $PGDATA/postgresql.conf"
    assert "two words" in container.exec("bash", "-c", find)


def test_defaults(usual: Container) -> None:
    assert usual.one("SHOW data_checksums") == "on"
    assert usual.one("SHOW server_encoding") == "UTF8"
    query = "SELECT datcollate FROM pg_database WHERE datname = current_database()"
    assert usual.one(query) == "C.UTF-8"
    assert usual.one("SHOW logging_collector") == "off"  # to stderr
    assert usual.one("SHOW data_directory") == variable("PGDATA")


def test_another_data_folder(containers: Containers) -> None:
    place = f"{variable('PGDATA')}/below"
    container = containers.start(environment={"PGDATA": place}).healthy()
    assert container.one("SHOW data_directory") == place


@pytest.mark.parametrize("command", [("postgres", *QUICK), QUICK], ids=["whole", "options"])
def test_arguments_of_the_server(containers: Containers, command: tuple[str, ...]) -> None:
    more = ("-c", "work_mem=5MB", "-c", "application_name=two words", "-p", "5433")
    container = containers.start("--publish=127.0.0.1::5433", command=(*command, *more)).healthy()
    sql = "SELECT current_setting('work_mem') || ' ' || current_setting('port')"
    answer = container.exec("psql", "-XAt", "--port", "5433", "-d", "siamese", "-c", sql)
    assert answer == "5MB 5433"


def test_other_programs(image: str) -> None:
    assert docker("run", "--rm", image, "id", "-un") == "postgres"
    for program in (["postgres"], [], ["pg_dump"]):
        version = docker("run", "--rm", image, *program, "--version")
        assert f"PostgreSQL) {variable('PG_MAJOR')}." in version


def test_data_of_another_version_is_refused(containers: Containers, tmp_path: Path) -> None:
    mark = tmp_path / "PG_VERSION"
    mark.write_text("15\n")
    mark.chmod(0o644)
    # A volume, since the folder isn't there before the first start.
    volume = f"--volume={containers.volume()}:{volume_at()}"
    docker("stop", containers.start(volume).healthy().name)
    container = containers.start(volume, files={f"{variable('PGDATA')}/PG_VERSION": mark})
    assert container.ended() == 1
    message = f"was made by PostgreSQL 15; this is PostgreSQL {variable('PG_MAJOR')}"
    assert message in container.logs()


def test_a_volume_in_the_place_of_old_is_refused(containers: Containers) -> None:
    """Or else a new, empty database would be made beside it, and be lost with the container."""
    if int(variable("PG_MAJOR")) < 18:
        pytest.skip("it is the place of this version")
    place = "/var/lib/postgresql/data"
    container = containers.start(f"--volume={containers.volume()}:{place}")
    assert container.ended() == 1
    assert "Mount the volume at /var/lib/postgresql," in container.logs()
    options = f"--volume={containers.volume()}:{place}", "--user=root"
    named = containers.start(*options, environment={"PGDATA": f"{place}/pg"}).healthy()
    assert named.one("SHOW data_directory") == f"{place}/pg"
