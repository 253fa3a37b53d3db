"""What a training objective is: what a step minimises, which images it takes, and which parameters it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from recast_exp.config.schema import Config
from recast_exp.data.episodes import Episodes
from recast_exp.models.adapted import KINDS

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


@dataclass
class Objective(ABC):
    """An objective. The fields of a subclass are its options.

    Attributes:
        trains: Kinds of parameters that gradient descent trains.
        solves_head: Whether the head has to be one that is solved.
    """

    trains: ClassVar[tuple[str, ...]] = KINDS
    solves_head: ClassVar[bool] = False

    @classmethod
    def problems(cls, settings: Config) -> Iterator[str]:
        """What contradicts this objective in the settings of a job. One line each."""
        return iter(())

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

    def before_validation(self, module: TaskModule) -> None:
        """Prepare the model for a validation during training, such as by solving its head; nothing by default."""
        return
