"""Real images with vectors computed outside PostgreSQL, and exact answers to compare with.

The truth is independent of the extension: a table of its own maps the MD5 of each image file to the
vector that ONNX Runtime gives outside PostgreSQL, and exact SQL on the images themselves, in the
same statement as the search, says what the snapshot's nearest rows are.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import psycopg
from psycopg.types.json import Jsonb

from pg_siamese import datasets
from pg_siamese.client.sources import png
from pg_siamese_server.encoding.encoder import Encoder
from pg_siamese_server.encoding.specification import InputSpec, ModelSpec
from tests.server import path_of
from tests.support import one
from tools.project import ROOT


def _dimension(path: Path) -> int:
    (embedding,) = onnx.load_model(path).graph.output
    return int(embedding.type.tensor_type.shape.dim[1].dim_value)


MODELS = ROOT / "models"
DIMENSION = _dimension(MODELS / "medical.onnx")
# Float32 rounding differs between one query at a time and a batch, and between summation orders.
DISTANCE_TOLERANCE = 1e-5
TIE_TOLERANCE = 1e-6
# Column of siamese.images by the share of the rows that one of its values has.
FILTERS: dict[float, tuple[str, int]] = {
    1.0: ("dataset", 1),
    0.1: ("split", 10),
    0.01: ("label", 100),
    0.001: ("source", 1000),
}

Connection = psycopg.Connection[Any]


def filled_up(vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Give vectors (count, up to DIMENSION) the model's dimension, with zeros."""
    return np.pad(vectors, ((0, 0), (0, DIMENSION - vectors.shape[1])))


def image_sets(count: int) -> list[datasets.LabelledImages]:
    """Return all 28 x 28 image sets that this machine has, up to ``count`` images of each."""
    found = []
    for name in datasets.MEDICAL_SETS:
        for split in datasets.SPLITS:
            try:
                found.append(datasets.load_medmnist(name, split, download=False))
            except datasets.DataNotFoundError:
                break
    with contextlib.suppress(datasets.DataNotFoundError):
        found.append(datasets.load_fashion_mnist("train"))
    return [images.select(slice(0, count)) for images in found if len(images)]


@dataclass(frozen=True)
class Gallery:
    """Image files and their vectors, float32 (count, DIMENSION), of length one."""

    files: list[bytes]
    vectors: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.files)

    @functools.cached_property
    def places(self) -> dict[str, int]:
        """The place of each file by its MD5 in hexadecimal."""
        return {hashlib.md5(file).hexdigest(): place for place, file in enumerate(self.files)}


def embed_outside(pixels: npt.NDArray[np.uint8], model: str = "medical") -> npt.NDArray[np.float32]:
    """Embed uint8 pixels (N, 28, 28, 3) by ONNX Runtime in this process; float32 (N, d)."""
    data = (MODELS / f"{model}.onnx").read_bytes()
    return Encoder(data, ModelSpec(InputSpec(28, 28))).embed(pixels)


@functools.cache
def gallery(count: int) -> Gallery:
    """Return ``count`` distinct images of all sets, shuffled (seeded).

    Raises:
        DataNotFoundError: this machine has none.
    """
    sets = image_sets(count)
    if not sets:
        raise datasets.DataNotFoundError("no image set on this machine")
    pixels = np.concatenate([images.rgb() for images in sets])
    pixels = pixels[np.random.default_rng(0).permutation(len(pixels))]
    files: dict[bytes, int] = {}
    for place, image in enumerate(pixels):
        files.setdefault(png(image), place)
        if len(files) == count:
            break
    return Gallery(list(files), embed_outside(pixels[list(files.values())]))


def prepare(connection: Connection, images: Gallery) -> None:
    """Make the table of true vectors, and let ``siamese.images`` carry each file's MD5."""
    connection.execute(
        f"CREATE TABLE public.truth (digest uuid PRIMARY KEY, vector public.vector({DIMENSION}))"
    )
    connection.execute(
        "ALTER TABLE siamese.images ADD COLUMN digest uuid"
        " GENERATED ALWAYS AS (md5(image)::uuid) STORED"
    )
    with connection.cursor().copy("COPY public.truth FROM STDIN") as copy:
        for file, vector in zip(images.files, images.vectors, strict=True):
            copy.write_row((hashlib.md5(file).hexdigest(), str(vector.tolist())))
    connection.execute("ANALYZE public.truth")


def insert(connection: Connection, files: Sequence[bytes], first: int = 0) -> list[int]:
    """Insert images in one statement, with values for each of FILTERS; returns their ids."""
    numbers = range(first, first + len(files))
    values = [[str(number % modulo) for number in numbers] for _, modulo in FILTERS.values()]
    columns = ", ".join(column for column, _ in FILTERS.values())
    cursor = connection.execute(
        f"INSERT INTO siamese.images (image, {columns}) SELECT * FROM unnest("
        f"%s::bytea[]{', %s::text[]' * len(FILTERS)}) RETURNING image_id",
        (list(files), *values),
        binary=True,
    )
    return [row[0] for row in cursor.fetchall()]


