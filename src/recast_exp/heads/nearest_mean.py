"""The class with the most similar mean: cosine similarity to the mean of each class's normalised features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F  # noqa: N812

from recast_exp.heads._base import Features, Head, Setting, Solution


@dataclass
class NearestMean(Head):
    """Cosine similarity, after the mean of all features is taken away, or before.

    The length of an image's own feature vector changes no decision, so each class needs a weight and a bias only. It
    knows no share of classes: `class_weight` makes no difference.
    """

    def settings(self) -> list[Setting]:
        """With the mean taken away, and without."""
        return [{"centre": "mean"}, {"centre": "none"}]

    def solve(self, features: Features, settings: Sequence[Setting]) -> Iterator[Solution]:
        """Average the normalised features of each class."""
        for setting in settings:
            centre = features.moments.mean if setting["centre"] == "mean" else torch.zeros(features.width).double()
            sums = torch.zeros(features.num_classes, features.width, dtype=torch.float64)
            for values, labels in features.chunks():
                sums.index_add_(0, labels, F.normalize(values - centre))
            weight = F.normalize(sums)
            yield Solution(weight, -weight @ centre, setting)
