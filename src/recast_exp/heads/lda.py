"""Linear discriminant analysis with a shrunken covariance, in closed form.

    logit_c(x) = xᵀ Σ⁻¹ μ_c - ½ μ_cᵀ Σ⁻¹ μ_c + ln π_c      Σ = (1 - s) S + s tr(S)/D I

with the class means μ_c, the shares π_c of the classes and the covariance S within classes; x and μ_c are measured from
the mean of all images, which changes all logits by the same. `ledoit_wolf` is the s that
minimises the expected error of Σ (Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance
matrices", Lemma 3.2 to 3.5).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recast_exp.config.fields import option
from recast_exp.heads._base import Features, Head, Moments, Setting, Solution

LEDOIT_WOLF = "ledoit_wolf"


@dataclass
class LDA(Head):
    """Gaussian classes that share a covariance."""

    shrinkages: list[float] = option(
        [1e-4, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9], "shrinkages of the covariance", ge=0, le=1
    )
    ledoit_wolf: bool = option(True, "try the shrinkage of Ledoit and Wolf, too")

    def settings(self) -> list[Setting]:
        """One shrinkage each."""
        own: list[Setting] = [{"shrinkage": shrinkage} for shrinkage in self.shrinkages]
        return [*own, {"shrinkage": LEDOIT_WOLF}] if self.ledoit_wolf else own

    def solve(self, features: Features, settings: Sequence[Setting]) -> Iterator[Solution]:
        """Solve from the sums over images; one factorisation serves all shrinkages."""
        moments = self.moments(features)
        wanted = [setting["shrinkage"] for setting in settings]
        numbers = (ledoit_wolf(features, moments) if isinstance(each, str) else float(each) for each in wanted)
        for setting, solution in zip(settings, discriminants(moments, numbers), strict=True):
            yield Solution(solution.weight, solution.bias, setting)


def discriminants(moments: Moments, shrinkages: Iterable[float]) -> Iterator[Solution]:
    """The discriminants for each shrinkage, from the sums over images alone; one factorisation serves all."""
    values, vectors = torch.linalg.eigh(moments.within())
    values = values.clamp(min=0)
    means = moments.centred_means()
    projected = means @ vectors
    # Where each class has a single image, nothing varies within classes, and the nearest mean is all there is to know
    scale = float(moments.centred_gram().trace() / moments.total) / len(values)
    least = max(scale * 1e-10, torch.finfo(torch.float64).tiny ** 0.5)
    priors = (moments.counts * moments.weights / moments.total).log()
    for shrinkage in shrinkages:
        shrunk = (1 - shrinkage) * values + shrinkage * values.mean()
        shrunk = shrunk.clamp(min=max(float(shrunk.max()) * 1e-10, least))
        weight = (projected / shrunk) @ vectors.T
        bias = priors - (weight * means).sum(1) / 2 - weight @ moments.mean
        yield Solution(weight, bias, {"shrinkage": shrinkage})


def ledoit_wolf(features: Features, moments: Moments) -> float:
    """The shrinkage of Ledoit and Wolf for the covariance within classes.

    Args:
        features: The features, which are read once more: their fourth moments are no part of `moments`.
        moments: Their sums.
    """
    within, width = moments.within(), features.width
    size = float(moments.total)
    means = moments.means
    fourth = torch.zeros((), dtype=torch.float64)
    for values, labels in features.chunks():
        squares = (values - means[labels]).square().sum(1).square()
        fourth += (moments.weights[labels] * squares).sum()
    norm: Tensor = within.square().sum()
    variance = norm - within.trace().square() / width  # of the eigenvalues, times D
    if variance <= 0:
        return 1.0
    error = (fourth / size - norm) / size
    return float((error / variance).clamp(0, 1))
