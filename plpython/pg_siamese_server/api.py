"""Entry points that the bodies of the extension's PL/Python functions call.

Each reports the package's own errors as PostgreSQL does, and ends with a look at interrupts. So a
late cancel hits this statement and not the session's next one.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

# Before NumPy, FAISS and ONNX Runtime are imported. A backend is one process among many, so only
# index builds start threads, and batches of searches that ask for them.
for _name, _value in (
    ("OMP_NUM_THREADS", "1"),
    ("OPENBLAS_NUM_THREADS", "1"),
    ("OMP_WAIT_POLICY", "PASSIVE"),  # waiting threads leave the processor to other backends
):
    os.environ.setdefault(_name, _value)

from pg_siamese_server import interrupts  # noqa: E402 -- after the environment
from pg_siamese_server.catalog import (  # noqa: E402
    Collection,
    collection_by_name,
    group_column,
    load_json,
    model_id_by_name,
    near_collection_hint,
    prepare,
)
from pg_siamese_server.errors import (  # noqa: E402
    CANCELLED,
    NULL_VALUE_NOT_ALLOWED,
    OBJECT_NOT_IN_PREREQUISITE_STATE,
    PROGRAM_LIMIT_EXCEEDED,
    UNDEFINED_COLUMN,
    SiameseError,
    file_error,
    package_error,
)
from pg_siamese_server.limits import Limits  # noqa: E402

# Their threads inherit the mask. PostgreSQL's signal handlers stay in the main thread.
with interrupts.signals_blocked():
    from pg_siamese_server.search import search as _search
    from pg_siamese_server.search.request import Answer, Examples, Request

if TYPE_CHECKING:  # few searches have one
    from pg_siamese_server.encoding.regions import Region

# The largest real, the type of distances.
MAX_REAL = 3.4028234663852886e38
# What stands for the collection's group column, as the name of a column.
OWN_COLUMN = "-"
# The box that is the whole image, as PostgreSQL writes it.
WHOLE = "(1,1),(0,0)"
# The largest bigint, which in SQL stands for no limit.
ALL_ROWS = 2**63 - 1


def _failure(plpy: Any, error: Exception) -> SiameseError:
    """Return the error to report. Raise ``error`` itself if PostgreSQL is to handle it."""
    if isinstance(error, SiameseError):
        return error
    if isinstance(error, OSError):
        return file_error(error)
    if isinstance(error, ImportError):
        return package_error(error)
    if not isinstance(error, plpy.SPIError) or error.sqlstate in CANCELLED:
        raise error
    if isinstance(error, plpy.spiexceptions.UndefinedColumn):
        return SiameseError(
            str(error),
            sqlstate=UNDEFINED_COLUMN,
            detail="A collection names the columns of its table as they were when it was created.",
            hint="If a column was renamed: give it its old name back, or drop the collection and"
            " create it again.",
        )
    # The statement is one of ours, which is of no use to the caller.
    detail, hint = (getattr(error, "spidata", None) or (None, None, None))[1:3]
    return SiameseError(str(error), sqlstate=error.sqlstate, detail=detail, hint=hint)


def _entry_point(function: Callable[..., Any]) -> Callable[..., list[str | None]]:
    """Return the result of an entry point, or its error, as an array of text for PL/pgSQL.

    An error that PL/Python raises has a prefix in its message and a traceback in its CONTEXT.
    Errors are SQLSTATE, message, DETAIL and HINT. Results are NULL and the values.
    """

    @functools.wraps(function)
    def call(plpy: Any, *values: Any) -> list[str | None]:
        return _result_or_error(plpy, functools.partial(function, plpy, *values))

    return call


def _entry_point_of_parts(
    function: Callable[..., Iterator[tuple[str | None, ...]]],
) -> Callable[..., Iterator[list[str | None]]]:
    """Return the same of each part of a result, for a function that returns a set."""

    @functools.wraps(function)
    def call(plpy: Any, *values: Any) -> Iterator[list[str | None]]:
        parts = function(plpy, *values)
        step = functools.partial(next, parts, ())
        while len(part := _result_or_error(plpy, step)) > 1:
            yield part

    return call


def _result_or_error(plpy: Any, function: Callable[[], Any]) -> list[str | None]:
    jit = interrupts.stop_jit()
    try:
        result = function()
    except (SiameseError, OSError, ImportError, plpy.SPIError) as error:
        failure = _failure(plpy, error)
        interrupts.check(plpy)
        return [failure.sqlstate, failure.message, failure.detail or None, failure.hint or None]
    finally:
        interrupts.resume_jit(jit)
    interrupts.check(plpy)
    return [None, *result]


def _check_given(**values: Any) -> None:
    """Refuse arguments that are NULL, so that none widens an answer."""
    for name, value in values.items():
        if value is None:
            raise SiameseError(f"{name} is null", sqlstate=NULL_VALUE_NOT_ALLOWED)


def _array(values: Iterable[str | None]) -> str:
    """Return an array of text as PostgreSQL reads it."""
    quoted = (
        "NULL" if value is None else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        for value in values
    )
    return "{" + ",".join(quoted) + "}"


@_entry_point
def register_model(
    plpy: Any,
    name: str | None,
    onnx: bytes | None,
    image_width: int | None,
    image_height: int | None,
    mean: list[float] | None,
    std: list[float] | None,
    resize: str | None,
    interpolation: str | None,
    metric: str | None,
    calibration: str | None,
    threshold: float | None,
    max_bytes: int | None,
    max_pixels: int | None,
    input_range: list[float | None] | None,
) -> tuple[str]:
    """Body of ``register_model``."""
    from pg_siamese_server.encoding import models

    size = {
        "width": image_width,
        "height": image_height,
        "resize": resize,
        "interpolation": interpolation,
        "max_bytes": max_bytes,
        "max_pixels": max_pixels,
        "input_range": input_range,
    }
    given = {
        "mean": _to_singles(mean),
        "std": _to_singles(std),
        "metric": metric,
        "calibration": load_json(calibration),
        "threshold": _to_single(threshold),
    }
    merged: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    merged["input"] = {key: value for key, value in size.items() if value is not None}
    with interrupts.signals_blocked():
        import onnx as _  # noqa: F401 -- its libraries may start threads
    return (str(models.register(plpy, name, onnx, merged)),)


def _to_single(value: Any) -> Any:
    """Round to single precision, in which encoders calculate and old versions stored."""
    return struct.unpack("f", struct.pack("f", value))[0] if isinstance(value, float) else value


def _to_singles(values: list[Any] | None) -> list[Any] | None:
    return None if values is None else [_to_single(value) for value in values]


@_entry_point
def register_shipped_models(plpy: Any, folder: str) -> tuple[str, str, str]:
    """Body of ``register_shipped_models``."""
    with interrupts.signals_blocked():
        import onnx as _  # noqa: F401 -- its libraries may start threads
    from pg_siamese_server.encoding import shipped

    found = shipped.register_shipped_models(plpy, folder)
    return (
        _array(name for name, _, _ in found),
        _array(str(number) for _, number, _ in found),
        _array(str(is_new) for _, _, is_new in found),
    )


@functools.cache
def _triggers() -> Any:
    """Import ``triggers`` late, since searches by a stored image need no image library."""
    from pg_siamese_server.writing import triggers

    return triggers


@_entry_point
def on_change(
    plpy: Any,
    event: str,
    collection_id: int,
    relation_oid: int,
    keys: list[str] | None,
    versions: str | None,
) -> tuple[()]:
    """Body of the statement triggers."""
    _triggers().on_change(plpy, event, collection_id, relation_oid, keys or [], versions)
    return ()


@_entry_point
def backfill(plpy: Any, collection: str | None, max_rows: int | None) -> tuple[str]:
    """Body of ``backfill``."""
    _check_given(collection=collection, max_rows=max_rows)
    limit = None if max_rows == ALL_ROWS else max_rows
    return (str(_triggers().backfill(plpy, collection, limit)),)


@_entry_point
def near_collection(plpy: Any, name: str) -> tuple[str]:
    """Body of ``_near_collection``."""
    return (near_collection_hint(plpy, name),)


@_entry_point
def embed_pending(plpy: Any, collection: str | None, max_rows: int | None) -> tuple[str]:
    """Body of ``embed_pending``. An empty name stands for all collections."""
    from pg_siamese_server.writing import deferred

    _check_given(collection=collection, max_rows=max_rows)
    limit = None if max_rows == ALL_ROWS else max_rows
    return (str(deferred.embed_pending(plpy, collection or None, limit)),)


@_entry_point
def build_index(
    plpy: Any,
    collection: str | None,
    m: int | None,
    ef_construction: int | None,
    target_recall: float | None,
    threads: int | None,
) -> tuple[str]:
    """Body of ``build_index``. Zero threads mean as many as the server's setting allows."""
    with interrupts.signals_blocked():
        from pg_siamese_server.index import build

    _check_given(
        collection=collection,
        m=m,
        ef_construction=ef_construction,
        target_recall=target_recall,
        threads=threads,
    )
    assert m is not None and ef_construction is not None and target_recall is not None
    return (
        str(
            build.build_index(plpy, collection, m, ef_construction, target_recall, threads or None)
        ),
    )


