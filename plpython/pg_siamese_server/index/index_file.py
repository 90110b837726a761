"""Keep a FAISS generation on disk: written once, published by rename, checked when opened.

A generation is two files. ``N.faiss`` has FAISS's own format. ``N.meta`` names model, collection
and build, and maps vectors to rows. It is published last, so a generation without one does not
exist. Published files never change, since a backend may have them mapped.

Layout of ``N.meta``: magic, XXH3-128 of all that follows, length of the header, header (JSON). Then
arrays at multiples of 64 bytes, as the header says.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import xxhash
from numpy.typing import NDArray

from pg_siamese_server.errors import IndexFileError
from pg_siamese_server.interrupts import raise_if_pending

MAGIC = b"PGSIAM01"
ALIGNMENT = 64
BLOCK = 4 * 1024 * 1024
ARRAY_TYPES = {"int64": np.int64, "int32": np.int32, "uint8": np.uint8}

# Paths are text, since pathlib takes as long to import as a part of a first search.
Place = str | os.PathLike[str]
Poll = Callable[[], None]


@dataclass(frozen=True)
class Identity:
    """Identity that a file must have to answer for a collection's generation.

    Attributes:
        collection_id, generation: of the catalog.
        build_id: drawn for each build, so that numbers reused after a restore don't match.
        model_sha256: of the ONNX file whose vectors are inside, in hexadecimal.
        dimension: of the vectors.
        metric: ``cosine`` (vectors are normalised) or ``l2``.
    """

    collection_id: int
    generation: int
    build_id: str
    model_sha256: str
    dimension: int
    metric: str


@dataclass(eq=False, repr=False)
class Rows:
    """Rows of a file, with one entry per row, ascending by embedding_id.

    Attributes:
        embedding_ids: int64 (rows,).
        keys: int64 (rows,) for integer keys. Else None, and the two arrays below are set.
        key_offsets, key_bytes: int64 (rows + 1,) and uint8, UTF-8 text of uuid and text keys, and
            of frames (``Collection.label``).
        by_key: int64 (rows,), the rows in the order of their integer keys, or None if these ascend.
        slots: int32 (rows,), the FAISS position of each row's vector. None if row i has position i.
        by_slot: int32 (rows,), the rows in the order of their positions, if ``slots`` is set.
        slot_starts: int32 (vectors + 1,), where the rows of each position begin in ``by_slot``.
            None if every row has a vector of its own.
    """

    embedding_ids: NDArray[np.int64]
    keys: NDArray[np.int64] | None = None
    by_key: NDArray[np.int64] | None = None
    key_offsets: NDArray[np.int64] | None = None
    key_bytes: NDArray[np.uint8] | None = None
    slots: NDArray[np.int32] | None = None
    by_slot: NDArray[np.int32] | None = None
    slot_starts: NDArray[np.int32] | None = None

    def set_keys(self, keys: NDArray[np.int64]) -> None:
        """Set integer keys."""
        self.keys = keys
        if (keys[1:] < keys[:-1]).any():
            self.by_key = np.argsort(keys)

    def row_of_key(self, key: int) -> int | None:
        """Return the row of an integer key, or None if the file does not hold it."""
        assert self.keys is not None
        place = int(self.keys.searchsorted(key, sorter=self.by_key))
        if place == len(self.keys):
            return None
        row = place if self.by_key is None else int(self.by_key[place])
        return row if self.keys[row] == key else None

    def place(self, slots: NDArray[np.int32], vectors: int) -> None:
        """Set the position of each row's vector among ``vectors`` positions."""
        self.slots = slots
        self.by_slot = np.argsort(slots, kind="stable").astype(np.int32)
        if vectors < len(slots):
            bounds = np.searchsorted(slots[self.by_slot], np.arange(vectors + 1))
            self.slot_starts = bounds.astype(np.int32)

    def move(self, places: NDArray[np.int32] | None) -> None:
        """Follow vectors to other positions, int32 (vectors,), if they were moved."""
        if places is not None:
            assert self.slots is not None
            self.place(places[self.slots], len(places))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that are set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def key(self, row: int) -> int | str:
        """Return the key of one row."""
        if self.keys is not None:
            return int(self.keys[row])
        assert self.key_offsets is not None and self.key_bytes is not None
        start, end = self.key_offsets[row], self.key_offsets[row + 1]
        return self.key_bytes[start:end].tobytes().decode()