ANSWER = """
WITH qualifying AS MATERIALIZED (
    SELECT b.image_id, t.vector OPERATOR(public.<=>) {query} AS distance
    FROM siamese.images AS b LEFT JOIN public.truth AS t ON t.digest = b.digest
    WHERE {where}
)
SELECT
    (SELECT count(*) FROM qualifying),
    (SELECT count(*) FROM qualifying AS q WHERE q.distance IS NULL),
    (SELECT array_agg(x.distance ORDER BY x.distance) FROM (
        SELECT q.distance FROM qualifying AS q ORDER BY q.distance LIMIT %(k)s) AS x),
    array_agg(s.rank ORDER BY s.rank), array_agg(s.image_id ORDER BY s.rank),
    array_agg(s.distance ORDER BY s.rank), array_agg(q.distance ORDER BY s.rank)
FROM similar_images({argument}, k => %(k)s, filter => %(filter)s, engine => %(engine)s) AS s
LEFT JOIN qualifying AS q USING (image_id)
"""
BY_IMAGE = ANSWER.replace("{argument}", "image => %(image)s::bytea").replace(
    "{query}", "%(vector)s::public.vector"
)
BY_ID = ANSWER.replace("{argument}", "image_id => %(id)s::bigint").replace(
    "{query}",
    "(SELECT t.vector FROM siamese.images AS b INNER JOIN public.truth AS t USING (digest)"
    " WHERE b.image_id = %(id)s)",
)


@dataclass
class Found:
    """How many of the true nearest rows were found, over all searches counted here."""

    hits: int = 0
    expected: int = 0
    searches: int = 0

    def add(self, other: Found) -> None:
        """Count another's searches in."""
        self.hits += other.hits
        self.expected += other.expected
        self.searches += other.searches

    @property
    def recall(self) -> float:
        """Share of the true nearest that were found; 1 where none was to be found."""
        return self.hits / self.expected if self.expected else 1.0


def check_answer(row: Sequence[Any], k: int, what: str) -> Found:
    """Check all that must hold of one answer, and count how many of the true nearest it has.

    Args:
        row: as ANSWER gives it.
        k: how many were asked for.
        what: names the search in error messages.
    """
    qualifying, unknown, exact, ranks, keys, distances, true = row
    if ranks in (None, [None]):  # an empty answer, by the outer join
        ranks, keys, distances, true = [], [], [], []
    assert not unknown, f"{what}: {unknown} images are not in the table of true vectors"
    assert len(set(keys)) == len(keys), f"{what}: duplicates in {keys}"
    strangers = [key for key, distance in zip(keys, true, strict=True) if distance is None]
    assert not strangers, f"{what}: rows {strangers} are deleted, not visible or filtered out"
    assert len(keys) == min(k, qualifying), f"{what}: {len(keys)} of {min(k, qualifying)} rows"
    assert ranks == list(range(1, len(keys) + 1)), f"{what}: ranks {ranks}"
    assert distances == sorted(distances), f"{what}: not ordered: {distances}"
    error = np.abs(np.array(distances, float) - np.array(true, float)).max(initial=0)
    assert error < DISTANCE_TOLERANCE, f"{what}: distances {distances}, but truly {true}"
    if not keys:
        return Found(searches=1)
    hits = int((np.array(true) <= exact[-1] + TIE_TOLERANCE).sum())
    return Found(hits, len(keys), 1)


def search_in_one_statement(
    connection: Connection,
    images: Gallery,
    *,
    image: int | None = None,
    image_id: int | None = None,
    k: int = 10,
    engine: str = "auto",
    condition: dict[str, str] | None = None,
    what: str,
) -> Found:
    """Search, for an image of the gallery or a stored one, beside changes of other sessions.

    The exact answer is computed in the same statement, and so in the same snapshot.
    """
    clauses = [f"b.{column} = '{value}'" for column, value in (condition or {}).items()]
    values: dict[str, Any] = {"k": k, "engine": engine, "filter": Jsonb(condition or {})}
    if image is not None:
        sql = BY_IMAGE
        values |= {"image": images.files[image], "vector": str(images.vectors[image].tolist())}
    else:
        sql = BY_ID
        values["id"] = image_id
        clauses.append("b.image_id <> %(id)s")
    where = " AND ".join(clauses) or "true"
    row = connection.execute(sql.format(where=where), values, binary=True).fetchone()
    assert row is not None
    return check_answer(row, k, what)


