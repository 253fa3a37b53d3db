"""The recipe of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from recast_exp.config.schema import OptimizerConfig, SchedulerConfig, TrainerConfig


@dataclass(frozen=True)
class Recipe:
    """The settings of training, apart from the model and the images.

    Attributes:
        optimizer: Optimiser, learning rates and loss.
        scheduler: Learning rates over the epochs.
        trainer: Device, precision and length.
        seed: Seed of the epochs.
        select: The epoch that is reported: the last, or the best by validation accuracy ("last", "best").
    """

    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    trainer: TrainerConfig
    seed: int
    select: str = "last"
