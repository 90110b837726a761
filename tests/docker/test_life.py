"""A container's life: stop, restart, a new container for old data, a read-only one."""

from __future__ import annotations

from tests.conftest import Connection
from tests.docker.conftest import QUICK, Container, Containers, docker, picture, variable, volume_at


def fill(container: Container) -> list[tuple[int, float]]:
    """Insert images, build the index; return the answer to a query."""
    with container.connect() as db:
        files = [picture(number) for number in range(40)]
        db.execute("INSERT INTO images (image) SELECT unnest(%s::bytea[])", (files,))
        db.execute("SELECT build_index()")
        return answer(db)


def answer(db: Connection) -> list[tuple[int, float]]:
    """Search by FAISS."""
    return db.execute(
        "SELECT image_id, distance FROM similar_images(%s, 5, engine => 'faiss')", (picture(7),)
    ).fetchall()


def test_stop_and_start(containers: Containers) -> None:
    container = containers.start(command=()).healthy()
    before = fill(container)
    with container.connect():  # a session is no reason to wait
        docker("stop", "--time", "60", container.name)
    assert container.state()["ExitCode"] == 0
    logs = container.logs()
    assert logs.count("received fast shutdown request") == 2  # the first of initialisation
    assert logs.endswith("database system is shut down")
    docker("start", container.name)
    container.healthy()
    assert "not properly shut down" not in container.logs()
    with container.connect() as db:
        assert answer(db) == before
        assert db.execute("SELECT subject FROM self_check() WHERE NOT ok").fetchall() == []


def test_a_new_container_takes_the_volume(containers: Containers) -> None:
    """As after an update of the image. It needs no password: that is in the data."""
    volume = f"--volume={containers.volume()}:{volume_at()}"
    first = containers.start(volume, environment={"POSTGRES_INITDB_ARGS": ""}, command=()).healthy()
    before = fill(first)
    docker("rm", "--force", first.name)
    second = containers.start(volume, environment={"POSTGRES_PASSWORD": ""}).healthy()
    with second.connect() as db:
        assert answer(db) == before
    # The index came with the data.
    assert second.exec("bash", "-c", f"ls {variable('PGDATA')}/pg_siamese/*/*/*.faiss")


def test_read_only_and_without_privileges(containers: Containers) -> None:
    options = "--read-only", "--tmpfs=/tmp", "--tmpfs=/run/postgresql", "--cap-drop=ALL"
    container = containers.start(*options, "--security-opt=no-new-privileges").healthy()
    assert len(fill(container)) == 5


def test_data_in_memory(containers: Containers) -> None:
    memory = f"--tmpfs={variable('PGDATA')}:uid=999,gid=999,mode=0700"
    assert len(fill(containers.start(memory).healthy())) == 5


def test_started_as_root_with_a_folder_of_root(containers: Containers) -> None:
    """As with a folder of the host: it is given to postgres, and so is the server."""
    folder = f"--tmpfs={variable('PGDATA')}:uid=0,gid=0,mode=0755"
    container = containers.start("--user=root", folder).healthy()
    assert container.exec("stat", "--format", "%U", "/proc/1") == "postgres"
    assert len(fill(container)) == 5


def test_with_an_init_process(containers: Containers) -> None:
    """Then the server isn't process 1, and signals come through the init."""
    container = containers.start("--init", command=QUICK).healthy()
    docker("stop", "--time", "60", container.name)
    assert container.logs().endswith("database system is shut down")
