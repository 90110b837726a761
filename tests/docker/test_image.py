"""What is in the image, and what is not."""

from __future__ import annotations

import shutil
import subprocess
import time

import pytest

from pg_siamese.datasets import sha256
from tests.conftest import MODELS
from tests.docker.conftest import (
    Container,
    Containers,
    described,
    docker,
    picture,
    variable,
    volume_at,
)
from tools.project import ROOT, version

LARGEST = 1.2e9  # bytes


def test_size(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nsize of the image: {described()['Size'] / 1e9:.2f} GB")
    assert described()["Size"] <= LARGEST


def test_settings() -> None:
    config = described()["Config"]
    assert config["User"] == "postgres"
    assert config["StopSignal"] == "SIGINT"
    places = {
        "17": ("/var/lib/postgresql/data", "/var/lib/postgresql/data"),
        "18": ("/var/lib/postgresql", "/var/lib/postgresql/18/docker"),
    }
    assert (volume_at(), variable("PGDATA")) == places[variable("PG_MAJOR")]
    assert list(config["ExposedPorts"]) == ["5432/tcp"]
    assert config["Healthcheck"]["Test"] == ["CMD", "docker-healthcheck.sh"]


def test_labels() -> None:
    prefix = "org.opencontainers.image."
    labels = described()["Config"]["Labels"]
    assert labels[f"{prefix}version"] == version()
    assert all(
        labels[f"{prefix}{name}"] not in ("", "unknown")
        for name in ("title", "description", "licenses", "revision", "base.name")
    )


def test_no_tools_of_the_build(usual: Container) -> None:
    tools = "cc gcc g++ c++ clang ld as make pip pip3 git curl wget"
    assert usual.exec("bash", "-c", f"type -P {tools} || true") == ""
    places = "/usr/local/lib/pg_siamese /usr/lib/python3* /usr/local/lib/python3* /usr/include"
    named = r"\( -name pip -o -name setuptools -o -name flit_core -o -name postgres.h \)"
    assert usual.exec("bash", "-c", f"find {places} {named} 2>/dev/null || true") == ""


def test_nothing_left_of_the_build(usual: Container) -> None:
    places = "/source /install /root/.cache /var/lib/apt/lists /etc/apt/apt.conf.d/90-build"
    find = f"find {places} /etc/pip.conf /run/secrets -type f -size +0 2>/dev/null || true"
    assert usual.exec("bash", "-c", find, user="root") == ""


def test_runs_as_postgres(usual: Container) -> None:
    assert usual.exec("stat", "--format", "%U", "/proc/1") == "postgres"
    assert usual.exec("cat", "/proc/1/comm") == "postgres"


def test_the_server_cannot_change_its_own_programs(usual: Container) -> None:
    find = "find /usr /docker-entrypoint-initdb.d -writable -not -type l"
    assert usual.exec("bash", "-c", find) == ""


def test_the_extension_and_its_packages(usual: Container) -> None:
    with usual.connect() as db:
        bad = db.execute("SELECT subject, detail FROM self_check() WHERE NOT ok").fetchall()
        assert bad == []
        checks = dict(db.execute("SELECT subject, detail FROM self_check()").fetchall())
        python = {"17": "3.13", "18": "3.14"}[variable("PG_MAJOR")]
        assert f"Python {python}" in checks["server package"]
        rows = db.execute("SELECT name, sha256 FROM siamese.models").fetchall()
    assert dict(rows) == {file.stem: sha256(file) for file in MODELS.glob("*.onnx")}


def test_python_is_compiled_beforehand(usual: Container) -> None:
    """Or else every session would compile it: the server can't write there."""
    folder = "/usr/local/lib/pg_siamese"
    count = usual.exec("bash", "-c", f"find {folder} -name '*.pyc' | wc -l")
    sources = usual.exec("bash", "-c", f"find {folder} -name '*.py' | wc -l")
    assert int(count) > 0.95 * int(sources)


def test_first_answer(containers: Containers, capsys: pytest.CaptureFixture[str]) -> None:
    container = containers.create(environment={"POSTGRES_INITDB_ARGS": ""}, command=())
    started = time.monotonic()
    docker("start", container.name)
    container.healthy()
    with container.connect() as db:
        db.execute(
            "INSERT INTO images (image) SELECT unnest(%s::bytea[])", ([picture(1), picture(2)],)
        )
        rows = db.execute("SELECT image_id FROM similar_images(%s, 2)", (picture(2),)).fetchall()
    seconds = time.monotonic() - started
    assert rows == [(2,), (1,)]
    with capsys.disabled():
        print(f"\nfrom an empty volume to the first answer: {seconds:.1f} s")


def test_compose_file() -> None:
    """Whatever Compose there is finds it valid, and demands a password."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and not subprocess.call(
            [*command, "version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ):
            break
    else:
        pytest.skip("there is no Docker Compose on this machine")
    check = [*command, "--file", str(ROOT / "docker" / "compose.yaml"), "config"]
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    refused = subprocess.run(check, env=environment, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "POSTGRES_PASSWORD" in refused.stderr
    environment["POSTGRES_PASSWORD"] = "x"
    done = subprocess.run(check, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "/var/lib/postgresql/data" in done.stdout
