"""From an experiment to a model file and its card: train, calibrate, export, check, evaluate."""

from __future__ import annotations

import dataclasses
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from pg_siamese.datasets import LabelledImages, sha256
from pg_siamese.training.calibration import calibrate, pair_distances, score_pairs
from pg_siamese.training.card import write_card
from pg_siamese.training.data import Batch, DataSplits, JoinedImages
from pg_siamese.training.evaluation import Embedded, retrieval_by_set, right_set
from pg_siamese.training.experiments import Experiment
from pg_siamese.training.export import export_encoder, images_per_second, least_cosine
from pg_siamese.training.learner import AverageWeights, MetricLearner, embed
from pg_siamese.training.sampling import class_sampler

PAIRS = 20_000
COSINE_AT_LEAST = 0.9999
CHECKED_IMAGES = 500


@dataclass(frozen=True)
class Trained:
    """What a training run gives: the encoder and the figures that go into file and card."""

    encoder: torch.nn.Module
    splits: list[DataSplits]
    metadata: dict[str, Any]


class ExportError(RuntimeError):
    """The exported file doesn't agree with PyTorch."""


class EpochLines(Callback):
    """One line an epoch, for logs and other places where a progress bar makes no sense."""

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Print the epoch's figures."""
        figures = " ".join(
            f"{name} {float(value):.4g}" for name, value in trainer.callback_metrics.items()
        )
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} {figures}", flush=True)


def run(
    experiment: Experiment,
    output: Path,
    *,
    command: str,
    log_folder: Path,
    threads: int = 2,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train an experiment and write `output` (ONNX) and its model card beside it (.md).

    Returns the metadata written into the file. Raises `DataNotFoundError` where the data can't
    be had, and `ExportError` where ONNX Runtime and PyTorch differ.
    """
    trained = fit(experiment, command=command, log_folder=log_folder, threads=threads, say=say)
    export_encoder(trained.encoder, output, trained.metadata)
    cosine = check(trained, output)
    speed = images_per_second(output)
    say(f"{output}: {output.stat().st_size:,} bytes, {speed:,.0f} images/s on one thread")
    card = write_card(experiment, trained.splits, trained.metadata, output, cosine, speed)
    say(f"{card}: model card")
    return trained.metadata


def fit(
    experiment: Experiment,
    *,
    command: str,
    log_folder: Path,
    threads: int = 2,
    test: bool = True,
    say: Callable[[str], None] = print,
) -> Trained:
    """Train, calibrate on validation pairs and evaluate; `test=False` leaves the test split
    alone, for choosing settings.
    """
    torch.set_num_threads(threads)
    _quiet()
    lightning.seed_everything(experiment.seed, workers=True, verbose=False)
    splits = experiment.load(experiment.seed)
    train, val = (JoinedImages([getattr(s, part) for s in splits]) for part in ("train", "val"))
    say(
        f"training {experiment.name}: {len(train):,} images of {len(train.names)} data sets in "
        f"{len(train.classes)} classes, {experiment.epochs} epochs"
    )
    learner = MetricLearner(experiment, train.names, train.classes)
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=experiment.epochs,
        check_val_every_n_epoch=min(experiment.validate_every, experiment.epochs),
        num_sanity_val_steps=0,
        logger=TensorBoardLogger(str(log_folder), name=experiment.name),
        callbacks=[
            AverageWeights(experiment.average_decay),
            LearningRateMonitor("step"),
            TQDMProgressBar(refresh_rate=10) if sys.stderr.isatty() else EpochLines(),
        ],
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
        enable_checkpointing=False,
        deterministic="warn",
    )
    batches = DataLoader(
        train,
        batch_size=experiment.batch_size,
        sampler=class_sampler(train.labels, experiment.balance, experiment.seed),
        collate_fn=as_it_is,
        drop_last=len(train) >= experiment.batch_size,
    )
    trainer.fit(learner, batches, [in_order(train), in_order(val)])
    encoder = learner.encoder.cpu().eval()
    return Trained(
        encoder, splits, _metadata(experiment, encoder, splits, train, val, command, test)
    )


def check(trained: Trained, path: Path) -> float:
    """Compare the file with PyTorch on test images of each set; return the least cosine."""
    cosine = min(
        least_cosine(trained.encoder, path, s.test.rgb()[:CHECKED_IMAGES]) for s in trained.splits
    )
    if cosine < COSINE_AT_LEAST:
        raise ExportError(f"{path}: cosine to PyTorch's embedding is {cosine:.6f}")
    return cosine


def as_it_is(batch: Any) -> Any:
    """Collate nothing: `JoinedImages` gives whole batches."""
    return batch


def in_order(images: JoinedImages, batch_size: int = 512) -> DataLoader[Batch]:
    """Load images in their order."""
    return DataLoader(images, batch_size=batch_size, collate_fn=as_it_is)


def embed_joined(encoder: torch.nn.Module, images: JoinedImages) -> Embedded:
    """Embed joined data sets."""
    return Embedded(embed(encoder, images.pixels), images.labels.numpy(), images.sets.numpy())


def _metadata(
    experiment: Experiment,
    encoder: torch.nn.Module,
    splits: list[DataSplits],
    train: JoinedImages,
    val: JoinedImages,
    command: str,
    test: bool,
) -> dict[str, Any]:
    gallery, queries = embed_joined(encoder, train), embed_joined(encoder, val)
    calibration = calibrate(*pair_distances(queries, PAIRS, experiment.seed))
    metrics: dict[str, Any] = {}
    parts = {"validation": queries}
    if test:
        parts["test"] = embed_joined(encoder, JoinedImages([s.test for s in splits]))
    for part, embedded in parts.items():
        pairs = score_pairs(*pair_distances(embedded, PAIRS, experiment.seed + 1), calibration)
        metrics[part] = {
            "retrieval": {
                name: score.as_dict()
                for name, score in retrieval_by_set(gallery, embedded, train.names).items()
            },
            "right_set": round(right_set(gallery, embedded), 3),
            "pairs": {k: round(v, 4) for k, v in dataclasses.asdict(pairs).items()},
        }
    height, width = train.pixels.shape[1:3]
    return {
        "format": 1,
        "name": experiment.name,
        "dimension": experiment.dimension,
        "metric": "cosine",
        "input": {
            "width": width,
            "height": height,
            "channels": 3,
            "resize": "stretch",
            "interpolation": "bicubic",
        },
        "calibration": {"weight": calibration.weight, "bias": calibration.bias},
        "threshold": calibration.threshold,
        "classes": list(train.classes),
        "training": {
            "data": [
                {"name": s.name, "file": file.name, "sha256": sha256(file)}
                for s in splits
                for file in _files(s.train, s.val, s.test)
            ],
            "command": command,
            "metrics": metrics,
        },
    }


def _files(*parts: LabelledImages) -> list[Path]:
    return list(dict.fromkeys(file for part in parts for file in part.files))


def _quiet() -> None:
    # Lightning talks of devices that aren't there and of loader processes that aren't needed.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*number of training batches.*")
