"""Measure searches: similar_images, pgvector's HNSW, FAISS alone and an empty call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from bench.exact import K, Truth
from bench.report import Line
from bench.server import index_file
from bench.session import BIGINT, BYTEA, Session, bigint, connect, first_bigints, first_row
from bench.timing import Summary, one_core, round_robin
from pg_siamese_server.index.generations import Breadths, opened
from pg_siamese_server.index.index_file import read_sidecar
from tools.cluster import Cluster

OURS = "similar_images"
PGVECTOR = "pgvector HNSW"
FAISS = "FAISS alone"
EMPTY = "empty PL/Python call"
TEN_ROWS = "PL/Python call that returns 10 rows"
EMBEDDING = "embed_image"

BY_ID = "search by stored id"
BY_IMAGE = "search by new image"
PENDING_SECTION = "search by stored id, one session"
PENDING = "5,000 pending"
NONE_PENDING = ("none pending", "none pending, after a build")

TARGET = 0.99
# hnsw.ef_search. Below 10 there can't be ten rows.
BREADTHS = (10, 11, 12, 14, 16, 20, 24, 32, 40, 48, 64, 80, 100, 128, 160, 200, 300, 400, 600, 800)
# target_recall of build_index, which chooses the breadth. Its default is 0.995.
TARGETS = (0.99, 0.9925, 0.995, 0.997, 0.998, 0.999, 0.9995)
BLOCK = 20
WARM_UP = 200

# The same columns as from similar_images. The query vector's sub-select runs once per search.
_DISTANCE = "embedding <=> ({query})"
PGVECTOR_BY_ID = (
    "SELECT image_id, {d} AS distance FROM bench.vectors WHERE image_id <> $1 ORDER BY {d} LIMIT 10"
).format(d=_DISTANCE.format(query="SELECT embedding FROM bench.vectors WHERE image_id = $1"))
PGVECTOR_BY_IMAGE = (
    "SELECT image_id, {d} AS distance FROM bench.vectors ORDER BY {d} LIMIT 10"
).format(d=_DISTANCE.format(query="SELECT siamese.embed_image($1, 'fashion_mnist')"))


@dataclass(frozen=True)
class Contestant:
    """One side that answers queries by number.

    Attributes:
        call: what is timed.
        ids: converts what ``call`` returned to ids, or None if that is no answer.
        note: settings.
    """

    call: Callable[[int], Any]
    ids: Callable[[Any], list[int]] | None = None
    note: str = ""


def ours(session: Session, collection: str, by_image: bool) -> Any:
    """Prepare ``similar_images``, after checking that FAISS answers."""
    kind, oid = ("image", BYTEA) if by_image else ("image_id", BIGINT)
    arguments = f"{kind} => $1, k => {K}, collection => '{collection}'"
    statement = f"SELECT image_id, distance FROM siamese.similar_images({arguments})"
    return session.prepare(f"ours_{kind}", statement, oid)


def check_engine(session: Session, collection: str) -> None:
    """Fail unless FAISS answers for the collection."""
    ready = session.run(f"SELECT engine FROM siamese.warm_up('{collection}')")
    assert ("faiss",) in ready, f"FAISS does not answer for {collection}"


def tune_ours(
    session: Session, collection: str, search: Any, values: list[bytes], truth: Truth
) -> str:
    """Build with the lowest target_recall that suffices for these queries, and return a note."""
    for target in TARGETS:
        session.run(f"SELECT siamese.build_index('{collection}', target_recall => {target})")
        if truth.recall([first_bigints(search(value)) for value in values]) >= TARGET:
            break
    session.notices.clear()
    check_engine(session, collection)
    return f"target_recall {target}"


class PgVector:
    """pgvector's HNSW index on the copy of the vectors, at its fastest sufficient setting."""

    def __init__(self, session: Session, by_image: bool) -> None:
        self.session = session
        # Planned once, since a generic plan is the faster one here.
        session.set("plan_cache_mode", "force_generic_plan")
        kind, oid = ("image", BYTEA) if by_image else ("image_id", BIGINT)
        statement = PGVECTOR_BY_IMAGE if by_image else PGVECTOR_BY_ID
        self.search = session.prepare(f"pgvector_{kind}", statement, oid)
        name = f"pgvector_{kind}"
        value = "'\\x00'" if by_image else "1"
        plan = "\n".join(str(row[0]) for row in session.run(f"EXPLAIN EXECUTE {name}({value})"))
        assert "Index Scan using vectors_embedding_idx" in plan, plan
        self.breadth = 0

    def tune(self, values: list[bytes], truth: Truth) -> None:
        """Choose the smallest ef_search whose recall on these queries is sufficient."""
        for self.breadth in BREADTHS:
            self.session.set("hnsw.ef_search", str(self.breadth))
            if truth.recall([first_bigints(self.search(value)) for value in values]) >= TARGET:
                break


