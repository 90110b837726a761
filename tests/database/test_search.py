"""Searches answer exactly what their snapshot holds, by whichever engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from tests.conftest import MODELS, Connect, Connection, NewRole, Pictures, insert_images
from tests.database.tables import make_collection, without_triggers
from tests.scenarios.gallery import filled_up, index_directory
from tests.support import assert_exact, exact_distances, grid_encoder, notices_of, one, sql_error

ENGINES = ("faiss", "pgvector", "auto")


def search(db: Connection, query: bytes | int, k: int = 10, **options: Any) -> list[Any]:
    """Rows (rank, image_id, distance, similarity, frame) of collection ``images``."""
    extra = "".join(f", {name} => %({name})s" for name in options)
    kind = "image" if isinstance(query, bytes) else "image_id"
    return db.execute(
        f"SELECT * FROM similar_images({kind} => %(query)s, k => %(k)s{extra})",
        {"query": query, "k": k, **options},
    ).fetchall()


def check(db: Connection, query: bytes, k: int = 10, **options: Any) -> None:
    """A search answers what plain SQL does."""
    assert_exact(search(db, query, k, **options), exact_distances(db, query), k)


def keys(rows: list[Any]) -> list[int]:
    return [row[1] for row in rows]


@pytest.fixture
def ids(db: Connection, pictures: Pictures) -> list[int]:
    """300 images, 250 of them in the index."""
    first = insert_images(db, pictures.files[:250], pictures.labels[:250])
    db.execute("SELECT build_index()")
    return first + insert_images(db, pictures.files[250:300], pictures.labels[250:300])


@pytest.mark.parametrize("engine", ENGINES)
def test_exact(db: Connection, ids: list[int], queries: Pictures, engine: str) -> None:
    for query in queries.files[:10]:
        check(db, query, engine=engine)


@pytest.mark.law(2)
@pytest.mark.parametrize("engine", ENGINES)
def test_after_each_kind_of_change(
    db: Connection, ids: list[int], pictures: Pictures, queries: Pictures, engine: str
) -> None:
    def check_all() -> None:
        for query in queries.files[:4]:
            check(db, query, 20, engine=engine)

    db.execute("DELETE FROM images WHERE image_id % 5 = 0")
    check_all()
    db.execute(
        "UPDATE images SET image = %s WHERE image_id = ANY(%s)", (queries.files[0], ids[1:4])
    )
    check_all()
    nearest = search(db, queries.files[0], 3, engine=engine)
    assert set(keys(nearest)) == set(ids[1:4])
    insert_images(db, pictures.files[300:330])
    check_all()
    db.execute("SELECT build_index()")
    check_all()
    db.execute("DELETE FROM images WHERE image_id % 2 = 0")
    check_all()


@pytest.mark.parametrize("engine", ENGINES)
def test_by_id(db: Connection, ids: list[int], pictures: Pictures, engine: str) -> None:
    """The stored image itself is left out, indexed or not; its copies are not."""
    copy = insert_images(db, [pictures.files[3]])[0]
    for place in (3, 270):
        truth = exact_distances(db, pictures.files[place])
        del truth[ids[place]]
        assert_exact(search(db, ids[place], engine=engine), truth, 10)
    assert search(db, ids[3], 1, engine=engine)[0][1] == copy
    assert search(db, copy, 1, engine=engine)[0][1] == ids[3]
    assert search(db, ids[3], candidates=[ids[3]]) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_equal_distances_are_in_the_order_of_keys(
    db: Connection, pictures: Pictures, engine: str
) -> None:
    copies = [7, 3, 90, 1, 50, 20]
    db.execute(
        "INSERT INTO images (image_id, image) SELECT *, %s FROM unnest(%s::bigint[])",
        (pictures.files[0], copies),
    )
    db.execute("INSERT INTO images (image_id, image) VALUES (2, %s)", (pictures.files[1],))
    db.execute("SELECT build_index()")
    assert keys(search(db, pictures.files[0], 6, engine=engine)) == sorted(copies)
    assert keys(search(db, 20, 5, engine=engine)) == [1, 3, 7, 50, 90]
    assert keys(search(db, 2, 6, engine=engine)) == sorted(copies)


@pytest.mark.law(9)
@pytest.mark.parametrize("engine", ENGINES)
def test_k_beyond_the_table(db: Connection, ids: list[int], queries: Pictures, engine: str) -> None:
    """Fewer than k rows only when fewer qualify."""
    assert_exact(
        search(db, queries.files[0], 10_000, engine=engine),
        exact_distances(db, queries.files[0]),
        300,
    )
    assert len(search(db, ids[0], 10_000, engine=engine)) == 299
    assert len(search(db, ids[0], 1, engine=engine)) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_empty_collection(db: Connection, pictures: Pictures, engine: str) -> None:
    if engine != "faiss":
        assert search(db, pictures.files[0], engine=engine) == []
    db.execute("SELECT build_index()")
    assert search(db, pictures.files[0], engine=engine) == []
    new = insert_images(db, pictures.files[:1])
    assert keys(search(db, pictures.files[0], engine=engine)) == new
    db.execute("DELETE FROM images; SELECT build_index()")
    assert search(db, pictures.files[0], engine=engine) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_max_distance(db: Connection, ids: list[int], queries: Pictures, engine: str) -> None:
    """Inclusive, in the very number that a search gave."""
    for query in queries.files[:5]:
        truth = exact_distances(db, query)
        found = search(db, query, 20, engine=engine)
        limit = found[7][2]
        within = search(db, query, 100, engine=engine, max_distance=limit)
        assert within == [row for row in found if row[2] <= limit]
        assert len(within) == pytest.approx(sum(one <= limit for one in truth.values()), abs=1)
    assert len(search(db, query, 500, engine=engine, max_distance=float("inf"))) == 300
    assert search(db, query, engine=engine, max_distance=-0.5) == []
    assert keys(search(db, ids[0], 300, engine=engine, max_distance=2.0)) != []


@pytest.mark.parametrize("engine", ["pgvector", "auto", "faiss"])
def test_candidates(db: Connection, ids: list[int], queries: Pictures, engine: str) -> None:
    chosen = [*ids[10:40], 10**12]
    query = queries.files[0]
    truth = exact_distances(db, query, f"b.image_id = ANY('{{{','.join(map(str, chosen))}}}')")
    assert_exact(search(db, query, 12, candidates=chosen, engine=engine), truth, 12)
    assert len(search(db, query, 100, candidates=chosen * 2, engine=engine)) == 30
    assert search(db, query, candidates=[], engine=engine) == []
    assert search(db, query, candidates=[None], engine=engine) == []
    nearest = search(db, query, 5, candidates=chosen, max_distance=sorted(truth.values())[2] + 1e-6)
    assert len(nearest) == 3


def test_similarity_is_calibrated(connect: Connect, ids: list[int], queries: Pictures) -> None:
    # Whatever pictures stand in for X-rays.
    connect().execute("UPDATE models SET specification = specification - 'domain'")
    db = connect()
    head = one(db, "SELECT specification -> 'calibration' FROM models")
    for _, key, distance, similarity, _ in search(db, queries.files[0], 5):
        logit = head["weight"] * distance + head["bias"]
        assert similarity == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-4)
        same_class = "SELECT same_class(image, %s) FROM images WHERE image_id = %s"
        expected = pytest.approx(similarity, abs=1e-3)
        assert one(db, same_class, queries.files[0], key) == expected


def test_euclidean_model(db: Connection, pictures: Pictures, queries: Pictures) -> None:
    """Long embeddings that lie close together, with and without an index, and pending ones."""
    model = grid_encoder(("n", 3, 28, 28), pool=14, offset=2000.0)
    db.execute("SELECT register_model('far', %s, metric => 'l2')", (model,))
    db.execute("SELECT create_collection('far', 'images', model => 'far')")
    insert_images(db, pictures.files[:100])
    db.execute("SELECT build_index('far')")
    insert_images(db, pictures.files[100:300])
    for query in queries.files[:5]:
        truth = dict(
            db.execute(
                "SELECT key, embedding <-> embed_image(%s, 'far') FROM siamese.embedding_2",
                (query,),
            ).fetchall()
        )
        for engine in ("auto", "pgvector"):
            found = search(db, query, 15, collection="far", engine=engine)
            assert_exact([(*row[:2], row[2], None) for row in found], truth, 15)
            limit = found[6][2]
            within = search(db, query, 15, collection="far", engine=engine, max_distance=limit)
            assert within == [row for row in found if row[2] <= limit]


def test_engine_errors(db: Connection, pictures: Pictures) -> None:
    insert_images(db, pictures.files[:5])
    with sql_error("55000", "FAISS cannot answer", "no index generation", "auto"):
        search(db, pictures.files[0], engine="faiss")
    assert len(search(db, pictures.files[0])) == 5


# Index files: a cache. Whatever happens to them costs speed, never an answer.


@pytest.mark.law(1)
def test_lost_directory(
    db: Connection, ids: list[int], connect: Connect, queries: Pictures
) -> None:
    query = queries.files[0]
    before, fresh = search(db, query), connect()
    old_notices, notices = notices_of(db), notices_of(fresh)
    shutil.rmtree(index_directory(db).parent)
    assert search(db, query) == before  # this session has the file open
    for _ in range(3):
        assert_exact(search(fresh, query), exact_distances(db, query), 10)
    assert len(notices) == 1 and old_notices == []  # it says so once
    assert 'searching collection "images" without its FAISS index' in notices[0]
    assert "is missing" in notices[0]
    with sql_error("55000", "FAISS cannot answer", "is missing"):
        search(fresh, query, engine="faiss")
    status = "SELECT generation_file FROM collection_status"
    assert one(db, status) == "missing"
    fresh.execute("SELECT build_index()")
    assert one(db, status) == "present"
    assert_exact(search(fresh, query, engine="faiss"), exact_distances(db, query), 10)


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.law(1)
@pytest.mark.parametrize("suffix", ["faiss", "meta"])
@pytest.mark.parametrize("damage", [torn, empty, flipped, unreadable, Path.unlink])
def test_damaged_files(
    db: Connection,
    pictures: Pictures,
    connect: Connect,
    suffix: str,
    damage: Callable[[Path], None],
) -> None:
    insert_images(db, pictures.files[:30])
    db.execute("SELECT build_index()")
    (path,) = index_directory(db).glob(f"*.{suffix}")
    damage(path)
    fresh = connect()
    query = pictures.files[40]
    assert_exact(search(fresh, query), exact_distances(db, query), 10)
    with sql_error("55000", "FAISS cannot answer"):
        search(fresh, query, engine="faiss")
    assert one(fresh, "SELECT ok FROM self_check() WHERE subject ~ 'index$'") is False


@pytest.mark.law(1)
def test_foreign_file(db: Connection, pictures: Pictures, connect: Connect) -> None:
    """As after a restore: right names and whole, but of another build."""
    insert_images(db, pictures.files[:30])
    db.execute("SELECT build_index()")
    directory = index_directory(db)
    kept = directory.parent / "kept"
    shutil.copytree(directory, kept)
    db.execute("DELETE FROM images")
    insert_images(db, pictures.files[30:60])
    generation = one(db, "SELECT build_index()")
    for path in kept.iterdir():
        shutil.copy(path, directory / f"{generation}{path.suffix}")
    query = pictures.files[40]
    assert_exact(search(connect(), query), exact_distances(db, query), 10)
    with sql_error("55000", "belongs to another build"):
        search(connect(), query, engine="faiss")


def test_only_two_generations_are_kept(db: Connection, pictures: Pictures) -> None:
    insert_images(db, pictures.files[:5])
    for _ in range(4):
        db.execute("SELECT build_index()")
    assert one(db, "SELECT array_agg(generation ORDER BY generation) FROM index_generations") == [
        3,
        4,
    ]
    names = sorted(path.name for path in index_directory(db).iterdir())
    assert names == ["3.faiss", "3.meta", "4.faiss", "4.meta"]


@pytest.mark.law(6)
def test_failed_build_changes_nothing(db: Connection, ids: list[int], queries: Pictures) -> None:
    with db.transaction(force_rollback=True):
        db.execute("SELECT build_index()")
    check(db, queries.files[0], engine="faiss")
    db.execute("SELECT build_index()")
    assert len(list(index_directory(db).iterdir())) == 4
    check(db, queries.files[0], engine="faiss")


# Snapshots.


@pytest.mark.law(2)
def test_repeatable_read_older_than_builds_and_deletes(
    db: Connection, ids: list[int], connect: Connect, queries: Pictures
) -> None:
    old, query = connect(), queries.files[0]
    truth = exact_distances(db, query)
    old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM images LIMIT 1")
    db.execute("DELETE FROM images WHERE image_id % 2 = 0")
    db.execute("UPDATE images SET image = %s", (queries.files[5],))
    for _ in range(3):
        assert_exact(search(old, query, 50), truth, 50)
        db.execute("SELECT build_index()")
    assert_exact(search(old, query, 50), truth, 50)
    assert len(search(old, ids[1], 300)) == 299
    old.execute("COMMIT")
    assert_exact(search(old, query, 50), exact_distances(db, query), 50)


def test_build_in_an_old_snapshot_harms_nothing(
    db: Connection, ids: list[int], connect: Connect, queries: Pictures
) -> None:
    old = connect()
    old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM images LIMIT 1")
    db.execute("SELECT build_index()")
    with sql_error("40001", "could not serialize"):
        old.execute("SELECT build_index()")
    old.execute("ROLLBACK")
    assert_exact(
        search(connect(), queries.files[0], engine="faiss"),
        exact_distances(db, queries.files[0]),
        10,
    )


def test_cursor_older_than_other_searches_of_its_session(
    db: Connection, ids: list[int], pictures: Pictures, queries: Pictures
) -> None:
    query = queries.files[0]
    declare = "DECLARE {} CURSOR FOR SELECT * FROM similar_images(%s, k => 400, engine => 'faiss')"
    with db.transaction():
        truths = []
        for step in range(4):
            truths.append(exact_distances(db, query))
            db.execute(declare.format(f"c{step}"), (query,))
            assert_exact(search(db, query, 400), truths[-1], 400)
            if step == 0:
                db.execute("DELETE FROM images WHERE image_id % 3 = 0")
            elif step == 1:
                db.execute("UPDATE images SET image = %s WHERE image_id %% 3 = 1", (query,))
            elif step == 2:
                insert_images(db, pictures.files[300:340])
        for step in (0, 2, 1, 3):
            assert_exact(db.execute(f"FETCH ALL c{step}").fetchall(), truths[step], 400)
            assert_exact(search(db, query, 400), truths[3], 400)


@pytest.mark.law(2)
def test_cursor_older_than_commits_of_others(
    db: Connection, ids: list[int], connect: Connect, queries: Pictures
) -> None:
    """What a newer snapshot has settled must not be taken for settled by an older one."""
    session, query = connect(), queries.files[0]
    truth = exact_distances(db, query)
    with session.transaction():
        session.execute(
            "DECLARE c CURSOR FOR SELECT * FROM similar_images(%s, k => 400, engine => 'faiss')",
            (query,),
        )
        db.execute("DELETE FROM images WHERE image_id % 2 = 0")
        insert_images(db, queries.files[:5])
        db.execute("SELECT txid_current()")
        assert_exact(search(session, query, 400), exact_distances(db, query), 400)
        assert_exact(session.execute("FETCH ALL c").fetchall(), truth, 400)
        assert_exact(search(session, query, 400), exact_distances(db, query), 400)


def test_imported_snapshot_older_than_the_sessions_last(
    db: Connection, ids: list[int], connect: Connect, queries: Pictures
) -> None:
    keeper, session, query = connect(), connect(), queries.files[0]
    truth = exact_distances(db, query)
    keeper.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    snapshot = one(keeper, "SELECT pg_export_snapshot()")
    db.execute("DELETE FROM images WHERE image_id % 2 = 0")
    insert_images(db, queries.files[:5])
    assert_exact(search(session, query, 400), exact_distances(db, query), 400)
    session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    session.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'")
    assert_exact(search(session, query, 400), truth, 400)
    session.execute("COMMIT")
    assert_exact(search(session, query, 400), exact_distances(db, query), 400)


@pytest.mark.law(2)
def test_one_statement_sees_one_snapshot(db: Connection, ids: list[int]) -> None:
    """A statement that deletes and searches sees the rows as they were when it began."""
    assert db.execute(
        "WITH gone AS (DELETE FROM images RETURNING image_id)"
        " SELECT (SELECT count(*) FROM similar_images(image_id => %s, k => 400)),"
        " (SELECT count(*) FROM gone)",
        (ids[0],),
    ).fetchone() == (299, 300)
    assert one(db, "SELECT count(*) FROM images") == 0


@pytest.mark.law(2)
def test_running_transactions_are_not_seen(
    db: Connection, ids: list[int], connect: Connect, queries: Pictures
) -> None:
    """Also when the build happens while they run, and whichever way they end."""
    busy, query = [connect(), connect()], queries.files[0]
    for place, session in enumerate(busy):
        session.execute("BEGIN")
        session.execute("DELETE FROM images WHERE image_id %% 10 = %s", (place,))
        insert_images(session, queries.files[place : place + 1])
    db.execute("SELECT build_index()")
    check(db, query, 400)
    busy[0].execute("COMMIT")
    check(db, query, 400)
    busy[1].execute("ROLLBACK")
    check(db, query, 400)
    db.execute("SELECT build_index()")
    check(db, query, 400)


# Row-level security.


@pytest.fixture
def readers(
    new_role: NewRole, db: Connection, ids: list[int], pictures: Pictures
) -> tuple[str, str]:
    """Two roles, the first of which sees images with an even id only, and the second all."""
    one, other = new_role(), new_role()
    for role in (one, other):
        db.execute("SELECT grant_usage(%s)", (role,))
    db.execute("ALTER TABLE images ENABLE ROW LEVEL SECURITY")
    db.execute(f"CREATE POLICY even ON images TO {one} USING (image_id % 2 = 0)")
    db.execute(f"CREATE POLICY all_rows ON images TO {other} USING (true)")
    db.execute("DELETE FROM images WHERE image_id % 7 = 0")
    return one, other


@pytest.mark.law(4)
@pytest.mark.parametrize("engine", ENGINES)
def test_row_level_security(
    db: Connection, readers: tuple[str, str], connect: Connect, queries: Pictures, engine: str
) -> None:
    session = connect(user=readers[0])
    for query in queries.files[:4]:
        truth = exact_distances(db, query, "b.image_id %% 2 = 0")
        assert_exact(search(session, query, 30, engine=engine), truth, 30)
        assert_exact(search(session, query, 500, engine=engine), truth, 500)
    with sql_error("P0002", "not in collection"):
        search(session, 1, engine=engine)
    assert all(key % 2 == 0 for key in keys(search(session, 2, 100, engine=engine)))


@pytest.mark.law(4)
def test_set_role_between_searches(
    db: Connection, readers: tuple[str, str], pictures: Pictures, queries: Pictures
) -> None:
    """What one role has been shown, the next must not be."""
    query = queries.files[0]
    every = exact_distances(db, query)
    even = {key: distance for key, distance in every.items() if key % 2 == 0}
    for role, truth in [(None, every), (0, even), (1, every), (0, even), (None, every)]:
        if role is not None:
            db.execute(f"SET ROLE {readers[role]}")
        assert_exact(search(db, query, 500), truth, 500)
        db.execute("RESET ROLE")
    insert_images(db, pictures.files[400:420])
    every = exact_distances(db, query)
    db.execute(f"SET ROLE {readers[0]}")
    even = {key: distance for key, distance in every.items() if key % 2 == 0}
    assert_exact(search(db, query, 500), even, 500)


# A graph index, of vectors that never were images.


class Large:
    """Collection ``t`` of 12,000 vectors, all but the last 500 in a graph index."""

    groups: np.ndarray[Any, Any]

    def __init__(self, db: Connection, pending: int = 500) -> None:
        self.db = db
        first = 12_000 - pending
        generator = np.random.default_rng(0)
        centres = generator.normal(size=(300, 64))
        points = centres[generator.integers(0, 300, 12_000)] + generator.normal(size=(12_000, 64))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        self.points = filled_up(points.astype(np.float32))
        make_collection(db, more=", n int")
        with without_triggers(db):
            db.execute("INSERT INTO t SELECT i, '', i FROM generate_series(0, 11999) AS i")
        self.copy(range(first))
        generation = one(db, "SELECT build_index('t')")
        query = "SELECT recall FROM index_generations WHERE generation = %s"
        self.recall = one(db, query, generation)
        self.copy(range(first, 12_000))
        db.execute(
            "INSERT INTO siamese.pending_2 (embedding_id)"
            " SELECT embedding_id FROM siamese.embedding_2 WHERE key >= %s",
            (first,),
        )

    def copy(self, places: range) -> None:
        with (
            self.db.cursor() as cursor,
            cursor.copy("COPY siamese.embedding_2 (key, embedding) FROM STDIN") as copy,
        ):
            for place in places:
                copy.write_row((place, str(self.points[place].tolist())))

    def nearest(self, key: int, allowed: np.ndarray[Any, Any], k: int) -> list[int]:
        order = np.argsort(1 - self.points @ self.points[key], kind="stable")
        return [place for place in order.tolist() if allowed[place] and place != key][:k]

    def recall_at(
        self, key: int, allowed: np.ndarray[Any, Any], k: int = 10, **options: Any
    ) -> float:
        """Check that an answer is full and qualifies; return its recall."""
        truth = self.nearest(key, allowed, k)
        found = keys(search(self.db, key, k, collection="t", **options))
        assert len(set(found)) == len(found) == len(truth)
        assert all(allowed[one] and one != key for one in found)
        return len(set(found) & set(truth)) / len(truth) if truth else 1.0

    def recall_of(self, allowed: np.ndarray[Any, Any], k: int = 10, **options: Any) -> float:
        """Return the mean recall of up to 40 ids."""
        chosen = [key for key in range(100, 12_000, 300) if allowed[key]]
        return float(np.mean([self.recall_at(key, allowed, k, **options) for key in chosen]))


@pytest.fixture(scope="module")
def large(shared: Connection) -> Large:
    return Large(shared)


@pytest.mark.parametrize("k", [1, 10, 200])
def test_graph(large: Large, k: int) -> None:
    assert large.recall >= 0.99  # by a graph, or a scan where that is quicker here
    assert large.recall_of(np.ones(12_000, bool), k) >= 0.97


@pytest.mark.law(9)
@pytest.mark.parametrize("share", [1, 2, 10, 100, 1000])
def test_graph_with_a_filter(large: Large, share: int) -> None:
    allowed = np.arange(12_000) % share == 100 % share
    db = large.db
    with db.transaction(force_rollback=True):
        db.execute(f"UPDATE t SET n = n % {share}")
        recall = large.recall_of(allowed, filter=f'{{"n": {100 % share}}}')
    assert recall >= 0.97


@pytest.mark.law(9)
def test_graph_after_deletions(large: Large) -> None:
    """From four fifths to nearly all: every answer stays full."""
    with large.db.transaction(force_rollback=True):
        for share in (5, 10):
            large.db.execute(f"DELETE FROM t WHERE id % {share} <> 0")
            assert large.recall_of(np.arange(12_000) % share == 0) >= 0.97
        large.db.execute("DELETE FROM t WHERE id % 1000 <> 100")
        assert large.recall_of(np.arange(12_000) % 1000 == 100) >= 0.99


@pytest.mark.parametrize("k", [1_000, 5_000, 10_000])
def test_graph_with_many_neighbours(large: Large, k: int) -> None:
    everything = np.ones(12_000, bool)
    found = keys(search(large.db, 100, k, collection="t", engine="faiss"))
    assert len(set(found)) == k
    assert len(set(found) & set(large.nearest(100, everything, k))) >= 0.99 * k


class Groups:
    """Column ``n`` of the large collection: groups of a share of the rows, and whose is whose."""

    def __init__(self, large: Large, kind: str, count: int) -> None:
        self.large, self.count = large, count
        if kind == "random":
            self.groups = np.random.default_rng(1).permutation(12_000) % count
        else:  # along one direction: a row's own group holds its neighbours, the last the farthest
            order = np.argsort(large.points @ large.points[100])
            self.groups = np.empty(12_000, np.int64)
            self.groups[order] = np.arange(12_000) * count // 12_000
        large.db.execute(
            "UPDATE t SET n = g.n FROM unnest(%s::int[]) WITH ORDINALITY AS g (n, id)"
            " WHERE t.id = g.id - 1",
            (self.groups.tolist(),),
        )

    def check(self, key: int, group: int, k: int = 10, **options: Any) -> None:
        allowed, filter_ = self.groups == group, f'{{"n": {group}}}'
        assert self.large.recall_at(key, allowed, k, filter=filter_, **options) >= 0.9


@pytest.mark.parametrize("analysed", [True, False])
@pytest.mark.parametrize("count", [3, 10, 100, 1_000])
@pytest.mark.parametrize("kind", ["random", "place"])
def test_filters_that_say_something_of_distance(
    large: Large, kind: str, count: int, analysed: bool
) -> None:
    """The nearest rows qualify, or the farthest, or any; the planner knows, or is wrong."""
    with large.db.transaction(force_rollback=True):
        groups = Groups(large, kind, count)
        if analysed:
            large.db.execute("CREATE INDEX ON t (n)")
            large.db.execute("ANALYZE t")
        for key in (100, 7, 11_900):  # the last one is pending
            for group in {int(groups.groups[key]), 0, count - 1}:
                groups.check(key, group)
                groups.check(key, group, 300)
        # None qualifies, while statistics may say otherwise; and all of those that do.
        groups.check(100, count)
        groups.check(100, 0, 10_000)


def test_filter_with_dead_and_pending_rows(large: Large) -> None:
    with large.db.transaction(force_rollback=True):
        groups = Groups(large, "random", 50)
        large.db.execute("DELETE FROM t WHERE id % 3 = 0 AND id <> 300")
        groups.groups[(np.arange(12_000) % 3 == 0) & (np.arange(12_000) != 300)] = -1
        for key in (100, 300, 11_900):
            for group in (0, 49):
                groups.check(key, group)
                groups.check(key, group, 200)


@pytest.mark.parametrize("count", [0, 1, 50, 3_000, 11_000])
def test_many_candidates(large: Large, count: int) -> None:
    chosen = np.sort(np.random.default_rng(count).permutation(12_000)[:count])
    allowed = np.zeros(12_000, bool)
    allowed[chosen] = True
    for key in (100, 11_900):
        for k in (10, 400):
            candidates = [*chosen.tolist(), None]
            assert large.recall_at(key, allowed, k, candidates=candidates) >= 0.97


@pytest.mark.law(12)
def test_a_filter_reads_what_qualifies(large: Large) -> None:
    """Not the vectors of the table, and not the rows that do not qualify."""

    def pages(statement: str) -> int:
        plan = one(large.db, f"EXPLAIN (ANALYZE, BUFFERS, FORMAT json) {statement}")[0]["Plan"]
        return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])

    large.db.execute("VACUUM FULL t")  # of what other tests rolled back
    with large.db.transaction(force_rollback=True):
        Groups(large, "random", 600)
        large.db.execute("CLUSTER t USING t_pkey")
        large.db.execute("CREATE INDEX ON t (n)")
        large.db.execute("ANALYZE t")
        arguments = "image_id => 5, k => 10, collection => 't', filter => '{\"n\": 7}'"
        search = f"SELECT * FROM similar_images({arguments})"
        for _ in range(8):  # catalogues, and plans that stay
            pages(search)
        qualifying = pages("SELECT id FROM t WHERE n = 7")
        assert pages(search) <= qualifying + 60
        everything = pages("SELECT key, embedding FROM siamese.embedding_2")
        assert everything > 200


def test_graph_with_max_distance(large: Large) -> None:
    for key in (5, 500, 11_900):
        distances = 1 - large.points @ large.points[key]
        limit = float(np.sort(distances)[30]) + 1e-5
        within = set(np.flatnonzero(distances <= limit).tolist()) - {key}
        found = keys(search(large.db, key, 300, collection="t", max_distance=limit))
        assert len(set(found) & within) >= 0.95 * len(within) and set(found) <= within


@pytest.mark.law(9)
def test_graph_with_many_copies(db: Connection, pictures: Pictures) -> None:
    """Copies of an image fill each other's neighbour lists; and all of them must be found."""
    db.execute(
        "INSERT INTO images (image) SELECT image FROM unnest(%s::bytea[]) AS image,"
        " generate_series(1, 40)",
        (pictures.files[:20],),
    )
    db.execute("SELECT build_index()")
    row = db.execute("SELECT rows, vectors FROM index_generations").fetchone()
    assert row and row[0] == 800 and row[1] < 800
    for file in pictures.files[:5]:
        found = search(db, file, 40, engine="faiss")
        assert max(row[2] for row in found) < 1e-6 and len(set(keys(found))) == 40


