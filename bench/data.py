"""Make the data to search: Fashion-MNIST, through the triggers, or a mixture of clusters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.exact import Vectors
from bench.session import Session, bytea_array, connect
from pg_siamese.client.sources import png
from pg_siamese.datasets import load_fashion_mnist
from pg_siamese_server.encoding.specification import ModelSpec
from tools.cluster import Cluster
from tools.project import ROOT

MODEL = ROOT / "models" / "fashion_mnist.onnx"
ROWS_A_STATEMENT = 1000
COPY_ROWS = 50_000
# The mixture: directions in which clusters lie and spread, and their deviation in each, with 1 for
# the centres. The last is the deviation of noise in all dimensions.
INNER, SPREAD, NOISE = 16, 0.5, 0.05


def fashion_mnist(count: int) -> NDArray[np.uint8]:
    """Return the pictures of clothes, uint8 (count, 28, 28), at most 70,000."""
    parts = [load_fashion_mnist(split).images for split in ("train", "test")]
    return np.concatenate(parts)[:count]


def new_pictures(pictures: NDArray[np.uint8], count: int, seed: int) -> list[bytes]:
    """Return PNG files of pictures that are not stored: moved, and turned by up to ten degrees."""
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(pictures), count, replace=False)
    return [
        png(
            np.asarray(
                Image.fromarray(pictures[place]).rotate(
                    generator.uniform(-10, 10),
                    Image.Resampling.BILINEAR,
                    translate=tuple(generator.integers(-2, 3, 2).tolist()),
                )
            )
        )
        for place in chosen
    ]


def register(cluster: Cluster) -> ModelSpec:
    """Register the shipped encoder for pictures of clothes, and return its specification."""
    with connect(cluster.dsn()) as admin:
        admin.execute("SELECT siamese.register_model('fashion_mnist', %s)", (MODEL.read_bytes(),))
        row = admin.execute("SELECT specification FROM siamese.models").fetchone()
    assert row is not None
    return ModelSpec.from_json(row[0])


def insert(session: Session, table: str, files: list[bytes]) -> None:
    """Insert image files the ordinary way, so that a trigger embeds them."""
    for start in range(0, len(files), ROWS_A_STATEMENT):
        part = bytea_array(files[start : start + ROWS_A_STATEMENT])
        statement = f"INSERT INTO {table} (image) SELECT * FROM unnest($1::bytea[])"
        insertion = session.prepare("", statement, 0)
        insertion(part)


def copy_vectors(cluster: Cluster, source: str, columns: Sequence[str] = ()) -> None:
    """Make pgvector's table: the same vectors, in the order of their rows.

    ``columns`` are columns of ``bench.large`` to copy, with an index on each.
    """
    more = "".join(f", b.{name}" for name in columns)
    joined = " INNER JOIN bench.large AS b ON b.image_id = e.key" if columns else ""
    with connect(cluster.dsn()) as admin:
        admin.execute(
            f"CREATE TABLE bench.vectors AS SELECT e.key AS image_id, e.embedding{more}"
            f" FROM {source} AS e{joined} ORDER BY e.key"
        )
        admin.execute("ALTER TABLE bench.vectors ADD PRIMARY KEY (image_id)")
        for name in columns:
            admin.execute(f"CREATE INDEX ON bench.vectors ({name})")


def read_vectors(cluster: Cluster) -> Vectors:
    """Read all vectors of pgvector's table."""
    ids, parts = [], []
    statement = "COPY bench.vectors (image_id, embedding) TO STDOUT (FORMAT binary)"
    with connect(cluster.dsn()) as reader, reader.cursor().copy(statement) as copy:
        copy.set_types(["int8", "bytea"])
        for image_id, data in copy.rows():
            ids.append(image_id)
            parts.append(data[4:])  # after dimension and flags
    matrix = np.frombuffer(b"".join(parts), dtype=">f4").reshape(len(ids), -1)
    order = np.argsort(ids)
    return Vectors(np.asarray(ids)[order], matrix[order].astype(np.float32))


