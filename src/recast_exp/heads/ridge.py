"""Ridge regression on one-hot targets, in closed form; and the same solve with gradients, for training through it.

    W = (X̃ᵀX̃ + λ t I)⁻¹ X̃ᵀỸ      with centred features X̃ [N, D], centred targets Ỹ [N, C]
                                   and t = tr(X̃ᵀX̃) / D, so that λ means the same for any features

Where there are fewer images than features, X̃ᵀ(X̃X̃ᵀ + λ t I)⁻¹Ỹ is the same and cheaper (the push-through identity);
Bertinetto et al., "Meta-learning with differentiable closed-form solvers" (R2-D2, arXiv 1805.08136), equation 6.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from recast_exp.config.fields import option
from recast_exp.heads._base import Features, Head, Moments, Setting, Solution


@dataclass
class Ridge(Head):
    """Least squares on one-hot targets with an L2 penalty."""

    strengths: list[float] = option(
        [1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0],
        "penalties, of the mean variance of a feature",
        gt=0,
    )

    def settings(self) -> list[Setting]:
        """One penalty each."""
        return [{"strength": strength} for strength in self.strengths]

    def solve(self, features: Features, settings: Sequence[Setting]) -> Iterator[Solution]:
        """Solve from the sums over images; one factorisation serves all penalties."""
        strengths = (float(setting["strength"]) for setting in settings)
        for setting, solution in zip(settings, regressions(self.moments(features), strengths), strict=True):
            yield Solution(solution.weight, solution.bias, setting)


def regressions(moments: Moments, strengths: Iterable[float]) -> Iterator[Solution]:
    """Ridge regression for each penalty, from the sums over images alone; one factorisation serves all."""
    values, vectors = torch.linalg.eigh(moments.centred_gram())
    values = values.clamp(min=0)
    projected = vectors.T @ moments.centred_sums().T
    for strength in strengths:
        penalty = strength * values.mean()
        scaled = projected / (values + penalty).clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        weight = (vectors @ scaled).T
        yield Solution(weight, _priors(moments) - weight @ moments.mean, {"strength": strength})


def _priors(moments: Moments) -> Tensor:
    """[C], share of each class, of weighted images."""
    return moments.counts * moments.weights / moments.total


def solve_ridge(features: Tensor, labels: Tensor, num_classes: int, strength: Tensor | float) -> tuple[Tensor, Tensor]:
    """Solve ridge regression with gradients to features and strength.

    Args:
        features: float64 [N, D].
        labels: int64 [N].
        num_classes: Number C of classes.
        strength: λ, positive.

    Returns:
        Weight [C, D] and bias [C], float64; the targets are 0 and 1.
    """
    targets = F.one_hot(labels, num_classes).to(features)
    mean, share = features.mean(0), targets.mean(0)
    centred, targets = features - mean, targets - share
    few = len(features) < features.shape[1]
    gram = centred @ centred.T if few else centred.T @ centred
    tiny = torch.finfo(features.dtype).tiny
    penalty = strength * (centred.square().sum() / features.shape[1]).clamp(min=tiny)
    factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    if few:
        weight = torch.cholesky_solve(targets, factor).T @ centred
    else:
        weight = torch.cholesky_solve(centred.T @ targets, factor).T
    return weight, share - weight @ mean


def leave_one_out(features: Tensor, labels: Tensor, num_classes: int, strength: Tensor | float) -> Tensor:
    """What ridge regression predicts for each image when it is solved for all others, from one solve.

    With H = X̃(X̃ᵀX̃ + λtI)⁻¹X̃ᵀ + 11ᵀ/N, the prediction without image i is (ŷᵢ - Hᵢᵢ yᵢ) / (1 - Hᵢᵢ). The penalty and the
    mean stay those of all images.

    Args:
        features: float64 [N, D].
        labels: int64 [N].
        num_classes: Number C of classes.
        strength: λ, positive.

    Returns:
        Predictions [N, C].
    """
    targets = F.one_hot(labels, num_classes).to(features)
    centred = features - features.mean(0)
    tiny = torch.finfo(features.dtype).tiny
    penalty = strength * (centred.square().sum() / features.shape[1]).clamp(min=tiny)
    few = len(features) < features.shape[1]
    gram = centred @ centred.T if few else centred.T @ centred
    factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    hat = torch.cholesky_solve(gram, factor) if few else centred @ torch.cholesky_solve(centred.T, factor)
    hat = hat + 1 / len(features)
    own = hat.diagonal()[:, None]
    return (hat @ targets - own * targets) / (1 - own).clamp(min=1e-9)