@pytest.mark.law(2)
def test_searches_in_a_row_notice_every_change(
    db: Connection, connect: Connect, pictures: Pictures
) -> None:
    """From the second one on, a search expects that nothing has changed, and finds out if so."""
    ids = insert_images(db, pictures.files[:40])
    db.execute("SELECT build_index()")
    reader = connect()
    image = pictures.files[3]

    def check(session: Connection) -> list[tuple[object, ...]]:
        found = []
        for argument, value in (("image", image), ("image_id", ids[5])):
            query = (
                "SELECT rank, image_id, round(distance::numeric, 4)"
                f" FROM similar_images({argument} => %s, k => 12, engine => %s)"
            )
            exact = session.execute(query, (value, "pgvector")).fetchall()
            for _ in range(2):
                assert session.execute(query, (value, "faiss")).fetchall() == exact
            found += exact
        return found

    def change(statement: str, *values: object) -> None:
        """Make a change, look at it in its own transaction, and from the other session."""
        before = check(reader)
        with db.transaction(), db.transaction():
            check(db)
            db.execute(statement, values)
            after = check(db)
            assert after != before
            assert check(reader) == before
        assert check(db) == check(reader) == after

    nearest = check(db)
    change("DELETE FROM images WHERE image_id = %s", nearest[1][1])
    change("INSERT INTO images (image) VALUES (%s)", image)
    change("UPDATE images SET image = %s WHERE image_id = %s", pictures.files[50], nearest[3][1])
    db.execute("SELECT build_index()")
    check(reader)
    change("UPDATE images SET image_id = 1000 WHERE image_id = %s", nearest[2][1])
    change("UPDATE images SET image = %s WHERE image_id = %s", pictures.files[60], ids[5])
    db.execute("SELECT build_index()")
    for _ in range(2):
        before = check(reader)
        with pytest.raises(psycopg.Error), db.transaction():
            check(db)
            with db.transaction(force_rollback=True):
                db.execute("DELETE FROM images WHERE image_id <> %s", (ids[5],))
                assert len(db.execute("SELECT similar_images(%s)", (image,)).fetchall()) == 1
            check(db)
            db.execute("SELECT 1 / 0")
        assert check(db) == check(reader) == before


