"""The index directory taken away, closed, given to another, or replaced by something else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.faults.checks import Connect, check_answers, check_fallback, check_repair
from tests.faults.cluster import FaultyCluster
from tests.scenarios.gallery import Connection, Gallery, index_directory, insert
from tests.support import one, sql_error


@pytest.fixture
def directory(db: Connection) -> Iterator[Path]:
    """The directory of a built index; can be entered again afterwards."""
    path = index_directory(db)
    yield path
    for part in (path.parents[1], path.parent, path):
        if part.is_dir():
            part.chmod(0o700)


def status(connect: Connect) -> str:
    return str(one(connect(), "SELECT generation_file FROM collection_status"))


LEVELS = {"collection": 0, "all": 2, "database": 1}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "level" in metafunc.fixturenames:
        is_long = metafunc.config.getoption("--faults-long")
        metafunc.parametrize("level", list(LEVELS) if is_long else list(LEVELS)[:2])


def at(directory: Path, level: str) -> Path:
    return (directory, *directory.parents)[LEVELS[level]]


@pytest.mark.law(1)
def test_removed(connect: Connect, images: Gallery, directory: Path, level: str) -> None:
    shutil.rmtree(at(directory, level))
    check_fallback(connect, images, "is missing")
    assert status(connect) == "missing"
    check_repair(connect, images)


@pytest.mark.law(1)
def test_replaced_by_a_file(connect: Connect, images: Gallery, directory: Path, level: str) -> None:
    path = at(directory, level)
    path.rename(path.with_name("aside"))
    path.write_text("not a directory")
    check_fallback(connect, images, "cannot be opened")
    assert status(connect) == "missing"
    check_repair(connect, images)
    shutil.rmtree(path.with_name("aside"))


def test_closed(
    cluster: FaultyCluster, connect: Connect, images: Gallery, directory: Path, level: str
) -> None:
    """By mode, and by owner: the error of the build names the directory and the way out."""
    if os.geteuid() != 0 or cluster.user is None:
        pytest.skip("only root can give a directory to another user")
    path = at(directory, level)
    for mode, owner in ((0, cluster.user.pw_uid), (0o700, 0)):
        path.chmod(mode)
        os.chown(path, owner, cluster.user.pw_gid)
        check_fallback(connect, images, "cannot be opened")
        assert status(connect) == "not readable"
        with sql_error("42501", "could not write index file", str(path), "chown", "chmod"):
            connect().execute("SELECT build_index()")
        check_fallback(connect, images, "cannot be opened")
        path.chmod(0o700)
        os.chown(path, cluster.user.pw_uid, cluster.user.pw_gid)
    session = connect()
    check_answers(session, images, "faiss", "opened again")
    check_repair(connect, images)


def test_elsewhere_by_a_link(
    connect: Connect, cluster: FaultyCluster, images: Gallery, directory: Path
) -> None:
    """A link to another disk is fine; one that leads nowhere, as before a mount, is not."""
    place = directory.parents[1]
    disk = cluster.folder / "disk"
    place.rename(disk)
    place.symlink_to(disk)
    try:
        check_answers(connect(), images, "faiss", "through a link")
        check_repair(connect, images)
        disk.rename(cluster.folder / "unmounted")
        check_fallback(connect, images, "is missing")
        with sql_error("58P01", "could not write index file", "link", "Mount"):
            connect().execute("SELECT build_index()")
        (cluster.folder / "unmounted").rename(disk)
        check_answers(connect(), images, "faiss", "mounted again")
    finally:
        place.unlink()
        disk.rename(place)
    check_repair(connect, images)


def test_litter_is_removed_by_the_next_build(
    connect: Connect, images: Gallery, directory: Path
) -> None:
    (directory / "77.faiss").mkdir()
    (directory / "78.faiss.tmp").mkdir()
    (directory / "notes.txt").write_text("mine")
    (directory / "79.meta").symlink_to("/nowhere")
    check_answers(connect(), images, "faiss", "beside litter")
    check_repair(connect, images)


def test_closed_while_a_session_searches(
    connect: Connect, images: Gallery, directory: Path
) -> None:
    """What a session has open, it keeps; what others write, it finds."""
    session = connect()
    check_answers(session, images, "faiss", "before")
    directory.chmod(0)
    other = connect()
    other.execute("DELETE FROM siamese.images WHERE image_id < 20")
    insert(other, images.files[170:171])
    check_answers(session, images, "faiss", "after")
    check_answers(other, images, "auto", "another session")
    directory.chmod(0o700)
    check_repair(connect, images)


def test_without_the_right_to_write(connect: Connect, images: Gallery, directory: Path) -> None:
    """A read-only directory: searches go on, and so do inserts; the build says what to do."""
    if os.geteuid() != 0:
        pytest.skip("needs a directory of another user")
    owner = directory.stat()
    os.chown(directory, 0, 0)
    directory.chmod(0o755)
    check_answers(connect(), images, "faiss", "read only")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        connect().execute("SELECT build_index()")
    check_answers(connect(), images, "faiss", "read only, after a build in vain")
    directory.chmod(0o700)
    os.chown(directory, owner.st_uid, owner.st_gid)
    check_repair(connect, images)
