"""Multinomial logistic regression with an L2 penalty, converged by L-BFGS in float64; scikit-learn's.

    minimise ½ ‖W‖² + C Σᵢ loss(xᵢ)      over features that are centred and have a mean variance of 1

The strength is chosen on a log grid, as in the evaluation of DINOv2 (arXiv 2304.07193, appendix B.3; 45 values from
10⁻⁶ to 10⁵ there, of unscaled features).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from recast_exp.config.fields import option
from recast_exp.heads._base import Features, Head, Setting, Solution


@dataclass
class Logistic(Head):
    """Cross-entropy with an L2 penalty, converged."""

    strengths: list[float] = option(
        [float(f"{10 ** (power / 2):.3g}") for power in range(-8, 5)], "inverse penalties C, from small to large", gt=0
    )
    MOST_CLASSES: ClassVar[int] = 1000
    """With more, `best` leaves it out: its time grows with images × classes × iterations."""

    tolerance: float = option(1e-5, "largest gradient at which it has converged", gt=0, lt=1)
    max_iterations: int = option(2000, "iterations of L-BFGS at most", ge=1)

    def settings(self) -> list[Setting]:
        """One inverse penalty each."""
        return [{"C": strength} for strength in self.strengths]

    def solve(self, features: Features, settings: Sequence[Setting]) -> Iterator[Solution]:
        """Solve for one penalty after the other, each from where the one before has ended."""
        from sklearn.linear_model import LogisticRegression

        if features.num_classes == 1:
            zeros = torch.zeros(1, features.width, dtype=torch.float64)
            yield from (Solution(zeros, zeros[:, 0], setting) for setting in settings)
            return
        moments = features.moments
        mean = moments.mean
        scale = (moments.centred_gram().diagonal().mean() / len(features)).clamp(min=0).sqrt().item() or 1.0
        values = np.concatenate([((rows - mean) / scale).numpy() for rows, _ in features.chunks()])
        labels = features.labels.numpy()
        weights = self.image_weights(moments.counts)[features.labels].numpy()
        model = LogisticRegression(tol=self.tolerance, max_iter=self.max_iterations, warm_start=True)
        for setting in settings:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a large C, validation says whether it is good enough
                model.set_params(C=float(setting["C"])).fit(values, labels, sample_weight=weights)
            weight, bias = torch.from_numpy(model.coef_ / scale), torch.from_numpy(np.copy(model.intercept_))
            if len(weight) == 1:  # two classes have one row, of their difference
                weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
            yield Solution(weight, bias - weight @ mean, setting)
