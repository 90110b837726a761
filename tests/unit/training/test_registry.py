"""What an experiment can name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pg_siamese.training.experiments import ExperimentError, experiment_names, load_experiment
from pg_siamese.training.registry import NETWORKS, build_network, build_objective
from pg_siamese.training.sampling import Batches

NAMES = (
    "cifar10_8d",
    "cifar10_8d_improved",
    "clinical",
    "clinical_224",
    "clinical_frozen",
    "clinical_learned",
    "clinical_sharp",
    "fashion_mnist",
    "folder",
    "folder_pretrained",
    "folder_small",
    "imagenette_pretrained",
    "imagenette_scratch",
    "medical",
    "medmnist_siamese",
    "medmnist_siamese_128",
    "mnist_2d",
)


def test_the_experiments_are_there() -> None:
    assert tuple(experiment_names()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_can_be_built(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.name == name
    assert experiment.labels == "class" or len(experiment.data) > 1
    size = (experiment.input.height, experiment.input.width)
    network = experiment.network
    encoder: Any = build_network(network.name, network.dimension, size, network.options)
    name, options = experiment.objective.name, experiment.objective.options
    given = (name, network.dimension, 10, experiment.metric, options)
    objective: Any = build_objective(
        *given, parts=encoder.parts, set_dimension=encoder.set_dimension
    )
    labels = torch.arange(200) % 10
    Batches(labels, experiment.sampling, experiment.batch_size, objective.takes, seed=0)
    with torch.inference_mode():
        embedding = encoder.eval()(torch.zeros((2, *size, 3), dtype=torch.uint8))
    assert embedding.shape == (2, network.dimension)
    assert embedding.dtype == torch.float32


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"siamese_cnn", "conv5"}))
def test_networks_for_cosine_give_unit_vectors(name: str) -> None:
    encoder: Any = build_network(name, 12, (64, 64), {}).eval()
    with torch.inference_mode():
        vectors = encoder(torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8))
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)


def test_unknown_networks_and_options() -> None:
    with pytest.raises(ExperimentError, match='no network "x"; there are: residual'):
        build_network("x", 2, (28, 28), {})
    with pytest.raises(ExperimentError, match='"conv5" has no option "depth"; there are: channels'):
        build_network("conv5", 2, (28, 28), {"depth": 3})


def test_every_set_of_an_experiment_has_its_augmentation() -> None:
    medical = load_experiment("medical").augmentation
    names = "breastmnist dermamnist ham10000_28 pneumoniamnist retinamnist"
    assert set(medical) == set(names.split())
    assert set(load_experiment("fashion_mnist").augmentation) == {"fashion_mnist"}
    assert medical["pneumoniamnist"].flip_vertical == 0


def test_an_experiment_extends_another() -> None:
    clinical, large = load_experiment("clinical"), load_experiment("clinical_224")
    assert (large.name, large.input.width) == ("clinical_224", 224)
    assert large.input.resize == clinical.input.resize
    same = {"name": "x", "title": "x", "input": clinical.input}
    assert large.changed(**same) == clinical.changed(**same)
    sharp = load_experiment("clinical_sharp").augmentation
    assert {name: each.small for name, each in sharp.items()} == dict.fromkeys(sharp, 0.0)
    assert sharp["ham10000_224"].rotation == clinical.augmentation["ham10000_224"].rotation > 0


def test_an_experiment_extends_one_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('extends = "nothing"')
    with pytest.raises(ExperimentError, match='no experiment "nothing"'):
        load_experiment(str(path))
