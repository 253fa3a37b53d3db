"""Training through a solved head: in each step, a head is solved for some images and measured on others.

    W(θ) = argmin_W ‖X_s(θ) W - Y_s‖² + λ ‖W‖²        the support images s, in closed form
    minimise over θ    loss(τ X_q(θ) W(θ), y_q)          the query images q, with the gradient through the solution

Coefficients and adapters θ so learn features that a head can be solved on; the head is no longer trained with them.
Bi-level learning with a differentiable solver: Bertinetto et al. (R2-D2, arXiv 1805.08136), which learns λ and τ as is
done here; Lee et al. (MetaOptNet, arXiv 1904.03758). There the episodes are tasks; here they are parts of one task.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recast_exp.config.fields import option
from recast_exp.data.episodes import Episodes
from recast_exp.data.loader import derive_seed
from recast_exp.errors import UserError
from recast_exp.heads import Features
from recast_exp.heads.ridge import leave_one_out, solve_ridge
from recast_exp.models.features import tapped
from recast_exp.training.objectives._base import Objective, Step, solve_head

if TYPE_CHECKING:
    from recast_exp.training.module import TaskModule

SPLITS, LEAVE_ONE_OUT = "splits", "leave_one_out"


class Strength(nn.Module):
    """λ and τ, positive, as their logarithms."""

    def __init__(self, strength: float, scale: float) -> None:
        super().__init__()
        self.log_strength = nn.Parameter(torch.tensor(math.log(strength)))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))


@dataclass
class ThroughHead(Objective):
    """The query images' loss under a ridge regression solved for the support images."""

    trains: ClassVar[tuple[str, ...]] = ("coefficients", "adapter", "backbone")
    solves_head: ClassVar[bool] = True
    needs_features: ClassVar[bool] = True

    images: int = option(128, "images of a step at most; a training set of no more is taken whole", ge=4)
    classes: int = option(16, "classes of an episode at most, where the set is not taken whole", ge=2)
    shots: int | None = option(None, "support images of each class; null is half", ge=1, needs="queries")
    queries: int | None = option(None, "query images of each class; null is half", ge=1, needs="shots")
    measured: str = option(
        SPLITS, "query images: those of random splits, or each image in turn", choices=(SPLITS, LEAVE_ONE_OUT)
    )
    splits: int = option(
        8, "random splits of the images of a step, which share a forward pass", ge=1, le=1000, needs="measured=splits"
    )
    strength: float = option(
        0.1, "first value of the ridge's penalty, of the mean variance of a feature", ge=1e-9, le=1e9
    )
    scale: float = option(10.0, "first value of the factor on the logits", gt=0, le=10_000)
    strength_lr: float = option(1e-2, "learning rate of the logarithms of both", ge=0)

    def episodes(self) -> Episodes:
        """The size of a step."""
        per_class = None if self.shots is None or self.queries is None else self.shots + self.queries
        return Episodes(self.images, self.classes, per_class)

    def check_images(self, counts: NDArray[np.int64]) -> None:
        """Refuse a set of which no class has an image for support and one for query, and steps of a single class."""
        per_class = self.episodes().per_class
        if per_class is not None and self.images < min(2 * per_class, counts.sum()):  # else the set is taken whole
            raise UserError(
                f"training.images: expected at least {2 * per_class}, which two classes have with training.shots + "
                f"training.queries = {per_class}, got {self.images}"
            )
        if counts.max() < 2:
            raise UserError(
                "training: expected joint, or a class with two training images, which through_head solves the head "
                "for and asks for, got one image of each class; add training=joint"
            )

    def state(self) -> Strength:
        """Penalty and scale, which are learnt."""
        return Strength(self.strength, self.scale)

    @property
    def lr(self) -> float:
        """Learning rate of the logarithms of penalty and scale."""
        return self.strength_lr

    def step(self, module: TaskModule, images: Tensor, labels: Tensor, batch_idx: int) -> Step:
        """Solve and measure."""
        with tapped(module.network) as tap:
            module(images)
            features = exact(tap.take())
        state = module.objective_state
        assert isinstance(state, Strength)
        strength, scale = state.log_strength.to(features).exp(), state.log_scale.to(features).exp()
        present, local = torch.unique(labels.to(features.device), return_inverse=True)
        size = len(present)
        with torch.autocast(features.device.type, enabled=False), _solvable(module, features, labels):
            if self.measured == LEAVE_ONE_OUT:
                parts = [(leave_one_out(features, local, size, strength), local)]
            else:
                parts = []
                seed = derive_seed(module.recipe.seed, module.current_epoch, batch_idx, "split")
                for support in supports(local.cpu(), self.splits, self.share, seed):
                    support = support.to(features.device)
                    weight, bias = solve_ridge(features[support], local[support], size, strength)
                    parts.append((features[~support] @ weight.T + bias, local[~support]))
            logits = scale * torch.cat([part for part, _ in parts])
            query = torch.cat([part for _, part in parts])
            loss = module.loss(logits, query, module.recipe.optimizer.label_smoothing)
        every = logits.new_full((len(logits), module.num_classes), -math.inf)
        every[:, present] = logits.detach()
        return Step(loss.float().to(module.device), every.float().to(module.device), present[query].to(module.device))

    @property
    def share(self) -> float:
        """The share of a class's images that are support."""
        if self.shots is None or self.queries is None:
            return 0.5
        return self.shots / (self.shots + self.queries)

    def before_validation(self, module: TaskModule) -> None:
        """Solve the head for all training images, with the penalty and the scale that are learnt by now."""
        state = module.objective_state
        assert isinstance(state, Strength)
        solve_head(module, float(state.log_strength.exp()), float(state.log_scale.exp()))


@contextlib.contextmanager
def _solvable(module: TaskModule, features: Tensor, labels: Tensor) -> Iterator[None]:
    """Within the block, a ridge regression without a solution is that of a training that has diverged."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # its documented place
        if not module.global_step:  # nothing has trained yet
            Features(features.detach(), labels, module.num_classes)  # refuses what is not finite
        raise module.diverged("features, or the penalty of the ridge regression, are NaN or out of range") from error


def exact(features: Tensor) -> Tensor:
    """Features in float64, where it exists: on the CPU for MPS."""
    return features.cpu().double() if features.device.type == "mps" else features.double()


def supports(labels: Tensor, splits: int, share: float, seed: int) -> Iterator[Tensor]:
    """Random masks [N] of support images: the share of each class, but at least one, and not all if it has two.

    Args:
        labels: int64 [N] of classes 0, 1, …, all of which have an image.
        splits: Number of masks.
        share: Share of support images.
        seed: Seed of the masks.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = torch.bincount(labels)
    sizes = (counts * share).round().long().clamp(min=1)
    sizes = torch.where(counts > 1, torch.minimum(sizes, counts - 1), sizes)
    starts = counts.cumsum(0) - counts
    for _ in range(splits):
        order = (labels + torch.rand(len(labels), generator=generator, dtype=torch.float64)).argsort()
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        yield place - starts[labels] < sizes[labels]
