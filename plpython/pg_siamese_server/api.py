"""Entry points: what the bodies of the extension's PL/Python functions call.

Each reports the package's own errors the way PostgreSQL does, and ends with a look at interrupts,
so that a late cancel hits this statement and not the next one of the session.
"""

from __future__ import annotations

import functools
import os
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

# Before NumPy, FAISS and ONNX Runtime are imported: a backend is one process among many, and
# threads of its own are started for index builds only.
for _name, _value in (
    ("OMP_NUM_THREADS", "1"),
    ("OPENBLAS_NUM_THREADS", "1"),
    (
        "OMP_WAIT_POLICY",
        "PASSIVE",
    ),  # waiting threads must not take the processor from other backends
):
    os.environ.setdefault(_name, _value)

from pg_siamese_server import interrupts  # noqa: E402 -- after the environment
from pg_siamese_server.catalog import load_json, model_id_by_name, prepare  # noqa: E402
from pg_siamese_server.errors import (  # noqa: E402
    OBJECT_NOT_IN_PREREQUISITE_STATE,
    UNDEFINED_COLUMN,
    SiameseError,
    file_error,
    package_error,
)

# Their threads inherit the mask; PostgreSQL's signal handlers stay in the main thread.
with interrupts.signals_blocked():
    from pg_siamese_server import search as _search

Function = TypeVar("Function", bound=Callable[..., Any])


def _entry(function: Function) -> Function:
    @functools.wraps(function)
    def call(plpy: Any, *values: Any) -> Any:
        try:
            result = function(plpy, *values)
        except SiameseError as error:
            interrupts.check(plpy)
            _report(plpy, error)
        except plpy.spiexceptions.UndefinedColumn as error:
            _report(
                plpy,
                SiameseError(
                    str(error),
                    sqlstate=UNDEFINED_COLUMN,
                    detail="A collection names the columns of its table as they were when it was"
                    " created.",
                    hint="If a column was renamed: give it its old name back, or drop the"
                    " collection and create it again.",
                ),
            )
        except OSError as error:
            interrupts.check(plpy)
            _report(plpy, file_error(error))
        except ImportError as error:
            interrupts.check(plpy)
            _report(plpy, package_error(error))
        interrupts.check(plpy)
        return result

    return call  # type: ignore[return-value]


def _report(plpy: Any, error: SiameseError) -> None:
    more = {"detail": error.detail, "hint": error.hint}
    given = {name: value for name, value in more.items() if value}
    plpy.error(error.message, sqlstate=error.sqlstate, **given)


@_entry
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
) -> int:
    """Body of ``register_model``."""
    from pg_siamese_server import models

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
        "mean": _singles(mean),
        "std": _singles(std),
        "metric": metric,
        "calibration": load_json(calibration),
        "threshold": _single(threshold),
    }
    merged: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    merged["input"] = {key: value for key, value in size.items() if value is not None}
    with interrupts.signals_blocked():
        import onnx as _  # noqa: F401 -- its libraries may start threads
    return models.register(plpy, name, onnx, merged)


def _single(value: Any) -> Any:
    """Round to single precision: encoders count in it, and versions before 0.3.0 stored it."""
    return struct.unpack("f", struct.pack("f", value))[0] if isinstance(value, float) else value


def _singles(values: list[Any] | None) -> list[Any] | None:
    return None if values is None else [_single(value) for value in values]


@_entry
def on_change(plpy: Any, event: str, collection_id: int) -> None:
    """Body of the statement triggers."""
    from pg_siamese_server import changes

    changes.on_change(plpy, event, collection_id)


@_entry
def backfill(plpy: Any, collection: str | None, max_rows: int | None) -> int:
    """Body of ``backfill``."""
    from pg_siamese_server import changes

    return changes.backfill(plpy, collection, max_rows)


@_entry
def embed_pending(plpy: Any, collection: str | None, max_rows: int | None) -> int:
    """Body of ``embed_pending``."""
    from pg_siamese_server import deferred

    return deferred.embed_pending(plpy, collection, max_rows)