@_entry_point
def progress(plpy: Any, database: int) -> tuple[str]:
    """Body of ``_read_progress``."""
    from pg_siamese_server.progress import read

    return (json.dumps(read(database)),)


@_entry_point
def rebuild_file(plpy: Any, collection: str | None) -> tuple[str | None]:
    """Body of ``rebuild_file``."""
    with interrupts.signals_blocked():
        from pg_siamese_server.index import rebuild

    _check_given(collection=collection)
    number = rebuild.rebuild_file(plpy, collection)
    return (None if number is None else str(number),)


@_entry_point
def similar_images(
    plpy: Any, image: bytes | None, image_id: int | None, *arguments: Any
) -> tuple[str | None, ...]:
    """Body of ``_similar_images``."""
    request = _request(image, image_id, *arguments)
    request.integer_keys = True
    return _to_columns(_search_or_explain(plpy, request), request)


@_entry_point
def similar_keys(
    plpy: Any,
    image: bytes | None,
    key: str | None,
    k: int | None,
    collection: str | None,
    filter_: str | None,
    candidates: list[str | None] | None,
    *arguments: Any,
) -> tuple[str | None, ...]:
    """Body of ``_similar_keys``, which ``similar_rows`` uses."""
    stored, chosen = _cast_keys(plpy, collection, key, candidates)
    request = _request(image, stored, k, collection, filter_, chosen, *arguments)
    return _to_columns(_search_or_explain(plpy, request), request)


