"""The recipe of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field

from recast_exp.config.schema import OptimizerConfig, SchedulerConfig, TrainerConfig
from recast_exp.training.objectives import Objective
from recast_exp.training.objectives.joint import Joint


@dataclass(frozen=True)
class Recipe:
    """The settings of training, apart from the model and the images.

    Attributes:
        optimizer: Optimiser, learning rates and loss.
        scheduler: Learning rates over the epochs.
        trainer: Device, precision and length.
        seed: Seed of the epochs.
        objective: What a step minimises.
        select: The epoch that is reported: the last, or the best by validation accuracy ("last", "best").
    """

    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    trainer: TrainerConfig
    seed: int
    select: str = "last"
    objective: Objective = field(default_factory=Joint)
