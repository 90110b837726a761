"""The Lightning module: encoder, objective, optimiser and validation."""

from __future__ import annotations

from typing import Any

import lightning
import msgspec
import numpy as np
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from pg_siamese.evaluation.retrieval import Embedded, retrieval_by_set
from pg_siamese.training.data import Augmenter, Batch
from pg_siamese.training.experiments.settings import Experiment, parse_experiment
from pg_siamese.training.registry import build_network, build_objective
from pg_siamese.training.sampling import draw_pairs, draw_triplets

CHECKPOINT_KEY = "pg_siamese"
VALIDATED = 10_000  # images, pairs or triplets


class MetricLearner(lightning.LightningModule):
    """Trains an encoder with an objective.

    Validation is the retrieval protocol itself: dataloader 0 is the gallery, dataloader 1 the
    queries. ``val_map5`` is the mean over the data sets. ``val_loss`` and ``val_accuracy`` are the
    objective's own, on images, pairs or triplets of the queries, the same every time.

    Attributes:
        on_features: whether batches hold what the encoder's frozen layers give, not pixels.
    """

    def __init__(
        self, experiment: Experiment, names: tuple[str, ...], classes: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.experiment = experiment
        self.names = names
        self.classes = classes
        size = (experiment.input.height, experiment.input.width)
        network = experiment.network
        self.encoder = build_network(network.name, network.dimension, size, network.options, names)
        self.objective = build_objective(
            experiment.objective.name,
            network.dimension,
            len(classes),
            experiment.metric,
            experiment.objective.options,
            sets_of(names, classes),
            self.encoder.parts,
            self.encoder.set_dimension,
        )
        self.augment = Augmenter(names, {name: experiment.augmentation_of(name) for name in names})
        self.on_features = False
        self._seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def encode(self, batch: Tensor) -> Tensor:
        """Embed pixels (N, H, W, 3), or ``on_features`` what the frozen layers give."""
        encoder: Any = self.encoder
        half = self.training and self.experiment.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            embeddings: Tensor = encoder.head(batch) if self.on_features else encoder(batch)
        return embeddings.float()

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of one augmented batch."""
        pixels, labels, sets = batch
        if not self.on_features:
            pixels = self.augment(pixels, sets)
        outcome = self.objective(self.encode(pixels), labels)
        figures = {"train_loss": outcome.loss}
        if outcome.accuracy is not None:
            figures["train_accuracy"] = outcome.accuracy
        self.log_dict(figures, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(labels))
        loss: Tensor = outcome.loss
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the embeddings of the last validation."""
        self._seen = {0: [], 1: []}

    def validation_step(self, batch: Batch, batch_index: int, dataloader_idx: int) -> None:
        """Embed one batch of the gallery or of the queries."""
        pixels, labels, sets = batch
        self._seen[dataloader_idx].append((self.encode(pixels), labels, sets))

    def on_validation_epoch_end(self) -> None:
        """Score the objective on the queries, and their retrieval in the gallery, set by set."""
        self._validate_objective()
        gallery, queries = (joined(self._seen[number]) for number in (0, 1))
        self._seen = {}
        metric, matching = self.experiment.metric, self.experiment.labels
        figures = retrieval_by_set(gallery, queries, self.names, metric, matching)
        for name, score in figures.items():
            self.log(f"val_map5/{name}", score.map5)
        mean = float(np.mean([score.map5 for score in figures.values()]))
        self.log("val_map5", mean, prog_bar=True)

    def _validate_objective(self) -> None:
        vectors, labels, _ = (torch.cat(column) for column in zip(*self._seen[1], strict=True))
        numbers, seed = labels.cpu().numpy(), self.experiment.seed
        takes = self.objective.takes
        if takes == "pairs":
            chosen = np.concatenate(draw_pairs(numbers, VALIDATED, seed))
        elif takes == "triplets":
            chosen = np.concatenate(draw_triplets(numbers, VALIDATED, seed))
        else:
            # A miner compares all with all.
            chosen = np.random.default_rng(seed).permutation(len(numbers))[:1000]
        place = torch.from_numpy(chosen).to(labels.device)
        outcome = self.objective(vectors[place], labels[place])
        self.log("val_loss", outcome.loss, prog_bar=True)
        if outcome.accuracy is not None:
            self.log("val_accuracy", outcome.accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Set up the optimiser and its rate.

        The rate is constant, halved when validation gets no better ("plateau"), falling to zero
        along a cosine, or first rising for a tenth of the steps ("one_cycle").
        """
        settings = self.experiment.optimiser
        # Norms and biases are not decayed, as is usual.
        learning = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in learning if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
        ]
        build = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[settings.name]
        optimiser: torch.optim.Optimizer = build(groups, lr=settings.learning_rate)
        if settings.schedule == "constant":
            return optimiser
        if settings.schedule == "plateau":
            validation = self.experiment.validation
            mode: Any = validation.mode
            # Torch counts the validations that it lets pass.
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimiser, mode, factor=0.5, patience=settings.patience - 1
            )
            return {
                "optimizer": optimiser,
                "lr_scheduler": {
                    "scheduler": plateau,
                    "monitor": validation.monitor,
                    "frequency": min(validation.every, self.experiment.epochs),
                },
            }
        steps = int(self.trainer.estimated_stepping_batches)
        if settings.schedule == "cosine":
            schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        else:
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimiser, settings.learning_rate, steps, pct_start=0.1, cycle_momentum=False
            )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the epoch's augmentation and dropout, so that a resumed run draws the same."""
        # Lightning leaves out on_train_epoch_start for the epoch that a resumed run begins with.
        if batch_idx == 0:
            torch.manual_seed(self.experiment.seed * 10_000 + self.current_epoch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what the encoder was made from, for ``load_learner``."""
        checkpoint[CHECKPOINT_KEY] = {
            "experiment": msgspec.to_builtins(self.experiment),
            "names": list(self.names),
            "classes": list(self.classes),
        }


def sets_of(names: tuple[str, ...], classes: tuple[str, ...]) -> list[int]:
    """Return the number of each class's data set: classes are "set" or "set: class"."""
    return [
        max(
            (number for number, name in enumerate(names) if f"{each}: ".startswith(f"{name}: ")),
            key=lambda number: len(names[number]),
        )
        for each in classes
    ]


def load_learner(path: Any) -> MetricLearner:
    """Read a checkpoint: the learner as it was, with the averaged weights if there are any.

    Only tensors and plain values are read, no code.

    Raises:
        ValueError: it is no checkpoint of this project.
        OSError: it can't be read.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        stored = checkpoint[CHECKPOINT_KEY]
        weights = checkpoint["state_dict"]
    except OSError:
        raise
    except Exception as error:  # torch has no common base for what a broken file makes of it
        raise ValueError(f"{path}: no checkpoint of pg_siamese: {error}") from error
    learner = MetricLearner(
        parse_experiment(stored["experiment"]), tuple(stored["names"]), tuple(stored["classes"])
    )
    learner.load_state_dict(weights)
    return learner


class AverageWeights(WeightAveraging):
    """Exponential moving average of the weights (and batch-norm statistics).

    It is what is validated and exported. It makes up for the noise of the small validation splits.
    """

    def __init__(self, decay: float) -> None:
        def average(mean: Tensor, value: Tensor, count: Tensor | int) -> Tensor:
            # Short memory at first, so that the random start is soon forgotten.
            share = min(decay, (1 + int(count)) / (10 + int(count)))
            return mean + (1 - share) * (value - mean)

        super().__init__(avg_fn=average)


def joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> Embedded:
    """Join batches of (vectors, labels, sets)."""
    vectors, labels, sets = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return Embedded(vectors, labels, sets)


@torch.inference_mode()
def embed(encoder: torch.nn.Module, pixels: Tensor, batch_size: int = 256) -> np.ndarray:
    """Embed uint8 pixels (N, H, W, 3) with an encoder in evaluation mode: float32 (N, d)."""
    encoder.eval()
    parts = [encoder(part) for part in torch.split(pixels, batch_size)]
    return torch.cat(parts).cpu().numpy()