def _request(
    image: bytes | None,
    key: int | str | None,
    k: int | None,
    collection: str | None,
    filter_: str | None = "{}",
    candidates: list[Any] | None = None,
    max_distance: float | None = math.inf,
    engine: str | None = "auto",
    options: list[str | None] | None = None,
    *examples: Any,
) -> Request:
    """Return the request. Arguments have the defaults of SQL, none of which is NULL.

    ``options`` are ``exclude``, ``group_by``, ``per_group``, ``own_group``, ``query_frame`` and
    ``region`` as text, or None for their defaults. ``examples`` are as for ``_examples``.
    """
    several = _examples(*examples) if examples else None
    if several is not None:
        if image is not None or key is not None:
            raise SiameseError(
                "an image and examples are given",
                hint="Give the image as one of like_images, or its key as one of like.",
            )
    else:
        _check_one_given("image", image, key)
    if None in (k, collection, filter_, max_distance, engine):
        _check_given(
            k=k, collection=collection, filter=filter_, max_distance=max_distance, engine=engine
        )
    assert max_distance is not None
    limit = None
    if not max_distance > MAX_REAL:  # as real, which is what callers see
        limit = ctypes.c_float(max(max_distance, -MAX_REAL)).value
    request = Request(
        collection_name=collection,
        image=image,
        key=key,
        k=k,
        filter=None if filter_ == "{}" else filter_,
        candidates=None if candidates is None else _flat(candidates),
        max_distance=limit,
        engine=engine,
        examples=several,
    )
    if options is not None:
        exclude, group_by, per_group, own_group, frame, region = options
        is_own = None if own_group is None else own_group == "true"
        _set_groups(
            request, exclude, group_by, None if per_group is None else int(per_group), is_own
        )
        _check_given(query_frame=frame, region=region)
        request.frame = int(frame or 0)
        request.region = _region(str(region))
        for name, value in (("query_frame", request.frame), ("region", request.region)):
            if value and several is not None:
                raise SiameseError(
                    f"{name} and examples are given", hint="It is for searches by one image."
                )
    return request


def _flat(values: list[Any]) -> list[Any]:
    """Return the elements of an array of one or several dimensions."""
    while values and isinstance(values[0], list):
        values = [one for part in values for one in part]
    return values


def _region(text: str) -> Region | None:
    """Return the part of the image to search for, or None for all of it."""
    if text == WHOLE:
        return None
    from pg_siamese_server.encoding import regions

    return regions.parse(text)


def _examples(
    keys: list[str | None] | None,
    like_images: list[bytes | None] | None,
    unlike_images: list[bytes | None] | None,
) -> Examples | None:
    """Return the examples, or None if none are given.

    ``keys`` are ``like``, ``unlike``, ``strategy`` and ``penalty`` as text, or None if there is no
    example of any kind.
    """
    if keys is None:
        return None
    like, unlike, strategy, penalty = keys
    _check_given(
        like=like,
        unlike=unlike,
        like_images=like_images,
        unlike_images=unlike_images,
        strategy=strategy,
        penalty=penalty,
    )
    assert like_images is not None and unlike_images is not None
    examples = Examples(
        like=str(like),
        unlike=str(unlike),
        like_images=like_images,
        unlike_images=unlike_images,
        strategy=str(strategy),
        penalty=float(penalty or 0),
    )
    examples.check()
    return examples


def _check_one_given(name: str, image: bytes | None, key: int | str | None) -> None:
    """Refuse neither or both of an image file and the key of a stored image."""
    if image is None and key is None:
        raise SiameseError(
            f"{name} is null",
            sqlstate=NULL_VALUE_NOT_ALLOWED,
            hint="Give the bytes of an image, or the key of a stored one by name.",
        )
    if image is not None and key is not None:
        raise SiameseError("an image and the key of a stored one are given", hint="Give one.")


def _set_groups(
    request: Request,
    exclude: str | None,
    group_by: str | None,
    per_group: int | None,
    own_group: bool | None,
) -> None:
    _check_given(exclude=exclude, group_by=group_by, per_group=per_group, own_group=own_group)
    assert group_by is not None and per_group is not None
    request.exclude = None if exclude == "{}" else exclude
    request.group_by, request.per_group = group_by, per_group
    request.own_group = bool(own_group)