@_entry
def build_index(
    plpy: Any,
    collection: str | None,
    m: int,
    ef_construction: int,
    target_recall: float,
    threads: int | None,
) -> int:
    """Body of ``build_index``."""
    with interrupts.signals_blocked():
        from pg_siamese_server import build

    return build.build_index(plpy, collection, m, ef_construction, target_recall, threads)


@_entry
def rebuild_file(plpy: Any, collection: str | None) -> int | None:
    """Body of ``rebuild_file``."""
    with interrupts.signals_blocked():
        from pg_siamese_server import rebuild

    return rebuild.rebuild_file(plpy, collection)


@_entry
def similar_images(
    plpy: Any,
    image: bytes | None,
    image_id: int | None,
    k: int | None,
    collection: str | None,
    filter_: str | None,
    candidates: list[int] | None,
    max_distance: float | None,
    engine: str | None,
    by_key: bool,
) -> list[tuple[int, int, str, str | None]]:
    """Body of both forms of ``similar_images``."""
    if by_key and image_id is None:
        raise SiameseError("image_id is null", sqlstate="22004")
    request = _search.Request(
        collection, image, image_id, k, filter_, candidates, max_distance, engine, integer_keys=True
    )
    return _ranked(plpy, _search.search(plpy, request))


@_entry
def similar_keys(
    plpy: Any,
    image: bytes | None,
    k: int | None,
    collection: str | None,
    filter_: str | None,
    candidates: list[str] | None,
    max_distance: float | None,
    engine: str | None,
) -> list[tuple[int, Any, str, str | None]]:
    """Body of ``_similar_keys``, which ``similar_rows`` uses."""
    request = _search.Request(collection, image, None, k, filter_, candidates, max_distance, engine)
    return _ranked(plpy, _search.search(plpy, request))


def _ranked(plpy: Any, answer: Any) -> list[tuple[int, Any, str, str | None]]:
    from pg_siamese_server import models

    spec = models.spec(plpy, answer.collection.model_id)
    # The rows found are not checked: of those nearest to an image inside, one in 10,000 is
    # outside and claimed to match (medical encoder, a quarter of the rows of other kinds).
    is_known = answer.query is None or spec.is_inside(answer.query)[0]
    match = spec.match_probability if is_known else _no_probability
    # Reals as text: PL/Python would write all 17 digits of a float, and PostgreSQL read them.
    return [
        (rank, key, f"{distance:.9g}", None if chance is None else f"{chance:.9g}")
        for rank, (key, distance, chance) in enumerate(
            zip(
                answer.keys,
                answer.distances,
                map(match, answer.distances),
                strict=True,
            ),
            start=1,
        )
    ]


def _no_probability(distance: float) -> None:
    return None


@_entry
def estimate(plpy: Any) -> str | None:
    """Body of ``_estimate``."""
    from pg_siamese_server import exact

    return exact.explain_asked()


@_entry
def classify_image(
    plpy: Any, image: bytes | None, k: int | None, collection: str | None, label_column: str | None
) -> list[tuple[str | None, int, float]]:
    """Body of ``classify_image``."""
    from pg_siamese_server import filters

    request = _search.Request(collection, image, None, k, None, None, None, "auto")
    answer = _search.search(plpy, request)
    found = answer.collection
    if label_column is None:
        raise SiameseError("label_column is null", sqlstate="22004")
    column = filters.columns(plpy, found, [label_column])[label_column]["quoted"]
    plan = prepare(
        plpy,
        f"SELECT b.{found.key_column}::text AS key, b.{column}::text AS label"
        f" FROM {found.relation} AS b WHERE b.{found.key_column} = ANY($1)",
        (found.key_array,),
    )
    labels = {row["key"]: row["label"] for row in plan.execute([answer.keys])}
    # In the order of nearness, so that of equal votes the nearer label comes first.
    votes = Counter(labels[str(key)] for key in answer.keys if str(key) in labels)
    total = votes.total()
    return [(label, count, count / total) for label, count in votes.most_common()]


