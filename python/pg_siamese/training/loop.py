"""From an experiment to a model file and its card: train, calibrate, evaluate, export, check."""

from __future__ import annotations

import logging
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import msgspec
import onnx
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from pg_siamese.datasets import DataFormatError, DataNotFoundError, DataSplits, open_dataset
from pg_siamese.evaluation.runtime import open_session
from pg_siamese.training.callbacks import EpochFigures, EpochLines, Snapshots
from pg_siamese.training.card import write_card
from pg_siamese.training.data import Batch, JoinedImages
from pg_siamese.training.experiments import ExperimentError
from pg_siamese.training.experiments.settings import Experiment
from pg_siamese.training.export import cosines, images_per_second, to_onnx
from pg_siamese.training.files import write_model
from pg_siamese.training.learner import AverageWeights, MetricLearner, load_learner
from pg_siamese.training.metadata import describe, left_out
from pg_siamese.training.quantise import calibration_pixels, quantised
from pg_siamese.training.sampling import Batches
from pg_siamese_server.encoding.specification import InputSpec
from pg_siamese_server.errors import counted

COSINE_AT_LEAST = 0.9999
# Mean of a quantised file. EfficientNet-lite0 reaches 0.995, another encoder's file 0.
QUANTISED_COSINE_AT_LEAST = 0.95
CHECKED_IMAGES = 500
FEATURES_AT_ONCE = 32
LAST = "last.ckpt"
BEST = "best.ckpt"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """What a training run gives: the encoder, also as ONNX, and what goes into file and card.

    ``unquantised`` is the graph that a quantised ``model`` was made of.
    """

    experiment: Experiment
    encoder: torch.nn.Module
    model: onnx.ModelProto
    splits: list[DataSplits]
    metadata: dict[str, Any]
    unquantised: onnx.ModelProto | None = None


class ExportError(RuntimeError):
    """The exported file doesn't agree with PyTorch, or there is nothing to export."""


def run_folder(runs: Path, experiment: Experiment) -> Path:
    """Return the folder of one run: checkpoints, figures, logs and the exported model."""
    return runs / experiment.name / f"seed-{experiment.seed}"


def run(
    experiment: Experiment,
    *,
    command: str,
    runs: Path,
    output: Path | None = None,
    resume: bool = False,
    threads: int = 2,
    say: Say = print,
) -> dict[str, Any]:
    """Train an experiment and write ``model.onnx`` and its card ``model.md`` into the run's folder.

    Args:
        experiment: what to train.
        command: the command line, for the metadata.
        runs: folder of all runs.
        output: another file to write the model to, with its card.
        resume: continue from the run's last checkpoint, if there is one.
        threads: threads of the CPU.
        say: called with lines of progress.

    Returns:
        The metadata written into the file.

    Raises:
        DataNotFoundError: the data is not available.
        ExperimentError: the experiment doesn't fit the data.
        ExportError: ONNX Runtime and PyTorch differ.
    """
    folder = run_folder(runs, experiment)
    trained = fit(
        experiment, command=command, folder=folder, resume=resume, threads=threads, say=say
    )
    return write(trained, folder / "model.onnx", output, say=say)


def write(
    trained: Trained, path: Path, output: Path | None = None, *, say: Say = print
) -> dict[str, Any]:
    """Export an encoder to ``path`` (and ``output``), check it, and write its model cards."""
    write_model(trained.model, path, trained.metadata)
    cosine = check(trained, path)
    speed = images_per_second(path)
    paths = [path]
    if output is not None and output.resolve() != path.resolve():
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, output)
        paths.append(output)
    for each in paths:
        say(f"{each}: {each.stat().st_size:,} bytes, {speed:,.0f} images/s on one thread")
        card = write_card(trained.experiment, trained.splits, trained.metadata, each, cosine, speed)
        say(f"{card}: model card")
    return trained.metadata


