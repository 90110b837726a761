"""A small encoder, trained once for all tests of the export and of what it states."""

# ruff: noqa: E402 - what is imported below needs what is skipped over above

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

# Without these, all files of the folder are skipped.
for package in ("torch", "lightning", "pytorch_metric_learning", "efficientnet_lite_pytorch"):
    pytest.importorskip(package)

from pg_siamese.evaluation import domain, figures
from pg_siamese.training import export, files, learner, loop
from tests.unit.training.stripes import PARTS, striped, tiny


@pytest.fixture(scope="package", autouse=True)
def _little_work() -> Iterator[None]:
    """Measure and draw less than for a model that is to be used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "PAIRS", 2000)
        patch.setattr(learner, "VALIDATED", 500)
        patch.setattr(domain, "GENERATED_IMAGES", 10)
        patch.setattr(loop, "images_per_second", partial(export.images_per_second, seconds=0.1))
        yield


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Two sets of stripes as npz files, by the texts that open them."""
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(("grey", "colour")):
        arrays: dict[str, np.ndarray] = {}
        for place, (split, count) in enumerate(PARTS):
            part = striped(name, split, count, 10 * number + place, name == "grey")
            arrays |= {f"{split}_images": part.images, f"{split}_labels": part.labels}
        np.savez(folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    return tuple(f"npz:{folder / name}.npz" for name in ("grey", "colour"))


@pytest.fixture(scope="package")
def trained(
    tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]
) -> tuple[Path, loop.Trained]:
    folder = tmp_path_factory.mktemp("tiny")
    command = "pg_siamese train tiny"
    result = loop.fit(tiny(data=data), command=command, folder=folder / "run", threads=1)
    files.write_model(result.model, folder / "tiny.onnx", result.metadata)
    return folder / "tiny.onnx", result
