"""What a training objective is: what a step minimises, which images it takes, and which parameters it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from recast_exp.config.schema import Config
from recast_exp.data.episodes import Episodes
from recast_exp.heads.ridge import Ridge
from recast_exp.models.adapted import KINDS
from recast_exp.models.features import set_head

if TYPE_CHECKING:
    from recast_exp.training.module import TaskModule


@dataclass(frozen=True)
class Step:
    """What a training step computes.

    Attributes:
        loss: What is minimised, a scalar with its gradient.
        logits: [B, C] of the images that it was measured on, for the metrics of training.
        labels: [B], their classes.
    """

    loss: Tensor
    logits: Tensor
    labels: Tensor


def classify(module: TaskModule, images: Tensor, labels: Tensor) -> Step:
    """The cross-entropy of a batch under the head as it is.

    Args:
        module: What trains.
        images: Normalised, float32 [B, 3, H, W].
        labels: int64, of the first images: those of this process.
    """
    logits = module(images)[: len(labels)]
    return Step(module.loss(logits.float(), labels, module.recipe.optimizer.label_smoothing), logits, labels)


def solve_head(module: TaskModule, strength: float, scale: float) -> None:
    """Make ridge regression on all training images the head of the model.

    Args:
        module: What trains.
        strength: Penalty, of the mean variance of a feature.
        scale: Factor on the logits.
    """
    (solution,) = Ridge().solve(module.training_features(), [{"strength": strength}])
    set_head(module.network, solution.scaled(scale))


@dataclass
class Objective(ABC):
    """An objective. The fields of a subclass are its options.

    Attributes:
        trains: Kinds of parameters that gradient descent trains.
        solves_head: Whether the head has to be one that is solved.
        needs_features: Whether `TaskModule.training_features` is called, which reads the training images unaltered.
    """

    trains: ClassVar[tuple[str, ...]] = KINDS
    solves_head: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False

    def problems(self, settings: Config) -> Iterator[str]:
        """What contradicts this objective in the settings of a job. One line each."""
        trainer, name = settings.trainer, settings.training["name"]
        if self.needs_features and trainer.devices > 1:
            yield (
                f"training: expected joint with trainer.devices={trainer.devices}, got {name}; add training=joint, or "
                "use one device"
            )
        if self.solves_head and trainer.head_first_epochs:
            yield (
                f"trainer.head_first_epochs: expected 0 with training={name}, whose head does not train, got "
                f"{trainer.head_first_epochs}"
            )

    def check_images(self, counts: NDArray[np.int64]) -> None:
        """Refuse training images that this objective cannot learn from.

        Args:
            counts: [C], training images of each class.

        Raises:
            UserError: One line.
        """
        return

    def episodes(self) -> Episodes | None:
        """How training images are divided into steps; None for batches of `dataset.batch_size`."""
        return None

    def state(self) -> nn.Module | None:
        """Parameters of its own, which train with the task's and are no part of the task; None where it has none."""
        return None

    @property
    def lr(self) -> float:
        """Learning rate of the parameters of its own."""
        return 0.0

    @abstractmethod
    def step(self, module: TaskModule, images: Tensor, labels: Tensor, batch_idx: int) -> Step:
        """The loss of a batch.

        Args:
            module: What trains.
            images: Normalised, float32 [B, 3, H, W].
            labels: int64 [B].
            batch_idx: Number of the batch in the epoch.
        """

    def before_epoch(self, module: TaskModule) -> None:
        """Prepare the model for an epoch of training; nothing by default."""
        return

    def before_validation(self, module: TaskModule) -> None:
        """Prepare the model for a validation during training, such as by solving its head; nothing by default."""
        return