def _cast_keys(
    plpy: Any, collection: str | None, key: str | None, candidates: list[str | None] | None
) -> tuple[int | str | None, list[Any] | None]:
    """Convert a key and a list of keys from text to the collection's type."""
    if key is None and candidates is None:
        return None, None
    found = collection_by_name(plpy, collection)
    stored: int | str | None = key
    if key is not None:
        # As PostgreSQL writes it, since a uuid may have capitals.
        cast = prepare(plpy, f"SELECT CAST($1 AS {found.key_type})::text AS key", ("text",))
        stored = cast.execute([key])[0]["key"]
    if not found.has_integer_keys:
        return stored, candidates
    chosen = candidates
    if candidates is not None:
        cast = prepare(plpy, "SELECT $1::bigint[] AS keys", ("text[]",))
        chosen = cast.execute([candidates])[0]["keys"]
    return None if stored is None else int(stored), chosen


def _search_or_explain(plpy: Any, request: Request) -> Answer:
    """Search. If a column is gone, or its type refuses a value, raise an error that names it."""
    with _explained_search(plpy, request):
        return _search.search(plpy, request)


@_entry_point_of_parts
def nearest(
    plpy: Any,
    keys: str | None,
    k: int | None,
    collection: str | None,
    filter_: str | None,
    max_distance: float | None,
    engine: str | None,
    exclude: str | None,
    group_by: str | None,
    per_group: int | None,
    own_group: bool | None,
    threads: int | None,
) -> Iterator[tuple[str | None, ...]]:
    """Body of ``_nearest``: portions of the answer, a column as an array of text each."""
    from pg_siamese_server.search import nearest as many

    every_key = 0  # stands for each of the keys
    request = _request(None, every_key, k, collection, filter_, None, max_distance, engine)
    _set_groups(request, exclude, group_by, per_group, own_group)
    _check_given(threads=threads)
    with _explained_search(plpy, request):
        for part in many.nearest(plpy, request, keys, threads or 0):
            yield (
                _keys(part.collection, part.keys),
                _integers(part.ranks),
                _keys(part.collection, part.neighbours),
                _reals(part.distances),
                None if part.frames is None else _integers(part.frames),
            )


# Pairs in one array.
MAX_PAIRS = 20_000


@_entry_point_of_parts
def similar_pairs(
    plpy: Any,
    collection: str | None,
    max_distance: float | None,
    filter_: str | None,
    engine: str | None,
    exclude: str | None,
    group_by: str | None,
    own_group: bool | None,
    threads: int | None,
) -> Iterator[tuple[str | None, ...]]:
    """Body of ``_similar_pairs``: portions of the answer, a column as an array of text each."""
    from pg_siamese_server.search import pairs

    request = _pair_request(collection, max_distance, filter_, engine, exclude, group_by, own_group)
    _check_given(threads=threads)
    with _explained_search(plpy, request):
        search = pairs.open_search(plpy, request, threads or 0)
        for found in search.find():
            for start in range(0, len(found.first), MAX_PAIRS):
                part = found.part(start, start + MAX_PAIRS)
                first, second = pairs.in_order(search, part)
                yield (
                    _keys(search.collection, first),
                    _keys(search.collection, second),
                    _reals(part.distances.tolist()),
                )


@_entry_point_of_parts
def near_duplicates(
    plpy: Any,
    collection: str | None,
    max_distance: float | None,
    max_difference: float | None,
    mirrored: bool | None,
    filter_: str | None,
    exclude: str | None,
    engine: str | None,
    threads: int | None,
) -> Iterator[tuple[str | None, ...]]:
    """Body of ``_near_duplicates``: portions of the answer, a column as an array of text each."""
    from pg_siamese_server.search import duplicates

    request = _pair_request(collection, max_distance, filter_, engine, exclude)
    _check_given(max_difference=max_difference, mirrored=mirrored, threads=threads)
    assert max_difference is not None
    with _explained_search(plpy, request):
        found, parts = duplicates.near_duplicates(
            plpy, request, max_difference, bool(mirrored), threads or 0
        )
        for part in parts:
            yield (
                _integers([row.group for row in part]),
                _keys(found, [row.key for row in part]),
                _keys(found, [row.representative for row in part]),
                _reals([row.likeness.difference for row in part]),
                _reals([row.distance for row in part]),
                _array(str(row.likeness.is_mirrored) for row in part),
            )


