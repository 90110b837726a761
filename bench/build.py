"""Measure index builds: build_index and pgvector's CREATE INDEX."""

from __future__ import annotations

from bench.report import Line
from bench.search import PGVECTOR, index_note
from bench.session import Session
from bench.timing import Summary
from tools.cluster import Cluster

SECTION = "index build"
OURS = "build_index"
M, EF_CONSTRUCTION, WORKERS = 16, 64, 2
CREATE = (
    "CREATE INDEX vectors_embedding_idx ON bench.vectors USING hnsw"
    f" (embedding public.vector_cosine_ops) WITH (m = {M}, ef_construction = {EF_CONSTRUCTION})"
)


def build(cluster: Cluster, collection: str, repetitions: int) -> list[Line]:
    """Build both indexes with their default parameters, in turns, and keep the last ones.

    FAISS gets as many threads as pgvector gets workers. pgvector's graph must fit into
    maintenance_work_mem, else it would be far slower.
    """
    seconds: dict[str, list[float]] = {OURS: [], PGVECTOR: []}
    with Session(cluster.dsn(), max_parallel_maintenance_workers=str(WORKERS)) as session:
        for _ in range(repetitions):
            statement = f"SELECT siamese.build_index('{collection}', threads => {WORKERS})"
            seconds[OURS].append(session.timed(statement))
            session.run("DROP INDEX IF EXISTS bench.vectors_embedding_idx")
            session.notices.clear()
            seconds[PGVECTOR].append(session.timed(CREATE))
            assert not session.notices, session.notices
    notes = {
        OURS: f"{index_note(cluster)}; {WORKERS} threads",
        PGVECTOR: f"m {M}, ef_construction {EF_CONSTRUCTION}; {WORKERS} workers and the leader",
    }
    return [Line(SECTION, name, Summary.of(seconds[name]), note=notes[name]) for name in notes]


def vacuum(cluster: Cluster) -> None:
    """Vacuum and analyse all tables, as autovacuum would have."""
    with Session(cluster.dsn()) as session:
        session.run("VACUUM ANALYZE")
        session.run("CHECKPOINT")
