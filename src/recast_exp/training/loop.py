"""The training loop: Lightning's, with the seeds, checkpoints and results of this project.

Randomness follows from (seed, epoch), and checkpoints are written after whole epochs. So on the CPU, a run that was
stopped and continued is equal, bit for bit, to one that was not.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor

from recast_exp import system
from recast_exp.data.datamodule import ImageDataModule
from recast_exp.data.loader import derive_seed
from recast_exp.errors import RecastError, UserError
from recast_exp.models.adapted import CHANGE, AdaptedModel
from recast_exp.models.features import full_precision
from recast_exp.models.task_file import copy_into
from recast_exp.runs import layout
from recast_exp.runs.results import LEFT_OUT, TESTED
from recast_exp.training.activations import kept
from recast_exp.training.history import History
from recast_exp.training.module import TaskModule
from recast_exp.training.recipe import Recipe
from recast_exp.training.trainer import trainer_for

log = logging.getLogger(__name__)

KEPT = ("train/", "val/", "adapter/")  # with CHANGE, the columns of the reported epoch that become results
BEST = "best"  # the value of `select` that reports the epoch with the best validation accuracy


@dataclass
class FitResult:
    """The result of a training run.

    Attributes:
        metrics: `train/…`, `val/…`, `adapter/…` and `coefficients/change` of the reported epoch, and `epochs`,
            `seconds`, `images_per_second`.
        history: One row per epoch.
        facts: What else there is to say, in words.
    """

    metrics: dict[str, float]
    history: list[dict[str, float]]
    facts: dict[str, str] = field(default_factory=dict)


class EpochSeed(Callback):
    """Seeds each epoch by (seed, epoch): the random numbers of an epoch do not depend on earlier ones."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed torch's generators, on the CPU and the accelerators."""
        torch.manual_seed(derive_seed(self.seed, trainer.current_epoch, "epoch"))


class LastCheckpoint(ModelCheckpoint):
    """Writes the checkpoint of each epoch in the place of the one before.

    It takes nothing from the checkpoint that a run is continued from. Its state there names files, which Lightning
    would look for, and remove: a folder of others must not choose them.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Leave the state as it is."""


def fit(
    recipe: Recipe,
    adapted: AdaptedModel,
    data: ImageDataModule,
    *,
    run_dir: Path | None = None,
    loggers: Sequence[Logger] = (),
    description: str = "training",
    more: Sequence[Callback] = (),
) -> FitResult:
    """Train a model's task parameters, in place; afterwards they are those of the reported epoch.

    The caller's random generators and number of threads are restored afterwards.

    Args:
        recipe: The settings of training.
        adapted: The model.
        data: The images.
        run_dir: Folder for checkpoints and `metrics.csv`; a checkpoint in it is continued. None keeps everything in
            memory.
        loggers: Trackers.
        description: Title of the progress bar.
        more: Further callbacks.

    Raises:
        UserError: If the device is not available, training diverges, or a checkpoint to continue is damaged.
    """
    recipe.objective.check_images(np.bincount(data.image_set.splits["train"].labels))
    adapted.set_trainable(*recipe.objective.trains)
    module = TaskModule(adapted, recipe, len(data.image_set.classes), data)
    if recipe.trainer.compile:
        adapted.network.compile()

    def measured() -> dict[str, float]:
        return adapted.coefficient_changes() | adapted.adapter.measure(adapted.network)

    history = History(run_dir / layout.HISTORY if run_dir else None, measured)
    callbacks: list[Callback] = [EpochSeed(recipe.seed), history, *more]
    if recipe.trainer.early_stopping:
        callbacks.append(Patience("val/loss", patience=recipe.trainer.early_stopping))
    snapshots = Snapshots(adapted) if recipe.select == BEST else None
    if snapshots:
        callbacks.append(snapshots)
    checkpoint = None
    if run_dir:
        last = layout.checkpoint(run_dir)
        callbacks.append(
            LastCheckpoint(
                last.parent, last.stem, save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=True
            )
        )
        checkpoint = last if last.is_file() else None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with (
        full_precision(adapted.network),
        kept(recipe, adapted, data) as module.resumable,
        trainer_for(recipe, callbacks, loggers, run_dir, description) as trainer,
    ):
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except SystemExit:
            if trainer.interrupted:  # Lightning has shut down cleanly; the command line has an exit code for it
                raise KeyboardInterrupt from None
            raise
        except Exception as error:  # a damaged file can raise anything
            of_machine = isinstance(error, MemoryError | OSError) or re.search("memory|DataLoader worker", str(error))
            if checkpoint is None or history.grew or of_machine or isinstance(error, RecastError):
                raise
            raise UserError(
                f"resume: expected a checkpoint of this run, got {checkpoint}, which is damaged or of another run "
                f"({type(error).__name__}); start the run from scratch"
            ) from error
    row = history.rows[-1]
    if snapshots:
        row = history.rows[snapshots.epoch]
        copy_into(adapted, snapshots.tensors)
    reported = {name: value for name, value in row.items() if name.startswith(KEPT) or name == CHANGE}
    seconds = sum(row["seconds"] for row in history.rows)
    images = sum(row["images"] for row in history.rows)
    return FitResult(
        reported
        | {
            "epoch": row["epoch"],
            "epochs": len(history.rows),
            "seconds": seconds,
            "images_per_second": images / seconds,
        },
        history.rows,
    )