@_entry_point_of_parts
def leaks(
    plpy: Any,
    collection: str | None,
    split_column: str | None,
    group_column_: str | None,
    max_distance: float | None,
    max_difference: float | None,
    filter_: str | None,
    exclude: str | None,
    engine: str | None,
    threads: int | None,
) -> Iterator[tuple[str | None, ...]]:
    """Body of ``_leaks``: portions of the answer, a column as an array of text each.

    ``-`` as ``group_column`` stands for the collection's own, if it has one.
    """
    from pg_siamese_server.search import duplicates

    request = _pair_request(collection, max_distance, filter_, engine, exclude)
    _check_given(
        split_column=split_column,
        group_column=group_column_,
        max_difference=max_difference,
        threads=threads,
    )
    assert split_column is not None and group_column_ is not None and max_difference is not None
    if group_column_ == OWN_COLUMN:
        group_column_ = group_column(plpy, collection) or ""
    with _explained_search(plpy, request):
        found, parts = duplicates.leaks(
            plpy, request, split_column, group_column_, max_difference, threads or 0
        )
        for part in parts:
            yield (
                _array(row.kind for row in part),
                _keys(found, [row.a for row in part]),
                _array(row.split_a for row in part),
                _keys(found, [row.b for row in part]),
                _array(row.split_b for row in part),
                _array(row.label for row in part),
                _array(_number(row.difference) for row in part),
            )


def _pair_request(
    collection: str | None,
    max_distance: float | None,
    filter_: str | None,
    engine: str | None,
    exclude: str | None,
    group_by: str | None = "",
    own_group: bool | None = True,
) -> Request:
    """Return the request of a search for pairs."""
    every_key = 0  # stands for each of the keys
    request = _request(None, every_key, 1, collection, filter_, None, max_distance, engine)
    request.key = None
    _set_groups(request, exclude, group_by, 1, own_group)
    return request


@contextmanager
def _explained(plpy: Any, collection: str | None, texts: Iterable[str | None]) -> Iterator[None]:
    """Raise an error that names column and value, if a filter is to blame."""
    try:
        yield
    except plpy.SPIError as error:
        _blame(plpy, error, collection, texts)
        raise


@contextmanager
def _explained_search(plpy: Any, request: Request) -> Iterator[None]:
    """Raise an error that names column and value, if filters or groups of a search are to blame."""
    try:
        yield
    except plpy.SPIError as error:
        # Read only now: a search sets the collection's own group column.
        texts = request.filter, request.exclude
        _blame(plpy, error, request.collection_name, texts, request.group_by)
        raise


def _blame(
    plpy: Any, error: Any, collection: str | None, texts: Iterable[str | None], group_by: str = ""
) -> None:
    """Raise an error that names the column to blame for a failed statement, if there is one."""
    given = [text for text in texts if text is not None]
    if error.sqlstate in CANCELLED or not (given or group_by):
        return
    from pg_siamese_server.search import filters

    found = collection_by_name(plpy, collection)
    for text in given:
        filters.explain(plpy, found, text)
    if group_by:
        filters.columns(plpy, found, [group_by])


def _to_columns(answer: Answer, request: Request) -> tuple[str | None, ...]:
    """Return keys and distances as arrays, the arguments of ``match_line``, and frames, as text.

    PL/Python would write all 17 digits of each float, and make each row separately.
    """
    distances = _reals(answer.distances)
    keys = _keys(answer.collection, answer.keys)
    query = "" if answer.query is None else answer.query.tobytes().hex()
    frames = None if answer.frames is None else _integers(answer.frames)
    # The calibration is of distances between two images.
    model_id = None if request.examples is not None else str(answer.collection.model_id)
    return keys, distances, model_id, query, frames


def _keys(collection: Collection, keys: list[Any]) -> str:
    """Return an array of keys as PostgreSQL reads it."""
    return _integers(keys) if collection.has_integer_keys else _array(keys)


def _integers(values: list[int]) -> str:
    """Return an array of integers as PostgreSQL reads it."""
    return "{" + str(values)[1:-1] + "}"


def match_line(plpy: Any, model_id: str | None, query: str | None) -> tuple[float, float] | None:
    """Body of ``_match_line``: weight and bias of matches, for SQL to compute probabilities.

    It is a separate call, since it takes as long as a part of a search. Not all need it.

    Args:
        plpy: PL/Python's module.
        model_id: of the collection's model, or None.
        query: float32 numbers of the prepared query, in hexadecimal. Empty if the model has no
            domain to check.
    """
    if model_id is None or query is None:
        return None
    import numpy as np

    from pg_siamese_server.encoding import models

    spec = models.spec(plpy, int(model_id))
    if spec.weight is None or spec.bias is None:
        return None
    # The rows found are not checked. Of those nearest to an image inside, one in 10,000 is outside
    # and claimed to match. That is for the medical encoder, with a quarter of rows of other kinds.
    if query and not spec.is_inside(np.frombuffer(bytes.fromhex(query), np.float32)):
        return None
    return spec.weight, spec.bias


def _reals(values: list[float]) -> str:
    """Return an array of reals as PostgreSQL reads it. Nine digits keep each exactly."""
    return _reals_template(len(values)) % tuple(values)


@functools.lru_cache(maxsize=64)
def _reals_template(count: int) -> str:
    return "{" + ",".join(["%.9g"] * count) + "}"


