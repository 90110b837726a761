"""Sessions side by side: searches are right in every snapshot, whatever others do meanwhile.

In full: ``python -m tests.scenarios mixed --seconds 120``.
"""

from __future__ import annotations

import threading

import psycopg
import pytest

from tests.conftest import Connect
from tests.database.tables import make_collection, without_triggers
from tests.scenarios.gallery import (
    Content,
    check_files,
    check_tables,
    gallery,
    index_directory,
    insert,
    prepare,
)
from tests.scenarios.mixed import Mixed
from tests.support import in_threads, one


@pytest.mark.law(2)
def test_eight_sessions_beside_index_builds(connect: Connect) -> None:
    Mixed(connect, gallery(1500), rows=1_000, seconds=12).run()


def test_backfills_at_the_same_time(connect: Connect) -> None:
    images = gallery(500)
    owner = connect()
    prepare(owner, images)
    with without_triggers(owner):
        insert(owner, images.files[:400])
    sessions = [connect() for _ in range(4)]
    errors = in_threads(*[lambda s=s: s.execute("SELECT backfill()") for s in sessions])
    assert not errors, errors
    check_tables(owner)


def test_backfill_beside_changes(connect: Connect) -> None:
    images = gallery(1500)
    owner, writer, session = connect(), connect(), connect()
    prepare(owner, images)
    with without_triggers(owner):
        ids = insert(owner, images.files[:500])

    def change() -> None:
        for number, image_id in enumerate(ids[::4]):
            file = images.files[800 + number % 700]
            if number % 3 == 0:
                writer.execute("DELETE FROM siamese.images WHERE image_id = %s", (image_id,))
            else:
                writer.execute(
                    "UPDATE siamese.images SET image = %s WHERE image_id = %s", (file, image_id)
                )

    errors = in_threads(change, lambda: session.execute("SELECT backfill()"))
    assert not errors, errors
    session.execute("SELECT backfill()")
    check_tables(owner)


def test_the_current_file_outlives_builds_that_are_rolled_back(connect: Connect) -> None:
    images = gallery(500)
    owner, session = connect(), connect()
    prepare(owner, images)
    insert(owner, images.files[:300])
    owner.execute("SELECT build_index()")
    owner.execute("BEGIN")
    owner.execute("SELECT build_index()")
    content = Content.read(session, images)
    content.check(session, images, image=0, engine="faiss", what="while another builds")
    owner.execute("ROLLBACK")
    content.check(connect(), images, image=1, engine="faiss", what="after rollback")
    content.check(owner, images, image=1, engine="faiss", what="in the session that rolled back")
    owner.execute("SELECT build_index()")
    check_files(owner)


def test_builds_of_one_collection_wait_for_each_other(connect: Connect) -> None:
    images = gallery(500)
    owner = connect()
    prepare(owner, images)
    insert(owner, images.files[:300])
    sessions = [connect() for _ in range(3)]
    sessions[2].execute("SET default_transaction_isolation = 'repeatable read'")
    errors = in_threads(*[lambda s=s: s.execute("SELECT build_index()") for s in sessions])
    # A REPEATABLE READ transaction that waited can't change what it can't see.
    assert all(isinstance(error, psycopg.errors.SerializationFailure) for error in errors), errors
    Content.read(owner, images).check(owner, images, image=0, engine="faiss", what="after all")
    assert one(owner, "SELECT generation_file FROM siamese.collection_status") == "present"
    owner.execute("SELECT build_index()")
    check_files(owner)


def test_truncate_beside_a_build_voids_the_build(connect: Connect) -> None:
    images = gallery(500)
    owner, builder = connect(), connect()
    prepare(owner, images)
    insert(owner, images.files[:300])
    builder.execute("SELECT build_index()")
    owner.execute("BEGIN")
    owner.execute("TRUNCATE siamese.images")
    insert(owner, images.files[300:350])
    errors: list[BaseException] = []
    thread = threading.Thread(
        target=lambda: errors.extend(in_threads(lambda: builder.execute("SELECT build_index()")))
    )
    thread.start()
    thread.join(1)
    assert thread.is_alive()
    owner.execute("COMMIT")
    thread.join()
    assert [type(error) for error in errors] == [psycopg.errors.ObjectNotInPrerequisiteState]
    for session in (owner, builder, connect()):
        content = Content.read(session, images)
        assert len(content.ids) == 50
        content.check(session, images, image=0, k=100, what="after truncate")
    owner.execute("SELECT build_index()")
    check_files(owner)
    check_tables(owner)


def test_a_dropped_collection_leaves_no_files(connect: Connect) -> None:
    owner = connect()
    insert(owner, gallery(500).files[:300])
    owner.execute("SELECT build_index()")
    folder = index_directory(owner)
    assert folder.is_dir()
    owner.execute("SELECT drop_collection('images')")
    # Others' snapshots may want them still: the next build of any collection removes them.
    make_collection(owner, "other", key="serial", model="medical")
    owner.execute("SELECT build_index('other')")
    if folder.exists():
        pytest.fail(f"orphans: {sorted(path.name for path in folder.iterdir())}")