def fit(
    experiment: Experiment,
    *,
    command: str,
    folder: Path,
    resume: bool = False,
    threads: int = 2,
    test: bool = True,
    say: Say = print,
) -> Trained:
    """Train, calibrate on validation pairs and evaluate.

    ``test=False`` leaves the test split alone, for choosing settings. ``resume`` continues from the
    last checkpoint in ``folder``, if there is one.
    """
    torch.set_num_threads(threads)
    _quiet()
    lightning.seed_everything(experiment.seed, workers=True, verbose=False)
    splits = open_splits(experiment, say)
    train = JoinedImages([s.for_training() for s in splits], experiment.labels)
    val = JoinedImages([s.val for s in splits], experiment.labels)
    for name, count in left_out(splits).items():
        say(f"left out: {counted(count, 'train image')} of {name}, whose groups are held out, too")
    learner = MetricLearner(experiment, train.names, train.classes)
    for part in (train, val):
        if not len(part):
            raise DataFormatError(
                f"{experiment.name}: too few images: none is left for the validation split. Each "
                "class needs some eight"
            )
    say(
        f"training {experiment.name}: {len(train):,} images of {len(train.names)} data sets in "
        f"{len(train.classes)} classes, {experiment.epochs} epochs"
    )
    start = folder / LAST if resume and (folder / LAST).is_file() else None
    if start is None:
        shutil.rmtree(folder, ignore_errors=True)
    elif resume:
        say(f"going on from {start}")
    folder.mkdir(parents=True, exist_ok=True)
    validation = experiment.validation
    every = min(validation.every, experiment.epochs)
    monitor: dict[str, Any] = {"monitor": validation.monitor, "mode": validation.mode}
    checkpoint = partial(
        ModelCheckpoint, folder, save_on_train_epoch_end=True, enable_version_counter=False
    )
    callbacks: list[Callback] = [
        LearningRateMonitor("step"),
        TQDMProgressBar(refresh_rate=10) if sys.stderr.isatty() else EpochLines(),
        EpochFigures(folder / "metrics.json", every),
        checkpoint(filename=Path(BEST).stem, every_n_epochs=every, **monitor),
        # Of its own: ``save_last`` of the one above keeps the last of the best. After all else of
        # the epoch, so that a resumed run starts with the next one.
        checkpoint(filename=Path(LAST).stem),
    ]
    if experiment.average_decay:
        callbacks.append(AverageWeights(experiment.average_decay))
    if validation.patience:
        callbacks.append(EarlyStopping(patience=validation.patience, **monitor))
    if experiment.snapshots:
        callbacks.append(
            Snapshots(folder / "snapshots.npz", val, experiment.snapshots, experiment.seed)
        )
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=experiment.epochs,
        check_val_every_n_epoch=every,
        num_sanity_val_steps=0,
        logger=TensorBoardLogger(str(folder), name="", version="tensorboard"),
        callbacks=callbacks,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
        deterministic="warn",
    )
    gallery = train.some(validation.gallery, experiment.seed)
    learned, gallery, val = _cached(learner, train, gallery, val, say)
    drawn = Batches(
        learned.labels,
        experiment.sampling,
        experiment.batch_size,
        learner.objective.takes,
        experiment.seed,
        len(train),
        torch.tensor([experiment.sampling.shares.get(name, 1.0) for name in train.names])[
            learned.sets
        ],
    )
    trainer.fit(
        learner,
        DataLoader(learned, sampler=drawn, batch_size=None),
        [in_order(gallery), in_order(val)],
        ckpt_path=start,
        weights_only=True,
    )
    chosen = folder / (BEST if validation.keep == "best" else LAST)
    if not chosen.is_file():
        raise ExperimentError(
            f'no checkpoint was written: "{validation.monitor}" is not among the figures of '
            f"validation: {', '.join(sorted(trainer.callback_metrics))}"
        )
    learner = load_learner(chosen)
    return finish(learner, splits, command=command, test=test, say=say)


def export_checkpoint(
    checkpoint: Path, output: Path | None, *, threads: int = 2, say: Say = print
) -> dict[str, Any]:
    """Export a checkpoint, or that of a run's folder which its experiment keeps.

    The data is opened again, for calibration and figures.

    Raises:
        ExportError: there is no checkpoint, or as in ``run``.
    """
    torch.set_num_threads(threads)
    _quiet()
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if checkpoint.is_dir():
        found = [folder / name for name in (LAST, BEST) if (folder / name).is_file()]
        if not found:
            raise ExportError(f"{folder}: neither {BEST} nor {LAST} is in this folder")
        keep = load_learner(found[0]).experiment.validation.keep
        checkpoint = folder / (BEST if keep == "best" and folder / BEST in found else found[0].name)
    try:
        learner = load_learner(checkpoint)
    except ValueError as error:
        raise ExportError(str(error)) from error
    splits = open_splits(learner.experiment, say)
    command = f"pg_siamese train {learner.experiment.name} --seed {learner.experiment.seed}"
    trained = finish(learner, splits, command=command, say=say)
    return write(trained, output or folder / "model.onnx", say=say)


def finish(
    learner: MetricLearner,
    splits: list[DataSplits],
    *,
    command: str,
    test: bool = True,
    say: Say = print,
) -> Trained:
    """Calibrate and evaluate a trained encoder, as its file will be: by ONNX Runtime."""
    encoder = learner.encoder.cpu().eval()
    encoder.requires_grad_(False)
    experiment = learner.experiment
    size, half = experiment.input, experiment.weights == "float16"
    model = to_onnx(encoder, (size.height, size.width), half)
    unquantised = None
    if experiment.weights == "int8":
        say("quantising the convolutions")
        unquantised = model
        model = quantised(model, calibration_pixels(splits, experiment.seed))
    metadata = describe(
        experiment,
        model.SerializeToString(),
        splits,
        command=command,
        head=learner.objective.calibration(),
        unquantised=None if unquantised is None else unquantised.SerializeToString(),
        test=test,
        say=say,
    )
    return Trained(experiment, encoder, model, splits, metadata, unquantised)


