"""Which data sets may be joined: never two that show the same pictures."""

from __future__ import annotations

import pytest

from pg_siamese.datasets import parts_by_size
from pg_siamese.datasets.names import CLASS_NAMES, LICENCES, SOURCES


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ("photos", {None: "photos"}),
        ("breast_224 pneumonia_224 retinamnist", {None: "breast_224 pneumonia_224 retinamnist"}),
        ("breastmnist pneumonia_224", {None: "breastmnist pneumonia_224"}),
        ("breast_224 breastmnist", {224: "breast_224", 28: "breastmnist"}),
        (
            "breastmnist ham10000_224 breast_224 retinamnist ham10000_28",
            {28: "breastmnist retinamnist ham10000_28", 224: "ham10000_224 breast_224 retinamnist"},
        ),
        ("pneumonia_224 pneumonia_224_official", {None: "pneumonia_224"}),
        (
            "pneumonia_224_official pneumonia_224 pneumoniamnist photos",
            {224: "pneumonia_224_official photos", 28: "pneumoniamnist photos"},
        ),
        ("dermamnist ham10000_28", {None: "dermamnist"}),
    ],
)
def test_sets_of_the_same_pictures_are_never_joined(
    names: str, parts: dict[int | None, str]
) -> None:
    given = names.split()
    found = parts_by_size(given)
    assert {size: " ".join(given[n] for n in part) for size, part in found.items()} == parts


def test_sets_of_the_same_pictures_have_the_same_classes() -> None:
    of_pictures: dict[str, set[tuple[str, ...]]] = {}
    for name, source in SOURCES.items():
        of_pictures.setdefault(source.pictures, set()).add(CLASS_NAMES[name])
        assert name in LICENCES
    assert all(len(classes) == 1 for classes in of_pictures.values())
