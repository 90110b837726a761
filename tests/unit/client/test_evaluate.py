"""`pg_siamese evaluate` from files to results: on a small encoder and small data sets."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from typer.testing import CliRunner

from pg_siamese.cli.evaluation import command_line
from pg_siamese.cli.main import app
from pg_siamese.client.connection import CommandError
from pg_siamese.client.sources import png
from pg_siamese.datasets import LabelledImages
from pg_siamese.evaluation import figures as figures_module
from pg_siamese.evaluation import model as model_module
from pg_siamese.evaluation import results
from pg_siamese.evaluation.model import embed_images, open_data, open_model
from pg_siamese.evaluation.results import read_results, summary, write_table
from pg_siamese_server.encoding.images import decode_image
from tests.support import grid_encoder
from tests.unit.datasets.files import write_clinical

COLOURS = {"reds": (200, 40, 40), "greens": (40, 200, 40), "blues": (40, 40, 200)}


def write_data(path: Path, classes: tuple[str, ...] = tuple(COLOURS), seed: int = 0) -> Path:
    """An npz in MedMNIST's layout: 8 x 8 images, each class of a colour of its own."""
    random = np.random.default_rng(seed)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        labels = np.repeat(np.arange(len(classes)), count)
        base = np.array([COLOURS[name] for name in classes])[labels][:, None, None, :]
        noise = random.integers(-35, 36, (len(labels), 8, 8, 3))
        arrays[f"{split}_images"] = (base + noise).astype(np.uint8)
        arrays[f"{split}_labels"] = labels.astype(np.uint8)[:, None]
    np.savez(path, **arrays)
    return path


