"""Labelled images from files: npz in MedMNIST's layout, IDX, CIFAR-10, image folders and zips.

The loader, the demo, the training and the evaluation use them, so nothing here imports torch.
Everything comes back as ``LabelledImages``: one split of one data set, as uint8 pixels with class
labels. ``open_dataset`` gives the three splits of a data set, by a short text such as
``medmnist:breastmnist`` or ``folder:photos``.

MedMNIST is taken from ``MEDMNIST_ROOT``, ``~/.medmnist`` or ``../shared/data/medmnist``, and is
downloaded otherwise. ``ham10000_28.npz`` (HAM10000, the source of DermaMNIST, at 28 x 28) stands in
for ``dermamnist.npz`` if only the former is found. It keeps its own name. Fashion-MNIST is taken
from Debian's package ``dataset-fashion-mnist``. The other sets with a name of their own are looked
for in ``PG_SIAMESE_DATA`` and in ``../shared/data``.
"""

from __future__ import annotations

from pg_siamese.datasets.base import (
    SPLITS,
    DataFormatError,
    DataNotFoundError,
    DataSplits,
    JoinedLabels,
    LabelledImages,
    Labels,
    Pixels,
    hold_out,
    join_labels,
    sha256,
    split_at_random,
)
from pg_siamese.datasets.cifar import find_cifar10, read_cifar10
from pg_siamese.datasets.fashion_mnist import (
    FASHION_MNIST_FOLDER,
    find_fashion_mnist,
    load_fashion_mnist,
)
from pg_siamese.datasets.folder import (
    IMAGE_SUFFIXES,
    ImageFile,
    LeftOut,
    list_image_folder,
    read_image_folder,
)
from pg_siamese.datasets.idx import read_idx, read_idx_folder, read_idx_images
from pg_siamese.datasets.medmnist import (
    MEDICAL_SETS,
    STAND_INS,
    download_medmnist,
    find_medmnist,
    load_medical,
    load_medmnist,
    medmnist_folders,
)
from pg_siamese.datasets.names import CLASS_NAMES, LICENCES
from pg_siamese.datasets.npz import npz_splits, read_npz
from pg_siamese.datasets.places import data_folders
from pg_siamese.datasets.resizing import resized
from pg_siamese.datasets.specs import SPECS, open_dataset
from pg_siamese.datasets.zipped import list_image_zip

__all__ = [
    "CLASS_NAMES",
    "FASHION_MNIST_FOLDER",
    "IMAGE_SUFFIXES",
    "LICENCES",
    "MEDICAL_SETS",
    "SPECS",
    "SPLITS",
    "STAND_INS",
    "DataFormatError",
    "DataNotFoundError",
    "DataSplits",
    "ImageFile",
    "JoinedLabels",
    "LabelledImages",
    "Labels",
    "LeftOut",
    "Pixels",
    "data_folders",
    "download_medmnist",
    "find_cifar10",
    "find_fashion_mnist",
    "find_medmnist",
    "hold_out",
    "join_labels",
    "list_image_folder",
    "list_image_zip",
    "load_fashion_mnist",
    "load_medical",
    "load_medmnist",
    "medmnist_folders",
    "npz_splits",
    "open_dataset",
    "read_cifar10",
    "read_idx",
    "read_idx_folder",
    "read_idx_images",
    "read_image_folder",
    "read_npz",
    "resized",
    "sha256",
    "split_at_random",
]