def open_splits(experiment: Experiment, say: Say = print) -> list[DataSplits]:
    """Open the experiment's data sets, at its input's size.

    Raises:
        DataNotFoundError: a set is not available. With ``skip_missing``: no set is available.
        ExperimentError: the experiment names no data, or two sets have one name.
    """
    if not experiment.data:
        raise ExperimentError(f"{experiment.name} needs data: --data folder:PATH, for example")
    spec = InputSpec(**msgspec.structs.asdict(experiment.input))
    found, missing = [], []
    for text in experiment.data:
        try:
            found.append(open_dataset(text, seed=experiment.seed, input_spec=spec))
        except DataNotFoundError as error:
            if not experiment.skip_missing:
                raise
            missing.append(str(error))
            say(f"left out: {error}")
    if not found:
        raise DataNotFoundError("; ".join(missing))
    names = [splits.name for splits in found]
    if len(set(names)) < len(names):
        raise ExperimentError(f"two data sets have one name: {', '.join(names)}")
    return found


def check(trained: Trained, path: Path) -> float:
    """Compare the file with PyTorch on test images of each set.

    Quantised convolutions change each embedding. So PyTorch's are those of the graph before it was
    quantised, and those of the file are near them in the mean.

    Returns:
        The least cosine to the graph, before it was quantised.

    Raises:
        ExportError: the cosine is too low.
    """
    parts = [each.test.rgb()[:CHECKED_IMAGES] for each in trained.splits]
    exact: Path | bytes = path
    if trained.unquantised is not None:
        exact = trained.unquantised.SerializeToString()
        mean = min(float(cosines(trained.encoder, path, part).mean()) for part in parts)
        if not mean >= QUANTISED_COSINE_AT_LEAST:
            raise ExportError(f"{path}: mean cosine to PyTorch's embeddings is {mean:.6f}")
    cosine = min(float(cosines(trained.encoder, exact, part).min()) for part in parts)
    if not cosine >= COSINE_AT_LEAST:
        raise ExportError(f"{path}: cosine to PyTorch's embedding is {cosine:.6f}")
    return cosine


def as_it_is(batch: Any) -> Any:
    """Collate nothing: ``JoinedImages`` gives whole batches."""
    return batch


def in_order(images: JoinedImages, batch_size: int = 256) -> DataLoader[Batch]:
    """Load images in their order."""
    return DataLoader(images, batch_size=batch_size, collate_fn=as_it_is)


def _cached(
    learner: MetricLearner, train: JoinedImages, gallery: JoinedImages, val: JoinedImages, say: Say
) -> tuple[JoinedImages, JoinedImages, JoinedImages]:
    """Put what frozen layers give in the place of the pixels: it is the same every time.

    Train images are there ``copies`` times: once as they are, otherwise changed at random.
    """
    network: Any = learner.encoder
    copies = learner.experiment.copies
    if not hasattr(network, "frozen"):
        if copies > 1:
            raise ExperimentError(f"copies is {copies}: the network has no frozen layers")
        return train, gallery, val
    shared = gallery is train
    total = copies * len(train) + (0 if shared else len(gallery)) + len(val)
    say(f"computing the features of {total:,} images once")
    # ONNX Runtime is several times as quick as PyTorch on a CPU.
    size = (learner.experiment.input.height, learner.experiment.input.width)
    graph = to_onnx(_Features(network), size).SerializeToString()
    session = open_session(graph, torch.get_num_threads())
    step = max(1, total // 20)
    done = 0

    def features(images: JoinedImages, times: int = 1) -> JoinedImages:
        nonlocal done
        rows = times * len(images)
        kept: torch.Tensor | None = None
        for start in range(0, rows, FEATURES_AT_ONCE):
            places = torch.arange(start, min(start + FEATURES_AT_ONCE, rows))
            pixels, _, sets = images[(places % len(images)).tolist()]
            later = places >= len(images)
            if later.any():
                changed = learner.augment(pixels[later], sets[later])
                pixels[later] = changed.round().to(torch.uint8)
            found = torch.from_numpy(session.run(None, {"image": pixels.numpy()})[0])
            if kept is None:
                # Half as many bytes. What is lost is less than what a change of the image adds.
                kept = torch.empty((rows, *found.shape[1:]), dtype=torch.float16)
            kept[start : start + len(found)] = found
            done += len(found)
            if done == total or done // step > (done - len(found)) // step:
                say(f"features: {done:,} of {total:,}")
        assert kept is not None
        return images.with_pixels(kept, times)

    torch.manual_seed(learner.experiment.seed)
    known = features(train, copies)
    gallery = train.with_pixels(known.pixels[: len(train)]) if shared else features(gallery)
    queries = features(val)
    learner.on_features = True
    return known, gallery, queries


class _Features(torch.nn.Module):
    """The frozen layers of a network alone."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return their features of uint8 pixels (N, H, W, 3)."""
        found: torch.Tensor = self.network.features(image)  # type: ignore[operator]
        return found


def _quiet() -> None:
    # Lightning talks of devices that aren't there and of loader processes that aren't needed.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    for part in (
        "treespec, LeafSpec",
        "does not have many workers",
        "number of training batches",
        "exists and is not empty",
        "in eval mode at the start of training",  # frozen layers are, on purpose
    ):
        warnings.filterwarnings("ignore", message=f".*{part}.*")