def write_model(path: Path, size: int = 8, metadata: dict[str, Any] | None = None) -> Path:
    """An encoder whose embedding is the mean colour of each quarter of an image."""
    says: dict[str, Any] = {
        "format": 1,
        "name": "colours",
        "metric": "l2",
        "input": {"width": size, "height": size, "channels": 3, "resize": "stretch"},
        **(metadata or {}),
    }
    shape: list[int | str] = ["batch", size, size, 3]
    onnx = grid_encoder(shape, TensorProto.UINT8, pool=size // 2, metadata=json.dumps(says))
    path.write_bytes(onnx)
    return path


def trained(data: Path, seed: int = 0) -> dict[str, Any]:
    sets = [{"name": data.stem, "spec": f"npz:{data}"}]
    return {"training": {"experiment": "colours", "seed": seed, "data": sets}}


def run(target: Path, *arguments: object) -> Any:
    """Evaluate; return what was written to ``target``."""
    command = ["evaluate", *map(str, arguments), "--output", str(target)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    content = json.loads(target.read_text())
    assert f"{content['experiment']}, {len(content['models'])} model" in result.output
    return content


def fails(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    *progress, line = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert all("embedding by" in bar for bar in progress)
    return line


@pytest.fixture(autouse=True)
def fewer_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures_module, "PAIRS", 2000)
    monkeypatch.setattr(figures_module, "TRIPLES", 500)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "paints.npz")


@pytest.fixture
def model(tmp_path: Path, data: Path) -> Path:
    """A model that names its data."""
    return write_model(tmp_path / "model.onnx", metadata=trained(data))


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A model that names no data."""
    return write_model(tmp_path / "bare.onnx")


def test_groups_are_kept_apart(tmp_path: Path, bare: Path, data: Path) -> None:
    arrays = dict(np.load(data))
    for split, count in (("train", 36), ("val", 18), ("test", 18)):
        arrays[f"{split}_groups"] = np.array([f"{split} {i // 2}" for i in range(count)], "U9")
    np.savez(data, **arrays)
    target = tmp_path / "grouped.json"
    content = run(target, bare, "--data", f"npz:{data}")
    counts = {"gallery": 36, "validation": 18, "queries": 18, "query_groups": 9}
    assert content["data"] == {"paints": counts}
    result = CliRunner().invoke(
        app, ["evaluate", str(bare), "--data", f"npz:{data}", "--output", str(target)]
    )
    said = " ".join(result.output.split())
    assert "No group of paints is among both queries and neighbours" in said
    arrays["test_groups"][0] = "train 3"
    np.savez(data, **arrays)
    line = fails(bare, "--data", f"npz:{data}", "--output", target)
    assert 'group "train 3" is in train (2 images) and in test (1 image)' in line


def test_one_model_from_its_own_metadata(tmp_path: Path, model: Path) -> None:
    target, table = tmp_path / "results" / "colours.json", tmp_path / "docs" / "results.md"
    content = run(target, model, "--table", table)
    assert content["experiment"] == "colours"
    assert content["data"] == {"paints": {"gallery": 36, "validation": 18, "queries": 18}}
    assert content["dimension"] == 12
    (one,) = content["models"]
    figures = one["figures"]
    # Colours far apart: everything is told right.
    assert figures["pairs"]["accuracy"] == figures["triples"]["accuracy"] == 1.0
    assert figures["reliability"]["expected_calibration_error"] < 0.01
    report = figures["triples"]["report"]
    assert report["two match"]["recall"] == report["no two match"]["recall"] == 1.0
    assert figures["sets"]["paints"]["retrieval"]["map5"] == 100
    assert figures["sets"]["paints"]["precision_at_10"] == 1.0
    # Vectors that are not of length one: both metrics are of interest.
    assert figures["sets"]["paints"]["by_cosine"]["knn_accuracy"]["5"] == 1.0
    figure = {"mean": 1.0, "sd": None, "min": 1.0, "max": 1.0}
    assert content["summary"]["pairs"]["accuracy"] == figure
    assert "| colours | paints | 18 | 100.00 [100.00, 100.00] |" in table.read_text()
    assert not list(tmp_path.rglob(".*.partial"))


def test_the_model_s_own_calibration_is_what_counts(tmp_path: Path, data: Path) -> None:
    said = {"calibration": {"weight": -1.0, "bias": 0.25}, "threshold": 0.0, **trained(data)}
    content = run(tmp_path / "r.json", write_model(tmp_path / "model.onnx", metadata=said))
    pairs = content["models"][0]["figures"]["pairs"]
    assert pairs["threshold"] == 0.0
    assert pairs["accuracy"] == 0.5  # nothing is nearer than that


def test_several_seeds_have_mean_and_spread(tmp_path: Path, data: Path) -> None:
    models = [
        write_model(tmp_path / f"{seed}.onnx", metadata=trained(data, seed)) for seed in range(3)
    ]
    content = run(tmp_path / "r.json", *models, "--table", tmp_path / "t.md")
    assert [model["seed"] for model in content["models"]] == [0, 1, 2]
    assert content["summary"]["pairs"]["accuracy"]["sd"] == 0.0
    map5 = content["summary"]["sets"]["paints"]["retrieval"]["map5"]
    assert map5 == {"mean": 100, "sd": 0, "min": 100, "max": 100, "interval": [100, 100]}
    assert "| colours | 3 | class | 100.00 ± 0.00 |" in (tmp_path / "t.md").read_text()


def test_models_of_two_experiments_are_not_mixed(tmp_path: Path, data: Path, model: Path) -> None:
    second = write_model(tmp_path / "b.onnx", metadata={"name": "other"})
    line = fails(model, second, "--data", f"npz:{data}", "--output", tmp_path / "r.json")
    assert "is of experiment other" in line
    assert not (tmp_path / "r.json").exists()


def test_several_data_sets_are_joined(tmp_path: Path, data: Path, bare: Path) -> None:
    other = write_data(tmp_path / "inks.npz", ("blues", "reds"), seed=1)
    sets = ("--data", f"npz:{data}", "--data", f"npz:{other}")
    content = run(tmp_path / "r.json", bare, *sets, "--table", tmp_path / "t.md")
    figures = content["summary"]
    assert list(figures["sets"]) == ["paints", "inks"]
    # The same colours are in both sets, so the sets can't be told.
    assert figures["right_set"]["mean"] < 90
    assert figures["set_pairs"]["accuracy"]["mean"] < 0.9
    assert "nearest of the right set" in (tmp_path / "t.md").read_text()
    assert "--data npz:paints.npz --data npz:inks.npz" in content["command"]


def write_lesions(folder: Path, size: int = 8) -> None:
    """Clinical pictures, of which half of the test images have a copy in train.

    The nearest after the copy is of the other class.
    """
    random = np.random.default_rng(3)

    def painted(colour: str) -> np.ndarray:
        noise = random.integers(-35, 36, (size, size, 3))
        return (np.array(COLOURS[colour]) + noise).astype(np.uint8)

    copies = [painted("blues") for _ in range(6)]
    by_class = ("reds", "greens")
    found = [("train", i % 2, f"g{i}", copy) for i, copy in enumerate(copies)]
    found += [("train", 1 - i % 2, "", copy + 1) for i, copy in enumerate(copies)]
    found += [("test", i % 2, f"g{i}", copy) for i, copy in enumerate(copies)]
    for split, count in (("train", 24), ("val", 12), ("test", 6)):
        found += [(split, i % 2, "", painted(by_class[i % 2])) for i in range(count)]
    rows = [
        f"{split},{row},{split}/{label}/{row}.png,{label},{group}"
        for row, (split, label, group, _) in enumerate(found)
    ]
    write_clinical(folder / "clinical", "breast_224", rows, [each[3] for each in found])


def test_published_groups_are_in_one_of_two_figures(
    tmp_path: Path, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_SIAMESE_DATA", str(tmp_path))
    write_lesions(tmp_path)
    table = tmp_path / "t.md"
    content = run(tmp_path / "r.json", bare, "--data", "clinical:breast_224", "--table", table)
    counts = content["data"]["breast_224"]
    assert (counts["queries"], counts["query_groups"]) == (12, 12)
    assert counts["queries_with_their_group_in_gallery"] == 6
    figures = content["summary"]["sets"]["breast_224"]
    assert figures["as_published"]["retrieval"]["acc1"]["mean"] == 100
    assert figures["retrieval"]["acc1"]["mean"] == 50
    rows = table.read_text()
    assert "| colours | breast_224 | 12 |" in rows
    assert "| colours | breast_224, as published | 12 |" in rows
    result = CliRunner().invoke(
        app,
        ["evaluate", str(bare), "--data", "clinical:breast_224", "--output", str(tmp_path / "b")],
    )
    assert "a query's own group may be a neighbour" in " ".join(result.output.split())


def test_sets_of_the_same_pictures_are_judged_apart(
    tmp_path: Path, bare: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_SIAMESE_DATA", str(tmp_path))
    write_lesions(tmp_path, size=16)
    small = write_data(tmp_path / "breastmnist.npz", ("reds", "greens"))
    specs = ["clinical:breast_224", f"npz:{small}", f"npz:{data}"]
    table = tmp_path / "t.md"
    pictures = ("--table", table, "--pictures", tmp_path / "pictures")
    content = run(tmp_path / "r.json", bare, *(f"--data={spec}" for spec in specs), *pictures)
    summary = content["summary"]
    assert not {"pairs", "right_set", "triples"} & set(summary)
    assert list(summary["sets"]) == ["breast_224", "breastmnist", "paints"]
    sizes = summary["sizes"]
    assert list(sizes) == ["224", "28"]
    for found in sizes.values():
        assert {"pairs", "set_pairs", "right_set", "triples"} <= set(found)
    alone = run(tmp_path / "a.json", bare, *(f"--data={spec}" for spec in specs[1:]))
    assert alone["summary"]["pairs"] == sizes["28"]["pairs"]
    assert alone["summary"]["right_set"] == sizes["28"]["right_set"]
    for size in ("224", "28"):
        assert f"| colours, {size} pixels | 1 | set |" in table.read_text()
    assert (tmp_path / "pictures" / "colours-roc.png").is_file()


def test_which_set_models_are_scored_by_set(tmp_path: Path) -> None:
    first = write_data(tmp_path / "warm.npz", ("reds", "reds"))
    second = write_data(tmp_path / "cold.npz", ("blues", "blues"), seed=1)
    by_set = write_model(tmp_path / "model.onnx", metadata={"labels": "set"})
    sets = ("--data", f"npz:{first}", "--data", f"npz:{second}")
    found = run(tmp_path / "r.json", by_set, *sets)["summary"]
    assert found["pairs"]["accuracy"]["mean"] == 1.0
    assert found["right_set"]["mean"] == 100
    assert "triples" not in found  # of three images of two sets, two always match


def test_the_validation_split_can_be_evaluated(tmp_path: Path, model: Path) -> None:
    content = run(tmp_path / "r.json", model, "--split", "val", "--table", tmp_path / "t.md")
    assert content["split"] == "val"
    assert content["command"].endswith("--split val")
    assert "colours (val)" in (tmp_path / "t.md").read_text()


def test_changed_images_and_other_kinds(tmp_path: Path, data: Path, model: Path) -> None:
    inks = write_data(tmp_path / "inks.npz", ("blues", "reds"), seed=1)
    table, pictures = tmp_path / "t.md", tmp_path / "pictures"
    options = ["--robustness", "--robustness-queries", 5, "--outside", f"npz:{inks}"]
    options += ["--outside", "npz:none.npz", "--table", table, "--pictures", pictures]
    content = run(tmp_path / "r.json", model, *options)
    figures = content["summary"]
    paints = figures["robustness"]["paints"]
    assert paints["queries"]["mean"] == 5
    assert paints["changes"]["gaussian_blur"]["1"]["cosine"]["mean"] > 0.999
    assert paints["changes"]["contrast_down"]["5"]["cosine"]["mean"] < 0.999
    assert paints["mean"]["same_neighbour"]["mean"] < 1
    # The same colours, and no domain.
    assert figures["outside"]["inks"]["false_match"]["mean"] == 100
    assert figures["outside"]["pages of text"]["false_match"]["mean"] == 0
    assert "none" not in figures["outside"]
    said = "--robustness --robustness-queries 5 --outside npz:inks.npz --outside npz:none.npz"
    assert content["command"].endswith(said)
    text = table.read_text()
    assert "| colours | paints | 5 | 100.00 |" in text
    assert "| colours | inks | 12 | 100.00 | 100.00 | 100.00 |" in text
    assert {"colours-reliability.png", "colours-robustness.png"} <= {
        picture.name for picture in pictures.iterdir()
    }


def test_images_come_to_the_encoder_as_in_the_server(bare: Path) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (5, 9, 13), np.uint8)
    images = LabelledImages("set", "test", pixels, np.zeros(5, np.int64), ("a",))
    model = open_model(bare)
    expected = model.encoder.embed(
        np.stack([decode_image(png(image), model.spec.input) for image in pixels])
    )
    counts: list[int] = []
    assert np.array_equal(embed_images(model, images, counts.append), expected)
    assert sum(counts) == 5


# --- what can go wrong ------------------------------------------------------------------------


def test_a_model_without_metadata(tmp_path: Path, data: Path) -> None:
    model = tmp_path / "plain.onnx"
    model.write_bytes(grid_encoder(["batch", 8, 8, 3], TensorProto.UINT8, pool=4))
    assert "plain.onnx: no metadata" in fails(model, "--data", f"npz:{data}")


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    assert "not a model that ONNX Runtime opens" in fails(tmp_path / "text.onnx")
    assert "No such file" in fails(tmp_path / "none.onnx")


def test_damaged_metadata(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.onnx", metadata={"calibration": 3})
    assert "m.onnx: its metadata is damaged" in fails(model)
    model = write_model(tmp_path / "m.onnx", metadata={"metric": "miles"})
    assert 'unknown metric "miles"' in fails(model)


def test_a_model_that_names_no_data_or_unknown_data(bare: Path) -> None:
    assert "say which with --data SPEC" in fails(bare)
    assert 'no data set "nothing"' in fails(bare, "--data", "nothing")


@pytest.mark.parametrize(
    ("split", "step", "message"),
    [
        ("test", None, 'data set "paints" has no images in its test split'),
        ("train", 5, "has 8 train images: at least 10 are needed"),
    ],
)
def test_too_few_images(
    split: str, step: int | None, message: str, data: Path, model: Path
) -> None:
    """None at all in a split, and a gallery that is too small."""
    with np.load(data) as file:
        arrays = dict(file)
    for name in (f"{split}_images", f"{split}_labels"):
        arrays[name] = arrays[name][::step] if step else arrays[name][:0]
    np.savez(data, **arrays)
    assert message in fails(model)


def test_two_data_sets_of_one_name(tmp_path: Path, data: Path, bare: Path) -> None:
    (tmp_path / "other").mkdir()
    again = write_data(tmp_path / "other" / "paints.npz")
    line = fails(bare, "--data", f"npz:{data}", "--data", f"npz:{again}")
    assert 'two data sets are called "paints"' in line


def test_without_scikit_learn_it_says_what_to_install(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "pg_siamese[train]" in fails(model)


def test_torch_is_not_needed(tmp_path: Path, model: Path) -> None:
    arguments = ["evaluate", str(model), "--output", str(tmp_path / "r.json")]
    arguments += ["--pictures", str(tmp_path)]
    program = (
        "import sys\n"
        "from pg_siamese.cli.main import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        "assert not {'torch', 'lightning'}.intersection(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "colours-roc.png").exists()


# --- results and table ------------------------------------------------------------------------


def test_summary_by_hand() -> None:
    figures: list[Any] = [{"a": 1.0, "b": {"c": 2}}, {"a": 3.0, "b": {"c": 2}, "only here": 1}]
    assert summary(figures) == {
        "a": {"mean": 2.0, "sd": pytest.approx(2**0.5), "min": 1.0, "max": 3.0},
        "b": {"c": {"mean": 2.0, "sd": 0.0, "min": 2, "max": 2}},
    }


def test_intervals_are_over_the_queries_of_all_seeds(tmp_path: Path, data: Path) -> None:
    """Of classes of one colour, each query is right or wrong by chance."""
    write_data(data, ("reds", "reds", "reds"))
    models = [
        write_model(tmp_path / f"{seed}.onnx", metadata=trained(data, seed)) for seed in range(2)
    ]
    one = run(tmp_path / "one.json", models[0], "--table", tmp_path / "t.md")
    two = run(tmp_path / "two.json", *models)
    figures, same = (each["summary"]["sets"]["paints"] for each in (one, two))
    for key, scale in (("retrieval", 100), ("knn_accuracy", 1)):
        for name, figure in figures[key].items():
            low, high = figure["interval"]
            assert 0 < high - low < scale
            assert low <= figure["mean"] <= high
            assert same[key][name]["interval"] == [low, high], "the same model twice"
    low, high = figures["retrieval"]["map5"]["interval"]
    assert f" [{low:.2f}, {high:.2f}] |" in (tmp_path / "t.md").read_text()
    assert "interval" in figures["by_cosine"]["precision_at_10"]
    assert "interval" not in one["summary"]["pairs"]["accuracy"]


def test_seeds_share_data_that_no_seed_drew(data: Path, bare: Path) -> None:
    model = open_model(bare)
    (first,) = open_data(model, [f"npz:{data}"], "test")
    (again,) = open_data(model, [f"npz:{data}"], "test", [first])
    assert again is first
    arrays = dict(np.load(data))
    np.savez(data, **{name: each for name, each in arrays.items() if name.startswith("train")})
    (drawn,) = open_data(model, [f"npz:{data}"], "test")
    (again,) = open_data(model, [f"npz:{data}"], "test", [drawn])
    assert drawn.drawn and again is not drawn


def test_the_same_images_are_embedded_once(data: Path, bare: Path) -> None:
    model = open_model(bare)
    (splits,) = open_data(model, [f"npz:{data}"], "test")
    counts: list[int] = []
    calls = []
    embed = model_module.embed_images

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[1])
        return embed(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "embed_images", counted)
        parts = [splits.test, splits.val, replace(splits.test, name="twice")]
        found = model_module.embed_joined(model, parts, counts.append)
    assert calls == [splits.test, splits.val]
    assert sum(counts) == len(found.vectors) == sum(map(len, parts))
    assert np.array_equal(found.of_set(0).vectors, found.of_set(2).vectors)


def test_spread_is_shown_where_there_is_one() -> None:
    figure = {"mean": 0.98765, "sd": 0.00123, "min": 0.0, "max": 1.0}
    assert results.spread(figure, 100, 2) == "98.77 ± 0.12"
    assert results.spread({**figure, "sd": None}, 1, 3) == "0.988"
    known = figure | {"interval": [0.979, 0.99172]}
    assert results.spread(known, 100, 2) == "98.77 ± 0.12"
    assert results.spread(known, 100, 2, with_interval=True) == "98.77 ± 0.12 [97.90, 99.17]"
    assert results.spread(figure, 100, 2, with_interval=True) == "98.77 ± 0.12"


def test_only_numbers_go_into_results() -> None:
    given = {"a": 0.123456789, "b": 3, "c": None}
    assert results.rounded(given) == given | {"a": 0.12346}
    with pytest.raises(ValueError, match="not a finite number"):
        results.rounded({"a": float("nan")})


def test_the_worst_kinds_of_changes_come_first() -> None:
    kinds = {"mild": (90, 80), "bad": (90, 10), "fair": (70, 60), "even": (60, 60)}
    changes = {
        kind: {str(n): {"map5": {"mean": each, "sd": None}} for n, each in enumerate(values, 1)}
        for kind, values in kinds.items()
    }
    assert results._worst(changes) == [(50, "bad"), (60, "even"), (65, "fair")]


def test_the_text_around_the_table_stays(tmp_path: Path) -> None:
    path = tmp_path / "results.md"
    path.write_text(f"# Mine\n{results.BEGIN}\nyesterday\n{results.END}\nafter\n")
    write_table([], path)
    text = path.read_text()
    assert text.startswith("# Mine\n")
    assert text.endswith("after\n")
    assert "yesterday" not in text
    path.write_text("# no marks\n")
    with pytest.raises(CommandError, match="lacks the marks"):
        write_table([], path)
    assert path.read_text() == "# no marks\n"


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}'])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(CommandError, match=r"bad\.json"):
        read_results(tmp_path)


def test_the_command_names_no_folder_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [tmp_path / "models" / "a.onnx", Path("b.onnx"), Path("/elsewhere/c.onnx")]
    assert command_line(files, ["mnist"], "test", True) == (
        "pg_siamese evaluate models/a.onnx b.onnx c.onnx --data mnist --in-database"
    )
