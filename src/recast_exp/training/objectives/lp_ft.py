"""Linear probing, then fine-tuning: joint training that starts with a solved head instead of a random one.

A random head distorts good features in the first steps of training; a head that fits them does not. Kumar et al.,
"Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution" (ICLR 2022, arXiv 2202.10054).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from recast_exp.config.fields import option
from recast_exp.training.objectives._base import Objective, Step, classify, solve_head

if TYPE_CHECKING:
    from recast_exp.training.module import TaskModule


@dataclass
class LinearProbeThenFineTune(Objective):
    """The cross-entropy of a batch; before the first epoch, the head is solved."""

    needs_features: ClassVar[bool] = True

    strength: float = option(0.1, "penalty of the ridge regression, of the mean variance of a feature", gt=0)
    scale: float = option(10.0, "factor on its logits", gt=0, le=10_000)

    def before_epoch(self, module: TaskModule) -> None:
        """Solve the head before the first epoch."""
        if module.current_epoch == 0:
            solve_head(module, self.strength, self.scale)

    def step(self, module: TaskModule, images: Tensor, labels: Tensor, batch_idx: int) -> Step:
        """Classify the images with the head as it is."""
        return classify(module, images, labels)