def validate(recipe: Recipe, adapted: AdaptedModel, data: ImageDataModule) -> dict[str, float]:
    """Metrics of a model on the validation images, by name (`val/accuracy`)."""
    module = TaskModule(adapted, recipe, len(data.image_set.classes))
    with full_precision(adapted.network), trainer_for(recipe, [], (), None, "validation") as trainer:
        trainer.validate(module, datamodule=data, verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


@dataclass
class Prediction:
    """The prediction of a model for a test image.

    Attributes:
        image: Number of the image in the test split.
        label: Its class.
        predicted: The most probable class.
        probability: The probability of that class.
        loss: Cross-entropy.
    """

    image: int
    label: int
    predicted: int
    probability: float
    loss: float


@dataclass
class Tested:
    """The result of a test.

    Attributes:
        metrics: `test/accuracy`, `test/loss`, … and `test/accuracy_per_class/NAME` of each class with images. Where not
            all test images were tested, `test/images` and `test/images_left_out`.
        predictions: One for each test image that was tested, in the order of the split.
    """

    metrics: dict[str, float]
    predictions: list[Prediction]


def test(recipe: Recipe, adapted: AdaptedModel, data: ImageDataModule, loggers: Sequence[Logger] = ()) -> Tested:
    """Measure a model on the test images."""
    module = TaskModule(adapted, recipe, len(data.image_set.classes))
    with full_precision(adapted.network), trainer_for(recipe, [], loggers, None, "testing") as trainer:
        trainer.test(module, datamodule=data, verbose=False)
    # `Trainer.test` returns only the metrics that it logs to trackers itself: none here
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    classes, labels = data.image_set.classes, set(data.image_set.splits["test"].labels.tolist())
    accuracies = zip(classes, module.per_class.compute().tolist(), strict=True)
    per_class = {name: accuracy for label, (name, accuracy) in enumerate(accuracies) if label in labels}
    rows = sorted(module.predictions.compute().tolist())
    predictions = [Prediction(*map(int, row[:3]), *row[3:]) for row in rows]
    metrics |= {f"test/accuracy_per_class/{name}": accuracy for name, accuracy in per_class.items()}
    if left_out := len(data.image_set.splits["test"]) - len(predictions):
        metrics |= {TESTED: len(predictions), LEFT_OUT: left_out}
        log.warning(
            "trainer.limit_batches: only %d of %d test images are tested", len(predictions), len(predictions) + left_out
        )
    return Tested(metrics, predictions)


class Patience(EarlyStopping):
    """Early stopping that survives a restart: a run that had stopped does not train further."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop again if it had stopped before."""
        trainer.should_stop = self.wait_count >= self.patience or self.stopped_epoch > 0


class Snapshots(Callback):
    """Keeps the task parameters of the epoch with the best validation accuracy; of equals, the first."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self._adapted = adapted
        self.best = -1.0
        self.epoch = 0
        self.tensors: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse to go on where the best epoch so far is not known."""
        if trainer.current_epoch >= (trainer.check_val_every_n_epoch or 1) and not self.tensors:
            raise UserError(
                "resume: expected a checkpoint with its best epoch, got one without; start the run from scratch"
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the parameters if the epoch is the best so far."""
        accuracy = trainer.callback_metrics["val/accuracy"].item()
        if accuracy > self.best:
            self.best, self.epoch = accuracy, trainer.current_epoch
            self.tensors = {name: tensor.cpu().clone() for name, tensor in self._adapted.task_tensors().items()}

    def state_dict(self) -> dict[str, object]:
        """The content of a checkpoint."""
        return {"best": self.best, "epoch": self.epoch, "tensors": self.tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.best, self.epoch, self.tensors = state_dict["best"], state_dict["epoch"], state_dict["tensors"]


def memory() -> dict[str, float]:
    """`peak_memory_mb` (10⁶ bytes): of this run on a GPU if it uses one, otherwise of the process so far, if known."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return {"peak_memory_mb": torch.cuda.max_memory_allocated() / 1e6}
    peak = system.peak_memory_mb()
    return {} if peak is None else {"peak_memory_mb": peak}
