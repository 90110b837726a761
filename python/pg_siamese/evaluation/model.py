"""An ONNX file to evaluate, the data sets that it names, and their embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pg_siamese.client.connection import CommandError
from pg_siamese.datasets import DataSplits, LabelledImages, join_labels, open_dataset, resized
from pg_siamese.evaluation.retrieval import Embedded
from pg_siamese.evaluation.runtime import open_session
from pg_siamese_server.encoding.encoder import Encoder, metadata_of
from pg_siamese_server.encoding.specification import ModelSpec
from pg_siamese_server.errors import ModelError

# Images that are resized and embedded in one go: 150 MB at 224 pixels.
BATCH_IMAGES = 1024
# Data sets whose images are of any size.
FILE_KINDS = ("folder", "zip", "collection", "imagenette", "clinical")

Advance = Callable[[int], object]


@dataclass(frozen=True)
class EvaluatedModel:
    """An encoder, opened, with what it says of itself (see ``metadata`` in its file)."""

    path: Path
    metadata: dict[str, Any]
    spec: ModelSpec
    encoder: Encoder

    @property
    def metric(self) -> str:
        """How distances are measured: ``cosine`` or ``l2``."""
        return self.spec.metric

    @property
    def labels(self) -> str:
        """What makes two images match: the same ``class`` of the same set, or the same ``set``."""
        return str(self.metadata.get("labels", "class"))

    @property
    def seed(self) -> int:
        """The seed that it was trained with. Data without splits was split by it."""
        return int(self.metadata.get("training", {}).get("seed") or 0)

    @property
    def experiment(self) -> str:
        """The name of the experiment that it is a result of."""
        training = self.metadata.get("training", {})
        return str(training.get("experiment") or self.metadata.get("name") or self.path.stem)


def open_model(path: Path, threads: int = 1) -> EvaluatedModel:
    """Open an ONNX file of this project.

    Raises:
        CommandError: it is none. The message names the file.
    """
    onnx = path.read_bytes()
    try:
        session = open_session(onnx)
    except Exception as error:  # ONNX Runtime has no common base for its errors
        reason = str(error).splitlines()[0][:200]
        raise CommandError(f"{path}: not a model that ONNX Runtime opens: {reason}") from None
    try:
        metadata = metadata_of(session.get_modelmeta().custom_metadata_map)
        if "input" not in metadata:
            raise CommandError(
                f'{path}: no metadata "pg_siamese" that says what its input is: only encoders '
                "written by pg_siamese can be evaluated"
            )
        spec = ModelSpec.from_json(metadata)
        encoder = Encoder(onnx, spec, threads)
    except ModelError as error:
        raise CommandError(f"{path}: {error}") from None
    except (TypeError, AttributeError, KeyError) as error:
        raise CommandError(f"{path}: its metadata is damaged: {error}") from None
    return EvaluatedModel(path, metadata, spec, encoder)


def data_specs(model: EvaluatedModel) -> list[str]:
    """Return the data sets that the model was trained on.

    Raises:
        CommandError: the model names none.
    """
    items = model.metadata.get("training", {}).get("data", [])
    specs = list(dict.fromkeys(str(item["spec"]) for item in items if "spec" in item))
    if not specs:
        raise CommandError(f"{model.path}: names no data set: say which with --data SPEC")
    return specs


def open_data(
    model: EvaluatedModel, specs: Sequence[str], split: str, known: Sequence[DataSplits] = ()
) -> list[DataSplits]:
    """Open data sets as the model was trained on them, by its seed and its input's size.

    ``known`` are those that were opened for another seed. They are taken again, unless they were
    drawn by it.

    Raises:
        CommandError: a split is empty, or two sets have one name.
        DataNotFoundError: as in ``open_dataset``.
        DataFormatError: as in ``open_dataset``.
    """
    found = []
    again = {data.spec: data for data in known if not data.drawn}
    for spec in specs:
        if spec in again:
            found.append(again[spec])
            continue
        # Arrays keep their size until they are embedded, batch by batch.
        size = model.spec.input if spec.partition(":")[0] in FILE_KINDS else None
        found.append(open_dataset(spec, seed=model.seed, input_spec=size))
    names = [data.name for data in found]
    for data in found:
        if names.count(data.name) > 1:
            raise CommandError(f'two data sets are called "{data.name}"')
        for part in dict.fromkeys(("train", "val", split)):
            if not len(getattr(data, part)):
                raise CommandError(f'data set "{data.name}" has no images in its {part} split')
    return found


def model_pixels(images: LabelledImages, spec: ModelSpec) -> npt.NDArray[np.uint8]:
    """Return the images as the server would give them to the encoder: uint8 (N, H, W, C).

    Raises:
        DataFormatError: an image is over the model's limits.
    """
    size = (spec.input.height, spec.input.width)
    if images.images.shape[1:3] == size and spec.input.channels == 3:
        return images.rgb()
    return resized(images.images, spec.input, f"{images.name} ({images.split})")


def embed_images(
    model: EvaluatedModel, images: LabelledImages, advance: Advance = lambda count: None
) -> npt.NDArray[np.float32]:
    """Embed images in their order: float32 (N, d).

    ``advance`` is called with numbers of images.
    """
    parts = []
    for start in range(0, len(images), BATCH_IMAGES):
        part = images.select(slice(start, start + BATCH_IMAGES))
        pixels = model_pixels(part, model.spec)
        step = max(1, len(pixels) // 8)
        for at in range(0, len(pixels), step):
            try:
                parts.append(model.encoder.embed(pixels[at : at + step]))
            except ModelError as error:
                raise CommandError(f"{model.path}: {error}") from None
            advance(len(pixels[at : at + step]))
    return np.concatenate(parts)


def embed_joined(
    model: EvaluatedModel, parts: Sequence[LabelledImages], advance: Advance = lambda count: None
) -> Embedded:
    """Embed one split of several data sets in a row.

    Labels are "which class of which set". Sets of the same images are embedded once.
    """
    found: list[npt.NDArray[np.float32]] = []
    for part in parts:
        same = [
            vectors
            for vectors, other in zip(found, parts, strict=False)
            if np.array_equal(other.images, part.images)
        ]
        found.append(same[0] if same else embed_images(model, part, advance))
        advance(len(part) if same else 0)
    vectors = np.concatenate(found)
    joined = join_labels(parts)
    return Embedded(vectors, joined.labels, joined.sets, joined.groups)
