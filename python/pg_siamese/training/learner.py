"""The Lightning module: encoder, metric-learning loss, optimiser and validation."""

from __future__ import annotations

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from pytorch_metric_learning.losses import CosFaceLoss
from torch import Tensor

from pg_siamese.training.data import Augmenter, Batch
from pg_siamese.training.encoder import ResidualEncoder
from pg_siamese.training.evaluation import Embedded, retrieval_by_set
from pg_siamese.training.experiments import Experiment


class MetricLearner(lightning.LightningModule):
    """Trains an encoder with a cosine-margin softmax over 'which class of which set'.

    The loss is CosFace (Wang et al. 2018) from pytorch-metric-learning: its class vectors are
    thrown away after training. Validation is the retrieval protocol itself: dataloader 0 is the
    gallery, dataloader 1 the queries; `val_map5` is the mean over the data sets.
    """

    def __init__(
        self, experiment: Experiment, names: tuple[str, ...], classes: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.experiment = experiment
        self.names = names
        self.encoder = ResidualEncoder(
            experiment.dimension, experiment.stem, experiment.stages, experiment.dropout
        )
        self.loss = CosFaceLoss(
            len(classes), experiment.dimension, margin=experiment.margin, scale=experiment.scale
        )
        self.augment = Augmenter(names, experiment.augmentation)
        self._seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of one augmented batch."""
        pixels, labels, sets = batch
        loss: Tensor = self.loss(self.encoder(self.augment(pixels, sets)), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the embeddings of the last validation."""
        self._seen = {0: [], 1: []}

    def validation_step(self, batch: Batch, batch_index: int, dataloader_idx: int) -> None:
        """Embed one batch of the gallery or of the queries."""
        pixels, labels, sets = batch
        self._seen[dataloader_idx].append((self.encoder(pixels), labels, sets))

    def on_validation_epoch_end(self) -> None:
        """Score the retrieval of the queries in the gallery, set by set."""
        gallery, queries = (joined(self._seen[number]) for number in (0, 1))
        self._seen = {}
        figures = retrieval_by_set(gallery, queries, self.names)
        for name, score in figures.items():
            self.log(f"val_map5/{name}", score.map5)
        mean = float(np.mean([score.map5 for score in figures.values()]))
        self.log("val_map5", mean, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW; the rate rises for a tenth of the steps and falls to zero along a cosine."""
        # Norms and biases are not decayed, as is usual.
        plain = [p for p in self.parameters() if p.ndim < 2]
        decayed = [p for p in self.parameters() if p.ndim >= 2]
        optimiser = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self.experiment.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=self.experiment.learning_rate,
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser,
            max_lr=self.experiment.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=0.1,
            cycle_momentum=False,
        )
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class AverageWeights(WeightAveraging):
    """Exponential moving average of the weights (and batch-norm statistics): what is validated
    and exported. It makes up for the noise of the small validation splits.
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
def embed(encoder: torch.nn.Module, pixels: Tensor, batch_size: int = 512) -> np.ndarray:
    """Embed uint8 pixels (N, H, W, 3) with an encoder in evaluation mode; float32 (N, d)."""
    encoder.eval()
    parts = [encoder(part) for part in torch.split(pixels, batch_size)]
    return torch.cat(parts).cpu().numpy()
