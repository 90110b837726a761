"""What an exported model says of itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from pg_siamese.evaluation.figures import draw_pairs
from pg_siamese.evaluation.pairs import calibrate
from pg_siamese.evaluation.retrieval import Embedded
from pg_siamese.training import export, loop, metadata
from pg_siamese.training.data import JoinedImages
from pg_siamese.training.learner import load_learner


def test_stated_figures_are_those_of_the_file(trained: tuple[Path, loop.Trained]) -> None:
    """Also where its weights are rounded, which moves distances."""
    path, result = trained
    learner = load_learner(path.parent / "run" / "last.ckpt")
    learner.experiment = result.experiment.changed(weights="float16")
    halved = loop.finish(learner, result.splits, command="", test=False)
    val = JoinedImages([each.val for each in result.splits])
    labels, sets = val.labels.numpy(), val.sets.numpy()
    for each in (result, halved):
        vectors = export.embed_onnx(each.model.SerializeToString(), val.pixels.numpy())
        pairs = draw_pairs(Embedded(vectors, labels, sets), "class", "cosine", 0)
        found = calibrate(*pairs)
        assert each.metadata["calibration"] == {"weight": found.weight, "bias": found.bias}
    assert result.metadata["calibration"] != halved.metadata["calibration"]


def test_embeddings_keep_their_groups(trained: tuple[Path, loop.Trained]) -> None:
    """So that stated figures are of pairs in two groups."""
    result = trained[1]
    part = result.splits[0].val
    groups = np.array([f"patient {place // 2}" for place in range(len(part))])
    joined = JoinedImages([replace(part, groups=groups)])
    embedded = metadata.embed_joined(result.model.SerializeToString(), joined)
    assert embedded.groups is not None and joined.groups is not None
    assert embedded.groups.tolist() == joined.groups.tolist()
    assert embedded.of_set(0).groups is not None


def test_it_learned(trained: tuple[Path, loop.Trained]) -> None:
    metrics = trained[1].metadata["training"]["metrics"]
    assert metrics["test"]["retrieval"]["grey"]["map5"] > 90
    assert metrics["test"]["retrieval"]["colour"]["map5"] > 90
    assert metrics["test"]["pairs"]["accuracy"] > 0.75


def test_metadata_says_how_it_was_made(
    trained: tuple[Path, loop.Trained], data: tuple[str, ...]
) -> None:
    metadata = trained[1].metadata
    training = metadata["training"]
    assert (metadata["labels"], metadata["metric"]) == ("class", "cosine")
    assert (training["experiment"], training["seed"]) == ("tiny", 0)
    assert [item["spec"] for item in training["data"]] == list(data)
    assert [item["file"] for item in training["data"]] == ["grey.npz", "colour.npz"]
    assert training["objective"] == "cosface"
