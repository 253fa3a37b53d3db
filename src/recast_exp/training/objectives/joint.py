"""Head and task parameters are trained together by gradient descent, as in the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from recast_exp.training.objectives._base import Objective, Step, classify

if TYPE_CHECKING:
    from recast_exp.training.module import TaskModule


@dataclass
class Joint(Objective):
    """The cross-entropy of a batch."""

    def step(self, module: TaskModule, images: Tensor, labels: Tensor, batch_idx: int) -> Step:
        """Classify the images with the head as it is."""
        return classify(module, images, labels)
