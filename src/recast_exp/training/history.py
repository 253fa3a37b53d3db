"""The history of a run: one row per epoch, in metrics.csv, in the checkpoint, and sent to the trackers."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L  # noqa: N812
from lightning.pytorch.callbacks import Callback

from recast_exp.data.loader import ImageLoader
from recast_exp.files import write_text
from recast_exp.runs import record as job_record


class History(Callback):
    """One row per epoch: metrics, learning rates, seconds.

    It is part of the checkpoint, so a continued run has all rows. A row goes to metrics.csv and, under the same
    names, to the trackers. Nothing else logs during training.

    Args:
        path: The file metrics.csv; None to write no file.
        measure: Returns further measurements at the end of each epoch, by name.
    """

    def __init__(self, path: Path | None, measure: Callable[[], dict[str, float]] = dict) -> None:
        self.path = path
        self._measure = measure
        self.rows: list[dict[str, float]] = []
        self.grew = False
        """Whether an epoch has ended since the run was started or continued."""
        self._started = self._validating = 0.0
        self._validated = False
        self._images = 0
        self._learning_rates: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Send the rows of a run that is continued to the trackers that would not have them otherwise."""
        for tracker in trainer.loggers:
            for row in self.rows if getattr(tracker, "starts_anew", False) else ():
                tracker.log_metrics(row, step=round(trainer.global_step * row["epoch"] / len(self.rows)))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and note the learning rates before the schedule changes them."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._learning_rates = {f"lr/{group['name']}": float(group["lr"]) for group in groups}
        self._started, self._validating, self._images = time.perf_counter(), 0.0, 0
        self._validated = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Count the images of all processes."""
        assert isinstance(trainer.train_dataloader, ImageLoader)
        self._images += trainer.train_dataloader.batch_sampler.share(batch_idx).total

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop counting training time."""
        self._validated = True
        self._validating -= time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count training time again."""
        self._validating += time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the epoch's row, rewrite metrics.csv, and send the row to the trackers."""
        row: dict[str, float] = {"epoch": trainer.current_epoch + 1}
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        measured = ("train/", "val/") if self._validated else ("train/",)  # else those of an earlier epoch
        row |= {name: metrics[name] for name in sorted(metrics) if name.startswith(measured)}
        row |= self._learning_rates | self._measure()
        row["images"] = self._images
        row["seconds"] = time.perf_counter() - self._started - self._validating
        self.rows.append(row)
        self.grew = True
        if self.path and trainer.is_global_zero:
            write_text(self.path, as_csv(self.rows))
            accuracy = {name: row[name] for name in ("val/accuracy",) if name in row}
            job_record.update(self.path.parent, epoch=int(row["epoch"]), **accuracy)
        for tracker in trainer.loggers:
            tracker.log_metrics(row, step=trainer.global_step)

    def state_dict(self) -> dict[str, object]:
        """The content of a checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, list[dict[str, float]]]) -> None:
        """Continue from a checkpoint."""
        self.rows = list(state_dict["rows"])


def as_csv(rows: list[dict[str, float]]) -> str:
    """Rows as CSV, floats to the last bit; a field is empty if its row lacks a name that another row has."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