def estimate(plpy: Any) -> str | None:
    """Body of ``_estimate``, which a search calls."""
    from pg_siamese_server.search import exact

    return exact.explain_asked(plpy)


@_entry_point
def classify_image(
    plpy: Any,
    image: bytes | None,
    key: str | None,
    k: int | None,
    collection: str | None,
    label_column: str | None,
    filter_: str | None,
    exclude: str | None,
    group_by: str | None,
    own_group: bool | None,
) -> tuple[str, str, str]:
    """Body of ``classify_image``. Of a group, the nearest row votes.

    ``-`` as ``group_by`` stands for the collection's group column, if it has one.
    """
    _check_given(label_column=label_column)
    stored, _ = _cast_keys(plpy, collection, key, None)
    request = _request(image, stored, k, collection, filter_)
    if group_by == OWN_COLUMN or (group_by == "" and own_group is False):
        own_column = group_column(plpy, collection)
        if group_by == OWN_COLUMN:
            group_by = own_column or ""
        if own_group is False and own_column is None:
            own_group = True  # without groups, none is to be left out
    _set_groups(request, exclude, group_by, 1, own_group)
    labels = _labels(plpy, _search_or_explain(plpy, request), str(label_column))
    if None in labels:  # rows without a label have no vote
        from pg_siamese_server.search import filters

        request.filter = filters.with_value(request.filter, str(label_column))
        labels = _labels(plpy, _search.search(plpy, request), str(label_column))
    # In order of distance, so that the nearer label comes first if votes are equal.
    votes = Counter(label for label in labels if label is not None)
    total = votes.total()
    found = votes.most_common()
    return (
        _array(label for label, _ in found),
        _array(str(count) for _, count in found),
        _array(f"{count / total:.9g}" for _, count in found),
    )


def _labels(plpy: Any, answer: Answer, label_column: str) -> list[str | None]:
    """Return the labels of the rows found, in their order."""
    from pg_siamese_server.search import groups

    labels = groups.labels(plpy, answer.collection, label_column, answer.keys)
    return [labels[key] for key in answer.keys if key in labels]


@_entry_point
def explain_search(
    plpy: Any,
    image: bytes | None,
    key: str | None,
    k: int | None,
    collection: str | None,
    filter_: str | None,
    candidates: list[str | None] | None,
    *arguments: Any,
) -> tuple[str, str, str]:
    """Body of ``explain_search``: a search as that of ``similar_keys``, with notes."""
    from pg_siamese_server.search import explain
    from pg_siamese_server.search.trace import Trace

    stored, chosen = _cast_keys(plpy, collection, key, candidates)
    request = _request(image, stored, k, collection, filter_, chosen, *arguments)
    trace = request.trace = Trace()
    started = time.perf_counter()
    answer = _search_or_explain(plpy, request)
    facts = explain.facts(plpy, trace, answer, time.perf_counter() - started)
    return (
        _array(name for name, _, _ in facts),
        _array(value for _, value, _ in facts),
        _array(detail for _, _, detail in facts),
    )


@_entry_point
def measure_recall(
    plpy: Any,
    collection: str | None,
    queries: int | None,
    k: int | None,
    filter_: str | None,
    seed: int | None,
) -> tuple[str | None, ...]:
    """Body of ``measure_recall``."""
    _check_given(collection=collection, queries=queries, k=k, filter=filter_, seed=seed)
    assert queries is not None and k is not None and seed is not None
    from pg_siamese_server.search import measures

    with _explained(plpy, collection, [filter_]):
        measured = measures.measure_recall(plpy, collection, queries, k, filter_, seed)
    return tuple(map(_number, measured))


@_entry_point
def retrieval_quality(
    plpy: Any,
    collection: str | None,
    label_column: str | None,
    queries: str | None,
    gallery: str | None,
    sample: int | None,
    seed: int | None,
    own_group: bool | None,
) -> tuple[str | None, ...]:
    """Body of ``retrieval_quality``."""
    _check_given(
        collection=collection,
        label_column=label_column,
        queries=queries,
        gallery=gallery,
        sample=sample,
        seed=seed,
        own_group=own_group,
    )
    assert sample is not None and seed is not None
    from pg_siamese_server.search import measures

    with _explained(plpy, collection, [queries, gallery]):
        count, figures = measures.retrieval_quality(
            plpy, collection, str(label_column), queries, gallery, sample, seed, bool(own_group)
        )
    return tuple(map(_number, (count, *figures.values())))


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.9g}"