@dataclass(eq=False, repr=False)
class IndexFile:
    """An opened generation, with its index and rows mapped.

    Attributes:
        index: the FAISS index.
        rows: which row each vector belongs to.
        made_for: snapshot that a standby made its own file in. Else None, and the file serves all
            snapshots that know of the generation.
    """

    index: Any
    rows: Rows
    made_for: str | None = None


def paths(directory: Place, generation: int) -> tuple[str, str]:
    """Return the paths of a generation's FAISS file and of its sidecar."""
    start = os.path.join(directory, str(generation))
    return f"{start}.faiss", f"{start}.meta"


def write(
    directory: Place,
    identity: Identity,
    index: Any,
    rows: Rows,
    poll: Poll,
    made_for: str | None = None,
) -> int:
    """Write and publish a generation, and return its size in bytes.

    Args:
        directory: of the collection.
        identity: of the generation.
        index, rows, made_for: as in ``IndexFile``.
        poll: called between pieces of work, may raise to stop.

    Raises:
        OSError: the disk is full, or the directory not writable. Nothing is published then.
    """
    _make_directory(directory)
    faiss_path, meta_path = paths(directory, identity.generation)
    digest = xxhash.xxh3_128()

    def write_index(file: Any) -> None:
        errors: list[OSError] = []

        def block(data: bytes) -> None:
            raise_if_pending()
            digest.update(data)
            try:
                file.write(data)
            except OSError as error:
                errors.append(error)
                raise

        try:
            writer = faiss.PyCallbackIOWriter(block, BLOCK)
            faiss.write_index(index, writer)
        except Exception:  # FAISS turns the call-back's error into one of its own
            poll()
            if errors:
                raise errors[0] from None
            raise

    _publish(faiss_path, write_index)
    size = os.stat(faiss_path).st_size
    header, body = _sidecar(identity, size, digest.hexdigest(), rows, made_for)
    try:
        _publish(meta_path, lambda file: (file.write(header), [file.write(part) for part in body]))
    except OSError:  # a full disk has no room for the one without the other
        _remove(faiss_path)
        raise
    return size + os.stat(meta_path).st_size


def _make_directory(directory: Place) -> None:
    """Make the directories of all collections, of the database and of the collection.

    A file in place of one of these is removed, since no administrator would put it there. A link is
    somebody's decision, so a dangling one is an error.
    """
    own = os.fspath(directory)
    database = os.path.dirname(own)
    for path in (os.path.dirname(database), database, own):
        if os.path.islink(path) and not os.path.exists(path):
            raise FileNotFoundError(
                errno.ENOENT, "It is a link to a directory that does not exist", path
            )
        if os.path.isfile(path):
            os.unlink(path)
        os.makedirs(path, exist_ok=True)


