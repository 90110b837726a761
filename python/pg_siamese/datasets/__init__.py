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

from pg_siamese.datasets.base import (
    SPLITS,
    DataFormatError,
    DataNotFoundError,
    DataSplits,
    LabelledImages,
    Labels,
    Pixels,
    hold_out,
    join_labels,
    sha256,
    split_at_random,
)
from pg_siamese.datasets.fashion_mnist import find_fashion_mnist, load_fashion_mnist
from pg_siamese.datasets.folder import LeftOut, Member, list_image_folder
from pg_siamese.datasets.idx import read_idx, read_idx_images
from pg_siamese.datasets.medmnist import (
    MEDICAL_SETS,
    STAND_INS,
    find_medmnist,
    load_medical,
    load_medmnist,
    medmnist_folders,
)
from pg_siamese.datasets.names import LICENCES, parts_by_size
from pg_siamese.datasets.npz import npz_splits, read_npz
from pg_siamese.datasets.resizing import resized
from pg_siamese.datasets.specs import open_dataset

__all__ = [
    "LICENCES",
    "MEDICAL_SETS",
    "SPLITS",
    "STAND_INS",
    "DataFormatError",
    "DataNotFoundError",
    "DataSplits",
    "LabelledImages",
    "Labels",
    "LeftOut",
    "Member",
    "Pixels",
    "find_fashion_mnist",
    "find_medmnist",
    "hold_out",
    "join_labels",
    "list_image_folder",
    "load_fashion_mnist",
    "load_medical",
    "load_medmnist",
    "medmnist_folders",
    "npz_splits",
    "open_dataset",
    "parts_by_size",
    "read_idx",
    "read_idx_images",
    "read_npz",
    "resized",
    "sha256",
    "split_at_random",
]