class FaissAlone:
    """FAISS in this process, on the same index file and with the same breadth."""

    def __init__(self, cluster: Cluster, collection: str, truth: Truth) -> None:
        faiss.omp_set_num_threads(1)
        path = index_file(cluster, collection)
        self.index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        _, rows = read_sidecar(path.with_suffix(".meta"), lambda: None)
        with connect(cluster.dsn()) as admin:
            breadths = first_row(
                admin,
                "SELECT g.ef_search_stored, g.ef_search, g.ef_search_many"
                " FROM siamese.generations AS g"
                " JOIN siamese.collections AS c USING (generation) WHERE c.name = %s",
                collection,
            )
        self.generation = opened(self.index, rows, False, Breadths(*breadths))
        self.count = K + (truth.own is not None)
        self.note = f"ef_search {breadths[1 if truth.own is None else 0]}"
        self.truth = truth
        self.entries: list[int | None] = [None] * len(truth.queries)
        if truth.own is not None:
            found = [rows.row_of_key(key) for key in truth.own.tolist()]
            self.entries = [self.generation.slot_of(row) for row in found if row is not None]
            assert len(self.entries) == len(truth.own)

    def call(self, number: int) -> Any:
        """Search for one of the queries, from itself if it is in the index."""
        query = self.truth.queries[number : number + 1]
        positions, _ = self.generation.search(query, self.count, self.entries[number])
        return number, positions.copy()

    def ids(self, answer: tuple[int, NDArray[np.int64]]) -> list[int]:
        """Convert positions to ids, and leave out the query's own."""
        number, positions = answer
        own = None if self.truth.own is None else self.truth.own[number]
        rows, _ = self.generation.expand(positions, np.zeros(len(positions), np.float32))
        keys = self.generation.rows.keys
        assert keys is not None
        found = keys[rows].tolist()
        return [key for key in found if key != own][:K]

    def contestant(self, note: str) -> Contestant:
        """Return this as a contestant."""
        return Contestant(self.call, self.ids, f"{self.note}, {note}")


def empty_calls(session: Session) -> dict[str, Contestant]:
    """Make two functions that do nothing, as the lower bound of a call's cost."""
    session.run(
        "CREATE FUNCTION bench.empty(value bigint) RETURNS bigint LANGUAGE plpython3u STABLE"
        " AS 'return value'"
    )
    session.run(
        "CREATE FUNCTION bench.ten_rows(value bigint) RETURNS TABLE (rank integer, image_id bigint,"
        " distance real, similarity real) LANGUAGE plpython3u STABLE ROWS 10"
        " AS 'return [(rank, value, 0.1, 0.9) for rank in range(10)]'"
    )
    empty = session.prepare("empty", "SELECT bench.empty($1)", BIGINT)
    ten = session.prepare("ten", "SELECT image_id, distance FROM bench.ten_rows($1)", BIGINT)
    return {
        EMPTY: Contestant(lambda number: empty(bigint(number))),
        TEN_ROWS: Contestant(lambda number: ten(bigint(number))),
    }


