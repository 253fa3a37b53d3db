"""Lightning's trainer as every stage uses it: quiet, with atomic checkpoints, on the devices of a recipe."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import lightning as L  # noqa: N812
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import Logger

from recast_exp.files import replacing
from recast_exp.torch_state import seeded, threads
from recast_exp.training.checkpoint import read_checkpoint
from recast_exp.training.environment import OneProcess, check_device, own_rank, thread_count
from recast_exp.training.recipe import Recipe

_bars = contextvars.ContextVar("bars", default=True)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are either complete or absent, and are read without unpickling code."""

    def save_checkpoint(self, checkpoint: dict[str, object], path: str | Path, storage_options: object = None) -> None:
        """Write to a temporary file, sync it to disk, and replace the old one."""
        with replacing(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = None
    ) -> dict[str, object]:
        """Read a checkpoint of plain tensors and containers.

        Raises:
            UserError: If it is no checkpoint of a run, or its numbers are not finite.
        """
        return read_checkpoint(Path(path))


@contextlib.contextmanager
def progress_bars(wanted: bool) -> Iterator[None]:
    """Set whether training shows progress bars in a terminal, within the block."""
    token = _bars.set(wanted)
    try:
        yield
    finally:
        _bars.reset(token)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence hints of libraries, and warnings about usage that is intended here."""
    names = ["lightning.pytorch", "lightning.fabric", "lightning", "timm"]
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
            warnings.filterwarnings("ignore", message=".*epoch parameter in `scheduler.step.*")
            warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
            warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
            warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
            warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", message="Encountered `nan` values.*")
            warnings.filterwarnings("ignore", message=".*decompression bomb.*")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def trainer_for(
    recipe: Recipe,
    callbacks: list[Callback],
    loggers: Sequence[Logger],
    run_dir: Path | None,
    description: str,
    *,
    alone: bool = False,
) -> Iterator[L.Trainer]:
    """Lightning's trainer for a recipe; the seed, the number of threads and the rank hold within the block.

    Args:
        recipe: The settings of training.
        callbacks: Its callbacks.
        loggers: Trackers.
        run_dir: Folder for checkpoints; None makes none.
        description: Title of the progress bar.
        alone: Whether this process computes by itself, on all images, whatever devices and limit the run has.
    """
    options = (
        dataclasses.replace(recipe.trainer, devices=1, strategy="auto", limit_batches=None) if alone else recipe.trainer
    )
    check_device(options)
    show = _bars.get() and sys.stderr.isatty()
    if show:
        callbacks = [*callbacks, _ProgressBar(description)]
    environment = [OneProcess()] if options.devices == 1 else []
    with seeded(recipe.seed), threads(thread_count(options)), own_rank(options.devices), _without_variables():
        yield L.Trainer(
            accelerator=options.accelerator,
            devices=options.devices,
            strategy=options.strategy,
            precision=options.precision,  # type: ignore[arg-type]  # one of the schema's choices
            max_epochs=options.max_epochs,
            check_val_every_n_epoch=min(options.validate_every, options.max_epochs),
            accumulate_grad_batches=options.accumulate,
            gradient_clip_val=options.gradient_clip or None,
            limit_train_batches=options.limit_batches or 1.0,
            limit_val_batches=options.limit_batches or 1.0,
            limit_test_batches=options.limit_batches or 1.0,
            logger=list(loggers) or False,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO(), *environment],
            enable_checkpointing=run_dir is not None,
            enable_progress_bar=show,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            default_root_dir=run_dir,
        )


@contextlib.contextmanager
def _without_variables() -> Iterator[None]:
    """Within the block, the variables are unset with which the environment sets options of Lightning's trainer."""
    found = {name: value for name, value in os.environ.items() if name.startswith("PL_TRAINER_")}
    for name in found:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(found)


class _ProgressBar(TQDMProgressBar):
    """A progress bar in one line, which is removed at the end."""

    def __init__(self, description: str) -> None:
        super().__init__(leave=False)
        self._description = description

    def init_train_tqdm(self) -> Tqdm:
        """Lightning's bar with the description as its title."""
        bar = super().init_train_tqdm()
        bar.set_description(self._description)
        return bar

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Leave out the version number that a logger adds."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
