"""A small encoder, trained once for all tests of the export and of what it states."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.unit.training.stripes import PARTS, striped, tiny

if TYPE_CHECKING:
    from pg_siamese.training.loop import Trained


@pytest.fixture(scope="package", autouse=True)
def _little_work() -> Iterator[None]:
    """Measure and draw less than for a model that is to be used."""
    try:
        from pg_siamese.training import export, learner, loop
    except ImportError:  # without torch, nothing here trains
        yield
        return
    from pg_siamese.evaluation import domain, figures

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
) -> tuple[Path, Trained]:
    folder = tmp_path_factory.mktemp("tiny")
    from pg_siamese.training import files, loop

    result = loop.fit(
        tiny(data=data), command="pg_siamese train tiny", folder=folder / "run", threads=1
    )
    files.write_model(result.model, folder / "tiny.onnx", result.metadata)
    return folder / "tiny.onnx", result
