"""What is kept of a run while it trains: its history, metrics.csv, and the trackers beside them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from recast_exp.data.loader import ImageLoader
from recast_exp.errors import Pruned
from recast_exp.files import write_text
from recast_exp.models.label import method_label
from recast_exp.runs import record as job_record
from recast_exp.tracking.wandb_sync import how_to_sync

log = logging.getLogger(__name__)


class Tracker(Logger):
    """What follows a run beside its files: one of Lightning's loggers that takes the results, and an end, too."""

    @abstractmethod
    def report(self, run_dir: Path, summary: Mapping[str, Any]) -> None:
        """Take the results of a finished run.

        Args:
            run_dir: Folder of the run, with its plots and its task file.
            summary: Name → result.
        """

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """End the run, well or not, so that the next job of this process starts one of its own."""


class History(Callback):
    """One row per epoch: metrics, learning rates, seconds. Part of the checkpoint, so a continued run has all of it.

    A row goes to metrics.csv and, under the same names, to the trackers: nothing else logs while a run trains.

    Args:
        path: The file metrics.csv; None writes none.
        measure: Gives more numbers at the end of each epoch, by name.
    """

    def __init__(self, path: Path | None, measure: Callable[[], dict[str, float]] = dict) -> None:
        self.path = path
        self._measure = measure
        self.rows: list[dict[str, float]] = []
        self.running = False
        self._started = self._validating = 0.0
        self._images = 0
        self._rates: dict[str, float] = {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and note the learning rates before the schedule moves on."""
        self.running = True
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._rates = {f"lr/{group['name']}": float(group["lr"]) for group in groups}
        self._started, self._validating, self._images = time.perf_counter(), 0.0, 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images, over all processes."""
        assert isinstance(trainer.train_dataloader, ImageLoader)
        self._images += trainer.train_dataloader.batch_sampler.share(batch_idx).total

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop counting training time."""
        self._validating -= time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count training time again."""
        self._validating += time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the epoch's row, rewrite metrics.csv, and send the row to the trackers."""
        row: dict[str, float] = {"epoch": trainer.current_epoch + 1}
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        row |= {name: metrics[name] for name in sorted(metrics) if name.startswith(("train/", "val/"))}
        row |= self._rates | self._measure()
        row["images"] = self._images
        row["seconds"] = time.perf_counter() - self._started - self._validating
        self.rows.append(row)
        if self.path and trainer.is_global_zero:
            write_text(self.path, as_csv(self.rows))
            accuracy = {"val/accuracy": row.get("val/accuracy")}
            job_record.update(self.path.parent, epoch=int(row["epoch"]), **accuracy)
        for tracker in trainer.loggers:
            tracker.log_metrics(row, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.rows = list(state_dict["rows"])


def as_csv(rows: list[dict[str, float]]) -> str:
    """Rows as CSV, floats to the last bit; a name that a row does not have is left empty."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@contextlib.contextmanager
def tracked(cfg: DictConfig, run_dir: Path, group: str | None) -> Iterator[list[Tracker]]:
    """The trackers of a job, closed when the block ends: as failed, where it ends with an exception of any kind.

    Args:
        cfg: The whole configuration.
        run_dir: Folder of the run.
        group: Folder of the sweep that the run belongs to, if any.

    Yields:
        The tracker that the configuration names, if any; metrics.csv is written by `History` in any case.
    """
    trackers = _trackers(cfg, run_dir, group)
    failed = True
    try:
        yield trackers
        failed = False
    except Pruned:  # a search has given the trial up: no failure
        failed = False
        raise
    finally:
        for tracker in trackers:
            tracker.close(failed=failed)
        if failed and group is None:  # a sweep says it once, for all
            say_how_to_sync(run_dir)


def report_results(trackers: Sequence[Tracker], run_dir: Path) -> None:
    """Send what stands in the folder of a finished run: results, counts, plots, the task file."""
    summary = results(run_dir) if trackers else {}
    for tracker in trackers:
        tracker.report(run_dir, summary)


def results(run_dir: Path) -> dict[str, Any]:
    """The results of a run, flat: metrics.json under its own names, the counts as `parameters/…`."""
    metrics: dict[str, Any]
    counts: dict[str, Any]
    metrics, counts = (
        json.loads((run_dir / f"{name}.json").read_text(encoding="utf-8")) for name in ("metrics", "parameters")
    )
    return metrics | {f"parameters/{name}": count for name, count in counts.items() if not isinstance(count, dict)}


@rank_zero_only
def say_how_to_sync(folder: Path) -> None:
    """Log how to upload what W&B has written offline below a folder, if anything; meant as a stage's last line."""
    if command := how_to_sync(folder):
        log.info("W&B is offline; upload with: %s", command)


def facts(cfg: DictConfig) -> dict[str, Any]:
    """What a run is, flat, for trackers to group and filter by; `method` is the label of tables and plots."""
    return {
        "method": method_label(cfg.label, cfg.model, cfg.adapter),
        "model": cfg.model.name,
        "adapter": cfg.adapter.name,
        "dataset": cfg.dataset.name,
        "seed": cfg.seed,
    }


def _trackers(cfg: DictConfig, run_dir: Path, group: str | None) -> list[Tracker]:
    """The libraries are imported for those who use them alone: W&B's takes seconds."""
    if cfg.logger.name == "tensorboard":
        from recast_exp.tracking.tensorboard_run import TensorBoardRun

        return [TensorBoardRun(run_dir, facts(cfg))]
    if cfg.logger.name == "wandb":
        from recast_exp.tracking.wandb_run import start

        return [start(cfg, run_dir, facts(cfg), "/".join(Path(group).parts[-2:]) if group else None)]
    return []
