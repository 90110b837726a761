"""What a run writes: lines, the figures of each epoch, snapshots of the embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from pg_siamese.files import write_whole
from pg_siamese.training.data import JoinedImages
from pg_siamese.training.learner import embed

SNAPSHOT_IMAGES = 2000


class EpochLines(Callback):
    """Prints one line per epoch, for logs and terminals in which a progress bar makes no sense."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's figures."""
        figures = " ".join(
            f"{name} {float(value):.4g}" for name, value in trainer.callback_metrics.items()
        )
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} {figures}", flush=True)


class EpochFigures(Callback):
    """Keeps ``metrics.json``: a list with an object per epoch, {"epoch": 1, "train_loss": …, …}.

    Figures of validation are in epochs that ended with one. The file is always whole. A resumed run
    continues it.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every
        self.rows: list[dict[str, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the epochs before the one that the run starts with."""
        if trainer.current_epoch and self.path.is_file():
            rows = json.loads(self.path.read_text(encoding="utf-8"))
            self.rows = [row for row in rows if row["epoch"] <= trainer.current_epoch]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch's figures."""
        epoch = trainer.current_epoch + 1
        validated = epoch % self.every == 0
        figures = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if validated or not name.startswith("val_")
        }
        self.rows.append({"epoch": epoch, **figures})
        write_whole(self.path, (json.dumps(self.rows, indent=1) + "\n").encode())


class Snapshots(Callback):
    """Keeps ``snapshots.npz``: how the embedding of the validation images forms over the training.

    ``points`` float16 (S, N, 2), ``labels`` int64 (N,), ``epochs`` float32 (S,), S evenly spaced by
    steps and N at most 2,000. A resumed run begins them again.
    """

    def __init__(self, path: Path, images: JoinedImages, count: int, seed: int) -> None:
        self.path = path
        self.images = images.some(SNAPSHOT_IMAGES, seed)
        self.count = count
        self.points: list[Any] = []
        self.epochs: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the embedding before anything is learned."""
        self._keep(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Keep the embedding if a snapshot is due."""
        total = int(trainer.estimated_stepping_batches)
        due = len(self.points) * total / max(self.count - 1, 1)
        if trainer.global_step >= due or trainer.global_step == total:
            self._keep(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        np.savez_compressed(
            self.path,
            points=np.stack(self.points).astype(np.float16),
            labels=self.images.labels.numpy(),
            epochs=np.array(self.epochs, np.float32),
        )

    def _keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        encoder: Any = pl_module.encoder
        training = encoder.training
        # Nothing random may be drawn here that the run would draw otherwise.
        self.points.append(embed(encoder, self.images.pixels.to(pl_module.device)))
        encoder.train(training)
        self.epochs.append(trainer.global_step / max(int(trainer.num_training_batches), 1))