@dataclass
class Content:
    """What a session sees of ``siamese.images``, with true vectors, while nobody changes it.

    Attributes:
        ids: int64 (rows,), ascending.
        vectors: float64 (rows, DIMENSION).
        columns: values of the columns of FILTERS, by name.
    """

    ids: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.float64]
    columns: dict[str, npt.NDArray[Any]]

    @classmethod
    def read(cls, connection: Connection, images: Gallery) -> Content:
        """Read it through a session."""
        names = [column for column, _ in FILTERS.values()]
        rows = connection.execute(
            f"SELECT image_id, digest, {', '.join(names)} FROM siamese.images ORDER BY image_id",
            binary=True,
        ).fetchall()
        places = [images.places[row[1].hex] for row in rows]
        return cls(
            np.array([row[0] for row in rows], dtype=np.int64),
            images.vectors[places].astype(np.float64),
            {name: np.array([row[2 + i] for row in rows]) for i, name in enumerate(names)},
        )

    def check(
        self,
        connection: Connection,
        images: Gallery,
        *,
        image: int | None = None,
        row: int | None = None,
        k: int = 10,
        engine: str = "auto",
        condition: dict[str, str] | None = None,
        what: str,
    ) -> Found:
        """Search for an image of the gallery or of a stored row, and check the answer."""
        excluded = np.zeros(len(self.ids), dtype=bool)
        for column, value in (condition or {}).items():
            excluded |= self.columns[column] != value
        query: npt.NDArray[Any]
        argument: tuple[str, int | bytes]
        if row is not None:
            excluded[row] = True
            query, argument = self.vectors[row], ("image_id", int(self.ids[row]))
        else:
            assert image is not None
            query, argument = images.vectors[image], ("image", images.files[image])
        found = connection.execute(
            "SELECT rank, image_id, distance"
            f" FROM similar_images({argument[0]} => %s, k => %s, filter => %s, engine => %s)",
            (argument[1], k, Jsonb(condition or {}), engine),
            binary=True,
        ).fetchall()
        distances = 1 - self.vectors @ query.astype(np.float64)
        distances[excluded] = np.inf
        qualifying = int(len(self.ids) - excluded.sum())
        truth = [self._of(distances, item[1]) for item in found]
        nearest = np.sort(np.partition(distances, k)[:k] if k < len(distances) else distances)
        columns = [[item[place] for item in found] for place in range(3)]
        exact = nearest[: min(k, qualifying)].tolist()
        return check_answer((qualifying, 0, exact, *columns, truth), k, what)

    def _of(self, distances: npt.NDArray[np.float64], image_id: int) -> float | None:
        """Return the true distance of a row, or None where it is not there or does not qualify."""
        place = int(self.ids.searchsorted(image_id))
        if place == len(self.ids) or self.ids[place] != image_id:
            return None
        return float(distances[place]) if np.isfinite(distances[place]) else None


def check_tables(connection: Connection) -> None:
    """Check that each row has its one vector, the right one, and that ``self_check`` is content."""
    row = connection.execute(
        "SELECT count(*), count(*) FILTER (WHERE e.key IS NULL),"
        " count(*) FILTER (WHERE b.image_id IS NULL),"
        " count(*) FILTER (WHERE e.embedding OPERATOR(public.<=>) t.vector > 1e-5)"
        " FROM siamese.images AS b"
        " FULL JOIN siamese.embedding_1 AS e ON e.key = b.image_id"
        " LEFT JOIN public.truth AS t USING (digest)"
    ).fetchone()
    assert row is not None and row[1:] == (0, 0, 0), f"rows, no vector, no row, wrong: {row}"
    bad = connection.execute("SELECT * FROM self_check() WHERE NOT ok").fetchall()
    assert not bad, f"self_check: {bad}"


def index_directory(connection: Connection) -> Path:
    """Return the directory of collection ``images``' index files."""
    query = (
        "SELECT current_setting('data_directory') || '/pg_siamese/' || d.oid || '/1'"
        " FROM pg_database AS d WHERE d.datname = current_database()"
    )
    return path_of(one(connection, query))


def check_files(connection: Connection) -> None:
    """Check that the index directory holds whole generations of the manifest, and nothing else."""
    there = check_no_orphans(connection, index_directory(connection))
    query = "SELECT generation FROM siamese.collections WHERE name = 'images'"
    if (current := one(connection, query)) is not None:
        assert {f"{current}.faiss", f"{current}.meta"} <= there, f"missing in {there}"


def check_no_orphans(connection: Connection, directory: Path) -> set[str]:
    """Check that a collection's directory has no file but its generations'; return their names."""
    known = connection.execute(
        "SELECT generation FROM siamese.generations WHERE collection_id = %s", (directory.name,)
    ).fetchall()
    expected = {f"{row[0]}.{suffix}" for row in known for suffix in ("faiss", "meta")}
    there = {path.name for path in directory.iterdir()}
    assert there <= expected, f"orphans: {sorted(there - expected)}"
    return there