@_entry
def embed_image(plpy: Any, image: bytes | None, model: str | None) -> str:
    """Body of ``embed_image``."""
    from pg_siamese_server import models, vectors

    return vectors.to_text(models.embed(plpy, model_id_by_name(plpy, model), [image])[0])


def _embedded(plpy: Any, model_id: int, images: list[bytes | None]) -> Any:
    """Return the images' prepared vectors, (images, dimension)."""
    from pg_siamese_server import models, vectors

    metric = models.spec(plpy, model_id).metric
    return vectors.prepare(models.embed(plpy, model_id, images), metric)


def _distances(plpy: Any, model_id: int, prepared: Any) -> list[float]:
    """Return the distances of all pairs of images, in the order of itertools.combinations."""
    import itertools

    from pg_siamese_server import models, vectors

    metric = models.spec(plpy, model_id).metric
    return [
        float(
            vectors.distances(
                vectors.squared_distances(prepared[i : i + 1], prepared[j : j + 1]), metric
            )[0]
        )
        for i, j in itertools.combinations(range(len(prepared)), 2)
    ]


@_entry
def image_distance(plpy: Any, a: bytes | None, b: bytes | None, model: str | None) -> float:
    """Body of ``image_distance``."""
    model_id = model_id_by_name(plpy, model)
    return _distances(plpy, model_id, _embedded(plpy, model_id, [a, b]))[0]


@_entry
def same_class(plpy: Any, a: bytes | None, b: bytes | None, model: str | None) -> float | None:
    """Body of ``same_class``."""
    from pg_siamese_server import models

    model_id = model_id_by_name(plpy, model)
    spec = models.spec(plpy, model_id)
    prepared = _embedded(plpy, model_id, [a, b])
    probability = spec.match_probability(_distances(plpy, model_id, prepared)[0])
    if probability is None:
        raise SiameseError(
            "model has no Siamese head",
            sqlstate=OBJECT_NOT_IN_PREREQUISITE_STATE,
            detail="It carries no calibration from distance to probability.",
            hint="Register it with calibration, or use image_distance.",
        )
    return probability if spec.is_inside(prepared).all() else None


@_entry
def any_two_match(plpy: Any, images: list[bytes | None] | None) -> bool | None:
    """Body of ``any_two_match``."""
    from pg_siamese_server import models

    if images is None or len(images) < 2:
        raise SiameseError("any_two_match needs at least two images")
    if len(images) > MAX_IMAGES:
        raise SiameseError(f"any_two_match takes at most {MAX_IMAGES} images", sqlstate="54000")
    model_id = model_id_by_name(plpy, None)
    spec = models.spec(plpy, model_id)
    if spec.threshold is None:
        raise SiameseError(
            "model has no decision threshold",
            sqlstate=OBJECT_NOT_IN_PREREQUISITE_STATE,
            hint="Register it with a threshold.",
        )
    prepared = _embedded(plpy, model_id, images)
    distances = _distances(plpy, model_id, prepared[spec.is_inside(prepared)])
    # As bool_or does: of a pair with an image that the encoder doesn't know, nothing is known.
    return min(distances) <= spec.threshold if distances else None


MAX_IMAGES = 100


@_entry
def warm_up(plpy: Any, collection: str | None) -> list[tuple[str, str]]:
    """Body of ``warm_up``."""
    return _search.warm_up(plpy, collection)


@_entry
def generation_file(plpy: Any, collection_id: int | None, generation: int | None) -> str | None:
    """Body of ``_generation_file``."""
    from pg_siamese_server import status

    return status.generation_file(plpy, collection_id, generation)


@_entry
def self_check(plpy: Any) -> list[tuple[str, bool, str]]:
    """Body of ``self_check``."""
    from pg_siamese_server import status

    return status.self_check(plpy)