def compete(
    section: str,
    contestants: dict[str, Contestant],
    truth: Truth,
    count: int,
    sessions: Sequence[Session],
) -> list[Line]:
    """Time the contestants on the same queries, in turns, with one line each."""
    calls = {name: contestant.call for name, contestant in contestants.items()}
    with one_core(session.pid for session in sessions):
        seconds, answers = round_robin(calls, count, BLOCK, WARM_UP)
    lines = []
    for name, contestant in contestants.items():
        ids, times = contestant.ids, Summary.of(seconds[name])
        recall = None if ids is None else truth.recall([ids(answer) for answer in answers[name]])
        lines.append(Line(section, name, times, recall=recall, note=contestant.note))
    return lines


def by_id(cluster: Cluster, collection: str, truth: Truth) -> list[Line]:
    """Search by stored id."""
    assert truth.own is not None
    values = [bigint(int(key)) for key in truth.own]
    return _searches(cluster, collection, truth, values, is_image=False)


def by_image(cluster: Cluster, collection: str, truth: Truth, files: list[bytes]) -> list[Line]:
    """Search by new image."""
    return _searches(cluster, collection, truth, files, is_image=True)


def _searches(
    cluster: Cluster, collection: str, truth: Truth, values: list[bytes], *, is_image: bool
) -> list[Line]:
    with Session(cluster.dsn()) as mine, Session(cluster.dsn()) as theirs:
        search = ours(mine, collection, is_image)
        note = f"{tune_ours(mine, collection, search, values, truth)}: {index_note(cluster)}"
        rival = PgVector(theirs, is_image)
        rival.tune(values, truth)
        theirs_note = f"ef_search {rival.breadth}{', query by embed_image' if is_image else ''}"
        alone = FaissAlone(cluster, collection, truth)
        contestants = {
            OURS: Contestant(partial(nth, search, values), first_bigints, note),
            PGVECTOR: Contestant(partial(nth, rival.search, values), first_bigints, theirs_note),
            FAISS: alone.contestant("embeddings at hand" if is_image else "in a Python process"),
        }
        if is_image:
            embed = mine.prepare("embed", "SELECT siamese.embed_image($1, 'fashion_mnist')", BYTEA)
            contestants[EMBEDDING] = Contestant(partial(nth, embed, values))
        else:
            contestants |= empty_calls(mine)
        section = BY_IMAGE if is_image else BY_ID
        lines = compete(section, contestants, truth, len(values), (mine, theirs))
        assert not mine.notices, mine.notices
    return lines


def pending(
    cluster: Cluster, collection: str, ids: NDArray[np.int64], add: Callable[[], None]
) -> list[Line]:
    """Search in one session: with nothing pending, with what ``add`` adds, and after a build.

    The machine may change its speed meanwhile. So there is a measurement without pending rows
    before and after the one with them.
    """
    values = [bigint(int(key)) for key in ids]
    lines = []
    with Session(cluster.dsn()) as session, connect(cluster.dsn()) as admin:
        search = ours(session, collection, by_image=False)
        build = partial(admin.execute, "SELECT siamese.build_index(%s)", (collection,))
        before, after = NONE_PENDING
        steps: dict[str, Callable[[], object]] = {before: lambda: None, PENDING: add, after: build}
        call = partial(nth, search, values)
        for name, step in steps.items():
            step()
            with one_core([session.pid]):
                seconds, _ = round_robin({name: call}, len(values), BLOCK, WARM_UP)
            lines.append(Line(PENDING_SECTION, name, Summary.of(seconds[name])))
        assert not session.notices, session.notices
    return lines


def index_note(cluster: Cluster) -> str:
    """Return a note on how the current index was built."""
    query = (
        "SELECT index_type, m, ef_construction, ef_search_stored, ef_search"
        " FROM siamese.index_generations WHERE is_current"
    )
    with connect(cluster.dsn()) as admin:
        kind, m, construction, stored, new = first_row(admin, query)
    if kind != "hnsw":
        return f"{kind} index"
    return f"m {m}, ef_construction {construction}; ef_search {stored} and {new}, by the build"


def nth(search: Callable[[bytes], Any], values: list[bytes], number: int) -> Any:
    """Search with the n-th value."""
    return search(values[number])