@_entry_point
def similarity_map(
    plpy: Any,
    image: bytes | None,
    neighbour: bytes | None,
    collection: str | None,
    key: str | None,
    neighbour_key: str | None,
    model: str | None,
    frame: int | None,
    neighbour_frame: int | None,
    masks: int | None,
    side: int | None,
    legend: bool | None,
) -> tuple[str]:
    """Body of ``_similarity_map``. Without a model, images are compared by the collection's."""
    from pg_siamese_server.search import similarity_map as maps

    _check_given(
        collection=collection,
        model=model,
        query_frame=frame,
        neighbour_frame=neighbour_frame,
        masks=masks,
        side=side,
        legend=legend,
    )
    assert frame is not None and neighbour_frame is not None
    assert masks is not None and side is not None
    _check_one_given("image", image, key)
    _check_one_given("neighbour", neighbour, neighbour_key)
    found = None
    if not model or key is not None or neighbour_key is not None:
        found = collection_by_name(plpy, collection)
    stored, _ = _cast_keys(plpy, collection, key, None)
    stored_neighbour, _ = _cast_keys(plpy, collection, neighbour_key, None)
    png = maps.similarity_map(
        plpy,
        maps.Picture(image, stored, frame),
        maps.Picture(neighbour, stored_neighbour, neighbour_frame),
        found,
        model_id_by_name(plpy, model) if model or found is None else found.model_id,
        masks,
        side,
        bool(legend),
    )
    return (png.hex(),)


@_entry_point
def thumbnail(
    plpy: Any,
    image: bytes | None,
    size: int | None,
    dicom_window: str | None,
    frame: int | None,
    collection: str | None,
) -> tuple[str | None]:
    """Body of ``_thumbnail``. Without a collection, the limits are those of models by default."""
    from pg_siamese_server.encoding import drawing, models
    from pg_siamese_server.encoding.specification import InputSpec

    window = Limits(dicom_window=_window(dicom_window))
    _check_given(size=size, frame=frame, collection=collection)
    assert size is not None and frame is not None
    drawing.check_side(size)
    spec = InputSpec(size, size)
    if collection:
        found = collection_by_name(plpy, collection)
        spec = models.spec(plpy, found.model_id).input.within(found.limits)
    if image is None:
        return (None,)
    poll = functools.partial(interrupts.check, plpy)
    return (drawing.thumbnail(image, size, frame, spec.within(window), poll).hex(),)


@_entry_point
def contact_sheet(
    plpy: Any,
    collection: str | None,
    keys: list[str | None] | None,
    captions: list[str | None] | None,
    columns: int | None,
    size: int | None,
    frames: list[int | None] | None,
) -> tuple[str | None]:
    """Body of ``_contact_sheet``. Without keys there is none."""
    from pg_siamese_server.encoding import drawing
    from pg_siamese_server.search import contact_sheet as sheets

    _check_given(captions=captions, columns=columns, size=size, frames=frames)
    assert captions is not None and frames is not None and columns is not None and size is not None
    drawing.check_side(size)
    found = collection_by_name(plpy, collection)
    _, chosen = _cast_keys(plpy, collection, None, keys)
    if not chosen:
        return (None,)
    png = sheets.contact_sheet(
        plpy, found, _flat(chosen), _flat(captions), _flat(frames), columns, size
    )
    return (png.hex(),)


@_entry_point
def dicom_tags(
    plpy: Any, image: bytes | None, more: list[str], less: list[str]
) -> tuple[str | None]:
    """Body of ``dicom_tags``: keywords are the list's, with some more and some less."""
    if not _is_dicom(image):
        return (None,)
    from pg_siamese_server.encoding.dicom import tags

    for keyword in (*more, *less):
        tags.check_keyword(keyword)
    keywords = [name for name in dict.fromkeys((*tags.KEYWORDS, *more)) if name not in less]
    found = tags.read(image, keywords, functools.partial(interrupts.check, plpy))
    return (None if found is None else _json(found),)


@_entry_point
def dicom_tag(plpy: Any, image: bytes | None, keyword: str | None) -> tuple[str | None]:
    """Body of ``dicom_tag``: text of a single value, JSON of anything else."""
    if keyword is None or not _is_dicom(image):
        return (None,)
    from pg_siamese_server.encoding.dicom import tags

    tags.check_keyword(keyword)
    found = tags.read(image, [keyword], functools.partial(interrupts.check, plpy)) or {}
    value = found.get(keyword)
    if isinstance(value, dict) and list(value) == ["Alphabetic"]:
        value = value["Alphabetic"]
    return (value if value is None or isinstance(value, str) else _json(value),)


def _is_dicom(image: bytes | None) -> bool:
    """Tell DICOM files, for which alone pydicom is loaded."""
    from pg_siamese_server.encoding.kinds import supported

    return image is not None and supported(image) == "DICOM"


def _json(value: Any) -> str:
    """Return JSON text; jsonb has no character zero, and text none either."""
    return json.dumps(value, ensure_ascii=False).replace("\\u0000", "")


@_entry_point
def embed_image(
    plpy: Any,
    image: bytes | None,
    model: str | None,
    dicom_window: str | None,
    frame: int | None,
) -> tuple[str]:
    """Body of ``embed_image``."""
    from pg_siamese_server import vectors
    from pg_siamese_server.encoding import models

    limits = Limits(dicom_window=_window(dicom_window))
    _check_given(frame=frame)
    embedded = models.embed(plpy, _model_id(plpy, model), [image], limits, frame=frame or 0)
    return (vectors.to_text(embedded[0]),)


