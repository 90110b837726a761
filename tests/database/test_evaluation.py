"""`pg_siamese evaluate --in-database`: `similar_images` gives the figures that were got offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pg_siamese.cli.main import app
from pg_siamese.datasets import DataNotFoundError, load_medmnist
from pg_siamese.evaluation import database
from pg_siamese.evaluation.model import open_data, open_model
from tests.conftest import MODELS, Connection
from tests.support import one
from tests.unit.datasets.files import write_clinical

MODEL = MODELS / "medical.onnx"
FIGURES = ("map5", "mmv5", "acc1", "acc3", "acc5")


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two small data sets of real images, grey and RGB."""
    folder = tmp_path_factory.mktemp("data")
    found = []
    for name in ("breastmnist", "retinamnist"):
        arrays: dict[str, Any] = {}
        for split, count in (("train", 120), ("val", 30), ("test", 40)):
            try:
                part = load_medmnist(name, split, download=False)
            except DataNotFoundError as error:
                pytest.skip(str(error))
            arrays[f"{split}_images"] = part.images[:count]
            arrays[f"{split}_labels"] = part.labels[:count].astype(np.uint8)
        np.savez(folder / f"{name}.npz", **arrays)
        found.append(f"npz:{folder / name}.npz")
    return found


def leftovers(db: Connection) -> list[str]:
    rows = db.execute(
        "SELECT name FROM siamese.collections WHERE name LIKE 'evaluation%'"
        " UNION ALL SELECT name FROM siamese.models WHERE name LIKE 'evaluation%'"
        " UNION ALL SELECT nspname FROM pg_namespace WHERE nspname LIKE 'evaluation%'"
    )
    return [name for (name,) in rows]


def evaluate(dsn: str, specs: list[str], target: Path, *more: str) -> str:
    arguments = [str(MODEL), "--in-database", "--dsn", dsn, "--output", str(target), *more]
    for spec in specs:
        arguments += ["--data", spec]
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_database_retrieves_what_was_retrieved_offline(
    dsn: str, db: Connection, specs: list[str], tmp_path: Path
) -> None:
    text = evaluate(dsn, specs, tmp_path / "r.json", "--table", str(tmp_path / "t.md"))
    assert "greatest difference in the database" in text
    (model,) = json.loads((tmp_path / "r.json").read_text())["models"]
    sets = model["figures"]["sets"]
    assert list(sets) == ["breastmnist", "retinamnist"]
    for figures in sets.values():
        assert 20 < figures["retrieval"]["map5"] < 100
        assert list(figures["in_database"]) == ["pgvector", "auto"]
        for there in figures["in_database"].values():
            for name in FIGURES:
                assert there[name] == pytest.approx(figures["retrieval"][name], abs=0.005)
            assert there["greatest_difference"] < 0.005
    assert (tmp_path / "t.md").read_text().count("| 0.000 | 0.000 |") == 2
    assert leftovers(db) == []
    assert one(db, "SELECT count(*) FROM siamese.collections") == 1


def test_a_querys_own_group_is_left_out_in_the_database(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the queries have their copy in the gallery, and next to it one of another class."""
    random = np.random.default_rng(0)
    pictures = random.integers(0, 250, (60, 4, 4), np.uint8).repeat(7, axis=1).repeat(7, axis=2)
    rows: list[str] = []
    stored: list[np.ndarray] = []
    for i, picture in enumerate(pictures):
        split = ("train", "val", "test")[min(i // 20, 2)]
        label, group = i % 2, ""
        if i >= 50:
            group = f"g{i}"
            rows.append(f"train,,train/{len(rows)}.png,{label},{group}")
            rows.append(f"train,,train/{len(rows)}.png,{1 - label},")
            stored += [picture, picture + 5]
        rows.append(f"{split},,{split}/{len(rows)}.png,{label},{group}")
        stored.append(picture)
    write_clinical(tmp_path / "clinical", "breast_224", rows, stored)
    monkeypatch.setenv("PG_SIAMESE_DATA", str(tmp_path))
    evaluate(dsn, ["clinical:breast_224"], tmp_path / "r.json")
    (model,) = json.loads((tmp_path / "r.json").read_text())["models"]
    figures = model["figures"]["sets"]["breast_224"]
    assert figures["as_published"]["retrieval"]["acc1"] >= 50
    assert figures["retrieval"]["acc1"] <= 50
    for stored_figures in figures["in_database"].values():
        assert stored_figures["acc1"] == figures["retrieval"]["acc1"]
        assert stored_figures["greatest_difference"] < 0.005


def test_the_collection_can_be_kept(
    dsn: str, db: Connection, specs: list[str], tmp_path: Path
) -> None:
    text = evaluate(dsn, specs[:1], tmp_path / "r.json", "--keep")
    (name,) = set(leftovers(db))
    assert f"collection kept: {name}" in text
    assert db.execute(
        "SELECT rows_embedded, pending FROM siamese.collection_status WHERE collection = %s",
        (name,),
    ).fetchone() == (120, 0)


def test_nothing_is_left_after_a_failure(
    dsn: str, db: Connection, specs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        assert leftovers(db)
        raise KeyboardInterrupt

    monkeypatch.setattr(database, "_search", broken)
    model = open_model(MODEL)
    with pytest.raises(KeyboardInterrupt):
        database.database_retrieval(db, model, open_data(model, specs[:1], "test"), "test")
    assert leftovers(db) == []