def test_nobody_but_a_search_has_anything_explained(db: Connection, pictures: Pictures) -> None:
    insert_images(db, pictures.files[:20], pictures.labels[:20])
    db.execute("SELECT build_index()")
    assert one(db, "SELECT siamese._estimate()") is None
    db.execute('SELECT similar_images(%s, filter => \'{"label": "1"}\')', (pictures.files[0],))
    assert one(db, "SELECT siamese._estimate()") is None


def test_similarity_is_never_out_of_range(db: Connection, pictures: Pictures) -> None:
    """Of calibrations as steep as they come, a real holds the probability."""
    # The encoder whose domain the pictures are in.
    name = "medical" if pictures.name == "pneumoniamnist" else "fashion_mnist"
    encoder = (MODELS / f"{name}.onnx").read_bytes()
    for number, weight in enumerate((-1e6, 1e6)):
        model, table = f"steep{number}", f"t{number}"
        db.execute(
            "SELECT register_model(%s, %s,"
            " calibration => jsonb_build_object('weight', %s::float8, 'bias', 0.0))",
            (model, encoder, weight),
        )
        make_collection(db, table, model=model)
        for place, file in enumerate(pictures.files[:5]):
            db.execute(f"INSERT INTO {table} VALUES (%s, %s)", (place, file))
        found = db.execute(
            "SELECT distance, similarity FROM similar_images(image_id => 0, collection => %s)",
            (table,),
        ).fetchall()
        far = [similarity for distance, similarity in found if distance > 0.01]
        assert far
        for similarity in far:
            assert 0 < similarity < 1e-30 if weight < 0 else similarity == 1.0