@_entry_point
def check_window(plpy: Any, dicom_window: str | None) -> tuple[()]:
    """Body of ``_check_window``."""
    _window(dicom_window)
    return ()


def _window(text: str | None) -> str | None:
    """Return the window to render with, or None for the file's own, which is an empty text."""
    _check_given(dicom_window=text)
    if not text:
        return None
    from pg_siamese_server.encoding import windows

    windows.parse(text)
    return text


@_entry_point
def compare_images(
    plpy: Any, function: str, images: list[bytes | None] | None, model: str | None
) -> tuple[str | None]:
    """Body of the functions that compare images, by name."""
    return (COMPARISONS[function](plpy, images or [], model),)


def _model_id(plpy: Any, model: str | None) -> int:
    _check_given(model=model)
    return model_id_by_name(plpy, model or None)


def _embed(plpy: Any, model_id: int, images: list[bytes | None]) -> Any:
    """Return the images' prepared vectors, (images, dimension)."""
    from pg_siamese_server import vectors
    from pg_siamese_server.encoding import models

    metric = models.spec(plpy, model_id).metric
    return vectors.prepare(models.embed(plpy, model_id, images), metric)


def _distances(plpy: Any, model_id: int, prepared: Any) -> list[float]:
    """Return the distances of all pairs of images, in the order of ``itertools.combinations``."""
    import itertools

    from pg_siamese_server import vectors
    from pg_siamese_server.encoding import models

    metric = models.spec(plpy, model_id).metric
    squared = [
        vectors.squared_distances(prepared[i : i + 1], prepared[j : j + 1])[0]
        for i, j in itertools.combinations(range(len(prepared)), 2)
    ]
    return vectors.to_distances([float(square) for square in squared], metric)


def _image_distance(plpy: Any, images: list[bytes | None], model: str | None) -> str:
    model_id = _model_id(plpy, model)
    return f"{_distances(plpy, model_id, _embed(plpy, model_id, images))[0]:.9g}"


def _same_class(plpy: Any, images: list[bytes | None], model: str | None) -> str | None:
    from pg_siamese_server.encoding import models

    model_id = _model_id(plpy, model)
    spec = models.spec(plpy, model_id)
    prepared = _embed(plpy, model_id, images)
    probability = spec.match_probability(_distances(plpy, model_id, prepared)[0])
    if probability is None:
        raise SiameseError(
            "model has no Siamese head",
            sqlstate=OBJECT_NOT_IN_PREREQUISITE_STATE,
            detail="It carries no calibration from distance to probability.",
            hint="Register it with calibration, or use image_distance.",
        )
    return f"{probability:.9g}" if spec.is_inside(prepared).all() else None


def _any_two_match(plpy: Any, images: list[bytes | None], model: str | None) -> str | None:
    from pg_siamese_server.encoding import models

    if len(images) < 2:
        raise SiameseError("any_two_match needs at least two images")
    if len(images) > MAX_IMAGES:
        raise SiameseError(
            f"any_two_match takes at most {MAX_IMAGES} images", sqlstate=PROGRAM_LIMIT_EXCEEDED
        )
    model_id = _model_id(plpy, model)
    spec = models.spec(plpy, model_id)
    if spec.threshold is None:
        raise SiameseError(
            "model has no decision threshold",
            sqlstate=OBJECT_NOT_IN_PREREQUISITE_STATE,
            hint="Register it with a threshold.",
        )
    prepared = _embed(plpy, model_id, images)
    distances = _distances(plpy, model_id, prepared[spec.is_inside(prepared)])
    # As bool_or does: nothing is known of a pair with an image outside the encoder's domain.
    return str(min(distances) <= spec.threshold).lower() if distances else None


MAX_IMAGES = 100
COMPARISONS: dict[str, Callable[[Any, list[bytes | None], str | None], str | None]] = {
    "image_distance": _image_distance,
    "same_class": _same_class,
    "any_two_match": _any_two_match,
}


@_entry_point
def warm_up(plpy: Any, collection: str | None) -> tuple[str, str]:
    """Body of ``warm_up``."""
    ready = _search.warm_up(plpy, collection)
    return _array(engine for engine, _ in ready), _array(detail for _, detail in ready)


@_entry_point
def generation_file(
    plpy: Any, collection_id: int | None, generation: int | None
) -> tuple[str | None]:
    """Body of ``_generation_file``."""
    from pg_siamese_server import status

    return (status.generation_file(plpy, collection_id, generation),)


@_entry_point
def self_check(plpy: Any, full: bool | None) -> tuple[str, str, str]:
    """Body of ``self_check``."""
    from pg_siamese_server import status

    lines = status.self_check(plpy, bool(full))
    return (
        _array(subject for subject, _, _ in lines),
        _array(str(ok) for _, ok, _ in lines),
        _array(detail for _, _, detail in lines),
    )
