"""What is kept of a run while it trains: its history, metrics.csv, and the trackers beside them."""

from __future__ import annotations

import csv
import io
import os
import time
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from recast_exp import job_record
from recast_exp.data.loader import ImageLoader
from recast_exp.files import write_text


class History(Callback):
    """One row per epoch: metrics, learning rates, seconds. Part of the checkpoint, so a continued run has all of it."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
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
        """Add the epoch's row and rewrite metrics.csv."""
        row: dict[str, float] = {"epoch": trainer.current_epoch + 1}
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        row |= {name: metrics[name] for name in sorted(metrics) if name.startswith(("train/", "val/"))}
        row |= self._rates
        row["images"] = self._images
        row["seconds"] = time.perf_counter() - self._started - self._validating
        self.rows.append(row)
        if self.path and trainer.is_global_zero:
            write_text(self.path, as_csv(self.rows))
            accuracy = {"val/accuracy": row.get("val/accuracy")}
            job_record.update(self.path.parent, epoch=int(row["epoch"]), **accuracy)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.rows = list(state_dict["rows"])


def as_csv(rows: list[dict[str, float]]) -> str:
    """Rows as CSV, floats to the last bit."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def make_loggers(cfg: DictConfig, run_dir: Path, group: str | None) -> list[Logger]:
    """The tracker of the configuration, if any; `metrics.csv` is written by `History` in any case.

    Args:
        cfg: The whole configuration.
        run_dir: Folder of the run.
        group: W&B group where the configuration names none.
    """
    if cfg.logger.name == "tensorboard":
        return [TensorBoardLogger(run_dir, name="", version="tensorboard")]
    if cfg.logger.name != "wandb":
        return []
    mode = cfg.logger.mode
    if mode == "auto":
        mode = "online" if has_wandb_key() else "offline"
    adapter = [cfg.adapter.name] if cfg.adapter.name != "none" else []
    # `mode` itself: Lightning's offline=True sets an environment variable, which a second run of a process ignores.
    logger = WandbLogger(
        name="-".join(str(part) for part in (cfg.model.name, *adapter, cfg.dataset.name, cfg.seed)),
        save_dir=run_dir,
        project=cfg.logger.project,
        entity=cfg.logger.entity,
        group=cfg.logger.group or group,
        job_type=cfg.stage.name,
        tags=[cfg.model.name, cfg.adapter.name, cfg.dataset.name, f"seed{cfg.seed}"],
        config=OmegaConf.to_container(cfg, resolve=True),
        mode=mode,
    )
    return [logger]


def finish_loggers(loggers: list[Logger], *, failed: bool) -> None:
    """Close the trackers, so that the next job of a process starts a run of its own."""
    for logger in loggers:
        logger.finalize("failed" if failed else "success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=int(failed))


def has_wandb_key() -> bool:
    """Whether W&B could log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="ignore")