def _publish(path: str, fill: Callable[[Any], Any]) -> None:
    """Write under a temporary name, make it durable, then rename it."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb", buffering=BLOCK) as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = path  # a failed write does not name its file
        with contextlib.suppress(OSError):
            _remove(temporary)
        raise
    sync_directory(os.path.dirname(path))


def sync_directory(directory: Place) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sidecar(
    identity: Identity, size: int, digest: str, rows: Rows, made_for: str | None
) -> tuple[bytes, list[bytes]]:
    arrays = rows.arrays()
    header: dict[str, Any] = {
        "identity": vars(identity),
        "faiss_bytes": size,
        "faiss_xxh3": digest,
        "made_for": made_for,
        "arrays": [[name, str(value.dtype), len(value)] for name, value in arrays.items()],
    }
    text = json.dumps(header).encode()
    prefix = len(MAGIC) + 16 + 4
    text += b" " * (-(prefix + len(text)) % ALIGNMENT)
    body = []
    for value in arrays.values():
        data = np.ascontiguousarray(value).tobytes()
        body.append(data + b"\0" * (-len(data) % ALIGNMENT))
    rest = len(text).to_bytes(4, "little") + text
    checksum = xxhash.xxh3_128(rest)
    for data in body:
        checksum.update(data)
    return MAGIC + checksum.digest() + rest, body


def read(directory: Place, identity: Identity, poll: Poll) -> IndexFile:
    """Check that a generation is the right one and undamaged, and open it.

    Raises:
        IndexFileError: it is missing, damaged, or another one.
    """
    faiss_path, meta_path = paths(directory, identity.generation)
    header, rows = read_sidecar(meta_path, poll)
    found = header.get("identity")
    if found != vars(identity):
        raise IndexFileError(
            f"index file of generation {identity.generation} belongs to another build",
        )
    _check_faiss_file(faiss_path, header, poll)
    try:
        index = faiss.read_index(faiss_path, faiss.IO_FLAG_MMAP_IFC)
    except Exception as error:  # FAISS raises RuntimeError for all kinds of damage
        raise IndexFileError(
            f"FAISS cannot read the index file of generation {identity.generation}",
            detail=str(error).splitlines()[0][:200],
        ) from None
    vectors = len(rows.embedding_ids if rows.slot_starts is None else rows.slot_starts[1:])
    if index.ntotal != vectors or index.d != identity.dimension:
        raise IndexFileError(f"index file of generation {identity.generation} is not consistent")
    return IndexFile(index, rows, header.get("made_for"))


def _map(path: Place) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise IndexFileError(f'index file "{os.path.basename(path)}" is empty')
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise IndexFileError(f'index file "{os.path.basename(path)}" is missing') from None
    except OSError as error:
        raise IndexFileError(
            f'index file "{os.path.basename(path)}" cannot be opened', detail=f"{error.strerror}."
        ) from None


def _checksum(data: memoryview, poll: Poll) -> Any:
    digest = xxhash.xxh3_128()
    for start in range(0, len(data), BLOCK):
        digest.update(data[start : start + BLOCK])
        poll()
    return digest


def read_sidecar(path: Place, poll: Poll) -> tuple[dict[str, Any], Rows]:
    """Read a generation's header and rows. Raises ``IndexFileError`` if they are damaged."""
    data = memoryview(_map(path))
    start = len(MAGIC) + 16
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise IndexFileError(f'"{os.path.basename(path)}" is not an index file of this version')
    if _checksum(data[start:], poll).digest() != bytes(data[len(MAGIC) : start]):
        raise IndexFileError(f'index file "{os.path.basename(path)}" is damaged')
    length = int.from_bytes(data[start : start + 4], "little")
    header = json.loads(bytes(data[start + 4 : start + 4 + length]))
    offset = start + 4 + length
    arrays: dict[str, Any] = {}
    for name, dtype, count in header["arrays"]:
        kind = ARRAY_TYPES[dtype]
        arrays[name] = np.frombuffer(data, kind, count, offset)
        offset += -(-arrays[name].nbytes // ALIGNMENT) * ALIGNMENT
    return header, Rows(**arrays)


def _check_faiss_file(path: str, header: dict[str, Any], poll: Poll) -> None:
    data = _map(path)
    try:
        with memoryview(data) as view:
            whole = (
                len(view) == header["faiss_bytes"]
                and _checksum(view, poll).hexdigest() == header["faiss_xxh3"]
            )
    finally:
        data.close()
    if not whole:
        raise IndexFileError(f'index file "{os.path.basename(path)}" is damaged')


def remove_temporary(directory: Place) -> None:
    """Remove temporary files of builds that did not finish."""
    for name, path in _entries(directory):
        if name.endswith(".tmp"):
            _remove(path)


def remove_before(directory: Place, generation: int) -> None:
    """Remove generations that are older than one."""
    for name, path in _entries(directory):
        stem = name.split(".", 1)[0]
        if stem.isdigit() and int(stem) < generation:
            _remove(path)


def remove_others(directory: Place, keep: set[int]) -> None:
    """Remove all generations and other files, except the generations to keep."""
    for name, path in _entries(directory):
        stem = name.split(".", 1)[0]
        if not stem.isdigit() or int(stem) not in keep:
            _remove(path)


def _entries(directory: Place) -> list[tuple[str, str]]:
    if not os.path.isdir(directory):
        return []
    return [(name, os.path.join(directory, name)) for name in os.listdir(directory)]


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        import shutil  # first searches don't need it

        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
