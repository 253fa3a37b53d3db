"""Alternating training: at the beginning of each epoch, a head is solved for all training images, and stays as it is.

    W = argmin_W ‖X(θ) W - Y‖² + λ ‖W‖²      once in an epoch, in closed form
    minimise over θ    loss(τ X(θ) W, y)     in the steps of the epoch, without a gradient through W

It is block coordinate descent, and the simplest alternative to training through the solution (`through_head`): θ is
trained on the images that the head has been solved for. docs/results.md sets the two side by side.
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
class Alternating(Objective):
    """The cross-entropy of a batch under the head that the epoch began with."""

    trains: ClassVar[tuple[str, ...]] = ("coefficients", "adapter", "backbone")
    solves_head: ClassVar[bool] = True
    needs_features: ClassVar[bool] = True

    strength: float = option(0.1, "penalty of the ridge regression, of the mean variance of a feature", gt=0)
    scale: float = option(10.0, "factor on the logits", gt=0, le=10_000)

    def before_epoch(self, module: TaskModule) -> None:
        """Solve the head for all training images."""
        solve_head(module, self.strength, self.scale)

    def before_validation(self, module: TaskModule) -> None:
        """Solve it again, for the features as they are by now."""
        solve_head(module, self.strength, self.scale)

    def step(self, module: TaskModule, images: Tensor, labels: Tensor, batch_idx: int) -> Step:
        """Classify the images with the head as it is."""
        return classify(module, images, labels)