def mixture(count: int, dimension: int, clusters: int, seed: int = 0) -> Vectors:
    """Return unit vectors in clusters, float32 (count, dimension).

    The mixture of Gaussians varies in INNER directions only, plus a little noise in all dimensions.
    So do the embeddings of trained encoders. With noise that fills all dimensions, neither engine
    reaches a recall of 0.99 at any usual setting.
    """
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((clusters, INNER), dtype=np.float32)
    inner = centres[generator.integers(0, clusters, count)]
    inner += np.float32(SPREAD) * generator.standard_normal((count, INNER), dtype=np.float32)
    basis = np.linalg.qr(generator.standard_normal((dimension, INNER)))[0].T.astype(np.float32)
    matrix = np.float32(NOISE) * generator.standard_normal((count, dimension), dtype=np.float32)
    matrix += inner @ basis
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    return Vectors(np.arange(1, count + 1, dtype=np.int64), matrix)


def load_mixture(
    cluster: Cluster, vectors: Vectors, columns: Mapping[str, NDArray[np.int32]]
) -> None:
    """Make collection ``large`` with these vectors, and with columns to filter by.

    There are no images behind them. The collection is created while its table is empty. Then, with
    triggers off as in a restore, rows and vectors are added. The pending table is filled as a
    trigger would have done.
    """
    with connect(cluster.dsn()) as admin:
        admin.execute(
            "CREATE TABLE bench.large (image_id bigint PRIMARY KEY, image bytea NOT NULL"
            + "".join(f", {name} integer NOT NULL" for name in columns)
            + ")"
        )
        admin.execute("SELECT siamese.create_collection('large', 'bench.large')")
        row = admin.execute(
            "SELECT collection_id FROM siamese.collections WHERE name = 'large'"
        ).fetchone()
    assert row is not None
    table, pending = f"siamese.embedding_{row[0]}", f"siamese.pending_{row[0]}"
    with Session(cluster.dsn(), session_replication_role="replica") as session:
        names = ", ".join(["image_id", "image", *columns])
        session.copy(f"bench.large ({names})", _rows(vectors.ids, columns))
        for name in columns:
            # With the key, as the documentation advises. pgvector's index has no use for a key.
            session.run(f"CREATE INDEX ON bench.large ({name}, image_id)")
        session.copy(f"{table} (key, embedding)", _vector_rows(vectors))
        session.run(f"INSERT INTO {pending} (embedding_id) SELECT embedding_id FROM {table}")
    copy_vectors(cluster, table, list(columns))


_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"


def _rows(ids: NDArray[np.int64], columns: Mapping[str, NDArray[np.int32]]) -> Iterator[bytes]:
    """Yield COPY's binary format of rows (bigint, bytea of one byte, integers)."""
    layout = [("n", ">i2"), ("l1", ">i4"), ("id", ">i8"), ("l2", ">i4"), ("image", "u1")]
    for name in columns:
        layout += [(f"length of {name}", ">i4"), (name, ">i4")]
    record = np.zeros(len(ids), dtype=layout)
    record["n"], record["l1"], record["id"], record["l2"] = 2 + len(columns), 8, ids, 1
    for name, values in columns.items():
        record[f"length of {name}"], record[name] = 4, values
    yield _HEADER
    for start in range(0, len(ids), COPY_ROWS):
        yield record[start : start + COPY_ROWS].tobytes()
    yield _TRAILER


def _vector_rows(vectors: Vectors) -> Iterator[bytes]:
    """Yield COPY's binary format of rows (bigint, vector)."""
    dimension = vectors.matrix.shape[1]
    layout = [
        ("n", ">i2"),
        ("l1", ">i4"),
        ("id", ">i8"),
        ("l2", ">i4"),
        ("dimension", ">i2"),
        ("unused", ">i2"),
        ("values", ">f4", (dimension,)),
    ]
    yield _HEADER
    for start in range(0, len(vectors.ids), COPY_ROWS):
        part = slice(start, start + COPY_ROWS)
        record = np.zeros(len(vectors.ids[part]), dtype=layout)
        record["n"], record["l1"], record["id"] = 2, 8, vectors.ids[part]
        record["l2"], record["dimension"] = 4 + 4 * dimension, dimension
        record["values"] = vectors.matrix[part]
        yield record.tobytes()
    yield _TRAILER
